"""Eq. 1, 4 and 5: the paper's own example, their invariances, and tags that straddle the real tokenizer's tokens."""

import math
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from properties import for_all
from qwen import QWEN, TOKENS, offset_cases
from wrapped import Wrapped, bytewise, wordwise

from advantage import CREDIT, SEGMENTS, TAGS, credit, group_advantages, segment_ids, token_advantages, token_offsets
from config import Config

OTHER, THINK, ANSWER, GLUE = range(4)

# rewards in steps of 0.001, so that a group either has no variance or a clear one
REWARDS = st.lists(st.integers(-3000, 3000), min_size=1, max_size=16).map(lambda row: [k / 1000 for k in row])
SEEDS = st.integers(0, 2**32 - 1)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


BYTEWISE = Wrapped(bytewise())


# --- Eq. 1 and Eq. 4


def test_table_8_of_zoom_zero_to_its_two_decimals():
    r_iou, r_acc = tensor([0.0, 0.5, 0.4, 0.8, 0.2]), tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    rows = group_advantages(torch.stack([r_iou, r_acc, r_iou + r_acc]))
    printed = [[-1.40, 0.44, 0.07, 1.55, -0.66], [0.82, -1.22, 0.82, -1.22, 0.82], [0.06, -1.54, 1.34, -0.58, 0.70]]
    assert [[round(float(x), 2) for x in row] for row in rows] == printed
    # with n - 1 the table does not come out
    assert round(float(group_advantages(r_iou, unbiased=True)[0]), 2) == -1.25


def test_sample_deviation_is_torch_std():
    r = tensor([0.0, 0.5, 0.4, 0.8, 0.2])
    assert torch.allclose(group_advantages(r, unbiased=True), (r - r.mean()) / r.std(), atol=1e-12)
    assert torch.allclose(group_advantages(r), (r - r.mean()) / r.std(correction=0), atol=1e-12)


@for_all(REWARDS, st.booleans())
def test_mean_zero_and_deviation_one_or_all_zero(rewards, unbiased):
    a = group_advantages(tensor(rewards), unbiased)
    if len(set(rewards)) == 1:
        assert torch.equal(a, torch.zeros_like(a))
    else:
        assert abs(float(a.mean())) < 1e-12
        assert float(a.std(correction=int(unbiased))) == pytest.approx(1)


@for_all(REWARDS, st.floats(-100, 100), st.floats(0.1, 100), st.booleans())
def test_shift_and_positive_scale_change_nothing(rewards, shift, scale, unbiased):
    r = tensor(rewards)
    moved = group_advantages(r * scale + shift, unbiased)
    assert torch.allclose(moved, group_advantages(r, unbiased), atol=1e-7)


@for_all(REWARDS, SEEDS)
def test_permuting_the_group_permutes_the_advantages(rewards, seed):
    order = Random(seed).sample(range(len(rewards)), len(rewards))
    r = tensor(rewards)
    assert torch.allclose(group_advantages(r[order]), group_advantages(r)[order], atol=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    "rewards",
    [
        [0.7],
        [0.0, 0.0, 0.0],
        [1.0] * 8,
        [0.3, 0.1 + 0.2, 0.3, 0.3],  # the same but for rounding
        [1e6, 1e6 + 1e-3, 1e6, 1e6],
        [0.0, 1e-17, -1e-17],
    ],
)
def test_groups_without_variance_get_exactly_zero(rewards, unbiased):
    a = group_advantages(tensor(rewards), unbiased)
    assert torch.equal(a, torch.zeros_like(a))
    assert torch.equal(group_advantages(tensor(rewards).float(), unbiased), torch.zeros(len(rewards)))


def test_small_but_real_differences_count():
    assert torch.allclose(group_advantages(tensor([0.5, 0.5001])), tensor([-1.0, 1.0]))
    # the threshold is eps times the largest reward, at least eps
    assert torch.allclose(group_advantages(tensor([0.0, 4e-6])), tensor([-1.0, 1.0]))
    assert torch.allclose(group_advantages(tensor([0.0, 2.1e-6])), tensor([-1.0, 1.0]))
    assert group_advantages(tensor([0.0, 1.9e-6])).tolist() == [0, 0]
    assert group_advantages(tensor([0.0, 4e-6]), eps=1e-5).tolist() == [0, 0]
    assert group_advantages(tensor([-1000.0, -1000.001])).tolist() == [0, 0]
    # each group has its own threshold
    assert group_advantages(tensor([[0.0, 4e-6], [0.0, 1000.0]])).abs().tolist() == [[1, 1], [1, 1]]
    assert group_advantages(tensor([1.0, 1.0]), eps=0.0).tolist() == [0, 0]


def test_groups_in_a_batch_are_independent():
    groups = tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    assert torch.equal(group_advantages(groups), torch.stack([group_advantages(g) for g in groups]))
    assert group_advantages(groups.reshape(3, 1, 3)).shape == (3, 1, 3)
    assert group_advantages(groups.float()).dtype == torch.float32


def test_whole_numbers_are_rewards_too():
    assert torch.allclose(group_advantages(torch.tensor([0, 0, 0, 1])), torch.tensor([-1.0, -1, -1, 3]) / 3**0.5)
    assert torch.equal(group_advantages(torch.tensor([True, False])), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rewards_raise_and_name_the_facet(bad):
    with pytest.raises(ValueError, match="iou: rewards must be finite"):
        group_advantages(tensor([0.0, bad]), facet="iou")
    with pytest.raises(ValueError, match="reward: rewards must be finite"):
        group_advantages(tensor([bad]))


# --- from ids to characters

TEXTS = [
    "<think>red<time>(3.0,8.0)</time></think><answer>B</answer><glue>[(3.0,8.0)]</glue>",
    "<answer>A</answer><glue>[(20.3, 30.8), (283.5, 304.2)]</glue>",
    "<think>猫が跳ぶ 🐈‍⬛ at １２．５</think>\n<answer>A</answer>",
    "e\u0301 naïve 👩‍👩‍👧‍👦 \u00a0 tab\t",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_qwen(text):
    check_offsets(QWEN, QWEN(text).input_ids)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_BYTEWISE(text):
    ids = BYTEWISE(text).input_ids
    assert len(ids) == len(text.encode())
    check_offsets(BYTEWISE, ids)


def check_offsets(tokenizer, ids):
    text, offsets = token_offsets(tokenizer, ids)
    assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(offsets) == len(ids)
    position = 0
    for start, end in offsets:
        assert start == position <= end
        position = end
    assert position == len(text)


def test_offsets_equal_the_real_tokenizers_own():
    for text, ids, offsets in offset_cases():
        assert token_offsets(QWEN, ids, skip_special_tokens=False) == (text, offsets)


def test_a_character_belongs_to_the_token_that_completes_it():
    text, offsets = token_offsets(BYTEWISE, BYTEWISE("a猫b").input_ids)
    assert text == "a猫b"
    assert offsets == [(0, 1), (1, 1), (1, 1), (1, 2), (2, 3)]


def test_a_response_cut_inside_a_character():
    ids = BYTEWISE("a猫").input_ids[:-1]
    text, offsets = token_offsets(BYTEWISE, ids)
    assert text == "a\ufffd" == BYTEWISE.decode(ids)
    assert offsets == [(0, 1), (1, 1), (1, 2)]


def test_special_tokens_are_empty_or_kept():
    ids = QWEN("<answer>B</answer><|im_end|>").input_ids
    text, offsets = token_offsets(QWEN, ids)
    assert text == "<answer>B</answer>" and offsets[-1] == (18, 18)
    text, offsets = token_offsets(QWEN, ids, skip_special_tokens=False)
    assert text == "<answer>B</answer><|im_end|>" and offsets[-1] == (18, 28)


def test_a_special_token_after_half_a_character_wrote_none_of_it():
    """The half is the last thing in the reasoning; the end token is credited with what stands outside."""
    tokenizer = Wrapped(bytewise())
    tokenizer.tokenizer.add_special_tokens(["<|im_end|>"])
    half, end = tokenizer("<think>a猫").input_ids[:-1], tokenizer("<|im_end|>").input_ids
    text, offsets = token_offsets(tokenizer, half + end)
    assert text == tokenizer.decode(half) == "<think>a\ufffd"
    assert offsets[:-1] == token_offsets(tokenizer, half)[1] and offsets[-2:] == [(8, 9), (9, 9)]
    assert token_offsets(tokenizer, half + end + end)[1] == [*offsets, (9, 9)]


@for_all(st.binary(max_size=30))
def test_any_sampled_bytes_have_offsets(ids):
    """Also bytes that are no text: the pieces still join to what the tokenizer decodes."""
    check_offsets(BYTEWISE, list(ids))


def test_any_sampled_ids_of_the_real_tokenizer_have_offsets():
    """Drawn from the whole vocabulary, and from the tokens that are pieces of characters."""
    for ids, text in TOKENS["sampled"]:
        check_offsets(QWEN, ids)
        assert token_offsets(QWEN, ids)[0] == text


def test_a_tokenizer_that_adds_spaces_between_words():
    text, offsets = token_offsets(Wrapped(wordwise()), [0, 4, 1, 2, 5, 6, 3])
    assert text == "<think> red </think> <glue> 3 8 </glue>"
    assert "".join(text[start:end] for start, end in offsets) == text
    assert segment_ids(text, offsets).tolist() == [THINK, THINK, THINK, GLUE, GLUE, GLUE, GLUE]


# --- segments


def marked(tokenizer, text, **options):
    """Segment of each token as (piece, segment)."""
    ids = tokenizer(text).input_ids
    text, offsets = token_offsets(tokenizer, ids, **options)
    segments = segment_ids(text, offsets)
    assert segments.dtype == torch.long and segments.shape == (len(ids),)
    return [(text[start:end], int(s)) for (start, end), s in zip(offsets, segments, strict=True)]


def test_segments_are_those_the_tags_name():
    assert SEGMENTS == ("other", "think", "answer", "glue")
    assert TAGS == {"think": "think", "answer": "answer", "glue": "glue", "timestamp": "glue"}


def test_tags_that_straddle_tokens_of_the_real_tokenizer():
    assert marked(QWEN, "<think>x</think><answer>A</answer><glue>(3, 8)</glue>\n<|im_end|>") == [
        *[(piece, THINK) for piece in ("<th", "ink", ">x", "</", "think")],
        *[(piece, ANSWER) for piece in ("><", "answer", ">A", "</", "answer")],
        *[(piece, GLUE) for piece in ("><", "gl", "ue", ">(", "3", ",", " ", "8", ")</", "gl", "ue", ">\n")],
        ("", OTHER),
    ]
    newlines = marked(QWEN, "<answer>A</answer>\n<glue>[]</glue>")
    assert newlines[5:] == [
        (">\n", ANSWER),
        *[(piece, GLUE) for piece in ("<", "gl", "ue", ">[]", "</", "gl", "ue", ">")],
    ]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("ab", "oo"),  # no tag
        ("<glue>1</glue>b", "g" * 14 + "o"),
        ("a<timestamp>1</timestamp>", "o" + "g" * 24),
        ("<glue>1</glue>-<glue>2</glue>", "g" * 14 + "o" + "g" * 14),  # repeated: both
        ("a<glue>12", "o" + "g" * 8),  # unclosed: to the end
        ("<think>a<answer>B", "t" * 8 + "a" * 9),
        ("<think>a<glue>1</glue>b</think>", "t" * 8 + "g" * 14 + "t" * 9),  # glue wins wherever it is
        ("<glue>1<answer>B</answer>2</glue>", "g" * 33),
        ("<answer>B<think>x</think>C</answer>", "a" * 35),
        ("</glue>a<answer></answer>", "o" * 8 + "a" * 17),
    ],
)
def test_segments_by_character(text, segments):
    assert "".join("otag"[s] for _, s in marked(BYTEWISE, text)) == segments


def test_a_token_belongs_to_glue_if_one_character_does():
    text = "x<answer>B</answer><glue>1</glue>y"  # answer [1, 19), glue [19, 33)
    tokens = {
        (0, 1): OTHER,
        (0, 2): ANSWER,
        (18, 19): ANSWER,
        (18, 20): GLUE,
        (19, 20): GLUE,
        (32, 34): GLUE,
        (33, 34): OTHER,
    }
    assert segment_ids(text, list(tokens)).tolist() == list(tokens.values())
    # empty ranges count as the character that follows; after the end there is none
    assert segment_ids(text, [(0, 0), (1, 1), (19, 19), (33, 33), (34, 34)]).tolist() == [
        OTHER,
        ANSWER,
        GLUE,
        OTHER,
        OTHER,
    ]
    assert segment_ids("<glue>1", [(7, 7)]).tolist() == [OTHER]
    assert segment_ids("", []).shape == (0,) and segment_ids("", []).dtype == torch.long


# --- Eq. 5

SEGMENT_GRID = torch.tensor([[OTHER, THINK, ANSWER, GLUE], [GLUE, GLUE, OTHER, ANSWER]])  # [G, T]
FACETS = {
    "format": tensor([1.0, -1.0]),
    "accuracy": tensor([10.0, -10.0]),
    "zoom": tensor([100.0, -100.0]),
    "iou": tensor([1000.0, -1000.0]),
}


def test_eq_5_by_hand():
    result = token_advantages(FACETS, SEGMENT_GRID, CREDIT["paper"])
    answering, grounding = 111 / 3, 1101 / 3
    assert torch.allclose(result, tensor([[answering] * 3 + [grounding], [-grounding] * 2 + [-answering] * 2]))


def test_printed_eq_5_gives_the_times_that_fix_the_span_no_credit_for_it_and_the_repair_does():
    """Two responses that differ in IoU alone, with the span written in think first and copied into glue."""
    text = "<think>red<time>(3,8)</time></think><answer>B</answer><glue>[(3,8)]</glue>"
    offsets = [(k, k + 1) for k in range(len(text))]
    rewards = {"format": [1.0, 1.0], "zoom": [1.0, 1.0], "accuracy": [1.0, 1.0], "iou": [1.0, 0.0]}
    response = SimpleNamespace(text=text, offsets=offsets)
    group = SimpleNamespace(rewards=rewards, responses=[response] * 2, view=None)
    found = {}
    for name in (*CREDIT, "time"):
        better, worse = credit(group, Config(tokenadv=name))
        assert torch.equal(better, -worse)
        found[name] = {
            "time": better[text.index("<time>") : text.index("</think>")],
            "red": better[text.index("red") : text.index("<time>")],
            "answer": better[text.index("<answer>") : text.index("<glue>")],
            "glue": better[text.index("<glue>") :],
        }
    credited = {name: {part: bool(values.any()) for part, values in parts.items()} for name, parts in found.items()}
    assert credited["paper"] == {"time": False, "red": False, "answer": False, "glue": True}
    assert credited["time"] == {"time": True, "red": False, "answer": False, "glue": True}
    assert credited["code"] == {"time": True, "red": True, "answer": False, "glue": True}
    assert credited["off"] == {"time": True, "red": True, "answer": True, "glue": True}
    assert torch.allclose(found["time"]["time"], torch.tensor(1 / 3)) and torch.equal(
        found["time"]["glue"], found["paper"]["glue"]
    )


def test_released_table_by_hand():
    result = token_advantages(FACETS, SEGMENT_GRID, CREDIT["code"])
    everything, answering, grounding = 1111 / 3, 111 / 3, 1101 / 3
    expected = [[everything] * 2 + [answering, grounding], [-grounding] * 2 + [-everything, -answering]]
    assert torch.allclose(result, tensor(expected))


def test_without_credit_assignment_all_tokens_get_the_mean():
    result = token_advantages(FACETS, SEGMENT_GRID, CREDIT["off"])
    assert torch.allclose(result, tensor([[1111 / 4] * 4, [-1111 / 4] * 4]))


def test_a_facet_that_does_not_apply_takes_no_part():
    without = {name: values for name, values in FACETS.items() if name != "accuracy"}
    result = token_advantages(without, SEGMENT_GRID[:, :4], CREDIT["paper"])
    assert torch.allclose(result[0], tensor([101 / 2] * 3 + [1101 / 3]))
    # the released table's weights sum to 4/3, also over the three facets that are left
    result = token_advantages(without, SEGMENT_GRID, CREDIT["code"])
    assert torch.allclose(result[0], tensor([1101 / 3 * 4 / 3] * 2 + [101 / 2, 1101 / 3]))


@for_all(REWARDS)
def test_with_one_facet_token_advantages_are_eq_1(rewards):
    a = group_advantages(tensor(rewards))  # [G]
    segments = torch.arange(4).repeat(len(rewards), 1)  # [G, 4]
    for name in ("paper", "code", "off"):
        result = token_advantages({"format": a}, segments, CREDIT[name])
        total = {segment: sum(CREDIT[name][segment].values()) if CREDIT[name] else 1 for segment in SEGMENTS}
        assert torch.allclose(result, a[:, None] * tensor(list(total.values())))
        if name != "code":
            assert torch.allclose(result, a[:, None].expand(-1, 4))


@for_all(st.integers(1, 16), SEEDS)
def test_permuting_responses_permutes_token_advantages(size, seed):
    random = Random(seed)
    order = random.sample(range(size), size)
    facets = {name: tensor([random.gauss(0, 1) for _ in order]) for name in FACETS}
    segments = torch.tensor([[random.randrange(4) for _ in range(6)] for _ in order])
    permuted = token_advantages({name: a[order] for name, a in facets.items()}, segments[order], CREDIT["paper"])
    assert torch.equal(permuted, token_advantages(facets, segments, CREDIT["paper"])[order])


def test_a_segment_without_any_of_its_facets_is_refused():
    with pytest.raises(
        ValueError, match=r"segment 'other' is credited with .*'accuracy'.* but only \['iou'\] are given"
    ):
        token_advantages({"iou": FACETS["iou"]}, SEGMENT_GRID, CREDIT["paper"])


@pytest.mark.parametrize("credit", ["paper", "code"])
def test_a_facet_that_no_segment_is_credited_with_is_refused(credit):
    with pytest.raises(ValueError, match=r"no segment is credited with \['acc'\], only with \['accuracy', 'format', "):
        token_advantages({"format": FACETS["format"], "acc": FACETS["accuracy"]}, SEGMENT_GRID, CREDIT[credit])


def test_credit_tables_name_all_segments_and_the_papers_sum_to_one():
    for name in ("paper", "code"):
        assert tuple(CREDIT[name]) == SEGMENTS
    assert all(sum(weights.values()) == pytest.approx(1) for weights in CREDIT["paper"].values())

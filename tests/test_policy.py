"""Prompts, positions, and prompts shared by their groups, each against an independent computation."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import drop_video_token, drop_weights, loud_model
from passes import CLIP, change_family, group_logp, random_video, separate_logp
from qwen import QWEN
from transformers import Qwen2_5_VLForConditionalGeneration

from engine.attention import Tree
from engine.loading import load
from engine.qwen2_5_vl import encode_clips
from policy import (
    ModelError,
    Policy,
    Prompt,
    Video,
    Vocabulary,
    build_prompt,
    embed_prompts,
    group_hidden,
    keep_tokens,
    last_hidden,
    mrope_positions,
    row_hidden,
)
from world import tiny

# ---------------------------------------------------------------- positions


def test_positions_of_text_video_text():
    # 2 tokens of text, 2 temporal grids of 1x2 tokens, 2 s per grid at 2 positions per second, 1 token of text
    positions, following = mrope_positions([2, (2, 1, 2, 2.0), 1], 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 6, 6, 7],
        [0, 1, 2, 2, 2, 2, 7],
        [0, 1, 2, 3, 2, 3, 7],
    ]
    assert following == 8


def test_text_continues_after_the_largest_position_of_any_axis():
    positions, following = mrope_positions([(1, 2, 5, 1.0), 2], 2)
    assert positions[:, -2:].tolist() == [[5, 6]] * 3 and following == 7
    _, following = mrope_positions([3, (4, 2, 2, 2.0)], 2)
    assert following == 3 + 12 + 1


def test_several_videos_each_start_after_the_other():
    segments = [1, (2, 2, 1, 1.0), 1, (1, 1, 1, 1.0)]
    positions, following = mrope_positions(segments, 2)
    assert positions.tolist() == [
        [0, 1, 1, 3, 3, 4, 5],
        [0, 1, 2, 1, 2, 4, 5],
        [0, 1, 1, 1, 1, 4, 5],
    ]
    assert following == 6


def test_positions_can_start_anywhere_and_be_empty():
    assert mrope_positions([2], 2, start=5)[0].tolist() == [[5, 6]] * 3
    positions, following = mrope_positions([], 2)
    assert positions.shape == (3, 0) and following == 0


@pytest.mark.parametrize("fps", ["1/10", "1/3", "1/2", "1", "3/2", "2", "3", "4", "6", "7", "8", "24000/1001"])
@pytest.mark.parametrize("tokens_per_second", [2, 4])
def test_time_is_the_exact_floor(fps, tokens_per_second):
    per_grid = 2 / Fraction(fps)  # seconds
    positions, _ = mrope_positions([(300, 1, 1, float(per_grid))], tokens_per_second)
    assert positions[0].tolist() == [int(k * tokens_per_second * per_grid) for k in range(300)]


@pytest.mark.parametrize("fps", [0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 3, 4])
def test_time_increases_strictly(fps):
    """Up to 4 frames per second, at the released models' 2 positions per second; beyond it grids share positions."""
    positions, _ = mrope_positions([(200, 1, 1, 2 / fps)], 2)
    assert (positions[0].diff() > 0).all()


@pytest.mark.parametrize("fps", [5, 8])
def test_time_never_falls_at_high_rates(fps):
    positions, _ = mrope_positions([(200, 1, 1, 2 / fps)], 2)
    assert (positions[0].diff() >= 0).all() and positions[0, -1] == int(199 * 4 / fps + 1e-6)


def test_a_prompt_expands_every_clip(vocabulary, model64):
    a, b = random_video(0, 4, 56, 28), random_video(1, 3, 28, 84, step=0.5)
    prompt = build_prompt(vocabulary.ids(f"{CLIP} red{CLIP}"), [a, b], model64.config)
    pad = model64.config.video_token_id
    assert (prompt.ids == pad).sum() == a.n_tokens + b.n_tokens == 2 * 2 + 2 * 3
    runs = (prompt.ids == pad).int().diff().abs().sum()
    assert runs == 4 and len(prompt) == prompt.positions.shape[1]
    assert prompt.positions[0, prompt.ids == pad].tolist() == [1, 1, 5, 5, 9, 9, 9, 11, 11, 11]
    assert prompt.next_position == prompt.positions[0, -1] + 1


def test_a_prompt_with_the_wrong_number_of_clips_is_refused(vocabulary, model64):
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> for 0 clips"):
        build_prompt(vocabulary.ids(CLIP), [], model64.config)


# ---------------------------------------------------------------- the prompt shared by its group


def test_a_clip_that_prompts_share_is_encoded_once(vocabulary, model64, monkeypatch):
    encoded = []
    change_family(
        monkeypatch,
        model64,
        encode_clips=lambda tower, patches, grids: encoded.append(grids) or encode_clips(tower, patches, grids),
    )
    shared, other = random_video(0, 2, 56, 56), random_video(1, 4, 28, 56)
    clips = [[shared], [other], [shared]]
    prompts = [
        build_prompt(vocabulary.ids(f"{CLIP} {c}"), v, model64.config) for c, v in zip("abc", clips, strict=True)
    ]
    together = last_hidden(model64, prompts)
    assert encoded == [[shared.grid, other.grid]]
    for prompt, row in zip(prompts, together, strict=True):
        torch.testing.assert_close(last_hidden(model64, [prompt])[0], row, atol=1e-4, rtol=1e-4)


def test_group_equals_separate_passes(model64, scene):
    """Log-probabilities and all gradients, the vision tower's included, are those of one pass per response."""
    prompts, ids, mask = scene
    weight = torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)

    shared, apart = copy.deepcopy(model64), copy.deepcopy(model64)
    logp = group_logp(shared, prompts, ids, mask)
    (logp * weight).sum().backward()
    alone = torch.cat(
        [separate_logp(apart, prompts[b], ids[b, g][mask[b, g]]) for b in range(2) for g in range(ids.shape[1])]
    )
    (alone * weight).sum().backward()

    torch.testing.assert_close(logp, alone, atol=1e-4, rtol=1e-5)  # rotary angles are float32
    for (name, p), q in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        difference = (p.grad - q.grad).abs().max() / q.grad.abs().max()
        assert difference < 1e-4, (name, difference)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_group_equals_groups_of_one(model64, scene, exact_norm, dtype, bound):
    """The same, with our own pass for each response alone: equal to rounding."""
    prompts, ids, mask = scene
    weight = torch.linspace(-1, 1, int(mask.sum()), dtype=dtype)
    shared, apart = copy.deepcopy(model64).to(dtype), copy.deepcopy(model64).to(dtype)
    logp = group_logp(shared, prompts, ids, mask)
    (logp * weight).sum().backward()
    pairs = [(b, g) for b in range(2) for g in range(3)]
    alone = torch.cat(
        [group_logp(apart, [prompts[b]], ids[None, None, b, g], mask[None, None, b, g]) for b, g in pairs]
    )
    (alone * weight).sum().backward()
    torch.testing.assert_close(logp, alone, atol=bound, rtol=bound)  # log-probabilities go down to -24 here
    for p, q in zip(shared.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=bound * float(q.grad.abs().max()), rtol=0)


def test_attention_matters_in_these_tests(model64, scene):
    """The power of the tests here: without the clip, or with another first token, log-probabilities change a lot."""
    prompts, ids, mask = scene
    logp = group_logp(model64, prompts, ids, mask)
    other = [
        build_prompt_like(
            prompt, [random_video(9, 2 * v.grid[0], v.grid[1] * 14, v.grid[2] * 14) for v in prompt.videos]
        )
        for prompt in prompts
    ]
    assert (group_logp(model64, other, ids, mask) - logp).abs().mean() > 0.05


def build_prompt_like(prompt: Prompt, videos: list[Video]) -> Prompt:
    return Prompt(prompt.ids, prompt.positions, videos, prompt.next_position)


def test_a_token_changes_only_what_follows_it_in_its_own_response(model64, scene):
    prompts, ids, mask = scene
    before = group_hidden(model64, prompts, ids, mask)
    changed = ids.clone()
    changed[0, 2, 3] = (ids[0, 2, 3] - 8 + 1) % 100 + 8
    assert changed[0, 2, 3] != ids[0, 2, 3]
    moved = (group_hidden(model64, prompts, changed, mask) - before).abs().amax(-1) > 0  # [N]
    expected = torch.zeros_like(mask)
    expected[0, 2, 4:] = True  # entry t is the state before token t
    assert torch.equal(moved, expected[mask])


def test_padding_has_no_influence(model64, scene):
    prompts, ids, mask = scene
    before = group_hidden(model64, prompts, ids, mask)
    padded = torch.where(mask, ids, torch.randint_like(ids, 8, 100))
    assert torch.equal(group_hidden(model64, prompts, padded, mask), before)
    wider = torch.nn.functional.pad(ids, (0, 3), value=11), torch.nn.functional.pad(mask, (0, 3))
    assert torch.equal(group_hidden(model64, prompts, *wider), before)


def test_an_empty_response_among_the_group_does_no_harm(model64, scene):
    prompts, ids, mask = scene
    emptied = mask.clone()
    emptied[0, 1] = False
    hidden = group_hidden(model64, prompts, ids, emptied)
    whole = group_hidden(model64, prompts, ids, mask)
    torch.testing.assert_close(hidden, whole[emptied[mask]], atol=1e-9, rtol=0)


def test_checkpointing_changes_no_gradient(model64, scene):
    prompts, ids, mask = scene
    plain, checkpointed = copy.deepcopy(model64).train(), copy.deepcopy(model64).train()
    Policy(checkpointed).checkpoint_activations()
    for model in (plain, checkpointed):
        group_logp(model, prompts, ids, mask).sum().backward()
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-12, rtol=1e-12)


def test_the_policy_gives_the_objective_its_real_tokens(model64, scene):
    prompts, ids, mask = scene
    hidden, head = Policy(model64)(prompts, ids, mask, lambda *given: given)
    assert torch.equal(hidden, group_hidden(model64, prompts, ids, mask)) and head is model64.lm_head.weight


def test_kept_tokens_are_used_and_change_nothing(model64, scene, monkeypatch):
    prompts, ids, mask = scene
    before = group_hidden(model64, prompts, ids, mask)
    keep_tokens(model64, [video for prompt in prompts for video in prompt.videos])
    change_family(monkeypatch, model64, encode_clips=None)  # not called again
    torch.testing.assert_close(group_hidden(model64, prompts, ids, mask), before, atol=1e-9, rtol=0)


def test_last_hidden_is_that_of_each_prompt_alone(model64, scene):
    prompts, _, _ = scene
    together = last_hidden(model64, prompts)
    for prompt, row in zip(prompts, together, strict=True):
        alone = row_hidden(model64, *embed_prompts(model64, [prompt]), Tree((1,), ((len(prompt) - 1,),)))
        torch.testing.assert_close(alone[-1], row, atol=1e-9, rtol=0)


# ---------------------------------------------------------------- vocabulary and checkpoints


def check_forced_letter(vocabulary: Vocabulary, chat: str):
    tokenizer = vocabulary.tokenizer
    ids, letters = vocabulary.forced_letter(chat, 5)
    assert len(set(letters)) == 5
    for letter, token in zip("ABCDE", letters, strict=True):
        assert tokenizer.decode([*ids, token]) == f"{chat}<answer>{letter}"
        assert tokenizer(f"{chat}<answer>{letter}")["input_ids"] == [*ids, token]


def test_forced_letter_with_the_tiny_tokenizer(vocabulary):
    check_forced_letter(vocabulary, f"<|im_start|>user\n{CLIP}red<|im_end|>\n<|im_start|>assistant\n")


def test_forced_letter_with_the_released_tokenizer():
    vocabulary = Vocabulary.of(QWEN)
    check_forced_letter(vocabulary, f"<|im_start|>user\n{CLIP}Which (A) x?<|im_end|>\n<|im_start|>assistant\n")
    _, letters = vocabulary.forced_letter("<|im_start|>assistant\n", 4)
    assert QWEN.convert_ids_to_tokens(letters) == [">A", ">B", ">C", ">D"]  # letters fuse with the tag


def test_more_letters_than_single_tokens_is_an_error(vocabulary):
    class Spelling:
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [ord(c) for c in text.replace("B", "BB")]}

    with pytest.raises(ValueError, match="one token"):
        Vocabulary(Spelling(), (), ()).forced_letter("x", 2)


def test_a_foreign_tokenizer_is_refused():
    class Other:
        def get_vocab(self):
            return {"<|im_end|>": 0, "a": 1}

    with pytest.raises(ModelError, match=r"no <\|endoftext\|>, <\|im_start\|>"):
        Vocabulary.of(Other())


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"^model /gone/nowhere: there is no such folder, and names on the hub are "):
        load("/gone/nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        load(str(tmp_path / "nowhere"))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ModelError, match=r"qwen2.*qwen2_5_vl"):
        load(str(tmp_path))


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def change_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= changes.pop("text_config", {})
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(drop_weights, part="visual."), "a checkpoint without vision weights, .*: it lacks 30 weights: "),
        (partial(drop_weights, part="layers.1.mlp.up"), "an incomplete checkpoint: it lacks 1 weights: .*up_proj"),
        (truncate_weights, "the weights cannot be read"),
        (drop_video_token, r"not a Qwen2.5-VL tokenizer: it has no <\|video_pad\|>"),
        (partial(change_config, video_token_id=1), r"do not belong together: <\|video_pad\|> is \d+ for one and 1 for"),
        (partial(change_config, text_config={"vocab_size": 90}), "do not belong together: .* tokens for 90 embeddings"),
        (partial(change_config, text_config={"intermediate_size": 7}), "size mismatch|mismatched"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_checkpoints_that_are_refused(talker, tmp_path, change, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(talker, folder)
    change(folder)
    with pytest.raises(ModelError, match=f"^model {folder}: .*{message}"):
        load(str(folder))


def test_the_tokenizer_is_checked_before_the_weights_are_read(talker, tmp_path, monkeypatch):
    shutil.copytree(talker, tmp_path / "checkpoint")
    drop_video_token(tmp_path / "checkpoint")
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="tokenizer"):
        load(str(tmp_path / "checkpoint"))


def test_a_saved_model_loads_silently_with_the_same_logits(tmp_path, tokenizer, vocabulary, caplog):
    model = loud_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, words = load(str(tmp_path))
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    prompt = build_prompt(vocabulary.ids(f"{CLIP} red"), [random_video(0, 2, 56, 56)], model.config)
    # Twice: a product of a single row may round otherwise where the weights lie elsewhere in memory.
    torch.testing.assert_close(last_hidden(loaded, [prompt] * 2), last_hidden(model, [prompt] * 2), atol=0, rtol=0)
    torch.testing.assert_close(last_hidden(loaded, [prompt]), last_hidden(model, [prompt]), atol=1e-5, rtol=0)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert isinstance(loaded, Qwen2_5_VLForConditionalGeneration) and tiny.SPECIAL_TOKENS[0] in words.get_vocab()

"""Positions, vision, shared prompts and sampling, each against an independent computation."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import drop_video_token, drop_weights, loud_model
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from attention import Tree
from policy import (
    BANNED_TOKENS,
    Episodes,
    ModelError,
    Observation,
    Pace,
    Policy,
    Prompt,
    Video,
    Vocabulary,
    _language_model,
    build_prompt,
    choose_tokens,
    embed_prompts,
    encode_clips,
    group_hidden,
    keep_tokens,
    last_hidden,
    load,
    mrope_positions,
    sample,
    stops_at,
    stream_layers,
    window_layout,
)
from video import normalise_patches
from world import tiny

REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"


def random_video(seed: int, frames: int, height: int, width: int, step: float = 1.0) -> Video:
    generator = torch.Generator().manual_seed(seed)
    return Video.from_frames(
        torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8), step
    )


def random_responses(seed: int, lengths: list[list[int]], n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, G, T] of ordinary tokens, padded with other random ids, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    T = max(max(row) for row in lengths)
    ids = torch.randint(8, n_tokens, (len(lengths), len(lengths[0]), T), generator=generator)
    mask = torch.arange(T) < torch.tensor(lengths)[..., None]
    return ids, mask


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


# ---------------------------------------------------------------- vision


@pytest.mark.parametrize(
    "sizes",
    [
        [(4, 112, 112)],  # whole windows only
        [(2, 28, 28)],  # one token per frame
        [(6, 140, 84)],  # windows cut at the right and at the bottom
        [(2, 252, 56), (4, 84, 196), (2, 140, 84)],  # several clips
    ],
)
def test_visual_tokens_equal_those_of_transformers(model64, sizes):
    videos = [random_video(i, *size) for i, size in enumerate(sizes)]
    patches = normalise_patches(torch.cat([video.patches for video in videos])).double()
    grids = [video.grid for video in videos]
    ours = encode_clips(model64.model.visual, patches, grids)
    theirs = model64.model.visual(patches, grid_thw=torch.tensor(grids))
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    assert ours.shape == theirs.shape
    # rotary angles are float32 on both sides
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_window_attention_has_an_effect(model64):
    """The power of the test above: one large window instead of several gives other tokens."""
    video = random_video(0, 2, 140, 84)
    patches = normalise_patches(video.patches).double()
    tower = copy.deepcopy(model64.model.visual)
    before = encode_clips(tower, patches, [video.grid])
    tower.config.window_size = 280
    assert (encode_clips(tower, patches, [video.grid]) - before).abs().max() > 0.1


def test_any_split_into_clips_gives_the_same_tokens(model64):
    video = random_video(0, 8, 140, 84)
    patches, (t, h, w) = normalise_patches(video.patches).double(), video.grid
    whole = encode_clips(model64.model.visual, patches, [(t, h, w)])
    for parts in ([1, 3], [2, 2], [1, 1, 1, 1]):
        split = encode_clips(model64.model.visual, patches, [(n, h, w) for n in parts])
        torch.testing.assert_close(split, whole, atol=1e-12, rtol=0)
        pieces = patches.split([n * h * w for n in parts])
        apart = [encode_clips(model64.model.visual, piece, [(n, h, w)]) for piece, n in zip(pieces, parts, strict=True)]
        torch.testing.assert_close(torch.cat(apart), whole, atol=1e-12, rtol=0)


def test_every_patch_is_in_exactly_one_window():
    layout = window_layout([(2, 10, 6), (1, 2, 18)], 4)
    assert layout.order.sort().values.tolist() == list(range(2 * 60 + 36))
    assert sum(n * length for n, length in layout.groups) == len(layout.order)


def test_a_clip_that_prompts_share_is_encoded_once(vocabulary, model64, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        "policy.encode_clips",
        lambda tower, patches, grids: encoded.append(grids) or encode_clips(tower, patches, grids),
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


# ---------------------------------------------------------------- the prompt shared by its group


@pytest.fixture
def scene(vocabulary, model64):
    """Two prompts of different length with clips, and three responses of different lengths each."""
    prompts = [
        build_prompt(vocabulary.ids(f"{CLIP} red <think>"), [random_video(0, 4, 56, 84)], model64.config),
        build_prompt(vocabulary.ids(f"a b c {CLIP} blue"), [random_video(1, 2, 28, 56)], model64.config),
    ]
    ids, mask = random_responses(2, [[5, 1, 7], [3, 7, 2]], len(vocabulary.tokenizer))
    return prompts, ids, mask


@pytest.fixture
def exact_norm(monkeypatch):
    """transformers computes this norm in float32 whatever the type, which rounds states and gradients too."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", norm)


def separate_logp(model, prompt: Prompt, response: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities of one response by a plain causal pass of transformers' own model, with our positions: [T].

    `after`: positions [3, T] of a response that is not plain text.
    """
    ids = torch.cat([prompt.ids, response])[None]
    if after is None:
        after = (torch.arange(len(response)) + prompt.next_position).expand(3, -1)
    positions = torch.cat([prompt.positions, after], dim=1)[:, None]
    patches = normalise_patches(torch.cat([video.patches for video in prompt.videos])).double()
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([video.grid for video in prompt.videos]),
        use_cache=False,
    ).logits[0]
    predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return predicted.gather(-1, response[:, None])[:, 0]


def group_logp(model, prompts, ids, mask) -> torch.Tensor:
    """Log-probabilities of all real tokens: [N]."""
    hidden = group_hidden(model, prompts, ids, mask)
    return model.lm_head(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]


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


def test_streamed_layers_are_there_one_at_a_time(model64, scene):
    prompts, responses, mask = scene
    model = copy.deepcopy(model64).requires_grad_(False)
    expected = group_hidden(model, prompts, responses, mask)
    stream_layers(model)
    layers = model.model.language_model.layers
    home = [[weight.data_ptr() for weight in layer.parameters()] for layer in layers]

    def away(module, *_) -> None:
        at_work.append([[w.data_ptr() for w in layer.parameters()] != h for layer, h in zip(layers, home, strict=True)])

    at_work: list[list[bool]] = []
    for layer in layers:
        layer.mlp.register_forward_hook(away)
    for _ in range(2):
        assert torch.equal(group_hidden(model, prompts, responses, mask), expected)
    assert at_work == 2 * [[i == k for i in range(len(layers))] for k in range(len(layers))]
    assert [[weight.data_ptr() for weight in layer.parameters()] for layer in layers] == home


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


# ---------------------------------------------------------------- sampling


def decode(model, vocabulary, prompts, G=3, T=24, temperature=1.0, seeds=True):
    rows = [[100 * b + g for g in range(G)] for b in range(len(prompts))] if seeds else None
    return sample(model, prompts, G, T, ends(vocabulary), vocabulary.banned, temperature, rows)


def ends(vocabulary) -> tuple[int, ...]:
    """One token in twelve ends a response, so that these have different lengths."""
    return (*vocabulary.eos, *range(20, len(vocabulary.tokenizer), 12))


def test_decoding_agrees_with_a_full_pass(model64, vocabulary, scene):
    """Greedy tokens are the most probable ones of `group_hidden`: cache, positions and masks of the two paths agree."""
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts, G=2, seeds=False)
    logits = model64.lm_head(group_hidden(model64, prompts, ids, mask))
    logits[:, list(vocabulary.banned)] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[mask])
    assert torch.equal(ids[:, 0], ids[:, 1])


def test_sampled_tokens_follow_the_distribution_of_a_full_pass(model64, vocabulary, scene):
    """With the same random numbers, inverting the distributions of `group_hidden` gives the sampled tokens again."""
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts, temperature=1.3)
    logits = model64.lm_head(group_hidden(model64, prompts, ids, mask))
    draws = [[torch.rand(24, generator=torch.Generator().manual_seed(100 * b + g)) for g in range(3)] for b in range(2)]
    uniform = torch.stack([torch.stack(row) for row in draws])[..., : ids.shape[2]].double()
    again = choose_tokens(logits, uniform[mask], 1.3, torch.tensor(vocabulary.banned))
    assert torch.equal(again, ids[mask])


@pytest.mark.parametrize("pace", [Pace(16, 64, False), Pace(3, 4, False), Pace(5, 1, False)])
@pytest.mark.parametrize("stops", [False, True])
def test_the_pace_changes_nothing(model64, vocabulary, scene, monkeypatch, exact_norm, pace, stops):
    """As on a GPU, but for the capture: rounded windows, looked at from time to time, a stop string seen too late."""
    prompts, _, _ = scene
    stop = stops_at(vocabulary.tokenizer, ["e", "1"]) if stops else None
    seeds = [[100 * b + g for g in range(3)] for b in range(2)]

    def run():
        states: list[torch.Tensor] = []
        eos, banned = ends(vocabulary), vocabulary.banned
        ids, mask = sample(model64, prompts, 3, 24, eos, banned, 1.0, seeds, stop, states)
        return ids, mask, torch.stack(states, dim=2)

    ids, mask, states = run()
    assert mask.sum(-1).unique().numel() > 2
    monkeypatch.setattr("policy.decoding_pace", lambda _: pace)
    again = run()
    assert torch.equal(again[0], ids) and torch.equal(again[1], mask)
    torch.testing.assert_close(again[2][mask], states[mask], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(states[mask], group_hidden(model64, prompts, ids, mask), atol=1e-9, rtol=1e-9)


def test_a_step_asks_nothing_of_the_host(tokenizer, vocabulary, scene):
    """With tensors that have a shape but no data, what needs a value on the host, has a shape that depends on one, or
    takes a tensor from the host raises: none of it could be captured.
    """
    eos, banned = ends(vocabulary), vocabulary.banned
    seed = partial(max, 7)
    episodes = Episodes(loud_model(tokenizer), scene[0], 3, 24, eos, banned, 1.0, seed, keep_hidden=True)

    def empty(x):
        if isinstance(x, list):
            return [empty(y) for y in x]
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    for place in (episodes, episodes.cache):
        vars(place).update({name: empty(x) for name, x in vars(place).items()})
    episodes.cache.layers = {layer: empty(tensors) for layer, tensors in episodes.cache.layers.items()}
    episodes.model.to("meta")
    with torch.no_grad():
        episodes._step(8)
    with pytest.raises(RuntimeError, match="meta"):  # the power of this test
        int(episodes.count[0])
    with pytest.raises(RuntimeError, match="meta"):
        episodes.ids[0] + torch.arange(24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are captured on one only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_steps_are_the_eager_ones(model64, vocabulary, scene, monkeypatch, dtype, autocast):
    prompts, _, _ = scene
    model = copy.deepcopy(model64).to("cuda", torch.float32 if autocast else dtype)
    found = []
    for pace in (Pace(16, 64, False), Pace(16, 64, True), Pace(4, 8, True)):
        monkeypatch.setattr("policy.decoding_pace", lambda _, pace=pace: pace)
        with torch.autocast("cuda", dtype, enabled=autocast):
            found.append([x.cpu() for x in decode(model, vocabulary, prompts, T=40)])
    for ids, mask in found[1:]:
        assert torch.equal(ids, found[0][0]) and torch.equal(mask, found[0][1])


# ---------------------------------------------------------------- episodes of several turns


@dataclass
class Episode:
    """What one row said and was shown."""

    turns: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    when: list[int] = field(default_factory=list)  # how many turns of any row had ended before each of its own


def shown_to(name: int, number: int, vocabulary, clips) -> tuple[list[int], list[Video]] | None:
    """What an environment answers to a turn of the row of this name: nothing, text, a clip, or two with their times."""
    words = [None, "not in the video", f"1.0{CLIP} go on", f"1.0{CLIP}2.0{CLIP} go on"][(name + 2 * number) % 4]
    if number == 3 or words is None:
        return None
    return vocabulary.ids(words), clips[: words.count(CLIP)]


CLIPS = [random_video(5, 4, 56, 28, 0.5), random_video(6, 2, 28, 84, 2.0)]


def play(model, vocabulary, prompts, names, max_tokens=12) -> list[Episode]:
    """Episodes of up to four turns; the rows' names [B][G] decide their seeds and what they are shown."""
    flat = [name for row in names for name in row]
    episodes = Episodes(
        model,
        prompts,
        len(names[0]),
        max_tokens,
        ends(vocabulary),
        vocabulary.banned,
        seed=lambda row, number: 10 * flat[row] + number,
        stop=stops_at(vocabulary.tokenizer, ["9"]),
        keep_hidden=True,
    )
    record, ended = [Episode() for _ in flat], itertools.count()
    while turns := episodes.sample():
        shown = {}
        for turn in turns:
            assert turn.number == len(record[turn.row].turns)
            record[turn.row].turns.append(turn.ids)
            record[turn.row].hidden.append(turn.hidden)
            record[turn.row].when.append(next(ended))
            answer = shown_to(flat[turn.row], turn.number, vocabulary, CLIPS)
            if answer is not None:
                shown[turn.row] = answer
        for row, observation in episodes.observe(shown).items():
            record[row].observations.append(observation)
    return record


NAMES = [[0, 1, 2], [5, 7, 6]]


def as_group(record: list[Episode], batch: int):
    """Ids [B, G, T], mask and observations [B][G] of episodes."""
    rows = [torch.cat(episode.turns) for episode in record]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    size = len(record) // batch
    observations = [[episode.observations for episode in record[b * size : (b + 1) * size]] for b in range(batch)]
    return ids.view(batch, size, -1), mask.view(batch, size, -1), observations


def whole(prompt: Prompt, episode: Episode, config) -> tuple[Prompt, torch.Tensor]:
    """A prompt and an episode as one prompt, built anew from its ids and clips, and what of it was sampled."""
    parts, videos = [(prompt.ids, False)], list(prompt.videos)
    for turn, observation in itertools.zip_longest(episode.turns, episode.observations):
        parts.append((turn, True))
        if observation is not None:
            parts.append((observation.prompt.ids, False))
            videos += observation.prompt.videos
    ids = torch.cat([ids for ids, _ in parts])
    sampled = torch.cat([torch.full(ids.shape, said) for ids, said in parts])
    first = (ids != config.video_token_id) | (ids.roll(1) != config.video_token_id)  # one <|video_pad|> per clip
    return build_prompt(ids[first].tolist(), videos, config), sampled


@pytest.fixture
def played(model64, vocabulary, scene, exact_norm):
    return play(model64, vocabulary, scene[0], NAMES)


def test_episodes_of_one_batch_are_at_different_turns(played):
    assert [len(episode.turns) for episode in played] == [1, 4, 2, 4, 4, 2]
    assert min(episode.when[1] for episode in played[1:]) < max(episode.when[0] for episode in played)


@pytest.mark.parametrize("pace", [Pace(1, 1, False), Pace(5, 4, False)])
def test_states_of_episodes_are_those_of_one_pass(model64, vocabulary, scene, exact_norm, monkeypatch, pace):
    """The cache that survives across turns, against [prompt, episodes] computed at once."""
    monkeypatch.setattr("policy.decoding_pace", lambda _: pace)
    record = play(model64, vocabulary, scene[0], NAMES)
    ids, mask, observations = as_group(record, 2)
    hidden = group_hidden(model64, scene[0], ids, mask, observations)
    cached = torch.cat([state for episode in record for state in episode.hidden])
    torch.testing.assert_close(cached, hidden, atol=1e-9, rtol=1e-9)
    assert (group_hidden(model64, scene[0], ids, mask) - hidden).abs().max() > 0.1  # what was shown matters


def test_the_pace_changes_no_episode(model64, vocabulary, scene, played, monkeypatch):
    monkeypatch.setattr("policy.decoding_pace", lambda _: Pace(5, 4, False))
    for ours, theirs in zip(play(model64, vocabulary, scene[0], NAMES), played, strict=True):
        assert [t.tolist() for t in ours.turns] == [t.tolist() for t in theirs.turns]


def test_an_episode_does_not_depend_on_its_batch(model64, vocabulary, scene, played):
    for k, episode in enumerate(played):
        (alone,) = play(model64, vocabulary, [scene[0][k // 3]], [[NAMES[k // 3][k % 3]]])
        assert [t.tolist() for t in alone.turns] == [t.tolist() for t in episode.turns]


def test_positions_go_on_through_all_clips_of_an_episode(model64, scene, played):
    """Those of the whole dialogue as one prompt."""
    for k, episode in enumerate(played):
        prompt = scene[0][k // 3]
        rebuilt, _ = whole(prompt, episode, model64.config)
        said, at = 0, len(prompt)
        for turn, observation in zip(episode.turns, episode.observations, strict=False):
            said, at = said + len(turn), at + len(turn)
            assert observation.after == said
            there = slice(at, at + len(observation.prompt))
            assert torch.equal(observation.prompt.positions, rebuilt.positions[:, there])
            at = there.stop


def test_no_token_of_an_episode_is_computed_twice(model64, vocabulary, scene, played, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        "policy._language_model",
        lambda model, embeds, positions, tree, cache=None: (
            tree is not None and lengths.append(len(embeds)),
            _language_model(model, embeds, positions, tree, cache),
        )[1],
    )
    play(model64, vocabulary, scene[0], NAMES)
    shown = [o.prompt for episode in played for o in episode.observations]
    # each with the last token of the turn before it
    assert sum(lengths) == sum(map(len, scene[0])) + sum(map(len, shown)) + len(shown)


def test_gradients_of_episodes_equal_those_of_separate_passes(model64, vocabulary, scene, played):
    """One pass over prompts and episodes, against our own pass for each episode as a prompt of its own."""
    prompts = scene[0]
    ids, mask, observations = as_group(played, 2)
    weight = torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)
    shared, apart = copy.deepcopy(model64), copy.deepcopy(model64)
    hidden = group_hidden(shared, prompts, ids, mask, observations)
    logp = shared.lm_head(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    (logp * weight).sum().backward()

    alone = []
    for k, episode in enumerate(played):
        joint, sampled = whole(prompts[k // 3], episode, model64.config)
        states = _language_model(apart, *embed_prompts(apart, [joint]), Tree((len(joint),)))
        predicted = apart.lm_head(states[:-1]).log_softmax(-1).gather(-1, joint.ids[1:, None])[:, 0]
        alone.append(predicted[sampled[1:]])
    (torch.cat(alone) * weight).sum().backward()
    torch.testing.assert_close(logp, torch.cat(alone), atol=1e-9, rtol=1e-9)
    for (name, p), q in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-9 * float(q.grad.abs().max()), rtol=0)


def test_episodes_equal_transformers_own_pass(model64, scene, played):
    ids, mask, observations = as_group(played, 2)
    hidden = group_hidden(model64, scene[0], ids, mask, observations)
    logp = model64.lm_head(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    alone = []
    for k, episode in enumerate(played):
        joint, sampled = whole(scene[0][k // 3], episode, model64.config)
        first = Prompt(joint.ids[:1], joint.positions[:, :1], joint.videos, 0)
        alone.append(separate_logp(model64, first, joint.ids[1:], joint.positions[:, 1:])[sampled[1:]])
    torch.testing.assert_close(logp, torch.cat(alone), atol=1e-4, rtol=1e-5)  # rotary angles are float32


def test_the_policy_takes_episodes(model64, scene, played):
    ids, mask, observations = as_group(played, 2)
    hidden, _ = Policy(model64)(scene[0], ids, mask, lambda *given: given, observations)
    assert torch.equal(hidden, group_hidden(model64, scene[0], ids, mask, observations))


def test_a_clip_that_several_rows_are_shown_is_encoded_once(model64, vocabulary, monkeypatch):
    grids = []
    monkeypatch.setattr(
        "policy.encode_clips", lambda tower, patches, g: grids.append(g) or encode_clips(tower, patches, g)
    )
    prompt = build_prompt(vocabulary.ids("red"), [], model64.config)
    episodes = Episodes(model64, [prompt], 3, 1, (), vocabulary.banned)
    assert len(episodes.sample()) == 3
    episodes.observe({row: (vocabulary.ids(f"{CLIP} a"), [CLIPS[0]]) for row in range(3)})
    assert grids == [[CLIPS[0].grid]]
    assert [turn.number for turn in episodes.sample()] == [1, 1, 1]


def test_only_a_row_whose_turn_has_just_ended_is_shown_something(model64, vocabulary):
    prompt = build_prompt(vocabulary.ids("red"), [], model64.config)
    episodes = Episodes(model64, [prompt], 2, 1, (), vocabulary.banned)
    with pytest.raises(ValueError, match="row 0 cannot be shown anything: its turn has not just ended"):
        episodes.observe({0: (vocabulary.ids("a"), [])})
    assert len(episodes.sample()) == 2
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> for 0 clips"):
        episodes.observe({0: (vocabulary.ids("a"), []), 1: (vocabulary.ids(CLIP), [])})
    assert episodes.observe({0: (vocabulary.ids("a"), [])})[0].after == 1  # what was refused left no trace
    assert [(turn.row, turn.number) for turn in episodes.sample()] == [(0, 1)]  # row 1 is over
    with pytest.raises(ValueError, match="row 1 "):
        episodes.observe({1: (vocabulary.ids("a"), [])})
    assert episodes.sample() == []


def test_what_an_episode_is_shown_after_its_last_token_is_not_computed(model64, scene, played):
    ids, mask, observations = as_group(played, 2)
    before = group_hidden(model64, scene[0], ids, mask, observations)
    said = int(mask[0, 0].sum())
    nonsense = Observation(said, Prompt(torch.tensor([10**9]), torch.zeros(3, 1, dtype=torch.long), [], 0))
    more = [[[*shown] for shown in row] for row in observations]
    more[0][0].append(nonsense)
    assert torch.equal(group_hidden(model64, scene[0], ids, mask, more), before)


def test_a_response_does_not_depend_on_its_batch(model64, vocabulary, scene):
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts)
    for b in range(2):
        for g in range(3):
            alone, real = sample(
                model64, [prompts[b]], 1, 24, ends(vocabulary), vocabulary.banned, 1.0, [[100 * b + g]]
            )
            assert torch.equal(alone[0, 0][real[0, 0]], ids[b, g][mask[b, g]])


def test_sampling_works_while_the_model_is_in_training_mode_with_checkpointing(model64, vocabulary, scene):
    """transformers drops the cache in that mode; `sample` leaves it for as long as it needs the cache."""
    prompts, _, _ = scene
    model = copy.deepcopy(model64)
    Policy(model).checkpoint_activations()
    model.train()
    for ours, expected in zip(decode(model, vocabulary, prompts), decode(model64, vocabulary, prompts), strict=True):
        assert torch.equal(ours, expected)
    assert model.training and all(module.training for module in model.modules())


def test_a_response_ends_with_its_first_end_token(vocabulary, tokenizer):
    model = loud_model(tokenizer)
    with torch.no_grad():  # one token in four ends a response
        model.lm_head.weight.mul_(0.01)
    prompt = build_prompt(vocabulary.ids("red"), [], model.config)
    eos = (*vocabulary.eos, *range(20, 20 + len(tokenizer) // 4))
    ids, mask = sample(model, [prompt], 64, 12, eos, vocabulary.banned, 1.0, [list(range(64))])
    lengths = set()
    for row, real in zip(ids[0], mask[0], strict=True):
        n = int(real.sum())
        assert real.tolist() == [True] * n + [False] * (len(real) - n)  # a prefix
        ends = [int(token) in eos for token in row[:n]]
        assert not any(ends[:-1]) and (ends[-1] or n == 12)
        lengths.add(n)
    assert len(lengths) > 4


def test_a_response_stops_where_its_text_says_so(model64, vocabulary, scene):
    """With every piece of two letters that appears in the unstopped text as a stop string in turn."""
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts)
    words = vocabulary.tokenizer.decode(ids[0, 0][mask[0, 0]])
    stops = sorted({words[k : k + 2] for k in range(len(words) - 1)})[:10]
    for string in stops:
        stop = stops_at(vocabulary.tokenizer, [string, "never said"])
        seeds = [[100 * b + g for g in range(3)] for b in range(2)]
        cut, real = sample(model64, prompts, 3, 24, ends(vocabulary), vocabulary.banned, 1.0, seeds, stop)
        for b in range(2):
            for g in range(3):
                whole, n = ids[b, g][mask[b, g]], int(real[b, g].sum())
                assert torch.equal(cut[b, g, :n], whole[:n])
                said = [string in vocabulary.tokenizer.decode(whole[:k]) for k in range(1, len(whole) + 1)]
                assert n == (said.index(True) + 1 if any(said) else len(whole))


def test_a_call_ends_where_the_released_tokenizer_fuses_its_end():
    if not (REALDATA / "tokenizer").is_dir():
        pytest.skip(f"{REALDATA}/tokenizer is not there")
    tokenizer = AutoTokenizer.from_pretrained(REALDATA / "tokenizer")
    stop = stops_at(tokenizer, ["</video_zoom>"])
    for after, fused in (("", ""), ("\n", "\n"), ("\n\nSo", "\n\n"), (")", ")"), (" I", "")):
        ids = tokenizer.encode(f'<video_zoom>{{"segment": [1, 2], "fps": 2}}</video_zoom>{after}')
        ends = [n for n in range(1, len(ids) + 1) if stop(ids[:n])]
        assert len(ends) == 1 and tokenizer.decode(ids[: ends[0]]).partition("</video_zoom>")[2] == fused


def test_the_states_are_those_the_tokens_were_chosen_from(model64, vocabulary, scene):
    prompts, _, _ = scene
    states: list[torch.Tensor] = []
    seeds = [[100 * b + g for g in range(3)] for b in range(2)]
    ids, mask = sample(model64, prompts, 3, 24, ends(vocabulary), vocabulary.banned, 1.0, seeds, states=states)
    assert mask.sum(-1).unique().numel() > 2  # some end sooner, and leave
    hidden = torch.stack(states, dim=2)  # [B, G, T, H]
    torch.testing.assert_close(hidden[mask], group_hidden(model64, prompts, ids, mask), atol=1e-4, rtol=1e-4)


def test_kept_tokens_are_used_and_change_nothing(model64, scene, monkeypatch):
    prompts, ids, mask = scene
    before = group_hidden(model64, prompts, ids, mask)
    keep_tokens(model64, [video for prompt in prompts for video in prompt.videos])
    monkeypatch.setattr("policy.encode_clips", None)  # not called again
    torch.testing.assert_close(group_hidden(model64, prompts, ids, mask), before, atol=1e-9, rtol=0)


def test_banned_tokens_never_appear(vocabulary, tokenizer):
    model = loud_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # nearly uniform: each banned token would come about every 300 tokens
    prompt = build_prompt(vocabulary.ids("red"), [], model.config)
    ids, mask = sample(model, [prompt], 200, 30, (), vocabulary.banned, 1.0, [list(range(200))])
    assert mask.all() and ids.shape == (1, 200, 30)
    counts = torch.bincount(ids.flatten(), minlength=len(tokenizer))
    assert counts[list(vocabulary.banned)].sum() == 0
    assert (counts > 0).sum() == len(tokenizer) - len(BANNED_TOKENS)


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, 5.0]).expand(20000, 4)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0)).double()
    for temperature in (0.5, 1.0, 2.0):
        chosen = choose_tokens(logits, uniform, temperature, torch.tensor([3]))
        expected = (logits[0, :3] / temperature).softmax(-1)
        frequency = torch.bincount(chosen, minlength=4)[:3] / 20000
        torch.testing.assert_close(frequency, expected, atol=0.012, rtol=0)


def test_choosing_at_the_ends_of_the_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, expected in ((0.0, 1), (0.499, 1), (0.501, 2), (1 - 1e-12, 2)):
        chosen = choose_tokens(logits, torch.tensor([u], dtype=torch.double), 1.0, torch.tensor([], dtype=torch.long))
        assert chosen == expected


def test_last_hidden_is_that_of_each_prompt_alone(model64, scene):
    prompts, _, _ = scene
    together = last_hidden(model64, prompts)
    for prompt, row in zip(prompts, together, strict=True):
        alone = _language_model(model64, *embed_prompts(model64, [prompt]), Tree((len(prompt),)))
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


@pytest.mark.skipif(not REALDATA.exists(), reason=f"no {REALDATA}: the released tokenizer's files are not here")
def test_forced_letter_with_the_released_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REALDATA / "tokenizer")
    vocabulary = Vocabulary.of(tokenizer)
    check_forced_letter(vocabulary, f"<|im_start|>user\n{CLIP}Which (A) x?<|im_end|>\n<|im_start|>assistant\n")
    _, letters = vocabulary.forced_letter("<|im_start|>assistant\n", 4)
    assert tokenizer.convert_ids_to_tokens(letters) == [">A", ">B", ">C", ">D"]  # letters fuse with the tag


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
    torch.testing.assert_close(last_hidden(loaded, [prompt]), last_hidden(model, [prompt]), atol=0, rtol=0)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert isinstance(loaded, Qwen2_5_VLForConditionalGeneration) and tiny.SPECIAL_TOKENS[0] in words.get_vocab()

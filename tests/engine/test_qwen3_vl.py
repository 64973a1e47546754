"""Qwen3-VL against transformers, with patches of 16 pixels as released checkpoints have them."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import loud_model
from passes import CLIP, group_logp, random_responses, random_video, separate_logp
from transformers import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from engine.families import family_of
from engine.qwen3_vl import encode_clips, table_weights, time_stamps
from engine.sampling import Sampler, generate
from engine.sharding import stream_layers
from policy import Policy, Video, Vocabulary, build_prompt, embed_prompts, group_hidden, keep_tokens, last_hidden
from video import Budget, VideoInfo, load_clip, normalise_patches, patchify_uint8, plan_clip
from world import lessons, tiny

PATCH = 16


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.of(tiny.build_tokenizer(lessons.corpus("qwen3_vl")))


@pytest.fixture(scope="module")
def model(vocabulary):
    """Of two deep layers, neither the first nor the last alone."""
    return loud_model(vocabulary.tokenizer, 0, "qwen3_vl", patch_size=PATCH).double()


def clip(seed: int, frames: int, rows: int, columns: int, step: float = 1.0) -> Video:
    """Of so many visual tokens along its sides."""
    return random_video(seed, frames, 32 * rows, 32 * columns, step, PATCH)


@pytest.fixture
def scene(vocabulary, model):
    """Two prompts of different length with clips, and three responses of different lengths each."""
    prompts = [
        build_prompt(vocabulary.ids(f"{CLIP} red <think>"), [clip(0, 4, 2, 3)], model.config, vocabulary),
        build_prompt(
            vocabulary.ids(f"a b {CLIP}c{CLIP} blue"), [clip(1, 3, 1, 2), clip(2, 2, 1, 1)], model.config, vocabulary
        ),
    ]
    ids, mask = random_responses(2, [[5, 1, 7], [3, 7, 2]], len(vocabulary.tokenizer))
    return prompts, ids, mask


# ---------------------------------------------------------------- pixels and prompts


def test_pixel_values_are_those_of_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    half = [0.5, 0.5, 0.5]
    processor = module.Qwen2VLImageProcessorPil(patch_size=PATCH, image_mean=half, image_std=half, do_resize=False)
    frame = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = processor(images=[frame[0].permute(1, 2, 0).numpy()], return_tensors="pt")
    patches, grid = patchify_uint8(frame, PATCH)
    assert theirs["image_grid_thw"].tolist() == [list(grid)] == [[1, 6, 4]]
    config = SimpleNamespace(model_type="qwen3_vl")
    ours = normalise_patches(patches, family_of(config).pixels)
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-6, rtol=0)


def test_a_clip_is_planned_and_cut_in_patches_of_16_pixels(plain):
    info = VideoInfo(str(plain), 2.0, 25.0, 320, 240)
    plan = plan_clip(info, None, 2, Budget(80, 4, 16, patch=PATCH))
    assert plan.height % 32 == plan.width % 32 == 0 and 4 <= plan.height * plan.width / 1024 <= 16
    loaded = load_clip(plan, plain)
    video = Video.of(loaded)
    assert video.n_tokens == loaded.visual_tokens == len(video.patches) // 4
    assert video.patches.shape[1] == 3 * 2 * PATCH * PATCH and tuple(video.times) == tuple(loaded.times)


def processor_text(frames: int, fps: float, grid: tuple[int, int, int]) -> str:
    """What transformers' processor writes in place of `<|video_pad|>`."""
    stand_in = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        video_token="<|video_pad|>",
        vision_end_token="<|vision_end|>",
    )
    stand_in._calculate_timestamps = lambda *a, **k: Qwen3VLProcessor._calculate_timestamps(stand_in, *a, **k)
    metadata = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=list(range(frames)))
    inputs = {"video_grid_thw": np.array([grid]), "video_metadata": [metadata]}
    return Qwen3VLProcessor.replace_video_token(stand_in, inputs, 0)


@pytest.mark.parametrize(("frames", "fps"), [(4, 1.0), (5, 2.0), (1, 1.0), (6, 0.7), (7, 29.97)])
@pytest.mark.parametrize("outer_tags", [False, True])
def test_a_prompt_has_the_tokens_of_transformers_processor(vocabulary, model, frames, fps, outer_tags):
    """transformers 5 leaves the tags around the clip where they are; 4.57 and vLLM replace them too."""
    video = clip(0, frames, 2, 1, 1 / fps)
    written = processor_text(frames, fps, video.grid)
    chat = f"<|im_start|>user\n{CLIP} red?<|im_end|>"
    theirs = chat.replace("<|video_pad|>" if outer_tags else CLIP, written)
    words = replace(vocabulary, outer_tags=outer_tags)
    prompt = build_prompt(vocabulary.ids(chat), [video], model.config, words)
    assert prompt.ids.tolist() == vocabulary.ids(theirs)
    assert len(prompt) == prompt.positions.shape[1] and written.count("seconds") == video.grid[0]


@pytest.mark.parametrize("outer_tags", [False, True])
def test_positions_are_those_of_transformers(vocabulary, model, outer_tags):
    videos = [clip(0, 5, 3, 2, 0.5), clip(1, 2, 1, 4), clip(2, 1, 1, 1)]
    words = replace(vocabulary, outer_tags=outer_tags)
    prompt = build_prompt(vocabulary.ids(f"a{CLIP}{CLIP} red {CLIP} b c"), videos, model.config, words)
    kinds = 2 * (prompt.ids == model.config.video_token_id).int()[None]
    grids = torch.tensor([video.grid for video in videos])
    theirs, delta = model.model.get_rope_index(prompt.ids[None], kinds, video_grid_thw=grids)
    assert torch.equal(theirs[:, 0], prompt.positions)
    assert prompt.next_position == int(delta) + len(prompt)
    shifted = build_prompt(vocabulary.ids("a"), [], model.config, words, 7)
    assert shifted.positions.tolist() == [[7]] * 3 and shifted.next_position == 8


def test_time_stamps_are_the_middle_of_a_pair():
    assert time_stamps([0.0, 1.0, 2.0]) == ["<0.5 seconds>", "<2.0 seconds>"]
    assert time_stamps([12.0, 12.4]) == ["<12.2 seconds>"] and time_stamps([]) == []


def test_only_the_tags_around_a_clip_are_dropped(vocabulary, model):
    """Not other tags in the text, and not text that stands where the tags would."""
    start, pad, end = vocabulary.ids(CLIP)
    for before, after, left in (([start], [end], []), ([8], [9], [8, 9]), ([start, start], [end, 9], [start, 9])):
        prompt = build_prompt([*before, pad, *after], [clip(0, 1, 1, 1)], model.config, vocabulary)
        stamp = vocabulary.ids("<0.0 seconds>")
        position = left.index(9) if 9 in left else len(left)
        assert prompt.ids.tolist() == [*left[:position], *stamp, start, pad, end, *left[position:]]


# ---------------------------------------------------------------- the vision tower


def normalised(model, videos: list[Video]) -> torch.Tensor:
    return normalise_patches(torch.cat([v.patches for v in videos]), family_of(model.config).pixels).double()


@pytest.mark.parametrize("sizes", [[(4, 4, 4)], [(2, 1, 1)], [(6, 5, 3)], [(2, 9, 2), (4, 3, 7), (3, 5, 3)]])
def test_visual_tokens_and_deep_features_equal_those_of_transformers(model, sizes):
    videos = [clip(i, *size) for i, size in enumerate(sizes)]
    patches, grids = normalised(model, videos), [video.grid for video in videos]
    ours = encode_clips(model.model.visual, patches, grids)
    theirs = model.model.visual(patches, grid_thw=torch.tensor(grids))
    joined = torch.cat([theirs.pooler_output, *theirs.deepstack_features], dim=-1)
    assert ours.shape == joined.shape == (len(patches) // 4, 3 * 128)
    torch.testing.assert_close(ours, joined, atol=1e-4, rtol=1e-5)  # angles and weights are float32 on both sides


def test_any_split_into_clips_gives_the_same_tokens(model):
    video = clip(0, 8, 5, 3)
    patches, (t, h, w) = normalised(model, [video]), video.grid
    whole = encode_clips(model.model.visual, patches, [(t, h, w)])
    for parts in ([1, 3], [1, 1, 1, 1]):
        pieces = patches.split([n * h * w for n in parts])
        apart = [encode_clips(model.model.visual, piece, [(n, h, w)]) for piece, n in zip(pieces, parts, strict=True)]
        torch.testing.assert_close(torch.cat(apart), whole, atol=1e-12, rtol=0)


def test_the_table_of_positions_is_interpolated_bilinearly():
    """On a table that is a plane, the interpolation is the plane."""
    side, y, x = 5, torch.tensor([0.0, 4.0, 1.25, 3.5]), torch.tensor([0.0, 4.0, 2.5, 0.75])
    entries, weights = table_weights(y, x, side)
    plane = torch.arange(side)[:, None] * 10.0 + torch.arange(side)
    torch.testing.assert_close((plane.flatten()[entries] * weights).sum(1), 10 * y + x)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


# ---------------------------------------------------------------- the language model


def test_group_equals_separate_passes_of_transformers(model, scene):
    """Log-probabilities and all gradients: the vision tower's, its table's and its deep mergers' too."""
    prompts, ids, mask = scene
    weight = torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)
    shared, apart = copy.deepcopy(model), copy.deepcopy(model)
    Policy(shared).train().checkpoint_activations()
    logp = group_logp(shared, prompts, ids, mask)
    (logp * weight).sum().backward()
    alone = torch.cat([separate_logp(apart, prompts[b], ids[b, g][mask[b, g]]) for b in range(2) for g in range(3)])
    (alone * weight).sum().backward()
    torch.testing.assert_close(logp, alone, atol=1e-4, rtol=1e-5)  # rotary angles are float32
    for (name, p), q in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        difference = (p.grad - q.grad).abs().max() / q.grad.abs().max()
        assert difference < 1e-4, (name, difference)


def test_deep_features_matter(model, scene, monkeypatch):
    """The power of the tests here: without them the states change a lot."""
    prompts, ids, mask = scene
    before = group_logp(model, prompts, ids, mask)
    for merger in (copied := copy.deepcopy(model)).model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
        torch.nn.init.zeros_(merger.linear_fc2.bias)
    assert (group_logp(copied, prompts, ids, mask) - before).abs().mean() > 0.05


def test_kept_tokens_and_streamed_layers_change_nothing(model, scene):
    prompts, ids, mask = scene
    expected = group_hidden(model, prompts, ids, mask)
    streamed = copy.deepcopy(model).requires_grad_(False)
    keep_tokens(streamed, [video for prompt in prompts for video in prompt.videos])
    stream_layers(streamed)
    torch.testing.assert_close(group_hidden(streamed, prompts, ids, mask), expected, atol=1e-9, rtol=0)


def test_a_row_of_text_alone_has_no_deep_features(model, vocabulary):
    assert embed_prompts(model, [build_prompt(vocabulary.ids("red blue"), [], model.config)])[0].shape == (2, 128)
    prompt = build_prompt(vocabulary.ids("red blue"), [], model.config)
    alone = model(input_ids=prompt.ids[None]).logits[0, -1]
    torch.testing.assert_close(model.lm_head(last_hidden(model, [prompt])[0]), alone, atol=1e-4, rtol=1e-4)


def test_without_a_clip_every_weight_takes_part(model, vocabulary):
    """As collectives of several processes need it: with gradients of zero in the vision tower."""
    prompt = build_prompt(vocabulary.ids("red"), [], model.config)
    copied = Policy(copy.deepcopy(model))
    ids, mask = random_responses(0, [[3]], len(vocabulary.tokenizer))
    copied([prompt], ids, mask, lambda hidden, head: (hidden @ head.T).sum()).backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert not any(p.grad.any() for p in copied.model.model.visual.parameters())


# ---------------------------------------------------------------- sampling


def test_sampled_states_are_those_of_a_full_pass(model, vocabulary, scene):
    prompts, _, _ = scene
    turns = generate(model, prompts, 2, 6, replace(vocabulary, eos=()), seed=lambda row, _: row, keep_hidden=True)
    ids = torch.stack([turn.ids for turn in turns]).view(2, 2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    states = torch.cat([turn.hidden for turn in turns])
    torch.testing.assert_close(states, group_hidden(model, prompts, ids, mask), atol=1e-4, rtol=1e-4)


def test_an_observed_response_is_the_whole_conversation_of_transformers(model, vocabulary):
    """What is shown between turns: a clip with its time, and its deep features, through the cache and through the
    update, against one plain pass."""
    first, shown = clip(0, 4, 1, 2), clip(5, 3, 2, 2, 0.5)
    prompt = build_prompt(vocabulary.ids(f"{CLIP} red"), [first], model.config, vocabulary)
    words = replace(vocabulary, eos=())
    sampler = Sampler(model, [prompt], 1, 4, words, seed=lambda _, number: number, keep_hidden=True)
    (one,) = sampler.sample()
    observed = sampler.observe({0: (vocabulary.ids(f" so {CLIP} go on"), [shown])})
    (two,) = sampler.sample()
    ids = torch.cat([one.ids, two.ids])[None, None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    together = group_hidden(model, [prompt], ids, mask, [[[observed[0]]]])
    torch.testing.assert_close(torch.cat([one.hidden, two.hidden]), together, atol=1e-4, rtol=1e-4)

    chat = [*vocabulary.ids(f"{CLIP} red"), *one.ids.tolist(), *vocabulary.ids(f" so {CLIP} go on")]
    whole = build_prompt(chat, [first, shown], model.config, vocabulary)
    after = [*one.ids.tolist(), *observed[0].prompt.ids.tolist()]
    assert whole.ids.tolist() == [*prompt.ids.tolist(), *after]
    theirs = separate_logp(model, whole, two.ids)
    logp = model.lm_head(together[4:]).log_softmax(-1).gather(-1, two.ids[:, None])[:, 0]
    torch.testing.assert_close(logp, theirs, atol=1e-4, rtol=1e-4)

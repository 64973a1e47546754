"""Random clips, prompts with responses, and passes of transformers' own model that ours are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.families import FAMILIES, family_of
from engine.sampling import Sampled
from policy import Prompt, Video, Vocabulary, group_hidden
from video import normalise_patches

CLIP = "<|vision_start|><|video_pad|><|vision_end|>"


def random_video(seed: int, frames: int, height: int, width: int, step: float = 1.0, patch: int = 14) -> Video:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)
    return Video.from_frames(pixels, step, patch)


def random_responses(seed: int, lengths: list[list[int]], n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, G, T] of ordinary tokens, padded with other random ids, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    T = max(max(row) for row in lengths)
    ids = torch.randint(8, n_tokens, (len(lengths), len(lengths[0]), T), generator=generator)
    mask = torch.arange(T) < torch.tensor(lengths)[..., None]
    return ids, mask


def group_logp(model, prompts: list[Prompt], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all real tokens, from one row of shared prompts: [N]."""
    hidden = group_hidden(model, prompts, ids, mask)
    return model.lm_head(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]


def separate_logp(model, prompt: Prompt, response: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities of one response by a plain causal pass of transformers' own model, with our positions: [T].

    `after`: positions [3, T] of a response that is not plain text.
    """
    ids = torch.cat([prompt.ids, response])[None]
    if after is None:
        after = (torch.arange(len(response)) + prompt.next_position).expand(3, -1)
    positions = torch.cat([prompt.positions, after], dim=1)[:, None]
    pixels = family_of(model.config).pixels
    patches = normalise_patches(torch.cat([video.patches for video in prompt.videos]), pixels).double()
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


def change_family(monkeypatch, model, **functions) -> None:
    """Replace functions of the model's family, for as long as the test runs."""
    monkeypatch.setitem(FAMILIES, model.config.model_type, replace(family_of(model.config), **functions))


def ending_often(vocabulary: Vocabulary) -> Vocabulary:
    """One token in twelve ends a response, so that these have different lengths."""
    return replace(vocabulary, eos=(*vocabulary.eos, *range(20, len(vocabulary.tokenizer), 12)))


def padded(turns: Sequence[Sampled], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, G, T] of one turn of each response, padded with zeros, and their mask."""
    lengths = torch.tensor([len(turn.ids) for turn in turns])
    ids = torch.nn.utils.rnn.pad_sequence([turn.ids for turn in turns], batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.unflatten(0, (batch, -1)), mask.unflatten(0, (batch, -1))

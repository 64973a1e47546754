"""Model families: what Qwen2.5-VL and Qwen3-VL do each in their own way, as one record per family.

All else is the same for every family: a vision tower with 2x2 patches of two frames to a visual token, a language model
whose attention can be replaced, positions along time, rows and columns, and Qwen's special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from engine import qwen2_5_vl, qwen3_vl
from video import CLIP_PIXELS

EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
BANNED_TOKENS = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Family:
    """How a family of models takes a prompt with clips.

    `model`: its class. `pixels`: mean and deviation of each colour. Sizes of patches are in its checkpoints' config.
    """

    model: type[PreTrainedModel]
    pixels: tuple[tuple[float, ...], tuple[float, ...]]
    # (ids with a <|video_pad|> per clip, clips, the model's config, vocabulary) -> the prompt's tokens in order: ids,
    # and grids of visual tokens as (t, rows, columns, time positions from one t to the next).
    lay_out: Callable[[Sequence[int], Sequence[Any], Any, Any], list]
    # (vision tower, normalised patches [N, 6 * side^2], grids [(t, h, w)]) -> visual tokens [N / 4, W]: W = H, or, with
    # what inner layers of the language model are to add, a multiple of it.
    encode_clips: Callable[[nn.Module, Tensor, Sequence[tuple[int, int, int]]], Tensor]
    # (vision tower, grids) -> floating-point operations of its attention, beside those of its weights.
    attention_flops: Callable[[nn.Module, Sequence[tuple[int, int, int]]], int]


FAMILIES = {
    "qwen2_5_vl": Family(
        Qwen2_5_VLForConditionalGeneration,
        CLIP_PIXELS,
        qwen2_5_vl.lay_out,
        qwen2_5_vl.encode_clips,
        qwen2_5_vl.attention_flops,
    ),
    "qwen3_vl": Family(
        Qwen3VLForConditionalGeneration,
        HALF,
        qwen3_vl.lay_out,
        qwen3_vl.encode_clips,
        qwen3_vl.attention_flops,
    ),
}


def family_of(model_config) -> Family:
    """The family of a model with this configuration."""
    return FAMILIES[model_config.model_type]


def missing_weights(names: Collection[str]) -> str:
    """What is wrong with a checkpoint that lacks these weights."""
    blind = any("visual." in name for name in names)
    kind = "a checkpoint without vision weights, which cannot see a video" if blind else "an incomplete checkpoint"
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{kind}: it lacks {len(names)} weights: {shown}"

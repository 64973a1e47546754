"""The model family Qwen2.5-VL: its special tokens, and our own traversal of its vision tower.

Windows of equal length are attended to as one batch; transformers loops over them in Python. Weights and results are
the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TEMPORAL_PATCH = 2  # frames per temporal grid
EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
BANNED_TOKENS = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def missing_weights(names: Collection[str]) -> str:
    """What is wrong with a checkpoint that lacks these weights."""
    blind = any("visual." in name for name in names)
    kind = "a checkpoint without vision weights, which cannot see a video" if blind else "an incomplete checkpoint"
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{kind}: it lacks {len(names)} weights: {shown}"


# ---------------------------------------------------------------- the vision tower


@dataclass(frozen=True)
class Layout:
    """An order of patches in which windows of equal length are contiguous: `order` indexes the raw order, `groups` are
    (windows, length).
    """

    order: Tensor
    groups: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def _grid_windows(h: int, w: int, window: int | None) -> list[Tensor]:
    """The attention windows of one temporal grid of h x w patches, as patch indices in raw order (2x2 blocks of patches
    are contiguous).
    """
    rows, columns = h // 2, w // 2
    window = window or max(rows, columns)  # None: the whole grid is one window
    blocks = torch.arange(rows * columns).view(rows, columns)
    windows = []
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            block = blocks[top : top + window, left : left + window].reshape(-1)
            windows.append((block[:, None] * 4 + torch.arange(4)).reshape(-1))
    return windows


def window_layout(grids: Sequence[tuple[int, int, int]], window: int | None) -> Layout:
    """Order the patches of all clips by windows (of `window` merged tokens a side, None = one window per temporal
    grid), equal lengths together.
    """
    by_length: dict[int, list[Tensor]] = {}
    offset = 0
    for t, h, w in grids:
        starts = offset + torch.arange(t) * h * w
        for indices in _grid_windows(h, w, window):
            by_length.setdefault(len(indices), []).append(starts[:, None] + indices)
        offset += t * h * w
    stacked = {length: torch.cat(parts) for length, parts in by_length.items()}
    order = torch.cat([indices.reshape(-1) for indices in stacked.values()])
    return Layout(order, tuple((len(indices), length) for length, indices in stacked.items()))


def _patch_positions(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Row and column of every patch, in raw order: int64 [N, 2]."""
    parts = []
    for t, h, w in grids:
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        position = torch.stack([row, column], dim=-1).view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2)
        parts.append(position.repeat(t, 1))
    return torch.cat(parts)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, in float32 or better: x [N, heads, d], cos and sin float32 [N, 1, d]."""
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return (x * cos + half * sin).to(x.dtype)


def _vision_attention(
    attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int], ...]
) -> Tensor:
    """Attention within the windows of a layout, on patches in its order: x [N, D] -> [N, D]."""
    heads = attn.num_heads
    q, k, v = attn.qkv(x).view(len(x), 3, heads, -1).unbind(1)  # [N, heads, d] each
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    parts, start = [], 0
    for n, length in groups:
        window = [z[start : start + n * length].view(n, length, heads, -1).transpose(1, 2) for z in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*window).transpose(1, 2).reshape(n * length, -1))
        start += n * length
    return attn.proj(torch.cat(parts))


def _vision_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """One block of the tower on patches in a layout's order: x [N, D] -> [N, D]."""
    x = x + _vision_attention(block.attn, block.norm1(x), cos, sin, groups)
    return x + block.mlp(block.norm2(x))


def encode_clips(visual: nn.Module, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Visual tokens of one or more clips: normalised patches [N, 1176], grids [(t, h, w)] -> [N / 4, H].

    Same weights and same result as `visual(patches, grids)` of transformers. Temporal grids do not see each other, so
    any split into clips gives the same tokens.
    """
    config, device = visual.config, patches.device
    window = config.window_size // config.patch_size // config.spatial_merge_size
    layouts = {True: window_layout(grids, None), False: window_layout(grids, window)}
    # In one copy: at each, the host waits until the device has done all that it was asked before.
    indices = torch.stack([*_patch_positions(grids).T, *(layout.order for layout in layouts.values())]).to(device)
    positions, orders = indices[:2].T, dict(zip(layouts, indices[2:], strict=True))

    d = config.hidden_size // config.num_heads
    frequency = 10000.0 ** -(torch.arange(0, d // 2, 2, device=device, dtype=torch.float) / (d // 2))
    angle = (positions[..., None] * frequency).flatten(1).repeat(1, 2)[:, None]  # [N, 1, d]
    rotation = {full: (angle.cos()[order], angle.sin()[order]) for full, order in orders.items()}

    # The convolution over 2 x 14 x 14 pixels without overlap, as the matrix product that it is.
    kernel = visual.patch_embed.proj.weight.flatten(1)
    x = F.linear(patches.to(kernel.dtype), kernel)
    current = torch.arange(len(x), device=device)
    for i, block in enumerate(visual.blocks):
        full = i in config.fullatt_block_indexes
        if current is not orders[full]:
            x = x[torch.argsort(current)[orders[full]]]
            current = orders[full]
        cos, sin, groups = *rotation[full], layouts[full].groups
        if visual.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_vision_block, block, x, cos, sin, groups, use_reentrant=False)
        else:
            x = _vision_block(block, x, cos, sin, groups)
    return visual.merger(x[torch.argsort(current)])

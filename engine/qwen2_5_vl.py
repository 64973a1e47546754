"""The model family Qwen2.5-VL: how it is shown a clip, and our own traversal of its vision tower.

Windows of equal length are attended to as one batch; transformers loops over them in Python. Weights and results are
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from policy import Video, Vocabulary

Grid = tuple[int, int, int, float]  # visual tokens: t, rows, columns, time positions from one t to the next


def lay_out(
    ids: Sequence[int], videos: Sequence[Video], config, vocabulary: Vocabulary | None = None
) -> list[int | Grid]:
    """A prompt's tokens, in which each `<|video_pad|>` becomes its clip's grid, whose time is in the positions."""
    rate, clips = config.vision_config.tokens_per_second, iter(videos)

    def grid(clip: Video) -> Grid:
        t, h, w = clip.grid
        return t, h // 2, w // 2, 2 * clip.step * rate  # two frames to a temporal grid

    return [grid(next(clips)) if token == config.video_token_id else token for token in ids]


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


def patch_positions(grids: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of patches, once for all frames of a size: int64 [M, 2], of one temporal grid of each size that
    there is, in raw order; the h and w of their grids, int64 [M, 2]; and which of these M each patch is, int64 [N].
    """
    positions, sizes, first, index = [], [], {}, []
    for t, h, w in grids:
        if (h, w) not in first:
            first[h, w] = sum(map(len, positions))
            row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            position = torch.stack([row, column], dim=-1).view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2)
            positions.append(position)
            sizes.append(torch.tensor([h, w]).expand(h * w, 2))
        index.append(torch.arange(first[h, w], first[h, w] + h * w).repeat(t))
    return torch.cat(positions), torch.cat(sizes), torch.cat(index)


def rotation(positions: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [M, 1, d], for patches at these rows and columns [M, 2] and heads of size d."""
    frequency = 10000.0 ** -(torch.arange(0, d // 2, 2, device=positions.device, dtype=torch.float) / (d // 2))
    angle = (positions[..., None] * frequency).flatten(1).repeat(1, 2)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, in the wider of their types: x [N, heads, d], cos and sin [N, 1, d]."""
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return (x * cos + half * sin).to(x.dtype)


def _vision_attention(
    attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int], ...]
) -> Tensor:
    """Attention within the windows of a layout, on patches in its order: x [N, D] -> [N, D]."""
    heads = attn.num_heads
    q, k, v = attn.qkv(x).view(len(x), 3, heads, -1).unbind(1)  # [N, heads, d] each
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    parts, start = [], 0
    for n, length in groups:
        window = [z[start : start + n * length].view(n, length, heads, -1).transpose(1, 2) for z in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*window).transpose(1, 2).reshape(n * length, -1))
        start += n * length
    return attn.proj(torch.cat(parts))


def vision_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """One block of the tower on patches in a layout's order: x [N, D] -> [N, D]."""
    x = x + _vision_attention(block.attn, block.norm1(x), cos, sin, groups)
    return x + block.mlp(block.norm2(x))


def _layouts(visual: nn.Module, grids: Sequence[tuple[int, int, int]]) -> dict[bool, Layout]:
    """By whether a block's attention is full: over a temporal grid, not over its windows."""
    config = visual.config
    window = config.window_size // config.patch_size // config.spatial_merge_size
    return {True: window_layout(grids, None), False: window_layout(grids, window)}


def attention_flops(visual: nn.Module, grids: Sequence[tuple[int, int, int]]) -> int:
    """Operations of the tower's attention: a patch is compared with those of its window, or of its pair of frames."""
    layouts = _layouts(visual, grids)
    full = [i in visual.config.fullatt_block_indexes for i in range(len(visual.blocks))]
    pairs = sum(n * length**2 for kind in full for n, length in layouts[kind].groups)
    return 4 * visual.config.hidden_size * pairs


def encode_clips(visual: nn.Module, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Visual tokens of one or more clips: normalised patches [N, 1176], grids [(t, h, w)] -> [N / 4, H].

    Same weights and same result as `visual(patches, grids)` of transformers. Temporal grids do not see each other, so
    any split into clips gives the same tokens.
    """
    config, device = visual.config, patches.device
    layouts = _layouts(visual, grids)
    # In one copy: at each, the host waits until the device has done all that it was asked before.
    positions, _, index = patch_positions(grids)
    parts = [positions.flatten(), index, *(layout.order for layout in layouts.values())]
    positions, index, *orders = torch.cat(parts).to(device).split(list(map(len, parts)))
    orders = dict(zip(layouts, orders, strict=True))

    cos, sin = (z[index] for z in rotation(positions.view(-1, 2), config.hidden_size // config.num_heads))
    rotations = {full: (cos[order], sin[order]) for full, order in orders.items()}

    # The convolution over 2 x 14 x 14 pixels without overlap, as the matrix product that it is.
    kernel = visual.patch_embed.proj.weight.flatten(1)
    x = F.linear(patches.to(kernel.dtype), kernel)
    current = torch.arange(len(x), device=device)
    for i, block in enumerate(visual.blocks):
        full = i in config.fullatt_block_indexes
        if current is not orders[full]:
            x = x[torch.argsort(current)[orders[full]]]
            current = orders[full]
        cos, sin, groups = *rotations[full], layouts[full].groups
        if visual.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(vision_block, block, x, cos, sin, groups, use_reentrant=False)
        else:
            x = vision_block(block, x, cos, sin, groups)
    return visual.merger(x[torch.argsort(current)])

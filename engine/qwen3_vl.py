"""The model family Qwen3-VL: how it is shown a clip, our own traversal of its vision tower, DeepStack.

What differs from Qwen2.5-VL: a clip's pairs of frames are written one by one, each after its time as text and between
vision tags of its own, so time is in the words and not in the positions. The tower has no windows; its learned table of
positions is interpolated to the size of the frames. Features of some of its inner layers are added to the first layers
of the language model (DeepStack): they travel beside the visual token that they belong to.

transformers 5's processor keeps the vision tags that stand around the whole clip in the chat template; that of 4.57,
the authors' own, and vLLM drop them. So do we, unless the option `outer_tags` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.qwen2_5_vl import Grid, patch_positions, rotation, vision_block, window_layout

if TYPE_CHECKING:
    from policy import Video, Vocabulary


def lay_out(ids: Sequence[int], videos: Sequence[Video], config, vocabulary: Vocabulary | None) -> list[int | Grid]:
    """A prompt's tokens, in which each `<|video_pad|>` becomes its clip's pairs of frames, each after its time."""
    start, pad, end = config.vision_start_token_id, config.video_token_id, config.vision_end_token_id
    places = {k for k, token in enumerate(ids) if token == pad}
    if not places:
        return list(ids)
    dropped = set() if vocabulary.outer_tags else {k + side for k in places for side in (-1, 1)}
    clips, items = iter(videos), []
    for k, token in enumerate(ids):
        if k in places:
            clip = next(clips)
            _, h, w = clip.grid
            for words in map(vocabulary.ids, time_stamps(clip.times)):
                items += [*words, start, (1, h // 2, w // 2, 0.0), end]
        elif token not in (start, end) or k not in dropped:
            items.append(token)
    return items


def time_stamps(times: Sequence[float]) -> list[str]:
    """What is written before each pair of frames: the middle of their times; an odd last frame is a pair of its own."""
    pairs = [times[k : k + 2] for k in range(0, len(times), 2)]
    return [f"<{(pair[0] + pair[-1]) / 2:.1f} seconds>" for pair in pairs]


def table_weights(y: Tensor, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation in a table of side x side entries, at rows y and columns x [N]: which entries int64
    [N, 4], and how much of each, float [N, 4].
    """
    top, left = y.floor().clamp(max=side - 1), x.floor().clamp(max=side - 1)
    low, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
    dy, dx = y - top, x - left
    entries = torch.stack([top * side + left, top * side + right, low * side + left, low * side + right], dim=1)
    return entries.long(), torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], dim=1)


def encode_clips(visual: nn.Module, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Visual tokens of one or more clips, each with its K DeepStack features behind it: normalised patches [N, 1536],
    grids [(t, h, w)] -> [N / 4, (1 + K) H].

    Same weights and same result as `visual(patches, grids)` of transformers. Temporal grids do not see each other, so
    any split into clips gives the same tokens.
    """
    config, device, side = visual.config, patches.device, visual.num_grid_per_side
    layout = window_layout(grids, None)
    # Along each side, the table's first and last entries are the frame's first and last patches.
    positions, sizes, index = patch_positions(grids)
    # In one copy: at each, the host waits until the device has done all that it was asked before.
    parts = [positions.flatten(), sizes.flatten(), index[layout.order], layout.order]
    positions, sizes, index, order = torch.cat(parts).to(device).split(list(map(len, parts)))
    positions, sizes, back = positions.view(-1, 2), sizes.view(-1, 2), torch.argsort(order)
    cos, sin = (z[index] for z in rotation(positions, config.hidden_size // config.num_heads))
    entries, weights = table_weights(*(positions * (side - 1) / (sizes - 1)).T, side)

    # The convolution over 2 x 16 x 16 pixels without overlap, as the matrix product that it is.
    proj = visual.patch_embed.proj
    x = F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
    x = x[order] + (visual.pos_embed(entries) * weights[..., None]).sum(1).to(x.dtype)[index]
    deep = []
    for i, block in enumerate(visual.blocks):
        if visual.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(vision_block, block, x, cos, sin, layout.groups, use_reentrant=False)
        else:
            x = vision_block(block, x, cos, sin, layout.groups)
        if i in config.deepstack_visual_indexes:
            deep.append(visual.deepstack_merger_list[len(deep)](x[back]))
    return torch.cat([visual.merger(x[back]), *deep], dim=-1)


def attention_flops(visual: nn.Module, grids: Sequence[tuple[int, int, int]]) -> int:
    """Operations of the tower's attention: in each block, a patch is compared with those of its pair of frames."""
    return 4 * visual.config.hidden_size * len(visual.blocks) * sum(t * (h * w) ** 2 for t, h, w in grids)

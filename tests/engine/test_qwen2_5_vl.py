"""The vision tower against that of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from passes import random_video
from torch.utils._python_dispatch import TorchDispatchMode

from engine.qwen2_5_vl import encode_clips, window_layout
from video import normalise_patches


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


class Copies(TorchDispatchMode):
    """Counts copies from the host to the device, here one without data: at each, the host waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.count += result.device.type == "meta"
        return result


def test_the_host_copies_to_the_device_once(model64):
    tower = copy.deepcopy(model64.model.visual).to("meta")
    tower.config.fullatt_block_indexes = [1]  # both orders are used
    with Copies() as copies:
        tokens = encode_clips(tower, torch.empty(3 * 60, 1176, device="meta"), [(3, 10, 6)])
    assert tokens.shape == (45, tower.config.out_hidden_size) and copies.count == 1

"""`video.py` against independent computations, and on files with a number in every frame."""

import itertools
import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from media.decode import VideoInfo, _Painter, probe
from media.file import VideoError
from media.frames import FrameCache
from media.prefetch import prefetch
from tests.numbered import HEIGHT, WIDTH, X264, get, read_number, sequential, write_video
from video import (
    Budget,
    Clip,
    decode,
    frame_budget,
    frame_size,
    load_clip,
    load_clips,
    merge_spans,
    normalise_patches,
    patchify_uint8,
    plan_clip,
    resize,
    sample_times,
    to_video_time,
)

FIXED = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------- Eq. 3


def test_frame_budget_by_hand():
    # 30 s at 1 fps in 8192 tokens: 30 frames, 273 tokens each; 10 s: 768 is the most; 600 s: 512 frames of 16.
    assert frame_budget(30, 1, 8192, 16, 768) == (30, 8192 / 30)
    assert frame_budget(10, 1, 8192, 16, 768) == (10, 768.0)
    assert frame_budget(600, 1, 8192, 16, 768) == (512, 16.0)
    assert frame_budget(600, 1, 8192, 16, 768, paired=True) == (600, 16384 / 600)
    assert frame_budget(2.5, 1, 8192, 16, 768)[0] == 3  # frames at 0, 1 and 2 s
    assert frame_budget(0.01, 1, 8192, 16, 768)[0] == 1
    assert frame_budget(0.1 * 3, 10, 8192, 16, 768)[0] == 3  # 0.30000000000000004


@pytest.mark.parametrize(
    "arguments", [(0, 1, 64, 4, 16), (math.inf, 1, 64, 4, 16), (1, 0, 64, 4, 16), (1, 1, 3, 4, 16)]
)
def test_frame_budget_refuses(arguments):
    with pytest.raises(ValueError):
        frame_budget(*arguments)


@FIXED
@given(st.floats(0.01, 1e5), st.floats(0.01, 60), st.integers(1, 30000), st.integers(1, 800), st.integers(1, 800))
def test_frame_budget_keeps_its_bounds(duration, fps, budget, v_min, v_max):
    v_min, v_max = min(v_min, v_max), max(v_min, v_max)
    budget = max(budget, v_min)
    n, tokens = frame_budget(duration, fps, budget, v_min, v_max)
    assert n >= 1 and v_min <= tokens <= v_max
    assert n * tokens <= budget * (1 + 1e-9)


@pytest.mark.parametrize(
    ("duration", "fps", "tokens", "fine_frames", "fine_tokens"),
    [(2386, 0.1, 64, 136, 76), (651, 0.2, 64, 86, 190), (4101, 0.06, 64, 154, 62)],
    ids=["VideoMME long", "MLVU", "LVBench"],
)
def test_table_13(duration, fps, tokens, fine_frames, fine_tokens):
    """Table 13 of Zoom-Zero. Its figures are means over videos, ours are those of one video of the mean duration.

    Coarse: at most 256 frames in 16,384 tokens, so V_min = 64. The paper's 253 frames (MLVU) and 54 tokens (VideoMME)
    are below these limits as means can be; its 0.2 fps for MLVU is not what 651 s give (0.39), so it is left out. Fine:
    1 fps, so frames are seconds. The mean of V_res lies between V_res of the mean number of frames under the budget of
    training (8192) and of evaluation (16,384).
    """
    n, v_res = frame_budget(duration, 1, 16384, 64, 768)
    assert (n, v_res) == (256, tokens)
    if duration != 651:
        assert round(n / duration, 2 if fps < 0.1 else 1) == fps
    frames, low = frame_budget(fine_frames, 1, 8192, 16, 768)
    assert frames == fine_frames
    _, high = frame_budget(fine_frames, 1, 16384, 16, 768)
    assert low <= fine_tokens <= high + 1


# ---------------------------------------------------------------- sizes


def test_frame_size_of_square_frames():
    assert frame_size(112, 112, 4) == (56, 56)
    for tokens in (9, 12, 15.99):
        assert frame_size(112, 112, tokens) == (84, 84)
    assert frame_size(112, 112, 16) == (112, 112)
    assert frame_size(720, 1280, 64) == (168, 280)
    assert frame_size(1280, 720, 64) == (280, 168)


@FIXED
@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(1, 800), st.floats(0, 1))
def test_frame_size_keeps_its_bounds(height, width, tokens, share):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            frame_size(height, width, tokens)
        return
    v_min = max(1, math.floor(share * tokens))
    h, w = frame_size(height, width, tokens, v_min)
    assert h % 28 == w % 28 == 0
    assert v_min <= h * w / 784 <= tokens + 1e-6
    if v_min == 1 and tokens >= 16 and 1 / 3 < height / width < 3:
        assert abs(math.log(h / w * width / height)) < 0.45  # half a token on each side of four or more


# ---------------------------------------------------------------- times


def info(duration=16.0, fps=8.0, width=112, height=112) -> VideoInfo:
    return VideoInfo("clip.mp4", duration, fps, width, height)


def test_sample_times():
    assert sample_times(0, 16, 1) == list(range(16))
    assert sample_times(3, 5, 0.5) == [3, 3.5, 4, 4.5]
    assert sample_times(3, 3.1, 0.5) == [3]


def test_merge_spans():
    assert merge_spans([(5, 7), (1, 2), (2, 3), (6, 9)], info(), 0.125) == [(1, 3), (5, 9)]
    assert merge_spans([(-1, 2), (15, 99)], info(), 0.125) == [(0, 2), (15, 16)]
    assert merge_spans([(4, 4)], info(), 1) == [(3.5, 4.5)]
    assert merge_spans([(0, 0), (16 - 1e-9, 16)], info(), 1) == [(0, 1), (15, 16)]
    assert merge_spans([(0.1, 0.2)], info(duration=0.5), 1) == [(0, 0.5)]


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ((5, 4), "reversed"),
        ((math.nan, 4), "not finite"),
        ((0, math.inf), "not finite"),
        ((16, 17), "outside"),
        ((-2, -1), "outside"),
    ],
)
def test_bad_spans(span, words):
    with pytest.raises(VideoError, match=rf"clip.mp4: span .*{words}.*; "):
        plan_clip(info(), [(1, 2), span], 1, Budget(64, 4, 16))


def test_no_spans():
    with pytest.raises(VideoError, match="empty list of spans"):
        plan_clip(info(), [], 1, Budget(64, 4, 16))


def test_coarse_plan():
    plan = plan_clip(info(), None, 1, Budget(64, 4, 16))
    assert plan.times == tuple(range(16)) and plan.step == 1
    assert (plan.height, plan.width) == (56, 56)
    capped = plan_clip(info(duration=3600, fps=25), None, 1, Budget(16384, 64, 768))
    assert len(capped.times) == 256 and capped.step == 3600 / 256
    assert np.allclose(capped.times, np.arange(256) * capped.step)
    assert len(plan_clip(info(duration=2, fps=5), None, 30, Budget(64, 4, 16)).times) == 10  # all that there are


def test_zoom_plan():
    plan = plan_clip(info(), [(3, 5)], 2, Budget(64, 4, 16))
    assert plan.times == (3, 3.5, 4, 4.5) and plan.step == 0.5
    assert (plan.height, plan.width) == (112, 112)
    two = plan_clip(info(), [(8, 9), (3, 4.2)], 4, Budget(640, 4, 16))
    assert np.allclose(two.times, [3, 3.25, 3.5, 3.75, 4, 8, 8.25, 8.5, 8.75])
    long = plan_clip(info(), [(0, 8)], 8, Budget(64, 4, 16))
    assert len(long.times) == 16 and (long.height, long.width) == (56, 56)


@FIXED
@given(
    st.lists(st.tuples(st.floats(0, 15.9), st.floats(0, 4)), min_size=1, max_size=30),
    st.floats(0.2, 40),
    st.integers(8, 400),
    st.booleans(),
)
def test_zoom_plan_keeps_its_bounds(pairs, fps, budget, paired):
    plan = plan_clip(info(), [(s, s + length) for s, length in pairs], fps, Budget(budget, 4, 16, paired))
    n = len(plan.times)
    assert 1 <= n <= (2 * budget if paired else budget) / 4 and n <= 128
    assert n * plan.height * plan.width / 784 <= (2 * budget if paired else budget)
    assert plan.step >= 1 / min(fps, 8) - 1e-9
    assert all(a < b for a, b in itertools.pairwise(plan.times))
    assert plan.times[0] >= 0 and plan.times[-1] < 16


def test_aspect_ratio_over_200():
    with pytest.raises(VideoError, match=r"aspect ratio over 200: 2010 x 10 pixels; "):
        plan_clip(info(width=2010, height=10), None, 1, Budget(64, 4, 16))


# ---------------------------------------------------------------- pixels


def test_resize_is_bit_equal_to_torch():
    generator = torch.Generator().manual_seed(0)
    for (h, w), (height, width) in [
        ((97, 131), (56, 84)),
        ((300, 500), (168, 280)),
        ((20, 30), (112, 196)),
        ((720, 406), (252, 140)),
    ]:
        frames = torch.randint(0, 256, (2, 3, h, w), dtype=torch.uint8, generator=generator)
        smooth = F.interpolate(frames.float(), size=(height, width), mode="bicubic", antialias=True)
        assert torch.equal(resize(frames, height, width), smooth.clamp(0, 255).round().to(torch.uint8))
    assert torch.equal(resize(frames, 720, 406), frames)


def test_decode_resizes_by_the_same_rule(plain):
    whole, _ = decode(plain, [0.2, 1.0])
    assert torch.equal(decode(plain, [0.2, 1.0], (56, 84))[0], resize(whole, 56, 84))


def test_patchify_element_by_element():
    frames = torch.randint(0, 256, (3, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches, grid = patchify_uint8(frames)
    assert grid == (2, 4, 6) and patches.shape == (48, 1176)
    places = itertools.product(range(2), range(2), range(3), range(2), range(2))
    for row, (t, big_y, big_x, y, x) in enumerate(places):
        top, left = (2 * big_y + y) * 14, (2 * big_x + x) * 14
        pair = [frames[min(2 * t + k, 2), :, top : top + 14, left : left + 14] for k in range(2)]
        assert torch.equal(patches[row], torch.stack(pair, dim=1).flatten())  # channel, frame, row, column
    values = normalise_patches(patches)
    assert patches.dtype == torch.uint8 and values.dtype == torch.float32
    red = (frames[0, 0, 0, 0] / 255 - 0.48145466) / 0.26862954
    assert values[0, 0] == pytest.approx(red.item(), abs=1e-6)
    blue = (frames[1, 2, 13, 13] / 255 - 0.40821073) / 0.27577711
    assert values[0, -1] == pytest.approx(blue.item(), abs=1e-6)
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify_uint8(frames[..., :70])


# ---------------------------------------------------------------- clips, cache


def test_clips_of_a_group_share_their_frames(plain, monkeypatch):
    found = probe(plain)
    plans = [
        plan_clip(found, spans, 25, Budget(400, 4, 16))
        for spans in ([(0.2, 0.6)], [(0.4, 0.8)], [(0.2, 0.3), (1.6, 1.7)])
    ]
    plans.append(plan_clip(found, None, 5, Budget(400, 4, 16)))
    alone = [load_clip(plan, plain) for plan in plans]
    painted = []
    monkeypatch.setattr(
        _Painter,
        "picture",
        lambda self, f, pts, real=_Painter.picture: (painted.append(pts), real(self, f, pts))[1],
    )
    together = load_clips(plain, plans)
    assert len(painted) == len(set(painted)) == len({t for clip in together for t in clip.times})
    for a, b, plan in zip(alone, together, plans, strict=True):
        assert torch.equal(a.frames, b.frames) and a.times == b.times == pytest.approx(plan.times)
        assert a.step == b.step == plan.step
        assert a.frames.shape == (len(plan.times), 3, plan.height, plan.width)


def test_a_zoom_clip_has_no_frame_twice(folder):
    path = get(folder, "vfr.mp4")
    found = probe(path)
    plan = plan_clip(found, [(0, found.duration)], 100, Budget(10000, 4, 16))
    clip = load_clip(plan, path)
    assert len(set(clip.times)) == len(clip.times) == len(clip.frames) < len(plan.times)
    coarse = load_clip(plan_clip(found, None, 100, Budget(10000, 4, 16)), path)
    assert len(coarse.frames) == len(plan.times)  # true to the clock instead


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_zoom_has_the_frames_of_its_span(folder, suffix):
    """25 pictures in the first second, then a still one for 100 s."""
    path = write_video(folder / f"still.{suffix}", 26, pts=[*range(25), 2500], clock=Fraction(1, 25), options=X264)
    found = probe(path)
    assert found.fps == pytest.approx(26 / 100.04, rel=0.02)
    for fps, n in ((2, 2), (10, 10), (50, 25)):
        clip = load_clip(plan_clip(found, [(0, 1)], fps, Budget(10000, 4, 16)), path)
        assert len(clip.times) == n and clip.times[-1] < 1
    assert probe(get(folder, "b.mp4")).moments is None
    still = plan_clip(found, [(20, 80)], 2, Budget(1000, 4, 16))
    assert still.times == (20,) and (still.height, still.width) == frame_size(HEIGHT, WIDTH, 16, 4)
    point = plan_clip(found, [(0.5, 0.5)], 2, Budget(1000, 4, 16))
    assert len(point.times) == 1 and abs(point.times[0] - 0.5) <= 0.04
    assert len(plan_clip(found, None, 50, Budget(10000, 4, 16)).times) == pytest.approx(26, abs=1)


def test_every_frame_at_the_rate_of_a_millisecond_clock(folder):
    """30 frames per second in Matroska are shown at 0, 33, 67, 100 ms: sampling at 30 fps finds each of them."""
    path = write_video(folder / "thirty.mkv", rate=30)
    clip = load_clip(plan_clip(probe(path), [(0, 2)], 30, Budget(10000, 4, 16)), path)
    assert [read_number(frame) for frame in resize(clip.frames, HEIGHT, WIDTH)] == list(range(60))


@pytest.mark.parametrize("name", ["b.mp4", "b.ts"])
def test_cached_frames_are_not_decoded_again(folder, monkeypatch, name):
    path, cache = get(folder, name), FrameCache(10**7)
    first, times = decode(path, [0.0, 0.4, 0.9], (56, 56), cache=cache)
    monkeypatch.setattr("media.decode._answer", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr("media.source.scan", lambda *_: pytest.fail("read through again"))
    again, same = decode(path, [0.9, 0.0, 0.4], (56, 56), cache=cache)
    assert torch.equal(again, first[[2, 0, 1]]) and same == [times[2], times[0], times[1]]


def test_cache_follows_the_file(tmp_path):
    path, cache = tmp_path / "changing.mp4", FrameCache(10**7)
    write_video(path, n=3)
    assert read_number(decode(path, [0.0], (HEIGHT, WIDTH), cache=cache)[0][0]) == 0
    write_video(path, n=3, pts=[40, 80, 120], clock=Fraction(1, 1000), options={**X264, "crf": "30"})
    os.utime(path, ns=(1, 1))
    assert decode(path, [0.04], (HEIGHT, WIDTH), cache=cache)[1] == [pytest.approx(0.04)]
    assert len(cache.items) == 2


def test_cache_under_several_threads(plain):
    cache, whole = FrameCache(60_000), sequential(plain)
    jobs = [lambda k=k: decode(plain, [k % 60 / 25], (HEIGHT, WIDTH), cache=cache)[0][0] for k in range(60)]
    with prefetch(jobs * 2, ahead=8, workers=4) as results:
        for k, frame in enumerate(results):
            assert torch.equal(frame, whole[k % 60])
    assert cache.n_bytes <= 60_000


# ---------------------------------------------------------------- a clip's own time


def clip_of(times: list[float], step: float) -> Clip:
    return Clip(torch.zeros(len(times), 3, 28, 28, dtype=torch.uint8), times, step)


@pytest.mark.parametrize(
    ("times", "step", "span", "expected"),
    [
        ([10.0, 11.0, 12.0], 1.0, (0.5, 2.5), [(10.5, 12.5)]),  # a window
        ([2.0, 2.5, 8.0, 8.5], 0.5, (0.5, 1.5), [(2.5, 3.0), (8.0, 8.5)]),  # over a seam
        ([2.0, 2.5, 8.0, 8.5], 0.5, (1.0, 2.0), [(8.0, 9.0)]),  # at a seam
        ([10.0, 11.0], 1.0, (1.0, 7.0), [(11.0, 12.0)]),  # over the end
        ([10.0, 11.0], 1.0, (5.0, 7.0), []),  # after the end
        ([18.0, 19.0], 1.0, (0.0, 2.0), [(18.0, 19.5)]),  # over the video's end, at 19.5
        ([10.0, 11.001], 1.0, (0.0, 2.0), [(10.0, 12.001)]),  # a file's own clock
    ],
)
def test_spans_of_a_clip_in_the_videos_time(times, step, span, expected):
    found = to_video_time([span], clip_of(times, step), 19.5)
    assert len(found) == len(expected)
    assert [t for pair in found for t in pair] == pytest.approx([t for pair in expected for t in pair])


def test_no_spans_stay_no_spans():
    assert to_video_time(None, clip_of([0.0], 1.0), 1.0) is None
    assert to_video_time([], clip_of([0.0], 1.0), 1.0) == []


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(0, 40), min_size=2, max_size=6),
)
def test_time_is_neither_lost_nor_invented(pieces, edges):
    """Seconds of a span inside the clip = seconds of its image; every image lies in what was shown."""
    step, times, start = 0.5, [], 0.0
    for n in pieces:
        start += 3.0
        times += [start + k * step for k in range(n)]
        start = times[-1]
    spans = [tuple(sorted(pair)) for pair in zip(edges[::2], edges[1::2], strict=False)]
    spans = [(a / 4, b / 4) for a, b in spans]
    clip, length = clip_of(times, step), len(times) * step
    for span in spans:
        images = to_video_time([span], clip, 1000.0)
        inside = max(0.0, min(span[1], length) - min(span[0], length))
        assert sum(end - start for start, end in images) == pytest.approx(inside)
        for a, b in images:
            middle = (a + b) / 2
            assert any(t <= middle < t + step + 1e-9 for t in times)

"""Pieces of a page: times, time lines and film strips, parsed."""

import base64
import doctest
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagetree import Tree, place
from PIL import Image

from report import ReportError, html

deterministic = settings(derandomize=True, deadline=None, max_examples=60)


@deterministic
@given(st.floats(-1e5, 1e5))
def test_clock_is_right_to_a_tenth(seconds):
    sign, minutes, rest = re.fullmatch(r"(-?)(\d{2,}):([0-5]\d\.\d)", html.clock(seconds)).groups()
    assert (-1 if sign else 1) * (int(minutes) * 60 + float(rest)) == pytest.approx(seconds, abs=0.0501)


def test_doctests():
    assert doctest.testmod(html).failed == 0


def test_spans_lie_on_the_time_line_at_their_per_cent():
    root = Tree(html.timeline([[2.5, 6.5]], {"r1": [[3, 8], [14, 19]], "r2": None, "r3": []}, 16.0)).root
    assert [place(n) for n in root.all(cls="true")] == [(15.625, 25.0)]
    assert [place(n) for n in root.all(cls="ghost")] == [(15.625, 25.0)] * 3
    first, cut = root.all(cls="pred")
    assert place(first) == (18.75, 31.25) and first.attrs["title"] == "00:03.0–00:08.0"
    assert place(cut) == (87.5, 12.5) and cut.attrs["title"] == "00:14.0–00:19.0"  # drawn cut off, labelled in full
    assert (cut.attrs["data-start"], cut.attrs["data-end"]) == ("14.0", "19.0")
    assert [n.text for n in root.all(cls="who")] == ["truth", "r1", "r2", "r3"]
    assert [n.text for n in root.all(cls="times")] == [
        "00:02.5–00:06.5", "00:03.0–00:08.0, 00:14.0–00:19.0", "no span", "empty"
    ]  # fmt: skip
    ticks = root.all("i")
    assert [(t.attrs["style"], t.text) for t in ticks[:2]] == [("left:0.000%", "00:00.0"), ("left:31.250%", "00:05.0")]
    assert [n.text for n in Tree(html.timeline(None, {"r": []}, 2.0)).root.all(cls="who")] == ["r"]
    assert Tree(html.timeline([], {}, 2.0)).root.all(cls="times")[0].text == "not annotated"


@deterministic
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), max_size=4), st.floats(0.1, 1e4))
def test_boxes_never_leave_the_time_line(spans, duration):
    for node in Tree(html.bars(spans, duration, "pred")).root.all(cls="span"):
        left, width = place(node)
        assert 0 <= left <= 100 and width >= 0 and left + width <= 100.001


def test_the_end_of_the_time_line_has_a_label():
    ends = [Tree(html.timeline(None, {"r": []}, duration)).root.all("i")[-1] for duration in (16.0, 20.0)]
    assert [(end.attrs["style"], end.text) for end in ends] == [
        ("left:100.000%", "00:16.0"),
        ("left:100.000%", "00:20.0"),
    ]


@pytest.mark.parametrize("duration", [0.3, 1, 16, 59.9, 754, 7200, 36000, 1e6])
def test_ticks_are_few_and_inside(duration):
    ticks = html.tick_times(duration)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 7 and ticks[-1] < duration


@pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf")])
def test_a_time_line_needs_a_duration(duration):
    with pytest.raises(ReportError, match="positive duration"):
        html.timeline([[0, 1]], {}, duration)


def decode(node):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", node.attrs["src"]).groups()
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).transpose(2, 0, 1)


def test_small_frames_are_embedded_exactly_and_shown_larger_by_a_whole_factor():
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 28, 56), dtype=np.uint8)
    root = Tree(html.film_strip(frames, [0.0, 0.5, 1.0], 136, [[0.5, 1.0]])).root  # the end does not belong to it
    for frame, image in zip(frames, root.all("img"), strict=True):
        kind, pixels = decode(image)
        assert kind == "png" and image.attrs["class"] == "small"
        np.testing.assert_array_equal(pixels, frame)
        assert (image.attrs["width"], image.attrs["height"]) == ("112", "56")
    assert [n.text for n in root.all("figcaption")] == ["00:00.0", "00:00.5", "00:01.0"]
    assert [n.attrs["class"] for n in root.all("figure")] == ["context", "evidence", "context"]
    assert "image-rendering: pixelated" in html.beside("style.css").split(".small {")[1].split("}")[0]


def test_large_frames_shrink_and_long_clips_are_thinned_evenly():
    frames = np.full((1, 3, 700, 1400), 90, np.uint8)
    root = Tree(html.film_strip(frames, [0.0], 136)).root
    kind, pixels = decode(root.all("img")[0])
    assert kind == "jpeg" and pixels.shape == (3, 160, 320) and abs(int(pixels.mean()) - 90) <= 1
    assert (root.all("img")[0].attrs["width"], root.all("img")[0].attrs["height"]) == ("136", "68")
    many = np.zeros((200, 3, 8, 8), np.uint8)
    root = Tree(html.film_strip(many, list(range(200)), 136)).root
    times = [n.text for n in root.all("figcaption")]
    assert len(times) == html.MAX_FRAMES and times[0] == "00:00.0" and times[-1] == "03:19.0"
    assert "48 of 200 frames shown" in root.text


@pytest.mark.parametrize(
    ("frames", "times"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), [0, 1]),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 1]),
        (np.zeros((2, 3, 8, 8), np.uint8), [0]),
    ],
)
def test_frames_of_another_shape_are_refused(frames, times):
    with pytest.raises(ReportError, match=r"uint8 \[N, 3, H, W\]"):
        html.film_strip(frames, times, 100)

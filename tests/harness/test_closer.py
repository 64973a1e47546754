"""Looking closer: what is shown of a claim, and that what is claimed there is in the video's time."""

from __future__ import annotations

import re

import pytest
from written import group_of, response_with

from harness import closer
from harness.closer import look_closer, widened
from policy import Vocabulary
from rollout import view_video, zoom_pass
from video import VideoError
from world import lessons, tiny


def test_widened_spans_stay_in_the_video_and_merge():
    assert widened([(0.0, 2.0), (4.0, 6.0)], 6.5) == [(0.0, 6.5)]
    assert widened([(4.0, 6.0)], 20.0) == [(3.0, 7.0)]


def test_looking_closer_is_a_group_whose_claims_are_in_the_videos_time(samples, config, vocabulary, model, monkeypatch):
    views = [view_video(sample, config) for sample in samples[:2]]
    groups = [
        group_of([response_with("(6.0,8.0)"), response_with("(1.0,2.0)")], views[0], vocabulary, config, model),
        group_of([response_with("")], views[1], vocabulary, config, model),
    ]
    shown = []

    def claims(model, views, config, vocabulary, step):
        shown.extend(views)
        return [group_of([response_with("(0.5,2.5)"), "nothing"], view, vocabulary, config, model) for view in views]

    monkeypatch.setattr(closer, "roll_out", claims)
    (near, whole), failed = look_closer(model, groups, config, vocabulary, 3)
    assert failed == {}
    # The first response's 2 s and half as much at each end, at the zoom pass' rate and size.
    assert near.view.clip.times == [5.0 + 0.5 * k for k in range(8)]
    assert near.view.clip.frames.shape[2] > views[0].clip.frames.shape[2]
    assert (shown[0].info.duration, near.view.info.duration) == (4.0, 20.0)
    assert [response.spans for response in near.responses] == [[(5.5, 7.5)], None]
    assert near.view.sample == samples[0] and near.view.draw != views[0].draw
    assert whole.view.clip is views[1].clip and whole.responses[0].spans == [(0.5, 2.5)]
    assert zoom_pass(model, [near], config, vocabulary) == {}
    assert near.responses[0].zoom.clip.times[0] == 5.5


def test_a_video_that_fails_when_looked_at_closer_is_shown_as_before(samples, config, vocabulary, model, monkeypatch):
    view = view_video(samples[0], config)
    group = group_of([response_with("(6.0,8.0)")], view, vocabulary, config, model)

    def broken(*_):
        raise VideoError("a.mp4", "damaged", "")

    monkeypatch.setattr(closer, "zoom_clips", broken)
    [again], failed = look_closer(model, [group], config, vocabulary, 0)
    assert again.view.clip is view.clip and len(again.responses) == config.group_size
    assert list(failed) == [samples[0].id] and "damaged" in str(failed[samples[0].id])


def test_what_is_written_into_the_frames_begins_at_0_too(samples, config):
    """Qwen3-VL reads times as text before its frames; what it claims of them is in these times."""
    tokenizer = tiny.build_tokenizer(lessons.corpus("qwen3_vl"))
    model, vocabulary = tiny.build_model(tokenizer, 0, "qwen3_vl"), Vocabulary.of(tokenizer)
    view = view_video(samples[0], config)
    group = group_of([response_with("(6.0,8.0)")], view, vocabulary, config, model)
    [again], _ = look_closer(model, [group], config, vocabulary, 0)
    stamps = re.findall(r"<([\d.]+) seconds>", tokenizer.decode([i for i in again.prompt.ids.tolist() if i >= 0]))
    assert again.view.clip.times[0] == 5.0
    assert list(map(float, stamps)) == pytest.approx([0.2, 1.2, 2.2, 3.2], abs=0.06)  # pairs of frames, 0.5 s apart

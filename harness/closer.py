"""Repeated zoom: a question is asked again about what was claimed, as if that were the whole video.

`infer.py` does it until the spans stay, training (`--repeated_zoom`) once. Source: Zoom-Zero, Appendix E (future work).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from config import Config
from media.prefetch import prefetch
from policy import Video, Vocabulary, keep_tokens
from prompts import Spans
from rewards import merge
from rollout import Group, View, roll_out, visible_spans, zoom_clips
from video import FrameCache, VideoError, to_video_time


def widened(spans: Spans, duration: float) -> Spans:
    """Each span with half its length more at each end, within the video; overlapping ones are merged."""
    halves = [((end - start) / 2, start, end) for start, end in spans]
    return merge([(max(0.0, start - half), min(duration, end + half)) for half, start, end in halves])


def closer_view(view: View, spans: Spans, config: Config, cache: FrameCache | None = None) -> View:
    """The same question about these spans alone (none: the whole video), as close as a zoom. Raises VideoError."""
    [clip] = zoom_clips(view, [spans], config, cache)
    return replace(view, clip=clip, video=Video.of(clip))


def view_alone(view: View) -> View:
    """The view as a video that has nothing but these frames, the first of them at 0 s."""
    times = [k * view.clip.step for k in range(len(view.clip.times))]
    info = replace(view.info, duration=len(times) * view.clip.step)
    return replace(view, info=info, video=replace(view.video, times=times))


def look_closer(
    model, groups: Sequence[Group], config: Config, vocabulary: Vocabulary, step: int | None
) -> tuple[list[Group], dict[str, VideoError]]:
    """A group more for each question, about what its first response claims, widened, as if that were the whole video.

    It is shown as close as a zoom; without a usable span, or if its frames cannot be decoded, the coarse pass' frames
    are shown again. What is claimed there is put back into the video's time, so that it is paid and zoomed into like
    any other claim. Also returns the ids and errors of samples whose frames could not be decoded.
    """

    def closer(view: View, claimed: Spans | None) -> View:
        spans = visible_spans(claimed, view.info.duration)
        return closer_view(view, widened(spans, view.info.duration), config) if spans else view

    jobs = [partial(closer, group.view, group.responses[0].spans) for group in groups]
    views, failed = [], {}
    with prefetch(jobs, ahead=len(jobs)) as decoded:
        for view in (group.view for group in groups):
            try:
                shown = next(decoded)
            except VideoError as error:
                failed[view.sample.id], shown = error, view
            views.append(replace(shown, draw=(*view.draw, 1), closer=True))  # new responses
    if not config.train_vision:
        keep_tokens(model, [view.video for view in views])
    again = roll_out(model, list(map(view_alone, views)), config, vocabulary, step)
    for group, view in zip(again, views, strict=True):
        group.view = view
        for turn in (turn for response in group.responses for turn in response.turns):
            turn.spans = to_video_time(turn.spans, view.clip, view.info.duration)
    return again, failed

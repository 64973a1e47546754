"""The oracle of the built-in world, who plays episodes as an expert does, knowing the evidence.

It answers coarse questions at once, unless that has failed, and for others calls for the parts of the evidence that no
clip has shown, at 2 frames per second for lights and 1 for patterns. It says what each frame of a clip shows; of a
light, how often it has been out.
"""

from __future__ import annotations

import json

from annotations.rows import Sample
from episodes import ClipEnvironment
from prompts import CALL_END
from rollout import Response
from world import benchmark
from world.lessons import asked_colour, asked_pattern, glimpse, written_spans


class Stuck(Exception):
    """An expert who cannot go on: the message says why."""


class Oracle:
    """Knows the events of the built-in world."""

    name = "oracle"

    def turn(self, scene: ClipEnvironment, episode: Response, failure: str | None) -> str:
        """What the last clip shows, frame by frame, and a call for what is still to be seen, or the answer."""
        sample = scene.view.sample
        colour = asked_colour(sample)
        hidden = [span for span in sample.evidence if not shows(episode, span, sample.kind)]
        seen = " ".join([colour, *noted(sample, episode)])
        if hidden:
            seen += f"<time>{written_spans(hidden)}</time>"
        if not episode.turns:
            seen += f" {glimpse(sample)}"
        if not hidden or (sample.kind == "coarse" and failure is None):
            return f"<think>{seen}</think><answer>{sample.answer}</answer>"
        calls, frames = scene.left(episode)
        fps = 2 if sample.kind in ("blink", "pair") else 1
        most = min(frames, scene.config.frames_per_call)
        start, end = hidden[0]
        if (hidden[-1][1] - start) * fps <= most:  # one call shows all
            end = hidden[-1][1]
        if not calls or (end - start) * fps > most:
            raise Stuck("no calls or frames left for the evidence")
        call = json.dumps({"segment": [start, end], "fps": fps})
        return f"<think>{seen}</think><video_zoom>{call}{CALL_END}"


def knows(sample: Sample) -> bool:
    """Whether a question is one of the built-in world's."""
    return sample.kind in benchmark.KINDS and bool(sample.evidence)


def noted(sample: Sample, episode: Response) -> list[str]:
    """A word for each frame of the last turn's clip: none outside the evidence; the pattern; of a light that is on its
    colour, of one that is out how often it has been so far, in all clips.
    """
    words: list[str] = []
    out: set[int] = set()  # seconds; a light goes out once in a second at most
    for clip in (turn.reply.clip for turn in episode.turns if turn.reply):
        words = []
        for frame, time in zip(clip.frames, clip.times, strict=True) if clip else ():
            if not any(start <= time < end for start, end in sample.evidence):
                words.append("none")
            elif sample.kind in ("coarse", "fine"):
                words.append(asked_pattern(sample))
            elif frame[:, frame.shape[1] // 2, frame.shape[2] // 2].float().mean() > benchmark.GREY:
                words.append(asked_colour(sample))
            else:
                out.add(int(time))
                words.append(benchmark.COUNTS[len(out)])
    return words


def shows(episode: Response, span: tuple[float, float], kind: str) -> bool:
    """Whether the clips of an episode show an event's pattern, or each second in which its light may go out."""
    times = [time for clip in episode.clips for time in clip.times]
    if kind in ("coarse", "fine"):
        return any(span[0] <= time < span[1] for time in times)
    seconds = range(int(span[0]), int(span[1]))
    return all(any(second + 0.25 <= time < second + 0.75 for time in times) for second in seconds)

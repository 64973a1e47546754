"""Long videos of the built-in benchmark: several of its videos joined, with known shots and scenes.

Each of them is a scene in a setting: instead of grey it shows walls whose stripes belong to the setting, filmed by two
cameras that differ in tint, light and distance. An event is a close-up. So shots and scenes are known, but neighbouring
shots of one scene may look less alike than those of two scenes, and settings come back.

As in benchmark.py, everything follows from a seed, and each video belongs to one split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from world.benchmark import CONTRAST, SIZE, Event, Job, check_split, draw_layout, questions, split_of, write_all

# What cameras tint walls with, as (U, V); seconds without events at both ends of a scene.
TINTS = ((128, 148), (111, 118), (145, 118))
MARGIN = 2


@dataclass(frozen=True)
class Wall:
    """A shot that shows no event: whole seconds [start, end), and a striped wall."""

    start: int
    end: int
    angle: float  # radians
    period: float  # pixels from stripe to stripe
    phase: float  # radians
    light: int  # grey levels above GREY
    tint: tuple[int, int]  # (U, V)

    def paint(self, luma: np.ndarray, chroma: np.ndarray) -> None:
        """The stripes and the tint, see `benchmark.Backdrop`."""
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        across = x * np.cos(self.angle) + y * np.sin(self.angle)
        luma += self.light + 0.75 * CONTRAST * np.sin(2 * np.pi * across / self.period + self.phase)
        chroma[0], chroma[1] = self.tint


@dataclass(frozen=True)
class Scene:
    """A part of a long video: whole seconds [start, end), what it shows before and between its events, and these."""

    start: int
    end: int
    walls: tuple[Wall, ...]
    events: tuple[Event, ...]


Film = tuple[Scene, ...]  # a long video


def draw_film(rng: np.random.Generator, n_scenes: int) -> Film:
    """Draw a long video. About every third scene is in the same setting, never two in a row.

    A setting is the angle and the period of its walls' stripes and the tints of its two cameras. Every cut from wall to
    wall changes the tint, and any two settings share one: colour alone does not tell a new scene from a new shot.
    """
    n_settings = max(2, -(-n_scenes // 3))
    angles = np.pi * (rng.random() + np.arange(n_settings)) / n_settings
    periods = rng.uniform(20, 50, n_settings)
    tints = [[TINTS[k] for k in rng.permutation(len(TINTS))[:2]] for _ in range(n_settings)]
    film: list[Scene] = []
    start, setting = 0, int(rng.integers(n_settings))
    for _ in range(n_scenes):
        n_events = int(rng.choice(3, p=[0.4, 0.45, 0.15]))
        length = int(rng.integers(9, 16) if n_events else rng.integers(1, 12))
        events = [shifted(event, start + MARGIN) for event in draw_layout(rng, length, n_events)]
        end = start + length + 2 * MARGIN
        walls: list[Wall] = []
        for first, last in gaps(start, end, events):
            before = film[-1].walls[-1].tint if film and first == start else None
            for cut, next_cut in cut_at_random(rng, first, last):
                others = [tint for tint in tints[setting] if tint != before]
                before = others[int(rng.integers(len(others)))]
                angle, period = float(angles[setting]), float(periods[setting] * rng.uniform(0.85, 1.2))
                phase, light = float(rng.uniform(0, 2 * np.pi)), int(rng.integers(-20, 21))
                walls.append(Wall(cut, next_cut, angle, period, phase, light, before))
        film.append(Scene(start, end, tuple(walls), tuple(events)))
        start, setting = end, (setting + int(rng.integers(1, n_settings))) % n_settings
    return tuple(film)


def shifted(event: Event, seconds: int) -> Event:
    """The same event later."""
    blinks = tuple(second + seconds for second in event.blinks)
    return replace(event, start=event.start + seconds, end=event.end + seconds, blinks=blinks)


def gaps(start: int, end: int, events: Sequence[Event]) -> list[tuple[int, int]]:
    """The times of a scene before, between and after its events."""
    starts, ends = [start, *(event.end for event in events)], [*(event.start for event in events), end]
    return list(zip(starts, ends, strict=True))


def cut_at_random(rng: np.random.Generator, start: int, end: int) -> list[tuple[int, int]]:
    """Cut a time into shots of 2 to 5 s (of 1 s if it is as short as that)."""
    shots = []
    while end - start > 5:
        length = int(rng.integers(2, min(5, end - start - 2) + 1))
        shots.append((start, start + length))
        start += length
    return [*shots, (start, end)]


def films(split: str, seed: int, n_scenes: int) -> Iterator[Film]:
    """The endless, reproducible sequence of a split's long videos."""
    for index in itertools.count():
        film = draw_film(np.random.default_rng([seed, index]), n_scenes)
        if split_of(film) == split:
            yield film


def build_long(
    root: str | Path, split: str, n_videos: int, seed: int = 0, n_scenes: int = 12, workers: int | None = None
) -> Path:
    """Write a split's long videos and what is known of them, unless they are there; the path of a JSON-lines file.

    A row per video: `{"video", "duration", "shots", "scenes", "questions"}`. `video` is relative to the file, `shots`
    and `scenes` are lists of [start, end] in seconds that cover the video without gaps. `questions` has a row as in
    `build` for each question about each scene, with times of the long video, and `scene`, the scene's number from 0.
    """
    check_split(split)
    if n_scenes < 1:
        raise ValueError(f"a long video has at least one scene, not {n_scenes}")
    index = Path(root) / f"long-v1-seed{seed}-{n_scenes}scenes" / f"{split}-{n_videos}.jsonl"
    if index.exists():
        return index
    jobs, rows = [], []
    for film, k in zip(films(split, seed, n_scenes), range(n_videos), strict=False):
        video, duration = f"{split}/{k:05d}.mp4", film[-1].end
        events = [event for scene in film for event in scene.events]
        walls = [wall for scene in film for wall in scene.walls]
        jobs.append(Job(video, duration, events, walls))
        asked = [{**row, "scene": n} for n, scene in enumerate(film) for row in questions(scene.events)]
        rows.append(
            {
                "video": video,
                "duration": float(duration),
                "shots": sorted([float(shot.start), float(shot.end)] for shot in (*walls, *events)),
                "scenes": [[float(scene.start), float(scene.end)] for scene in film],
                "questions": [{"id": f"{split}-{k:05d}-{n}", **row} for n, row in enumerate(asked)],
            }
        )
    return write_all(index, split, jobs, rows, workers)

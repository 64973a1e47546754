"""The built-in benchmark: real mp4 files whose evidence is known.

A video is grey except for a few coloured events of some seconds. Each event shows something in its middle, and a
question asks for it:

| kind   | during the event                                       | can be read                                     |
|--------|--------------------------------------------------------|-------------------------------------------------|
| coarse | a pattern with thick lines                             | in the coarse pass                              |
| fine   | the same patterns with lines one pixel wide            | only at full resolution, in the zoom pass       |
| blink  | a light that goes out for half a second, 0 to 3 times  | only above 1 frame per second, in the zoom pass |
| pair   | the same light in two separate events of one colour    | when both events are zoomed into                |

Coarse frames show the video at whole seconds, where no light is ever out, and at half the resolution, where every fine
pattern averages to the same grey. So on all but coarse questions, the answer is right beyond chance if and only if the
span was: what R_zoom is meant to measure.

Everything follows from a seed. Each layout belongs to exactly one split (by a hash of what is shown), so no video is in
two splits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import av
import numpy as np
from tqdm import tqdm

from media.decode import all_cores

SIZE = 112  # pixels; the pattern fills the central half
FPS = 8
# Colours as (Y, U, V), so that frames are written without any colour conversion.
COLOURS = {
    "red": (90, 100, 210),
    "green": (120, 70, 60),
    "blue": (60, 210, 100),
    "yellow": (180, 40, 150),
    "purple": (90, 180, 180),
    "cyan": (150, 160, 50),
}
PATTERNS = ("rows", "columns", "checks", "dots")
COUNTS = ("never", "once", "twice", "thrice")
KINDS = ("coarse", "fine", "blink", "pair")
SPLITS = ("train", "val", "test")
GREY = 128
CONTRAST = 48  # grey levels around GREY
LIGHT_ON, LIGHT_OFF = 220, 30


@dataclass(frozen=True)
class Event:
    """One coloured event: whole seconds [start, end), and what it shows."""

    start: int
    end: int
    colour: str
    show: str  # "coarse", "fine" or "blink"
    pattern: str = ""  # for coarse and fine
    blinks: tuple[int, ...] = ()  # for blink: seconds n in which the light is out during [n + 0.25, n + 0.75)


class Backdrop(Protocol):
    """What a video shows during [start, end) seconds instead of grey, where there is no event. Hashable."""

    start: int
    end: int

    def paint(self, luma: np.ndarray, chroma: np.ndarray) -> None:
        """Change the frame's luma [SIZE, SIZE] and chroma [2, SIZE / 2, SIZE / 2] in place."""
        ...


# ---------------------------------------------------------------- layouts and questions


def draw_layout(rng: np.random.Generator, duration: int, n_events: int) -> list[Event]:
    """Draw the events of one video: whole seconds, at least one second apart, sorted by time."""
    if n_events > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} events, one colour each, not {n_events}")
    lengths = rng.integers(2, 5, n_events)  # seconds
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))[:n_events]]
    shows = [str(show) for show in rng.choice(["coarse", "fine", "blink"], n_events, p=[0.35, 0.35, 0.3])]
    if n_events > 1 and rng.random() < 0.4:  # two of the events share a colour, and the question is about both
        first, second = np.sort(rng.permutation(n_events)[:2])
        colours[second] = colours[first]
        lengths[[first, second]] = 2, rng.integers(2, 4)
        shows[first] = shows[second] = "blink"
    slack = duration - lengths.sum() - (n_events - 1)
    if slack < 0:
        raise ValueError(f"{n_events} events of up to 4 s, one second apart, do not fit into {duration} s")
    # The slack is cut at random into the gaps before, between and after the events.
    starts = np.sort(rng.integers(0, slack + 1, n_events)) + np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    times = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))

    blinks: dict[str, list[int]] = {}  # per colour: 0 to 3 of the seconds in which it is on, over all its events
    for colour in dict.fromkeys(colours):
        seconds = [s for (start, end), c in zip(times, colours, strict=True) if c == colour for s in range(start, end)]
        count = rng.integers(0, 4) if len(seconds) >= 3 else rng.integers(0, 3)
        blinks[colour] = sorted(int(s) for s in rng.permutation(seconds)[:count])
    events = []
    for (start, end), colour, show in zip(times, colours, shows, strict=True):
        if show == "blink":
            events.append(Event(start, end, colour, show, blinks=tuple(s for s in blinks[colour] if start <= s < end)))
        else:
            events.append(Event(start, end, colour, show, pattern=str(rng.choice(PATTERNS))))
    return events


def questions(events: Sequence[Event]) -> list[dict]:
    """One question per colour: `question`, `options`, `answer` as "(C)", `glue` as [[start, end]], `kind`.

    The options always come in the same order: a policy of a million parameters can then learn letters as classes.
    """
    rows = []
    for colour in dict.fromkeys(event.colour for event in events):
        asked = [event for event in events if event.colour == colour]
        if asked[0].show == "blink":
            kind = "pair" if len(asked) == 2 else "blink"
            question, options = f"How often does {colour} blink?", COUNTS
            right = sum(len(event.blinks) for event in asked)
        else:
            kind, question, options = asked[0].show, f"Which pattern does {colour} show?", PATTERNS
            right = PATTERNS.index(asked[0].pattern)
        rows.append(
            {
                "question": question,
                "options": list(options),
                "answer": f"({'ABCD'[right]})",
                "glue": [[float(event.start), float(event.end)] for event in asked],
                "kind": kind,
            }
        )
    return rows


def split_of(layout: Sequence[object]) -> str:
    """The one split that a layout belongs to: 80% train, 10% val, 10% test, by a hash of the layout."""
    bucket = hashlib.sha256(repr(layout).encode()).digest()[0] % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"


# ---------------------------------------------------------------- pixels and files


def pattern_pixels(name: str, size: int, line: int) -> np.ndarray:
    """A pattern of lines `line` pixels wide, around 0 with unit power: [size, size]."""
    y, x = np.mgrid[0:size, 0:size] // line
    rows, columns = 1.0 - 2 * (y % 2), 1.0 - 2 * (x % 2)
    return {
        "rows": rows,
        "columns": columns,
        "checks": rows * columns,
        "dots": (rows + columns + rows * columns) / np.sqrt(3),
    }[name]


@lru_cache(maxsize=16)
def draw_still(event: Event | None, light_out: bool, backdrop: Backdrop | None) -> tuple[np.ndarray, np.ndarray]:
    """What is seen for a while, without the bar: luma [SIZE, SIZE] and chroma [2, SIZE / 2, SIZE / 2], uint8."""
    luma = np.full((SIZE, SIZE), float(GREY))
    chroma = np.full((2, SIZE // 2, SIZE // 2), 128)
    if backdrop is not None:
        backdrop.paint(luma, chroma)
    half, quarter = SIZE // 2, SIZE // 4
    middle = slice(quarter, quarter + half)
    if event is not None:
        y, u, v = COLOURS[event.colour]
        luma[:] = y
        chroma[0], chroma[1] = u, v
        chroma[:, quarter // 2 : (quarter + half) // 2, quarter // 2 : (quarter + half) // 2] = 128
        luma[middle, middle] = GREY
        if event.show == "blink":
            luma[middle, middle] = LIGHT_OFF if light_out else LIGHT_ON
        elif event.show == "coarse":
            luma[middle, middle] += CONTRAST * pattern_pixels(event.pattern, half, line=quarter // 2)
        else:
            # Lines one pixel wide vanish at half the resolution. A hard edge would leak which lines they were, hence
            # the smooth window.
            window = np.sin(np.pi * (np.arange(half) + 0.5) / half) ** 2
            luma[middle, middle] += CONTRAST * np.outer(window, window) * pattern_pixels(event.pattern, half, line=1)
    still = np.rint(luma).astype(np.uint8), chroma.astype(np.uint8)
    for plane in still:
        plane.setflags(write=False)
    return still


def draw_frame(events: Sequence[Event], time: float, duration: int, backdrops: Sequence[Backdrop] = ()) -> np.ndarray:
    """The frame shown at `time` seconds: planar YUV 4:2:0, uint8 [SIZE * 3 / 2, SIZE]."""
    event = next((event for event in events if event.start <= time < event.end), None)
    backdrop = next((backdrop for backdrop in backdrops if backdrop.start <= time < backdrop.end), None)
    light_out = event is not None and any(second + 0.25 <= time < second + 0.75 for second in event.blinks)
    luma, chroma = draw_still(event, light_out, backdrop)
    frame = np.concatenate([luma.ravel(), chroma.ravel()]).reshape(-1, SIZE)
    # A bar along the bottom grows with time, as players draw it.
    frame[SIZE - 4 : SIZE] = 16
    frame[SIZE - 4 : SIZE, : round(SIZE * time / duration)] = 235
    return frame


def write_video(events: Sequence[Event], path: Path, duration: int, backdrops: Sequence[Backdrop] = ()) -> None:
    """Write one H.264 mp4 at FPS frames per second, nearly lossless so that fine patterns survive."""
    part = path.with_suffix(f".{os.getpid()}.part")
    # An absolute path: what stands before a colon in a relative one would be taken for a protocol.
    with av.open(os.path.abspath(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1", "preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for k in range(duration * FPS):
            image = draw_frame(events, k / FPS, duration, backdrops)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="yuv420p")))
        container.mux(stream.encode())
    part.replace(path)


# ---------------------------------------------------------------- the data set


def draw_duration(rng: np.random.Generator, least: int, most: int) -> int:
    """Whole seconds in [least, most], as often below the geometric mean of both as above; no draw if they are equal."""
    if least == most:
        return most
    return min(most, int(least * ((most + 1) / least) ** rng.random()))


def layouts(
    split: str, seed: int, duration: int, n_events: int, min_duration: int = 0
) -> Iterator[tuple[int, list[Event]]]:
    """The endless, reproducible sequence of a split's layouts, each with its video's seconds: `duration`, or drawn from
    `min_duration` to it.
    """
    index = 0
    while True:
        rng = np.random.default_rng([seed, index])
        seconds = draw_duration(rng, min_duration or duration, duration)
        events = draw_layout(rng, seconds, n_events)
        if split_of(events) == split:
            yield seconds, events
        index += 1


class Job(NamedTuple):
    """A video to write: a path in its folder, and the arguments of `write_video`."""

    video: str
    duration: int
    events: Sequence[Event]
    backdrops: Sequence[Backdrop] = ()


def _write(folder: Path, job: Job) -> None:
    if not (folder / job.video).exists():
        write_video(job.events, folder / job.video, job.duration, job.backdrops)


def write_all(index: Path, split: str, jobs: list[Job], rows: list[dict], workers: int | None) -> Path:
    """Write the videos that are not there yet, several at a time, then the rows that name them."""
    (index.parent / split).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers or all_cores()) as pool:
        done = pool.map(partial(_write, index.parent), jobs, chunksize=16 if len(jobs) > 64 else 1)
        for _ in tqdm(done, total=len(jobs), desc=f"writing {split} videos", unit="video", disable=None):
            pass
    part = index.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(index)
    return index


def build(
    root: str | Path,
    split: str,
    n_videos: int,
    seed: int = 0,
    *,
    duration: int = 20,
    min_duration: int = 0,
    n_events: int = 3,
    workers: int | None = None,
) -> Path:
    """Write a split's videos and its questions, unless they are there, and return the path of its JSON-lines file.

    The file has rows of `{"id", "video", "question", "options", "answer", "glue", "duration", "kind"}`; `video` is
    relative to it. Videos of a smaller build of the same world are used again. `duration` is in seconds; with
    `min_duration`, lengths are drawn from it to `duration`. Raises ValueError if the events do not fit.
    """
    check_split(split)
    lengths = f"{min_duration}to{duration}s" if min_duration else f"{duration}s"
    folder = Path(root) / f"world-v2-seed{seed}-{lengths}-{n_events}events"
    index = folder / f"{split}-{n_videos}.jsonl"
    if index.exists():
        return index
    jobs, rows = [], []
    drawn = layouts(split, seed, duration, n_events, min_duration)
    for (seconds, events), k in zip(drawn, range(n_videos), strict=False):
        video = f"{split}/{k:05d}.mp4"
        jobs.append(Job(video, seconds, events))
        for n, row in enumerate(questions(events)):
            rows.append({"id": f"{split}-{k:05d}-{n}", "video": video, "duration": float(seconds), **row})
    return write_all(index, split, jobs, rows, workers)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: {', '.join(SPLITS)}")

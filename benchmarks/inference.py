"""Questions per second of every strategy of infer.py: one at a time, and with 16 and 64 looks in a pass.

    python -m benchmarks.inference                 # about half an hour on two idle cores
    python -m benchmarks.inference --short         # a few questions, to see that it runs

Two data sets: the built-in world's test split, and long videos, of which decoding is most of the work: one file of 10
minutes at 25 frames per second of 640 x 360 pixels under 30 names, so that nothing decoded for one serves another.
Each line begins with an empty cache of frames. evaluate.py's rows, without controls, stand beside the strategies.

- questions/s: of the whole line, by the clock. CPU: seconds of this process per question, which other work on the
  machine changes less. passes, decoding: seconds that the model computed, and that frames were decoded.
- neither: seconds without a pass and without decoding, in which a decoder could have been at work or frames were
  already there; what the host does between passes. waited: seconds that a pass was put off by decoding in progress.

Writes benchmarks/results/inference.md.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

import config as configuration
import evaluate
from annotations.rows import Sample
from annotations.samples import load_samples
from config import Config
from harness import asking
from harness.asking import Agent, side_by_side
from harness.commands import Settings
from infer import STRATEGIES, load_agent
from media.frames import FrameCache
from tests.numbered import write_video

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 16, 64)
CORES = len(os.sched_getaffinity(0))
COLUMNS = (
    "strategy, looks in a pass",
    "questions/s",
    "CPU s per question",
    "passes, s",
    "decoding, s",
    "waited, s",
    "neither, s",
)
OPTIONS = ("rows", "columns", "checks", "dots")
# One frame per second; the world's budget per frame.
LONG = ["--budget", "2400", "--zoom_budget", "352", "--max_tokens", "48"]


@dataclass
class Clock:
    """When the model computed and when frames were decoded: lists of (start, end) in seconds."""

    passes: list[tuple[float, float]] = field(default_factory=list)
    decoding: list[tuple[float, float]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, passes and decoding are noted."""
        decode, take = asking.decode, {name: getattr(asking, name) for name in ("write", "play", "choose")}

        def timed(function, intervals, *arguments):
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                intervals.append((start, time.perf_counter()))

        asking.decode = partial(timed, decode, self.decoding)
        for name, function in take.items():
            setattr(asking, name, partial(timed, function, self.passes))
        try:
            yield
        finally:
            asking.decode = decode
            for name, function in take.items():
                setattr(asking, name, function)


def seconds(intervals: list[tuple[float, float]]) -> float:
    """Of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def covered(intervals: list[tuple[float, float]]) -> float:
    """Seconds of the union."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def measured(name: str, n: int, work) -> list[str]:
    """A row of the table: `work` answers n questions."""
    clock, cpu, start = Clock(), time.process_time(), time.perf_counter()
    with clock.running():
        work()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    passes, decoding = seconds(clock.passes), seconds(clock.decoding)
    both = covered(clock.passes + clock.decoding)
    cells = (n / wall, cpu / n, passes, decoding, both - passes, wall - both)
    return [name, *(f"{cell:.3g}" for cell in cells)]


def lines(agents: dict[str, Agent], samples: list[Sample], settings: Settings) -> list[list[str]]:
    """Every strategy with every batch, and evaluate.py."""
    rows = []
    for strategy, ask in STRATEGIES.items():
        agent = agents["agent" if strategy == "agent" else "others"]
        for batch in BATCHES:
            fresh = replace(agent, frames=FrameCache(asking.FRAME_BYTES))
            questions = ((sample, ask(fresh, sample, settings)) for sample in samples)
            rows.append(measured(f"{strategy}, {batch}", len(samples), lambda: list(side_by_side(questions, batch))))  # noqa: B023
            print(rows[-1], flush=True)
    agent = agents["others"]
    config = replace(agent.config, eval_batch=BATCHES[-1], eval_controls=False)
    rows.append(
        measured(
            f"evaluate.py, {BATCHES[-1]}",
            len(samples),
            lambda: evaluate.evaluate(agent.model, samples, config, agent.vocabulary, Accelerator(cpu=True), "rows"),
        )
    )
    return rows


def long_videos(folder: Path, n: int, minutes: float) -> list[Sample]:
    """A question about each of n names of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    duration = 60 * minutes
    source = folder / f"long-{minutes:g}min.mp4"
    if not source.exists():
        part = source.with_suffix(".part.mp4")
        write_video(part, round(25 * duration), size=(640, 360))
        part.replace(source)
    samples = []
    for k in range(n):
        video = folder / f"{source.stem}-{k:02d}.mp4"
        if not video.exists():
            os.link(source, video)
        question = f"Which pattern does <{('red', 'blue', 'green')[k % 3]}> show?"
        samples.append(Sample(f"long-{k}", str(video), question, OPTIONS, "A", ((1.0, 5.0),), duration))
    return samples


def loaded(options: list[str]) -> dict[str, Agent]:
    """The built-in policies, for the agent and for the other strategies, shown videos with these options."""
    cpu = torch.device("cpu")
    world: Config = configuration.parse(options)
    zoomer: Config = configuration.parse(["--config", str(ROOT / "recipes" / "cpu_world_agent.yaml"), *options])
    return {"others": load_agent(world, cpu), "agent": load_agent(zoomer, cpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few questions and short videos")
    parser.add_argument("--videos", type=int, default=30, help="long videos [30]")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the long videos [10]")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of the model [cores]"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "cache", help="folder of videos [cache]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "inference.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = loaded(["--cache", str(options.cache)])
    samples = load_samples("world", "test", world["others"].config)[: 24 if options.short else None]
    n, minutes = (4, 0.5) if options.short else (options.videos, options.minutes)
    films = long_videos(options.cache / "long", n, minutes)
    head = f"| {' | '.join(COLUMNS)} |"
    load = os.getloadavg()[0]
    parts = [
        "# Inference",
        f"`python -m benchmarks.inference{' --short' * options.short}`: {CORES} cores, {options.threads} "
        f"threads, {platform.machine()}, torch {torch.__version__}; load of the machine {load:.1f} at the start.",
    ]
    for title, agents, asked, settings in (
        (f"The built-in world: {len(samples)} questions", world, samples, Settings(window=10, window_budget=88)),
        (f"{n} videos of {minutes:g} minutes", loaded(LONG), films, Settings(window=60, window_budget=240)),
    ):
        table = [f"| {' | '.join(row)} |" for row in lines(agents, asked, settings)]
        parts += [f"## {title}", "\n".join([head, "|---|" + "---:|" * 6, *table])]
    parts.append(f"Load of the machine at the end: {os.getloadavg()[0]:.1f}.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()

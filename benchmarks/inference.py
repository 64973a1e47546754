"""Questions per second of every strategy of infer.py: one at a time, and with 16 and 64 looks in a pass.

    python -m benchmarks.inference                                   # about an hour on two idle cores
    python -m benchmarks.inference --sets world --strategies one-stage coarse-to-fine
    python -m benchmarks.inference --short                           # a few questions, to see that it runs

Two sets of questions: the built-in world's test split, and long videos, of which decoding is most of the work: one file
of 10 minutes at 25 frames per second of 640 x 360 pixels under 30 names, so that nothing decoded for one serves
another. Each line begins with an empty cache of frames. evaluate.py's rows, without controls, stand beside the
strategies.

- questions/s: of the whole line, by the clock. CPU: seconds of this process per question, which other work on the
  machine changes less; times: how many of them one at a time takes for each of these.
- passes, decoding: seconds that the model computed, and that frames were decoded. hidden: how much of the decoding
  took place while the model computed.
- waited: seconds in which a pass was put off by decoding in progress. late: seconds, over all looks, between the moment
  when a look's frames were asked for and the decoder was free, and the moment when it began. Apart from what the system
  takes to wake a thread it is 0: computing never waits for a decoder that could have begun earlier.
- neither: seconds without a pass and without decoding: what the host does between passes.

Writes benchmarks/results/inference.md after every line.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from media.decode import all_cores
from media.frames import FrameCache
from tests.numbered import write_video

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 16, 64)
CORES = all_cores()
COLUMNS = ("strategy, looks in a pass", "questions/s", "CPU s per question", "times", "passes, s", "decoding, s")
COLUMNS += ("hidden", "waited, s", "late, s", "neither, s")
OPTIONS = ("rows", "columns", "checks", "dots")
# One frame per second; the world's budget per frame.
LONG = ["--budget", "2400", "--zoom_budget", "352", "--max_tokens", "48"]

Interval = tuple[float, float]  # start and end in seconds


@dataclass
class Clock:
    """When the model computed and when frames were decoded; `late`: seconds by which decoding began after its frames
    were asked for and the decoder was free.
    """

    passes: list[Interval] = field(default_factory=list)
    decoding: list[Interval] = field(default_factory=list)
    late: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, passes and decoding are noted."""
        take = {name: getattr(asking, name) for name in ("write", "play", "choose")}
        clock = self

        class Decoder(ThreadPoolExecutor):
            def submit(self, decode: Callable, requests: list) -> Future:
                return super().submit(clock.decode, decode, requests, time.perf_counter())

        asking.ThreadPoolExecutor = Decoder
        for name, function in take.items():
            setattr(asking, name, partial(self.compute, function))
        try:
            yield
        finally:
            asking.ThreadPoolExecutor = ThreadPoolExecutor
            for name, function in take.items():
                setattr(asking, name, function)

    def decode(self, decode: Callable, requests: list, asked: float) -> float:
        """In the decoder's thread: what was asked for at this time."""
        start = time.perf_counter()
        self.late += start - max(asked, self.decoding[-1][1] if self.decoding else 0.0)
        try:
            return decode(requests)
        finally:
            self.decoding.append((start, time.perf_counter()))

    def compute(self, function: Callable, *arguments: object) -> list:
        """A pass of the model."""
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            self.passes.append((start, time.perf_counter()))


def seconds(intervals: list[Interval]) -> float:
    """Of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def covered(intervals: list[Interval]) -> float:
    """Seconds of the union."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def measured(name: str, n: int, work: Callable[[], object], alone: float | None = None) -> tuple[list[str], float]:
    """A row of the table, and its CPU seconds per question; `work` answers n questions. alone: the same CPU seconds,
    one look at a time.
    """
    clock, cpu, start = Clock(), time.process_time(), time.perf_counter()
    with clock.running():
        work()
    wall, cpu = time.perf_counter() - start, (time.process_time() - cpu) / n
    passes, decoding = seconds(clock.passes), seconds(clock.decoding)
    both = covered(clock.passes + clock.decoding)
    waited = both - passes
    cells = [n / wall, cpu, (alone or cpu) / cpu, passes, decoding, 1 - waited / decoding, waited, clock.late]
    return [name, *(f"{cell:.3g}" for cell in [*cells, wall - both])], cpu


def lines(
    agents: dict[str, Agent], samples: list[Sample], settings: Settings, strategies: list[str]
) -> Iterator[list[str]]:
    """Rows of the table: every strategy with every batch, and evaluate.py."""
    alone: dict[str, float] = {}
    for strategy in strategies:
        agent = agents["agent" if strategy == "agent" else "others"]
        for batch in BATCHES:
            fresh = replace(agent, frames=FrameCache(asking.FRAME_BYTES))
            work = partial(ask_all, fresh, samples, settings, strategy, batch)
            row, cpu = measured(f"{strategy}, {batch}", len(samples), work, alone.get(strategy))
            alone.setdefault(strategy, cpu)
            yield row
    agent = agents["others"]
    config = replace(agent.config, eval_batch=BATCHES[-1], eval_controls=False)
    rows = partial(evaluate.evaluate, agent.model, samples, config, agent.vocabulary, Accelerator(cpu=True), "rows")
    yield measured(f"evaluate.py, {BATCHES[-1]}", len(samples), rows, alone.get("coarse-to-fine"))[0]


def ask_all(agent: Agent, samples: list[Sample], settings: Settings, strategy: str, batch: int) -> None:
    """Answer all questions, up to `batch` looks in a pass."""
    questions = ((sample, STRATEGIES[strategy](agent, sample, settings)) for sample in samples)
    for _, result, _ in side_by_side(questions, batch):
        if isinstance(result, Exception):
            raise result


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


def parse() -> tuple[argparse.Namespace, str]:
    """The options, and the command that they are, without the places of files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=("world", "long"), default=["world", "long"], help="[both]")
    parser.add_argument("--strategies", nargs="+", choices=[*STRATEGIES], default=[*STRATEGIES], help="[all]")
    parser.add_argument("--questions", type=int, default=160, help="about the world [160]")
    parser.add_argument("--videos", type=int, default=30, help="long videos [30]")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the long videos [10]")
    parser.add_argument("--threads", type=int, default=CORES, help="threads of the model [cores]")
    parser.add_argument("--short", action="store_true", help="12 questions and 4 videos of half a minute")
    parser.add_argument("--cache", type=Path, default=ROOT / "cache", help="folder of videos [cache]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "inference.md")
    options, words = parser.parse_args(), []
    for name in ("sets", "strategies", "questions", "videos", "minutes", "threads"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if options.short:
        options.questions, options.videos, options.minutes = 12, 4, 0.5
        words.append("--short")
    return options, " ".join(["python -m benchmarks.inference", *words])


def main() -> None:
    options, command = parse()
    torch.set_num_threads(options.threads)
    cache = ["--cache", str(options.cache)]
    sets = []
    if "world" in options.sets:
        world = loaded([*cache, "--world_test_videos", str((options.questions + 1) // 2)])  # of two questions each
        samples = load_samples("world", "test", world["others"].config)[: options.questions]
        sets.append((f"The built-in world: {len(samples)} questions", world, samples, Settings(10, 88)))
    if "long" in options.sets:
        films = long_videos(options.cache / "long", options.videos, options.minutes)
        title = f"{options.videos} videos of {options.minutes:g} minutes"
        sets.append((title, loaded([*cache, *LONG]), films, Settings(60, 240)))
    parts = [
        "# Inference",
        f"`{command}`, {time.strftime('%Y-%m-%d')}: {CORES} cores of {platform.machine()}, {options.threads} threads, "
        f"torch {torch.__version__}. What the columns mean is in the program.",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for title, agents, asked, settings in sets:
        ask_all(agents["others"], asked[:2], settings, "coarse-to-fine", 1)  # what is imported at first use
        load = f"Load of the machine at the beginning: {os.getloadavg()[0]:.1f}."
        parts.append(f"## {title}\n\n{load}\n\n| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}")
        for row in lines(agents, asked, settings, options.strategies):
            parts[-1] += f"\n| {' | '.join(row)} |"
            print(f"| {' | '.join(row)} |", flush=True)
            options.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

"""Every inference strategy on the built-in world's test split: accuracy by kind of question, spans, and cost.

    python -m benchmarks.strategies --model runs/cpu_world/checkpoint [--answer_model checkpoints/tiny]
    accelerate launch -m benchmarks.strategies ...                     # split over processes

Writes benchmarks/results/strategies.md: one part about videos of 40 s, a length that the policy was trained for, one
about videos of 120 s, which two windows of 60 frames cut in half. The questions' rows are kept in runs/strategies/, one
file per line of a table: after an interruption, running again does only the rest. Intervals are 95%, by drawing videos;
p-values compare with one-stage on the same questions (permutation over videos). Cost is per question, one at a time;
decoded frames are kept for the next question about the same video, in each line anew.
"""

import argparse
import platform
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

import config as configuration
import infer
from annotations.rows import DataError
from annotations.samples import load_samples
from infer import RELEASED, STRATEGIES, Settings, load_agent
from policy import ModelError
from report.intervals import bootstrap, paired_test
from report.scores import summarise
from report.tables import cost, figure, p_text

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "cpu_world.yaml"
DURATIONS = (40, 120)  # of videos, in seconds
PLAIN = Settings()
WINDOWS = Settings(window=60)


@dataclass(frozen=True)
class Entry:
    """One line of the tables."""

    label: str
    strategy: str
    settings: Settings = PLAIN
    answer_model: bool = False  # another model answers
    durations: tuple[int, ...] = DURATIONS  # of the videos it is tried on, in seconds


ENTRIES = (
    Entry("one-stage", "one-stage"),
    Entry("coarse-to-fine", "coarse-to-fine"),
    Entry(
        "divide-and-conquer, 20 frames", "divide-and-conquer", Settings(window=20, window_budget=80), durations=(40,)
    ),
    Entry("divide-and-conquer, top 1", "divide-and-conquer", replace(WINDOWS, top=1), durations=(120,)),
    Entry("divide-and-conquer, top 4", "divide-and-conquer", WINDOWS, durations=(120,)),
    Entry("divide-and-conquer, released", "divide-and-conquer", replace(WINDOWS, **RELEASED), durations=(120,)),
    Entry("ground-then-answer, one model", "ground-then-answer"),
    Entry("ground-then-answer, two models", "ground-then-answer", answer_model=True),
    Entry("repeated-zoom", "repeated-zoom"),
)


def interval(rows: list[dict], name: str) -> str:
    scores, between = summarise(rows), bootstrap(rows)
    return f"{scores[name]:.3f} [{between[name][0]:.2f}, {between[name][1]:.2f}]" if name in scores else "-"


def tables(results: dict[str, list[dict]]) -> str:
    """Scores, cost and comparisons with the first result as Markdown."""
    first = next(iter(results.values()))
    kinds = sorted({row["kind"] for row in first})
    lines = ["| strategy | accuracy | mIoU | Acc@GQA | " + " | ".join(kinds) + " |", "|---" * (4 + len(kinds)) + "|"]
    for label, rows in results.items():
        by_kind = [interval([row for row in rows if row["kind"] == kind], "accuracy") for kind in kinds]
        cells = [*(interval(rows, name) for name in ("accuracy", "mIoU", "Acc@GQA")), *by_kind]
        lines.append(f"| {label} | {' | '.join(cells)} |")

    base = cost(first)
    lines += ["", "| strategy | passes | visual tokens | GFLOP | times | seconds | times |", "|---" * 7 + "|"]
    for label, rows in results.items():
        spent = cost(rows)
        more = {name: spent[name] / base[name] for name in ("gflop", "seconds")}
        lines.append(
            f"| {label} | {spent['passes']:.2f} | {spent['visual_tokens']:.0f} | {spent['gflop']:.2f} | "
            f"{more['gflop']:.2f} | {spent['seconds']:.3f} | {more['seconds']:.2f} |"
        )

    lines += ["", "| accuracy minus that of one-stage | all | p | fine | p |", "|---" * 5 + "|"]
    for label, rows in list(results.items())[1:]:
        cells = []
        for chosen in (lambda row: True, lambda row: row["kind"] == "fine"):
            test = paired_test(list(filter(chosen, rows)), list(filter(chosen, first)), "accuracy")
            cells += [figure(test["difference"], (test["low"], test["high"]), "+"), p_text(test).removeprefix("= ")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "tiny"))
    parser.add_argument("--answer_model", help="answers what --model has found (a line of its own)")
    parser.add_argument("--videos", type=int, default=80, help="test videos")
    parser.add_argument("--cache", default=str(ROOT / "cache"), help="folder of the world's videos")
    parser.add_argument("--rows", default=str(ROOT / "runs" / "strategies"), help="folder of the questions' rows")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "strategies.md"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    accelerator = Accelerator()
    parts = [
        "# Inference strategies on the built-in world",
        f"`python -m benchmarks.strategies {' '.join(sys.argv[1:])}`",
        f"Processes: {accelerator.num_processes}, threads of each: {given.threads}, device: {accelerator.device.type}, "
        f"{platform.machine()}, torch {torch.__version__}. Seconds depend on what else the machine did.",
    ]
    for duration in DURATIONS:
        results = run(given, duration, accelerator)
        rows = results["one-stage"]
        parts.append(f"## Videos of {duration} s: {len({row['video'] for row in rows})}, {len(rows)} questions")
        parts.append(tables(results))
    if accelerator.is_main_process:
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
        Path(given.out).write_text("\n\n".join(parts) + "\n")
        print("\n\n".join(parts))
        print(f"\n{given.out}")


def run(given: argparse.Namespace, duration: int, accelerator: Accelerator) -> dict[str, list[dict]]:
    """The rows of each line of the table about videos of this many seconds."""
    wanted = {"model": given.model, "cache": given.cache}
    wanted |= {"world_test_videos": given.videos, "world_duration": duration, "world_min_duration": 0}
    config = configuration.parse([w for k, v in wanted.items() for w in (f"--{k}", str(v))], recipe=RECIPE)
    with accelerator.main_process_first():
        samples = load_samples("world", "test", config)
    agent = load_agent(config, accelerator.device)
    results = {}
    for entry in ENTRIES:
        if duration not in entry.durations or (entry.answer_model and not given.answer_model):
            continue
        ask, asked, grounder = STRATEGIES[entry.strategy], agent, None
        if entry.answer_model:
            asked = load_agent(replace(config, model=given.answer_model), accelerator.device)
            ask, grounder = partial(infer.ground_then_answer, grounder=agent), given.model
        same = infer.made_with(entry.strategy, grounder, entry.settings, asked.config)
        path = Path(given.rows) / f"{duration}s-{entry.label.replace(', ', '-').replace(' ', '-')}.jsonl"
        results[entry.label] = infer.answer_all(
            asked, ask, samples, entry.settings, path=path, made_with=same, accelerator=accelerator
        )
    return results


if __name__ == "__main__":
    try:
        main()
    except (configuration.ConfigError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")

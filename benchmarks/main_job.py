"""The main job over several seeds: mean and standard deviation of the table it ends with, and its duration.

    python -m benchmarks.main_job                                        # the README's lines are among what it prints
    python -m benchmarks.main_job --label paper -- --tokenadv paper      # any option of train.py, after --

Runs go to runs/main_job/LABEL-SEED; a run that is finished there is not repeated. The table, and the one that the first
seed's console ended with, are printed and written to benchmarks/results/main_job-LABEL.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import tables
from report.results import stored_rows

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("mIoU", "mIoP", "mIoG", "R@0.3", "R@0.5", "accuracy", "zoom_accuracy", "Acc@GQA", "format")
CONTROLS = ("true_zoom_accuracy", "shuffled mIoU", "chance mIoU")
# What is also told apart, and which scores of it.
PARTS = {
    "by_kind": ("mIoU", "accuracy", "Acc@GQA", "zoom_accuracy", "true_zoom_accuracy"),
    "by_duration": ("mIoU", "accuracy", "zoom_accuracy"),
}


def finished_run(out: Path, seed: int, options: list[str]) -> dict:
    """Train with this seed, unless the folder has the result already, and return its evaluation with "seconds"."""
    result = out / "evaluation.json"
    clock = out / "seconds.json"
    if not clock.exists():
        start = time.perf_counter()
        command = ["accelerate", "launch", "train.py", "--seed", str(seed), "--out", str(out), *options]
        subprocess.run(command, cwd=ROOT, check=True)
        clock.write_text(json.dumps(time.perf_counter() - start))
    return {**json.loads(result.read_text()), "seconds": json.loads(clock.read_text())}


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def table(runs: list[dict]) -> str:
    """A Markdown table of scores before and after, and their change."""
    lines = ["| score | before | after | change |", "|---|---|---|---|"]

    def line(name: str, before: list[float], after: list[float]) -> str:
        change = spread([b - a for a, b in zip(before, after, strict=True)])
        return f"| {name} | {spread(before)} | {spread(after)} | {change} |"

    for name in (*SCORES, *CONTROLS):
        lines.append(line(name, *([run[when]["all"][name] for run in runs] for when in ("before", "after"))))
    for by, names in PARTS.items():
        for part in runs[0]["before"][by]:
            for name in names:
                values = ([run[when][by][part][name] for run in runs] for when in ("before", "after"))
                lines.append(line(f"{part}: {name}", *values))
    return "\n".join(lines)


def console(out: Path) -> str:
    """The table that a finished run's console ended with."""
    return tables.table({label: stored_rows(out / f"results-{label}.jsonl") for label in ("before", "after")})


def main() -> None:
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, options = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--label", default="default", help="name of the runs and of the result file")
    given = parser.parse_args(arguments)
    folders = [ROOT / "runs" / "main_job" / f"{given.label}-{seed}" for seed in given.seeds]
    runs = [finished_run(out, seed, options) for out, seed in zip(folders, given.seeds, strict=True)]
    minutes = [run["seconds"] / 60 for run in runs]
    command = "python -m benchmarks.main_job" + "".join(f" {word}" for word in sys.argv[1:])
    text = f"`{command}`\n\nSeeds {given.seeds}, mean ± standard deviation, test split.\n\n{table(runs)}\n\n"
    text += f"Minutes per run, evaluation and start included: {', '.join(f'{m:.1f}' for m in minutes)}.\n\n"
    text += f"Seed {given.seeds[0]}, as the console ends:\n\n```\n{console(folders[0])}\n```\n"
    print(text)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"main_job-{given.label}.md").write_text(text)


if __name__ == "__main__":
    main()

"""Random options of train.py, two steps each: a run ends, or one line says what is wrong. No traceback.

    python -m benchmarks.fuzz_options --runs 200 --out benchmarks/results/fuzz_options.md

Every run starts from one of the built-in recipes, in small, and changes two to six options to random values: other
choices, the ends of their ranges, values around the default. Every fourth one evaluates before and after. Same seed,
same options: `--only N` repeats one. Runs are forks of one process that has done the imports; what is done is kept in a
journal, and running again does the rest.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import config as configuration
import train
from benchmarks.kills import Kill, Mode, attempt
from harness import journal
from report import drawing
from world import benchmark

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("cpu_world", "cpu_longvtg", "cpu_world_agent")
SMALL = "--steps 2 --prompts_per_step 2 --group_size 2 --world_train_videos 4 --world_test_videos 1 --max_tokens 24"
SMALL += " --save_every 2 --n_episodes 1 --tracker none --threads 1"
ODD = 0.05  # share of numbers that may be out of their range
MOST_SECONDS = 600  # of CPU time, after which a run counts as one that does not end
# What the harness sets, what would only make a run long, and where nothing is to be found.
LEFT_OUT = {word.removeprefix("--") for word in SMALL.split() if word.startswith("--")}
LEFT_OUT |= {"out", "cache", "resume", "overwrite", "model", "train_data", "test_data", "data_format", "video_root"}
LEFT_OUT |= {"world_seed", "world_duration", "world_events"}


def draw(name: str, rng: random.Random) -> object:
    """A value for an option: mostly one that it may have."""
    about, kind = configuration.OPTIONS[name], configuration.OPTION_TYPES[name]
    default = configuration.Config.__dataclass_fields__[name].default
    if kind is bool:
        return rng.choice(["true", "false"])
    if about["choices"]:
        return rng.choice(list(about["choices"]))
    if kind is str:
        return rng.choice(["", "Answer.", "{}", "%s \u00e9"])
    above, least, most = (about[limit] for limit in ("above", "least", "most"))
    ends = [limit for limit in (above, least, most) if limit is not None]
    values = [kind(value) for value in (*ends, default, 2 * default, default / 2, 1, 3, 1e-3, 0.5, 1e9, -1)]
    low, high = -math.inf if least is None else least, most or math.inf
    may = [value for value in values if low <= value <= high and (above is None or value > above)]
    return rng.choice(values if rng.random() < ODD else may)


def command(number: int, seed: int, out: str, cache: str) -> tuple[list[str], list[str]]:
    """The command line of a run, and what is random of it."""
    rng = random.Random(f"{seed} {number}")
    recipe = ROOT / "recipes" / f"{rng.choice(RECIPES)}.yaml"
    names = [
        name for name, about in configuration.OPTIONS.items() if "train" in about["used_by"] and name not in LEFT_OUT
    ]
    words = [f"--{name}={draw(name, rng)}" for name in rng.sample(names, rng.randint(2, 6))]
    test = "world" if number % 4 == 0 else ""
    fixed = ["--config", str(recipe), *SMALL.split(), "--test_data", test, "--out", out, "--cache", cache]
    return [*fixed, *words], [recipe.stem, *words]


def run(number: int, seed: int, cache: str) -> tuple[dict, str]:
    """What became of a run, and all that it said: it "ran", was "refused" in one line, left a "traceback", or did "not
    end".
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        arguments, words = command(number, seed, f"{folder}/run", cache)
        mode = Mode(train.main, lambda out: arguments, lambda out: None)
        status = attempt(mode, arguments, log, Kill(seconds=MOST_SECONDS))
        said = log.read_text(errors="replace")
    lines = said.rstrip().splitlines()
    refused = status == 1 and lines and lines[-1].startswith("error: ")
    end = "ran" if status == 0 else "refused" if refused else "traceback" if status > 0 else "not end"
    line = lines[-1].removeprefix("error: ") if refused else ""
    return {"number": number, "seed": seed, "options": words, "end": end, "line": line, "status": status}, said


def table(runs: int, seed: int, rows: Sequence[dict]) -> str:
    """How the runs ended, and what was refused, as a page."""
    counts = Counter(row["end"] for row in rows)
    reasons = Counter(re.sub(r"\S*\d\S*", "N", row["line"]) for row in rows if row["end"] == "refused")
    lines = [
        "# Random options",
        "",
        f"`python -m benchmarks.fuzz_options --runs {runs} --seed {seed}`: {len(rows)} runs of train.py on the CPU,",
        "two steps each, with two to six options set at random; every fourth one evaluates before and after.",
        "",
        "| end | runs |",
        "| --- | --- |",
        *(f"| {name} | {counts[name]} |" for name in ("ran", "refused", "traceback", "not end")),
        "",
        "Refused, each with one line (numbers and paths as N):",
        "",
        "| line | runs |",
        "| --- | --- |",
        *(f"| {line.replace('|', chr(92) + '|')} | {count} |" for line, count in reasons.most_common()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the options (default: %(default)s)")
    parser.add_argument("--only", type=int, help="this run alone, with what it says")
    parser.add_argument("--cache", default="cache", help="folder of the built-in videos (default: %(default)s)")
    parser.add_argument("--journal", default="runs/fuzz_options.jsonl", help="what is done (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the counts to this file, after every run")
    options = parser.parse_args()
    drawing.save_figure(drawing.new_figure(1, 1), Path(tempfile.gettempdir()) / "fuzz_options.png")  # imports it
    for split, count in (("train", 4), ("test", 1)):
        benchmark.build(options.cache, split, count, workers=1)
    if options.only is not None:
        row, said = run(options.only, options.seed, options.cache)
        print(said, row, sep="\n")
        return
    journal.begin(options.journal)
    rows = [row.fields for row in journal.read(options.journal)]
    done = {row["number"]: row for row in rows if row["seed"] == options.seed}
    for number in range(options.runs):
        if number not in done:
            done[number], said = run(number, options.seed, options.cache)
            journal.append(options.journal, done[number])
            print(number, done[number]["end"], *done[number]["options"], done[number]["line"], flush=True)
            if done[number]["end"] not in ("ran", "refused"):
                print(said, flush=True)
        if options.out:
            rows = [done[k] for k in range(options.runs) if k in done]
            options.out.write_text(table(options.runs, options.seed, rows))
    ends = Counter(row["end"] for row in done.values())
    print(", ".join(f"{count} {name}" for name, count in ends.items()))
    sys.exit(0 if set(ends) <= {"ran", "refused"} else 1)


if __name__ == "__main__":
    main()

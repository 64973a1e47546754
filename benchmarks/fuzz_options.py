"""Random options of train.py, two steps each: a run ends, or one line says what is wrong. No traceback.

    python -m benchmarks.fuzz_options --runs 200 --out benchmarks/results/fuzz_options.md

Every run starts from one of the built-in recipes, in small, and changes two to six options to random values: other
choices, the ends of their ranges, values around the default. Same seed, same options: `--only N` repeats one.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import config as configuration

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("cpu_world", "cpu_longvtg", "cpu_world_agent")
SMALL = "--steps 2 --prompts_per_step 2 --group_size 2 --world_train_videos 4 --world_test_videos 2 --max_tokens 24"
SMALL += " --save_every 1 --n_episodes 1 --tracker none --threads 1"
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
    ends = [limit for limit in (about["above"], about["least"], about["most"]) if limit is not None]
    values = [*ends, default, 2 * default, default / 2, 1, 3, 1e-3, 0.5, 1e9, -1]
    value = rng.choice(values)
    return int(value) if kind is int else float(value)


def command(number: int, seed: int, out: str, cache: str) -> list[str]:
    """The command line of a run."""
    rng = random.Random(f"{seed} {number}")
    recipe = ROOT / "recipes" / f"{rng.choice(RECIPES)}.yaml"
    names = [
        name for name, about in configuration.OPTIONS.items() if "train" in about["used_by"] and name not in LEFT_OUT
    ]
    words = [f"--{name}={draw(name, rng)}" for name in rng.sample(names, rng.randint(2, 6))]
    return ["--config", str(recipe), *SMALL.split(), "--out", out, "--cache", cache, *words]


def outcome(done: subprocess.CompletedProcess) -> str:
    """ "ran", "refused" in one line, or "traceback"."""
    if "Traceback" in done.stderr or done.returncode not in (0, 1):
        return "traceback"
    if done.returncode == 0:
        return "ran"
    return "refused" if done.stderr.rstrip().splitlines()[-1].startswith("error: ") else "traceback"


def table(given: argparse.Namespace, counts: Counter[str], reasons: Counter[str]) -> str:
    """How the runs ended, and what was refused, as a page."""
    lines = [
        "# Random options",
        "",
        f"`python -m benchmarks.fuzz_options --runs {given.runs} --seed {given.seed}`: {counts.total()} runs of",
        "train.py on the CPU, two steps each, with two to six options set at random.",
        "",
        "| end | runs |",
        "| --- | --- |",
        *(f"| {name} | {counts[name]} |" for name in ("ran", "refused", "traceback")),
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
    parser.add_argument("--out", type=Path, help="write the counts to this file, after every run")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for number in [given.only] if given.only is not None else range(given.runs):
        with tempfile.TemporaryDirectory() as folder:
            words = command(number, given.seed, f"{folder}/run", given.cache)
            done = subprocess.run(
                [sys.executable, "train.py", *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=1800,
                check=False,
            )
        found = outcome(done)
        counts[found] += 1
        print(number, found, *words[len(SMALL.split()) + 6 :], flush=True)
        if found == "refused":
            last = done.stderr.rstrip().splitlines()[-1]
            reasons[re.sub(r"\S*\d\S*", "N", last.removeprefix("error: "))] += 1
            print("  ", last, flush=True)
        if found == "traceback" or given.only is not None:
            print(done.stderr, flush=True)
        if given.out:
            given.out.write_text(table(given, counts, reasons))
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    sys.exit(1 if counts["traceback"] else 0)


if __name__ == "__main__":
    main()

"""Ledgers: what the benchmarks' runs of train.py began with, and what came out, so that none is run twice or left out.

A ledger is a file of JSON lines. One is added when a run starts and one when it ends, with its scores and its curves: a
later session goes on with the rest, and a run that was started and is not reported can be seen. Lines about another
start, another recipe or other options stay in the file, but do not count.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from report.curves import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TEN = 10  # steps that a point of a curve is the mean of


def recipe_hash(recipe: Path) -> str:
    """The first digits of the hash of a recipe's options; comments do not count."""
    return _digits(json.dumps(yaml.safe_load(recipe.read_text()), sort_keys=True).encode())


def beginning(checkpoint: Path, recipe: Path) -> str:
    """What training begins with: the first digits of the hashes of a checkpoint's weights and of a recipe's options."""
    return f"{_digits((checkpoint / 'model.safetensors').read_bytes())}-{recipe_hash(recipe)}"


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


@dataclass
class Ledger:
    """The file of what was started and what came out; lines are added by several threads.

    `key`: from the name of a run, what it begins with and its options. A line counts if it has these.
    """

    path: Path
    key: Callable[[str], tuple[str, Sequence[str]]]

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def lines(self) -> list[dict]:
        """The lines that count, oldest first."""
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in found if (line["start"], line["options"]) == self._key(line["name"])]

    def ended(self) -> dict[tuple[str, int], dict]:
        """What came out, by name and seed."""
        return {(line["name"], line["seed"]): line for line in self.lines() if line["event"] == "ended"}

    def add(self, name: str, seed: int, event: str, **more) -> None:
        start, options = self._key(name)
        line = {"name": name, "seed": seed, "event": event, "start": start, "options": options, **more}
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _key(self, name: str) -> tuple[str, list[str]]:
        start, options = self.key(name)
        return start, list(options)

    def count(self) -> str:
        """How many runs were started and what became of them."""
        events = [line["event"] for line in self.lines()]
        started, ended, failed = map(events.count, ("started", "ended", "failed"))
        return f"Runs started {started}, ended {ended}, failed {failed}; the rest was interrupted."


def lines_of(found: dict[tuple[str, int], dict], name: str) -> list[dict]:
    """What came out of each seed of a name, in their order."""
    return [line for (other, _), line in sorted(found.items()) if other == name]


def blocks(values: Sequence[float]) -> list[float]:
    """Means over ten steps, rounded; a shorter rest is left out."""
    return [round(statistics.mean(values[k : k + TEN]), 4) for k in range(0, len(values) - TEN + 1, TEN)]


def noted_run(
    ledger: Ledger,
    name: str,
    seed: int,
    out: Path,
    options: Sequence[str],
    before: Path,
    note: Callable[[Path], dict],
) -> None:
    """A run of train.py into the folder `out`, noted when it starts, and when it ends with what `note` reads there;
    "failed" with its exit code otherwise. `before`: where what the start answered is kept, for the runs that follow.
    """
    ledger.add(name, seed, "started")
    command = ["accelerate", "launch", "train.py", "--seed", f"{seed}", "--out", str(out), "--threads", "1"]
    if before.exists():
        command += ["--eval_before", str(before)]
    begun = time.perf_counter()
    done = subprocess.run([*command, "--overwrite", *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        ledger.add(name, seed, "failed", code=done.returncode)
        return
    if not before.exists():
        shutil.copy(out / "results-before.jsonl", before)
    seconds = round(time.perf_counter() - begun)
    ledger.add(name, seed, "ended", **note(out), seconds=seconds)


def scores_of(out: Path, parts: Sequence[str]) -> dict[str, dict]:
    """These parts of a finished run's scores, before and after it."""
    scores = json.loads((out / "evaluation.json").read_text())
    return {when: {part: scores[when][part] for part in parts} for when in ("before", "after")}


def curves_of(out: Path, wanted: Callable[[str], bool]) -> dict[str, list[float]]:
    """The curves of a finished run whose names are wanted, in `blocks`."""
    rows = read_metrics(out / "metrics.jsonl")
    return {key: blocks([row[key] for row in rows]) for key in filter(wanted, rows[0])}


def reward_mean(key: str) -> bool:
    """Whether a curve is that of a reward."""
    return key.startswith("reward/") and key.endswith("_mean")

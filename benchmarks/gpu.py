"""Whether what has a branch for CUDA is right there, and what 7B costs on one GPU beside what the GPU can do.

    bash benchmarks/gpu.sh                          # benchmarks/results/gpu.md; at most 6 minutes on one H100
    bash benchmarks/gpu.sh --dry                    # the same sections in small on the CPU, printed only
    bash benchmarks/gpu.sh --only kernels policy    # some sections; --out FILE: elsewhere

It needs torch and transformers, no network, no video decoder; *lora* needs peft, *job* PyAV, *tests* pytest. Each
section is a process of its own with a limit of its own, so that one that fails, hangs or breaks the device leaves the
others alone; the file is written after every line. Those that only check run at the same time, before those that are
timed.

- *kernels*: attention of a tree, cached decoding, chunked KL, choice of tokens, against float64.
- *policy*: vision tower, gradients of whole models, sampling with and without CUDA graphs, episodes, a streamed
  reference, against float64 or against the CPU.
- *families*: the same of the built-in Qwen3-VL.
- *training*: the 20M policy under autocast on the GPU and in float32: losses on the same data, and how rewards rise
  over several seeds.
- *tests*: those of tests/ that need a GPU.
- *seven*: Qwen2.5-VL-7B's shapes with random weights in bfloat16; the policy is its own reference, there is no
  optimiser: 17 GB of weights and as much of gradients. Each figure is the better of two runs. Peaks beside the plan of
  benchmarks/memory.py.
- *lora*: an update of the same shapes with adapters and AdamW, beside that plan.
- *job*: train.py on the built-in world, as a user runs it.
- *plain*: the 7B shapes with transformers alone: the prompt is copied for each response.

A check compares an error with a bound. Errors are norms of differences over norms. In half precision the bound is twice
the error of a plain implementation of the same thing in the same type on the same device (PyTorch's matrix products,
softmax and autograd, or transformers); in float32 a few of its last digits (1e-6) are added.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import absent  # noqa: F401  (before whatever imports PyAV)

# isort: split
from benchmarks import gpu_checks, gpu_runs, gpu_seven
from benchmarks.engine import row, versions
from benchmarks.gpu_checks import FAILED, SUSPECT, Setting

ROOT = Path(__file__).resolve().parents[1]
RUN: dict[str, Callable[[Setting, Path], None]] = {
    "kernels": gpu_checks.kernels,
    "policy": gpu_checks.whole_policy,
    "families": gpu_checks.families,
    "training": gpu_checks.training,
    "tests": gpu_runs.tests,
    "seven": gpu_seven.seven,
    "lora": gpu_runs.lora,
    "job": gpu_runs.job,
    "plain": gpu_seven.plain,
}
SECTIONS = {"kernels": 130, "policy": 150, "families": 150, "training": 150, "tests": 150}  # seconds, at the same time
TIMED = {"seven": 100, "lora": 50, "job": 160, "plain": 70}  # one after the other


def header(dry: bool) -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = "no GPU"
    command = "bash benchmarks/gpu.sh" + " --dry" * dry
    return ["# On a GPU", "", f"`{command}`", "", f"{datetime.date.today()}; {card}; {versions()}."]


def compose(top: list[str], body: list[str]) -> str:
    """The file: what was found so far, with what failed and what became of the suspects."""
    suspects = [line[len(SUSPECT) :].strip() for line in body if line.startswith(SUSPECT)]
    failed = [line for line in body if FAILED in line]
    lines = [*top, "", f"Failed: {len(failed)}.", *failed]
    lines += [line for line in body if not line.startswith(SUSPECT)]
    if suspects:
        lines += ["", "## Suspects", "", row(["suspect", "found"]), "|---|---|", *(f"| {line} |" for line in suspects)]
    return "\n".join(lines) + "\n"


def run_section(name: str, limit: float, dry: bool, scratch: Path, take: Callable[[str], None]) -> None:
    """A section in a process of its own, which is ended after `limit` seconds; `take` gets its lines."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--scratch", str(scratch)]
    threads = {} if name in TIMED else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(SECTIONS)))}
    start = time.monotonic()
    take("")
    take(f"## {name}")
    errors = scratch / f"{name}.err"
    with errors.open("w") as file:
        command += ["--dry"] * dry
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True, env=threads | os.environ
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:
            take(line.rstrip("\n"))
        code = process.wait()
        timer.cancel()
    seconds = time.monotonic() - start
    take("")
    take(f"{name} took {seconds:.0f} s.")
    if code:
        take(f"{FAILED}: {name} ended with code {code} after {seconds:.0f} of {limit:.0f} s:")
        for line in ["```", *errors.read_text().splitlines()[-25:], "```"]:
            take(line)


class Report:
    """The file, written after every line of any section."""

    def __init__(self, out: Path, dry: bool, names: Sequence[str]):
        self.out, self.top, self.lock = out, header(dry), threading.Lock()
        self.bodies: dict[str, list[str]] = {name: [] for name in names}
        out.parent.mkdir(parents=True, exist_ok=True)

    def take(self, name: str, line: str) -> None:
        with self.lock:
            self.bodies[name].append(line)
            self.out.write_text(compose(self.top, self.lines()))
            print(f"{name:8} {line}", flush=True)

    def lines(self) -> list[str]:
        return [line for body in self.bodies.values() for line in body]


def run_all(report: Report, end: float, dry: bool) -> None:
    """First what only checks, at the same time; then what is timed. All of it until `end`, in seconds."""
    names = list(report.bodies)
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str) -> None:
            take, left = partial(report.take, name), end - time.monotonic()
            if left < 10:
                return take(f"{FAILED}: no time was left for {name}")
            limit = 3600 if dry else (SECTIONS | TIMED)[name]
            run_section(name, min(left, limit), dry, Path(folder), take)

        with ThreadPoolExecutor(1 if dry else len(SECTIONS)) as together:
            list(together.map(run, [name for name in names if name in SECTIONS]))
        for name in (name for name in names if name in TIMED):
            run(name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="the same in small on the CPU")
    parser.add_argument("--only", nargs="+", choices=RUN, default=list(RUN), metavar="SECTION")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.md; a temporary file with --dry")
    parser.add_argument("--minutes", type=float, default=6, help="for everything; without --dry")
    parser.add_argument("--section", choices=RUN, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.section:
        RUN[given.section](Setting(given.dry), given.scratch)
        return 0
    end = time.monotonic() + (3600 if given.dry else 60 * given.minutes)
    fallback = Path(tempfile.gettempdir()) / "gpu.md" if given.dry else ROOT / "benchmarks" / "results" / "gpu.md"
    report = Report(given.out or fallback, given.dry, given.only)
    run_all(report, end, given.dry)
    failed = sum(FAILED in line for line in report.lines())
    print(f"\n{report.out}: {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

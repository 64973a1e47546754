"""What a user of one GPU runs: an update with LoRA at 7B's shapes, the main job, and the tests that need a GPU: the
sections *lora*, *job* and *tests* of `benchmarks/gpu.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import policy
from benchmarks import memory
from benchmarks.engine import Meter, Ours, Problem, make_problem, row
from benchmarks.gpu_checks import FAILED, HALF, Setting, check, distance, head, say
from benchmarks.gpu_seven import build, planned
from benchmarks.memory import GIB
from config import Config
from engine import lora as adapters

ROOT = Path(__file__).resolve().parents[1]
TEXT = (64, memory.TEXT_TOKENS - 64)  # ids around the clip: as many as the plan counts


def missing(*packages: str) -> bool:
    """Whether one of them is not installed; says so."""
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            say("", f"{name} is not installed.")
            return True
    return False


# ---------------------------------------------------------------- lora


def states(ours: Ours, problem: Problem) -> torch.Tensor:
    """Each time with autocast anew: it would go on with its copies of the adapters that were there first."""
    with torch.no_grad(), torch.autocast(ours.device.type, HALF):
        return ours.hidden(ours.model, problem, slice(1))


def adapter_checks(ours: Ours, problem: Problem, base: torch.Tensor) -> None:
    """New adapters change nothing; others do, and switched off they leave the base to the bit."""
    check("new adapters, change of the states", distance(states(ours, problem), base), 0)
    for name, weight in ours.model.named_parameters():
        if name.endswith(adapters.B):
            weight.data.normal_(std=0.1)
    check(
        "other adapters, share of the states that they leave",
        float((states(ours, problem) == base).float().mean()),
        0.5,
    )
    with adapters.adapters_off(ours.model):
        check("adapters off, change of the states", distance(states(ours, problem), base), 0)
    for name, weight in ours.model.named_parameters():
        if name.endswith(adapters.B):
            weight.data.zero_()


def lora(at: Setting, scratch: Path) -> None:
    """One update with AdamW, the better of two: G = 8, 8,192 visual tokens and 256 others, 512 tokens each."""
    if missing("peft"):
        return
    visual, group, length = at(8192, 128), at(8, 2), at(512, 8)
    recipe = Config(
        lora_rank=16, train_vision=False, group_size=group, max_tokens=length, rollout_batch=1, zoom_batch=1
    )
    model = build(at)
    ours = Ours(model, model, optimise=False)
    problem = make_problem(model.config, visual, group, length, text=TEXT)
    policy.keep_tokens(model, problem.prompts[0].videos)  # as in training: the tower is not trained
    small = make_problem(model.config, 64, 2, 8, seed=1)
    base = states(ours, small)
    targets = recipe.lora_targets.split(",")
    adapters.add_adapters(model, recipe.lora_rank, recipe.lora_alpha, targets, recipe.train_vision, seed=0)
    head("check", "error", "bound", "")
    adapter_checks(ours, small, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True if at.cuda else None)

    def update() -> None:
        with torch.autocast(at.device, HALF):
            with adapters.adapters_off(model):
                reference = ours.reference_states(problem)
            ours.backward(problem, reference)
        ours.optimizer.step()
        ours.optimizer.zero_grad()

    meter, costs, peak = Meter(at.device, memory=False), [], 0
    for _ in range(2):
        meter.start()
        update()
        costs.append(meter.stop().seconds)
        peak = max(peak, torch.cuda.max_memory_allocated() if at.cuda else 0)
    plan = planned(model.config, recipe, visual, sum(TEXT))
    phases = memory.totals([part for part in plan if not part.name.startswith("allowance")])
    most = max(phases[phase] for phase in (*memory.UPDATE, "optimiser"))
    if at.cuda:
        check("peak of an update with LoRA beside its plan, difference", abs(peak / most - 1), 0.1)
    say(
        "",
        f"Trained: {sum(p.numel() for p in trained):,} parameters, planned {memory.adapters(model.config, recipe):,}.",
    )
    say(f"An update with the reference's pass: {min(costs):.2f} s (the first {costs[0]:.2f} s); ")
    say(f"peak {peak / GIB:.1f} GiB, planned {most / GIB:.1f} GiB.")


# ---------------------------------------------------------------- whole programs


def job(at: Setting, scratch: Path) -> None:
    """The main job's recipe with fewer videos and steps, as a program of its own per precision."""
    if missing("av", "accelerate"):
        return
    head(
        "mixed_precision",
        "exit code",
        "s in all",
        "s per step",
        "rollout",
        "zoom",
        "update",
        "rewards, first quarter",
        "last",
    )
    wrong = []
    for precision in ("no", "bf16"):
        out = scratch / f"job-{precision}"
        command = [sys.executable, "train.py", "--out", str(out), "--cache", str(scratch / "cache")]
        command += ["--steps", str(at(20, 1)), "--mixed_precision", precision]
        command += ["--world_train_videos", str(at(80, 8)), "--world_test_videos", str(at(8, 2))]
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - start
        file = out / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        say(row([precision, done.returncode, f"{seconds:.0f}", *step_cells(rows)]))
        if done.returncode or len(rows) != at(20, 1):
            wrong += [f"{precision} {FAILED}: {len(rows)} steps", "```", *done.stderr.splitlines()[-25:], "```"]
        elif (out / "evaluation.json").exists():
            found = json.loads((out / "evaluation.json").read_text())
            wrong.append(
                f"{precision}: " + ", ".join(f"{when} mIoU {found[when]['all']['mIoU']:.3f}" for when in found)
            )
    say("", *wrong)


def step_cells(rows: list[dict]) -> list[str]:
    """Median seconds of a step and of its phases, and the sum of the rewards at both ends."""
    if not rows:
        return ["-"] * 6
    middle = len(rows) // 2
    names = ("step", "rollout", "zoom", "update")
    cells = [f"{sorted(r[f'seconds/{name}'] for r in rows)[middle]:.2f}" for name in names]
    paid = [
        sum(value for name, value in r.items() if name.startswith("reward/") and name.endswith("_mean")) for r in rows
    ]
    quarter = max(1, len(rows) // 4)
    return cells + [f"{sum(part) / quarter:.3f}" for part in (paid[:quarter], paid[-quarter:])]


def tests(at: Setting, scratch: Path) -> None:
    """Those that are skipped without a GPU."""
    if missing("pytest", "hypothesis", "av"):
        return
    files = ["tests/engine/test_sampling.py", "tests/test_kl.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "captured_steps or on_cuda",
        *files,
    ]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # packages may be there, too
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    lines = done.stdout.splitlines()
    if done.returncode:
        say(
            "",
            f"pytest {FAILED} with code {done.returncode}:",
            "```",
            *lines[-60:],
            *done.stderr.splitlines()[-10:],
            "```",
        )
    else:
        say("", lines[-1])

"""What a training step reports: the figures of its line in metrics.jsonl, over the whole batch and all processes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from config import Config, ConfigError, clipped
from harness.journal import save_whole
from rewards import paid_facets
from rollout import Group

log = logging.getLogger("zoomgrpo")


def start_tracker(config: Config, accelerator: Accelerator) -> None:
    """Raises ConfigError if the tracker's package is missing."""
    if config.tracker != "none":
        accelerator.init_trackers("zoomgrpo", config=asdict(config))
        if accelerator.is_main_process and not accelerator.trackers:
            raise ConfigError(f"tracker = {config.tracker}: its package is not installed")


def keep_metrics(path: Path, done: int, accelerator: Accelerator) -> None:
    """Start metrics.jsonl, or cut it back to the steps that the checkpoint has. Lines that cannot be read are left out
    (a crash may have cut one short); steps without a line are named.
    """
    if not accelerator.is_main_process:
        return
    lines = {}  # by step
    for line in path.read_bytes().splitlines(keepends=True) if done and path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            lines[json.loads(line)["step"]] = line.rstrip(b"\n") + b"\n"
    if lacking := [step for step in range(done) if step not in lines]:
        log.warning("%s: no line that can be read for steps %s; curves go on without", path, clipped(lacking))
    kept = b"".join(lines[step] for step in range(done) if step in lines)
    save_whole(path, lambda part: part.write_bytes(kept))


def log_step(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    """One line of metrics.jsonl, and the tracker. run: `setup.Run`."""
    run.accelerator.log(dict(metrics), step=step)
    if run.accelerator.is_main_process:
        with open(Path(run.config.out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


# ---------------------------------------------------------------- figures


def step_figures(
    groups: Sequence[Group], totals: Mapping[str, float], seconds: float, config: Config, accelerator: Accelerator
) -> dict[str, float]:
    """All figures of a step, from this process' groups, its sums of statistics, and the step's seconds.

    Rewards are those of groups that saw the whole video; those of closer looks at what was claimed (repeated zoom) have
    `closer/` before their names.
    """
    whole, closer = ([group for group in groups if group.view.closer == kind] for kind in (False, True))
    figures = reward_figures(whole, config, accelerator) | response_figures(groups, config, accelerator)
    if closer:
        figures |= {f"closer/{name}": value for name, value in reward_figures(closer, config, accelerator).items()}
    figures |= loss_figures(totals, config, accelerator)
    return figures | throughput(groups, seconds, accelerator)


def gathered(rows: Sequence[Sequence[float]], accelerator: Accelerator) -> Tensor:
    """These rows of all processes, [B, G]."""
    return accelerator.gather(torch.tensor(rows, dtype=torch.float64, device=accelerator.device).float())


def reward_figures(groups: Sequence[Group], config: Config, accelerator: Accelerator) -> dict[str, float]:
    """Of each facet: mean and deviation, share of samples that it applies to, share of groups without variance."""
    figures: dict[str, float] = {}
    varied = torch.zeros((), dtype=torch.bool, device=accelerator.device)  # becomes [B]: of each group
    nothing = [math.nan] * config.group_size
    for name in paid_facets(config):
        values = gathered([group.rewards.get(name, nothing) for group in groups], accelerator)  # [B, G]
        applies = ~values.isnan().any(-1)
        figures[f"applies/{name}"] = applies.float().mean().item()
        if not applies.any():
            continue
        differs = values.std(-1, unbiased=False) > 1e-6
        varied = varied | differs
        figures[f"reward/{name}_mean"] = values[applies].mean().item()
        figures[f"reward/{name}_std"] = values[applies].std(unbiased=False).item()
        figures[f"zero_variance/{name}"] = 1 - differs[applies].float().mean().item()
    figures["zero_variance_fraction"] = 1 - varied.float().mean().item()
    return figures


def response_figures(groups: Sequence[Group], config: Config, accelerator: Accelerator) -> dict[str, float]:
    """Length, share without an end, and of episodes: turns, calls, and calls that returned frames."""
    counts = {
        "response_tokens": lambda response: len(response.ids),
        "unfinished_fraction": lambda response: not response.finished,
    }
    if config.multi_turn:
        counts["episode/turns"] = lambda response: len(response.turns)
        counts["episode/calls"] = lambda response: response.calls
        counts["episode/clips"] = lambda response: len(response.clips)
    return {
        name: gathered([[count(r) for r in group.responses] for group in groups], accelerator).mean().item()
        for name, count in counts.items()
    }


def loss_figures(totals: Mapping[str, float], config: Config, accelerator: Accelerator) -> dict[str, float]:
    """From the sums of `grpo.objective`'s statistics over the step's updates: means per token."""
    names = sorted(totals)
    own = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=accelerator.device)
    sums = dict(zip(names, accelerator.reduce(own, "sum").tolist(), strict=True))
    tokens = max(1.0, sums["tokens"])  # none if all responses are masked
    updates = config.updates_per_rollout
    figures = {"loss": sums["loss"] / updates}
    if config.max_redraws:
        figures["redrawn"] = sums["redrawn"] / (config.prompts_per_step + sums["redrawn"])
    for name in ("grad_norm", "lr"):  # the same on every process
        figures[name] = sums[name] / updates / accelerator.num_processes
    for name in ("entropy", "ratio", "approx_kl"):
        figures[name] = sums[name] / tokens
    figures["clip_fraction"] = (sums["clipped_low"] + sums["clipped_high"]) / tokens
    if config.kl != "none":
        for name, summed in (("kl/time", "kl_time"), ("kl/text", "kl_text"), ("kl/penalty", "penalty")):
            figures[name] = sums[summed] / tokens
    return figures


def throughput(groups: Sequence[Group], seconds: float, accelerator: Accelerator) -> dict[str, float]:
    """Tokens of prompts, zooms and responses per second."""
    counts = [float(sum(group.visual_tokens for group in groups)), float(sum(group.text_tokens for group in groups))]
    visual, written = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
    return {"visual_tokens_per_second": visual / seconds, "text_tokens_per_second": written / seconds}

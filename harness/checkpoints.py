"""What a run keeps in its folder: who may write there, the checkpoint, and the state to resume from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import config as configuration
from config import Config
from harness.run import TrainingError

log = logging.getLogger("zoomgrpo")
# What a run leaves in `out`; --overwrite deletes it.
LEFT_BEHIND = ("config.yaml", "metrics.jsonl", "zoomgrpo", "curves.png", "episodes.html", "evaluation.json")
LEFT_BEHIND += ("evaluation.html", "clue.png", "reliability.png", "results-before.jsonl", "results-after.jsonl")
LEFT_BEHIND += tuple(name + end for name in ("state", "checkpoint") for end in ("", ".part", ".old"))


def claim_folder(config: Config, accelerator: Accelerator) -> None:
    """Make `out` ours and write the configuration there. Raises TrainingError if it holds another run."""
    out = Path(config.out)
    if not accelerator.is_main_process:
        return
    begun = [name for name in ("metrics.jsonl", "state", "state.old") if (out / name).exists()]
    if config.resume and (out / "config.yaml").exists():
        before = configuration.read_recipe(out / "config.yaml")
        for name, value in asdict(config).items():
            if not configuration.OPTIONS[name]["free"] and name in before and before[name] != value:
                log.warning("resuming with another %s: %r, before %r", name, value, before[name])
    elif begun and not config.overwrite:
        raise TrainingError(
            f"{out} holds a run already: continue it with --resume, replace it with --overwrite, or choose another "
            "--out"
        )
    elif begun:
        for name in LEFT_BEHIND:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    configuration.save(replace(config, resume=False, overwrite=False), out / "config.yaml")


def save_checkpoint(run: Any, progress: Mapping[str, int]) -> None:
    """Write `checkpoint/` (for from_pretrained) and `state/` (for --resume); each appears whole or not at all.

    run: `setup.Run`. progress: what `resume` returns, such as the number of steps done.
    """
    out, accelerator = Path(run.config.out), run.accelerator
    if accelerator.is_main_process:
        for name in ("state", "checkpoint"):
            shutil.rmtree(out / f"{name}.part", ignore_errors=True)  # of a run that was killed while it saved
    accelerator.wait_for_everyone()
    # As one tensor per weight: safetensors would complain about tied ones.
    accelerator.save_state(str(out / "state.part"), safe_serialization=False)
    weights = accelerator.get_state_dict(run.policy)  # of a sharded policy: whole, in the main process' memory
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Each tied weight once: gathered from shards, its two names would be two tensors.
        weights = {name: weights[f"model.{name}"] for name, _ in run.model.named_parameters()}
        run.model.save_pretrained(out / "checkpoint.part", state_dict=weights)
        run.vocabulary.tokenizer.save_pretrained(out / "checkpoint.part")
        (out / "state.part" / "step.json").write_text(json.dumps(progress))
        for name in ("state", "checkpoint"):
            shutil.rmtree(out / f"{name}.old", ignore_errors=True)
            if (out / name).exists():
                (out / name).rename(out / f"{name}.old")
            (out / f"{name}.part").rename(out / name)
            shutil.rmtree(out / f"{name}.old", ignore_errors=True)
    accelerator.wait_for_everyone()


def resume(run: Any) -> dict[str, int]:
    """Load the last checkpoint of the run and return its progress. Raises TrainingError without one."""
    out = Path(run.config.out)
    # state.old is the last one if the run was killed between the two renames of save_checkpoint.
    found = [out / name for name in ("state", "state.old") if (out / name / "step.json").exists()]
    if not found:
        raise TrainingError(f"{out / 'state'}: no checkpoint to resume from; run without --resume to start anew")
    run.accelerator.load_state(str(found[0]))
    return json.loads((found[0] / "step.json").read_text())

"""What a run keeps in its folder: the checkpoint to load, the state to resume from, and who may replace them.

The state is tensors and numbers alone, in safetensors and JSON: nothing in it can be code. Each process writes what it
holds of weights and moments, so that a sharded run resumes on any number of processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as shards
from torch.distributed.checkpoint.api import CheckpointException

import config as configuration
from config import Config, ConfigError
from engine.lora import merged, save_adapters
from harness.folder import claimed, delete
from harness.journal import save_whole, sync
from harness.publish import complete
from harness.run import TrainingError, in_words, main_does
from harness.setup import new_scheduler

log = logging.getLogger("zoomgrpo")
PROGRESS = ("step", "drawn", "failures", "updates")
UNREADABLE = (OSError, ValueError, AttributeError, TypeError, KeyError, OverflowError, RecursionError)  # JSON of ours
SAVED = ("checkpoint", "adapter", "state")  # folders, in the order in which new ones are put in their place
# All that a run writes into `out`; --overwrite deletes it.
SCORES = ("evaluation.json", "evaluation.html", "clue.png", "reliability.png", "results-after.jsonl")
BEGUN = ("metrics.jsonl", "zoomgrpo", "curves.png", "episodes.html", "episodes-first.html", "best.json", *SCORES)
# Of evaluations on the way, and checkpoints that are kept; whoever has copied one to checkpoint-mine keeps it.
NUMBERED = ("results-[0-9]*.jsonl", "checkpoint-[0-9]*", "checkpoint-best", "checkpoint-best.part")
BEGUN += tuple(name + end for name in SAVED for end in ("", ".part", ".old"))
OWNED = (*BEGUN, "config.yaml", "results-before.jsonl")
OWNED += tuple(f"{name}.part" for name in ("config.yaml", "metrics.jsonl", "results-before.jsonl"))


@contextlib.contextmanager
def claim_folder(config: Config, accelerator: Accelerator) -> Iterator[None]:
    """Make `out` this run's and write the configuration there; within, no other program writes to it.

    Raises TrainingError if it holds another run, or with --resume none that can be resumed.
    """
    out = Path(config.out)
    with claimed(out, accelerator):
        main_does(accelerator, partial(prepare_folder, config, out))
        yield


def prepare_folder(config: Config, out: Path) -> None:
    """The folder as the run needs it. Raises TrainingError."""
    settle(out)
    begun = any((out / name).exists() for name in BEGUN)
    saved = (out / "state").exists()
    if config.resume and not saved:
        anew = "begin it anew with --overwrite" if begun else "run without --resume to begin"
        raise TrainingError(f"{out / 'state'}: no checkpoint to resume from; {anew}")
    if config.resume:
        if read_progress(out)["step"] < config.steps:
            delete(out, SCORES)  # of fewer steps
        compare(config, out / "config.yaml")
        keep_copies(config, out)
    elif begun and not config.overwrite:
        found = "a run already: continue it with --resume," if saved else "a run that has no checkpoint yet:"
        raise TrainingError(f"{out} holds {found} replace it with --overwrite, or choose another --out")
    else:
        delete(out, [*OWNED, *(path.name for pattern in NUMBERED for path in out.glob(pattern))])
    save_whole(out / "config.yaml", partial(configuration.save, replace(config, resume=False, overwrite=False)))


def compare(config: Config, path: Path) -> None:
    """Name the options that a resumed run has changed."""
    if not path.exists():
        log.warning("%s is gone: the options of this command line count, and are written there anew", path)
        return
    try:
        before = configuration.read_recipe(path)
    except ConfigError as error:
        log.warning("%s; the options of this command line count, and are written there anew", error)
        return
    for name, value in asdict(config).items():
        if not configuration.OPTIONS[name]["free"] and name in before and before[name] != value:
            log.warning("resuming with another %s: %r, before %r", name, value, before[name])


# ---------------------------------------------------------------- saving


def save_checkpoint(run: Any, progress: Mapping[str, int], score: float | None = None) -> None:
    """Write `checkpoint/` (for from_pretrained) and `state/` (for --resume): whole or not at all, and on disk.

    Then keep the checkpoint under further names, as the options say. Raises TrainingError if they cannot be written.

    run: `setup.Run`. progress: what `resume` returns: steps done, samples drawn and failed. score: by which the best
    checkpoint is kept, if this one was evaluated.
    """
    out, accelerator = Path(run.config.out), run.accelerator
    main_does(accelerator, partial(delete, out, [f"{name}.part" for name in SAVED]))  # of a save that was interrupted
    with in_a_line(out / "state.part", "written"):
        writer = shards.HuggingFaceStorageWriter(str(out / "state.part"), save_distributed=True)
        shards.save(apart(held_tensors(run)), storage_writer=writer, no_dist=accelerator.num_processes == 1)
    weights = accelerator.get_state_dict(run.policy)  # of a sharded policy: whole, in the main process' memory
    done = progress if score is None else {**progress, run.config.keep_best: score}
    main_does(accelerator, partial(finish_save, run, out, weights, done))


def keep_copies(config: Config, out: Path) -> None:
    """Keep the checkpoint that was saved last under further names; a resumed run does it again, since a kill may have
    come between the two.
    """
    saved = read_saved(out)
    keep_numbered(out, saved["step"], config.keep_checkpoints)
    if config.keep_best in saved:
        link_best(out, saved["step"], config.keep_best, saved[config.keep_best])


def keep_numbered(out: Path, step: int, most: int) -> None:
    """Keep the checkpoint of this step as checkpoint-STEP/, and of those before the last `most` in all."""
    if most:
        link_checkpoint(out, f"checkpoint-{step}")
        numbers = [path.name.removeprefix("checkpoint-") for path in out.glob("checkpoint-*")]
        older = sorted(int(number) for number in numbers if number.isdecimal() and int(number) != step)
        delete(out, [f"checkpoint-{number}" for number in older[: len(older) + 1 - most]])


def keep_best(run: Any, step: int, score: float) -> None:
    """Keep the checkpoint as checkpoint-best/ if no score before was as high; best.json says of which step it is."""
    main_does(run.accelerator, partial(link_best, Path(run.config.out), step, run.config.keep_best, score))


def link_best(out: Path, step: int, metric: str, score: float) -> None:
    """`keep_best`, in one process. A best.json that cannot be read is named, and counts as none."""
    path = out / "best.json"
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        if known and known["metric"] == metric and float(known["score"]) >= score:
            return
    except UNREADABLE as error:
        log.warning("%s: cannot be read: %r; the checkpoint of step %d is kept as the best one", path, error, step)
    link_checkpoint(out, "checkpoint-best")
    best = {"step": step, "metric": metric, "score": score}
    save_whole(path, lambda part: part.write_text(json.dumps(best)))


def link_checkpoint(out: Path, name: str) -> None:
    """The checkpoint under another name, too: its files are linked, since nothing writes into them again."""
    delete(out, [f"{name}.part"])
    shutil.copytree(out / "checkpoint", out / f"{name}.part", copy_function=link_or_copy)
    delete(out, [name])
    (out / f"{name}.part").rename(out / name)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def held_tensors(run: Any) -> dict[str, Tensor]:
    """What this process holds of the policy's weights (with LoRA, of those that are trained), and of the optimiser's
    moments as NAME/MOMENT.
    """
    found: dict[str, Tensor] = {}
    for name, weight in run.accelerator.unwrap_model(run.policy).named_parameters():
        if run.config.lora_rank and not weight.requires_grad:
            continue  # as the model that it began from has it
        found[name] = weight.detach()
        found |= {f"{name}/{m}": torch.as_tensor(value) for m, value in run.optimizer.state.get(weight, {}).items()}
    return found


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, each a tensor of its own: all weights share bitsandbytes' tables of values, and safetensors refuses to
    write one tensor under several names.
    """
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor if first[id(tensor)] == name else tensor.clone() for name, tensor in tensors.items()}


def finish_save(run: Any, out: Path, weights: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """The main process' part. step.json comes last: with it, both folders are complete."""
    # Each tied weight once: gathered from shards, its two names would be two tensors.
    weights = {name: weights[f"model.{name}"] for name, _ in run.model.named_parameters()}
    config = run.config
    try:
        if config.lora_rank:
            save_adapters(run.model, weights, out / "adapter.part", config.model)
            weights = merged(weights, config.lora_alpha / config.lora_rank)
        run.model.save_pretrained(out / "checkpoint.part", state_dict=weights)
        run.vocabulary.tokenizer.save_pretrained(out / "checkpoint.part")
        complete(out / "checkpoint.part", run.model, config)
    except SafetensorError as error:
        raise TrainingError(f"{out / 'checkpoint.part'}: cannot be written: {error}") from None
    for name in SAVED:
        for path in (out / f"{name}.part").rglob("*"):
            sync(path)
    done = dict(progress) | {"updates": run.scheduler.last_epoch}
    save_whole(out / "state.part" / "step.json", lambda part: part.write_text(json.dumps(done)))
    settle(out)
    keep_copies(config, out)


def settle(out: Path) -> None:
    """Put what was saved last in its place, however often that is interrupted.

    As long as a complete state.part is there, what stands beside it is complete too, or in its place already.
    """
    complete = (out / "state.part" / "step.json").exists()
    for name in SAVED:
        here, part, old = (out / f"{name}{end}" for end in ("", ".part", ".old"))
        if complete and part.exists():
            delete(out, [old.name])
            if here.exists():
                here.rename(old)
            part.rename(here)
        elif old.exists() and not here.exists():
            old.rename(here)
        delete(out, [old.name])
    if complete:
        sync(out)


# ---------------------------------------------------------------- resuming


def resume(run: Any) -> dict[str, int]:
    """Load the last checkpoint of the run and return its progress. Raises TrainingError if it cannot be read."""
    out = Path(run.config.out)
    progress = read_progress(out)
    with in_a_line(out / "state", "read", f"; {rescue(out)}"):
        reader = shards.HuggingFaceStorageReader(str(out / "state"))
        make_moments(run, reader.read_metadata().state_dict_metadata)
        shards.load(held_tensors(run), storage_reader=reader, no_dist=run.accelerator.num_processes == 1)
    plain_counts(run)
    run.scheduler = new_scheduler(run.optimizer.optimizer, run.config, progress["updates"])
    return progress


def read_progress(out: Path) -> dict[str, int]:
    """The progress that `save_checkpoint` was told, and how many updates there were. Raises TrainingError."""
    saved = read_saved(out)
    return {name: saved[name] for name in PROGRESS}


def read_saved(out: Path) -> dict[str, Any]:
    """What step.json says: progress, updates, perhaps the score of `keep_best` by its name. Raises TrainingError."""
    path = out / "state" / "step.json"
    try:
        fields = json.loads(path.read_text()).items()
        saved = {name: int(value) if name in PROGRESS else float(value) for name, value in fields}
    except UNREADABLE as error:
        raise TrainingError(f"{path}: cannot be read: {error}; {rescue(out)}") from None
    if lacking := [name for name in PROGRESS if name not in saved]:
        raise TrainingError(f"{path}: does not tell {', '.join(lacking)}; {rescue(out)}")
    if wrong := [name for name in PROGRESS if saved[name] < 0]:
        raise TrainingError(f"{path}: {wrong[0]} = {saved[wrong[0]]} cannot be; {rescue(out)}")
    return saved


def rescue(out: Path) -> str:
    return f"begin anew with --overwrite, or from its weights with --model {out / 'checkpoint'} and another --out"


def make_moments(run: Any, saved: Mapping[str, Any]) -> None:
    """Room for the moments that a state has, which the optimiser makes at its first step only. saved: what is known of
    each tensor of the state.
    """
    moments: dict[str, list[str]] = defaultdict(list)
    for key in saved:
        name, _, moment = key.partition("/")
        moments[name] += [moment] if moment else []
    fused = run.optimizer.defaults.get("fused")
    for name, weight in run.accelerator.unwrap_model(run.policy).named_parameters():
        for moment in moments[name]:
            about = saved[f"{name}/{moment}"]
            if about.size == weight.shape and about.properties.dtype == weight.dtype:
                room = torch.zeros_like(weight)  # sharded as the weight is
            else:
                on_cpu = moment == "step" and not fused
                room = torch.zeros(about.size, dtype=about.properties.dtype, device="cpu" if on_cpu else weight.device)
            run.optimizer.state[weight][moment] = room


def plain_counts(run: Any) -> None:
    """Steps that the optimiser counts as a Python integer, such as bitsandbytes' does, are one again."""
    for moments in run.optimizer.state.values():
        for name, value in moments.items():
            if value.dtype == torch.int64 and not value.dim():
                moments[name] = value.item()


@contextlib.contextmanager
def in_a_line(path: Path, done: str, advice: str = "") -> Iterator[None]:
    """Raise TrainingError for what keeps shards from being read or written, in whatever process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as found:
        error = next(iter(found.failures.values()))[0]
        if not isinstance(error, Exception):  # a second Ctrl-C
            raise error from None
        problem: Exception = error
    except SafetensorError as error:
        problem = error
    else:
        return
    raise TrainingError(f"{path}: cannot be {done}: {in_words(problem).splitlines()[0]}{advice}")

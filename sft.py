"""Supervised training: VideoZoomer's cold start on trajectories, and that of the built-in policy.

    accelerate launch --config_file recipes/accelerate_fsdp2.yaml sft.py --config recipes/videozoomer_sft.yaml
    python sft.py --config recipes/cpu_world_agent_sft.yaml  # the built-in policy learns to ask for clips
    python sft.py                                            # makes checkpoints/tiny from nothing (world/lessons.py)
    python sft.py --config recipes/cpu_longvtg_sft.yaml      # goes on with it on longer videos, for LongVTG-R1

`train_data` names a file of trajectories (annotations/trajectories.py, exemplars.py), or is `world` for
world/lessons.py.

Loss is the mean negative log-likelihood over the tokens that assistants wrote in the step's trajectories, all processes
together. What stands between turns is only read. Everything else is as in train.py: signals, --resume, checkpoints.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.answer_help("sft", __doc__)  # the imports below take seconds

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import config as configuration
import evaluate
import kl
from annotations import trajectories
from annotations.samples import load_test
from annotations.trajectories import Example, Trajectory, build_example
from media.file import VideoError
from media.prefetch import prefetch
from train import (
    KL_CHUNK,
    Run,
    Stopped,
    StopSignal,
    TrainingError,
    claim_folder,
    generator,
    keep_metrics,
    log_step,
    prepare,
    results,
    results_before,
    resume,
    run_main,
    save_checkpoint,
    start_processes,
    start_tracker,
    timed,
)
from world import lessons

RECIPE = configuration.RECIPES / "cpu_world_sft.yaml"


def draw(run: Run, rows: Sequence[Trajectory], step: int) -> list[Trajectory]:
    """This process' trajectories of a step, in the order of a permutation per epoch that depends on the seed alone."""
    config, accelerator = run.config, run.accelerator
    mine = config.prompts_per_step // accelerator.num_processes
    first = step * config.prompts_per_step + accelerator.process_index * mine
    places = [divmod(position, len(rows)) for position in range(first, first + mine)]
    orders = {epoch: torch.randperm(len(rows), generator=generator(config.seed, "epoch", epoch)) for epoch, _ in places}
    return [rows[orders[epoch][index]] for epoch, index in places]


def examples(run: Run, rows: Sequence[Trajectory], first_step: int) -> Iterator[list[Example]]:
    """This process' examples of each step, decoded in the background. Raises TrainingError for an unreadable video."""
    share = run.config.prompts_per_step // run.accelerator.num_processes

    def build(trajectory: Trajectory) -> Example:
        try:
            return build_example(trajectory, run.config, run.vocabulary, run.model.config)
        except VideoError as error:
            raise TrainingError(f"{trajectory.row.file}: {trajectory.row.where}: {error}") from None

    jobs = (partial(build, row) for step in range(first_step, run.config.steps) for row in draw(run, rows, step))
    with prefetch(jobs, ahead=2 * share) as ready:
        for _ in range(first_step, run.config.steps):
            yield [next(ready) for _ in range(share)]


def padded(some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64, mask of real tokens bool and weights float of one response per prompt: [b, 1, T]."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones(len(example.ids), dtype=torch.bool) for example in some])
    return pad([e.ids for e in some])[:, None], mask[:, None], pad([e.weight for e in some])[:, None]


def loss_of(hidden: Tensor, lm_head: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """The sum of weighted negative log-likelihoods of ids [N], from the states before them [N, H]."""
    learned = weight.to(hidden.device) > 0
    logp = kl.chunked_weighted_kl(hidden[learned], None, lm_head, None, KL_CHUNK, ids.to(hidden.device)[learned]).logp
    return -logp.sum()


def update(run: Run, some: Sequence[Example]) -> dict[str, float]:
    """One optimiser step on these examples (and those of the other processes); its figures."""
    config, accelerator = run.config, run.accelerator
    count = accelerator.reduce(torch.stack([e.weight.sum() for e in some]).sum().to(accelerator.device), "sum")
    chunks = [some[k : k + config.prompts_per_pass] for k in range(0, len(some), config.prompts_per_pass)]
    total = torch.zeros((), device=accelerator.device)
    for k, chunk in enumerate(chunks):
        ids, mask, weight = padded(chunk)
        loss_here = partial(loss_of, ids=ids[mask], weight=weight[mask])
        # FSDP2 reduces every micro-batch's gradients: kept for later, they would be whole on every process.
        last = k == len(chunks) - 1
        with contextlib.nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(run.policy):
            loss = (
                run.policy([e.prompt for e in chunk], ids, mask, loss_here, [[e.observations] for e in chunk]) / count
            )
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss of {', '.join(e.name for e in chunk)} is {loss.item()}")
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(run.policy.parameters(), config.max_grad_norm)
    if not math.isfinite(float(norm)):
        raise TrainingError(f"the gradient of {', '.join(e.name for e in some)} is not finite")
    figures = {"loss": accelerator.reduce(total, "sum").item(), "grad_norm": float(norm), "tokens": count.item()}
    figures["lr"] = run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return figures


def train(run: Run, rows: Sequence[Trajectory]) -> None:
    """The loop. Raises Stopped after a signal."""
    config, accelerator = run.config, run.accelerator
    done = resume(run) if config.resume else 0
    keep_metrics(Path(config.out) / "metrics.jsonl", done, accelerator)
    with (
        StopSignal(accelerator) as stop,
        contextlib.closing(examples(run, rows, done)) as batches,
        tqdm(
            total=config.steps, initial=done, unit="step", disable=None if accelerator.is_main_process else True
        ) as bar,
    ):
        while done < config.steps:
            seconds: dict[str, float] = {}
            with timed(seconds, "step"):
                with timed(seconds, "decode"):
                    some = next(batches)
                figures = update(run, some)
            log_step(run, bar, done, {**figures, **{f"seconds/{name}": value for name, value in seconds.items()}})
            done += 1
            try:
                stop.check()
            except Stopped:
                save_checkpoint(run, done)
                raise
            if done == config.steps or done % config.save_every == 0:
                save_checkpoint(run, done)


def main(arguments: list[str] | None = None) -> None:
    config = configuration.parse(arguments, RECIPE, __doc__.splitlines()[0], "sft")
    if config.train_data == "world":
        lessons.teach(config)
        return
    accelerator = start_processes(config)
    rows = trajectories.load(config.train_data, config.video_root)
    trajectories.check_files(rows)
    if config.epochs:
        config = replace(config, steps=max(1, round(config.epochs * len(rows) / config.prompts_per_step)))
    with accelerator.main_process_first():
        test = load_test(config)
    evaluate.check_test_samples(test, config)
    claim_folder(config, accelerator)
    start_tracker(config, accelerator)
    run = prepare(replace(config, kl="none", zoom_judge="policy"), accelerator)  # there is no reference
    before = results_before(run, test) if test else []
    train(run, rows)
    out = Path(config.out)
    if test:
        after = results(run, test, "after training")
        if accelerator.is_main_process:
            evaluate.save_and_print({"before": before, "after": after}, out, test, config.data_format)
    accelerator.print(f"{out}/: config.yaml, metrics.jsonl, checkpoint/")
    accelerator.wait_for_everyone()  # as in train.py
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)

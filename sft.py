"""Supervised training: VideoZoomer's cold start on trajectories, and that of the built-in policy.

    accelerate launch --config_file recipes/accelerate_fsdp2.yaml sft.py --config recipes/videozoomer_sft.yaml
    python sft.py --config recipes/cpu_world_agent_sft.yaml  # the built-in policy learns to ask for clips
    python sft.py --overwrite                                # makes checkpoints/tiny from nothing (world/lessons.py)
    torchrun --nproc_per_node 2 sft.py --overwrite    # the same in two processes

`train_data` names a file of trajectories (annotations/trajectories.py, exemplars.py), or is `world` for
world/lessons.py.

Loss is the mean negative log-likelihood over the tokens that assistants wrote in the step's trajectories, all processes
together. What stands between turns is only read. Everything else is as in train.py: signals, --resume, checkpoints.
Lessons are resumed after the last cycle of their course that was done.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("sft", __doc__)  # the imports below take seconds

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import config as configuration
import evaluate
import kl
from annotations import trajectories
from annotations.rows import DataError, Sample
from annotations.samples import load_test
from annotations.trajectories import Example, Trajectory, build_example
from harness.batches import Reading, generator
from harness.checkpoints import claim_folder
from harness.folder import claimed
from harness.log import start_tracker
from harness.run import TrainingError, finish, program, training_accelerator
from harness.session import Session
from harness.setup import Run, load_run
from media.file import VideoError
from media.prefetch import prefetch
from policy import ModelError
from report import ReportError
from train import optimiser_step
from world import lessons

RECIPE = configuration.RECIPES / "cpu_world_sft.yaml"


def draw_trajectories(run: Run, rows: Sequence[Trajectory], step: int) -> list[Trajectory]:
    """This process' trajectories of a step, in the order of a permutation per epoch that depends on the seed alone."""
    config, accelerator = run.config, run.accelerator
    n_local = config.prompts_per_step // accelerator.num_processes
    first = step * config.prompts_per_step + accelerator.process_index * n_local
    places = [divmod(position, len(rows)) for position in range(first, first + n_local)]
    orders = {epoch: torch.randperm(len(rows), generator=generator(config.seed, "epoch", epoch)) for epoch, _ in places}
    return [rows[orders[epoch][index]] for epoch, index in places]


def example_batches(run: Run, rows: Sequence[Trajectory], reading: Reading, first_step: int) -> Iterator[list[Example]]:
    """This process' examples of each step, decoded in the background. Raises TrainingError for an unreadable video."""
    share = run.config.prompts_per_step // run.accelerator.num_processes

    def build(trajectory: Trajectory) -> Example:
        try:
            return build_example(trajectory, run.config, run.vocabulary, run.model.config)
        except VideoError as error:
            raise TrainingError(f"{trajectory.row.file}: {trajectory.row.where}: {error}") from None

    jobs = (
        partial(build, row)
        for step in range(first_step, run.config.steps)
        for row in draw_trajectories(run, rows, step)
    )
    with prefetch(jobs, ahead=2 * share) as ready:
        for _ in range(first_step, run.config.steps):
            yield [next(ready) for _ in range(share)]


def padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64, mask of real tokens bool and weights float of one response per prompt: [b, 1, T]."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones(len(example.ids), dtype=torch.bool) for example in examples])
    return pad([e.ids for e in examples])[:, None], mask[:, None], pad([e.weight for e in examples])[:, None]


def negative_log_likelihood(hidden: Tensor, lm_head: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """The sum of weighted negative log-likelihoods of ids [N], from the states before them [N, H]."""
    learned = weight.to(hidden.device) > 0
    logp = kl.chunked_weighted_kl(hidden[learned], None, lm_head, None, kl.CHUNK, ids.to(hidden.device)[learned]).logp
    return -logp.sum()


def update(run: Run, examples: Sequence[Example]) -> dict[str, float]:
    """One optimiser step on these examples (and those of the other processes); its figures."""
    config, accelerator = run.config, run.accelerator
    count = accelerator.reduce(torch.stack([e.weight.sum() for e in examples]).sum().to(accelerator.device), "sum")
    total = torch.zeros((), device=accelerator.device)

    def loss_of(chunk: Sequence[Example]) -> Tensor:
        ids, mask, weight = padded(chunk)
        likelihood = partial(negative_log_likelihood, ids=ids[mask], weight=weight[mask])
        loss = run.policy([e.prompt for e in chunk], ids, mask, likelihood, [[e.observations] for e in chunk]) / count
        total.add_(loss.detach())
        return loss

    chunks = [examples[k : k + config.prompts_per_pass] for k in range(0, len(examples), config.prompts_per_pass)]
    figures = optimiser_step(run, [(", ".join(e.name for e in chunk), partial(loss_of, chunk)) for chunk in chunks])
    return figures | {"loss": accelerator.reduce(total, "sum").item(), "tokens": count.item()}


def train(run: Run, rows: Sequence[Trajectory], test: Sequence[Sample] = ()) -> None:
    """The loop. Raises Stopped after a signal."""
    batches, evaluation = partial(example_batches, run, rows), partial(evaluate.evaluate_at, run, test)
    with Session(run, batches, {"loss": "loss"}, evaluate=evaluation) as session:
        for _ in session.steps():
            examples = session.next_batch()
            with session.phase("update"):
                figures = update(run, examples)
            session.log(figures)


def main(arguments: list[str] | None = None) -> None:
    config = configuration.parse(arguments, RECIPE, __doc__.splitlines()[0], "sft")
    if config.train_data == "world" and config.lora_rank:
        raise configuration.ConfigError("lessons of the built-in world train all weights: lora_rank needs trajectories")
    accelerator = training_accelerator(config)
    if config.train_data == "world":
        results = ("config.json", "metrics.jsonl", lessons.KEPT)
        with claimed(config.out, accelerator, results, config.overwrite or config.resume):
            lessons.teach(config, accelerator)
        return
    rows = trajectories.load_trajectories(config.train_data, config.video_root)
    trajectories.check_files(rows)
    if config.epochs:
        config = replace(config, steps=max(1, round(config.epochs * len(rows) / config.prompts_per_step)))
    with accelerator.main_process_first():
        test = load_test(config)
    evaluate.check_evaluations(test, config)
    known = evaluate.known_before(test, config, accelerator)
    with claim_folder(config, accelerator):
        start_tracker(config, accelerator)
        run = load_run(replace(config, kl="none", zoom_judge="policy"), accelerator)  # there is no reference
        with evaluate.before_and_after(run, test, known):
            train(run, rows, test)
        accelerator.print(f"{config.out}/: config.yaml, metrics.jsonl, checkpoint/")
        finish(accelerator, run.policy)


if __name__ == "__main__":
    program(main, DataError, ModelError, ReportError)

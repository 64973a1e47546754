"""The training loop of all three systems: collect, pay, credit, update, log.

    accelerate launch train.py                                             # the built-in world, on a laptop
    accelerate launch --config_file recipes/accelerate_fsdp2.yaml train.py --config recipes/zoom_zero_stage1.yaml  # 7B
    accelerate launch train.py --config runs/NAME/config.yaml --resume     # go on with a run that was stopped

What differs from the paper, and why, is named option by option in config.py; recipes/ has the paper's values. Two
things are ours throughout: the KL is exact over the vocabulary and not estimated, and a prompt is computed once for its
whole group (see policy.py).

Ctrl-C and SIGTERM end the run at the next border between phases, with a checkpoint, and the exit code is 130 or 143.
Everything random follows from `seed`, the place in the run and the sample, so a run that was stopped and resumed leaves
the same metrics and weights as one that was not (on a GPU nearly: flash attention's backward does not repeat its bits).
Other errors end it with a message and exit code 1.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("train", __doc__)  # the imports below take seconds

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter

import torch
from accelerate.utils import gather_object
from torch import Tensor

import config as configuration
import evaluate
import kl
from advantage import RewardError, credit
from annotations.rows import DataError, Sample
from annotations.samples import DataSet, Epochs, load_test, load_training
from config import Config
from engine.lora import adapters_off
from engine.sharding import whole_weights
from episodes import clip_failures, environments
from grpo import loss_count, objective
from harness.batches import SPARE, Drawn, generator, view_batches
from harness.checkpoints import claim_folder
from harness.closer import look_closer
from harness.log import start_tracker, step_figures
from harness.run import TrainingError, finish, main_reads, program, training_accelerator
from harness.session import Session
from harness.setup import Run, check_rewards, load_run
from harness.watch import Watch
from kl import Reference
from policy import ModelError, Observation, Prompt, group_hidden, keep_tokens
from report import ReportError
from rewards import facets, paid_facets
from rollout import Group, roll_out, zoom_pass


def train(run: Run, sets: Sequence[DataSet], test: Sequence[Sample] = ()) -> None:
    """The loop. Raises Stopped after a signal."""
    config, accelerator = run.config, run.accelerator
    epochs = Epochs(sets, partial(generator, config.seed))
    headline = {name: f"reward/{name}_mean" for name in paid_facets(config)} | {"kl": "kl/text"}
    batches, watch = partial(view_batches, config, accelerator, epochs), Watch(run)
    with Session(run, batches, headline, draw=watch.draw, evaluate=partial(evaluate.evaluate_at, run, test)) as session:
        for step in session.steps():  # resume, signals, checkpoints
            groups = collect(run, session, step, session.next_batch())  # coarse pass, zoom pass
            for group in groups:
                group.rewards = facets(group, config)  # what each response is paid
                group.advantages = credit(group, config)  # Eq. 1, 4, 5: and so each of its tokens
            redrawn = redraw(run, session, epochs, step, groups)  # VideoZoomer section 3.3
            with session.phase("update"):
                totals = update(run, groups) | {"redrawn": float(redrawn)}  # Eq. 2
            figures = step_figures(groups, totals, sum(session.seconds.values()), config, accelerator)
            session.log(figures | {"failed_videos": session.reading.failures})
            watch.note(step, groups, figures)  # curves, pages, warnings


def collect(run: Run, session: Session, step: int, drawn: Sequence[Drawn]) -> list[Group]:
    """The groups of a step, rolled out and zoomed. Raises Stopped between phases: the step is then begun anew later."""
    config = run.config
    views = [d.view for d in drawn]
    session.stop.check()
    with torch.no_grad(), whole_weights(run.policy), run.accelerator.autocast():
        with session.phase("rollout"):
            if not config.train_vision:  # then rollout, reference and update see the same visual tokens
                keep_tokens(run.model, [view.video for view in views])
            groups = roll_out(run.model, views, config, run.vocabulary, step, environments=environments(views, config))
            failed = clip_failures(groups)
            if step >= config.steps - round(config.repeated_zoom * config.steps):
                closer, unseen = look_closer(run.model, groups, config, run.vocabulary, step)
                groups, failed = groups + closer, failed | unseen
        session.stop.check()
        with session.phase("zoom"):
            if config.zoom_reward:
                with run.judge() as judge:
                    failed |= zoom_pass(judge, groups, config, run.vocabulary)
    session.stop.check()
    unreadable = [pair for d in drawn for pair in d.failed]
    unreadable += [(d.view.sample, failed[id]) for d in drawn if (id := d.view.sample.id) in failed]
    session.reading.note(len(drawn) + sum(len(d.failed) for d in drawn), unreadable, config, run.accelerator)
    return groups


def redraw(run: Run, session: Session, epochs: Epochs, step: int, groups: list[Group]) -> int:
    """Replace groups without variance, which teach nothing, by those of other samples, `max_redraws` times at most.

    No sample is drawn twice in a step, by whatever process, while there are others; each set has its weight. Returns
    how many were replaced by this process; what is left without variance takes no part in the loss. VideoZoomer section
    3.3 (dynamic sampling).
    """
    config, accelerator, name = run.config, run.accelerator, attrgetter("video", "id")
    tried: set[tuple[str, str]] = set()  # by all processes
    count = 0
    for attempt in range(config.max_redraws):
        flat = [k for k, group in enumerate(groups) if not group.advantages.any()]
        found = torch.tensor(len(flat), device=accelerator.device)
        if not accelerator.reduce(found, "sum"):  # all processes go on, or none
            break
        tried.update(gather_object([name(group.view.sample) for group in groups]))
        shuffled = list(islice(epochs.redrawn(step, attempt), SPARE * config.prompts_per_step))
        others = list({name(s): s for s in shuffled if name(s) not in tried}.values()) or shuffled
        own = others[accelerator.process_index :: accelerator.num_processes] or others
        with session.phase("decode"):  # the candidates behind are spare, should a video be unreadable
            candidates = [[*own[k % len(own) :: len(flat)], *shuffled] for k in range(len(flat))]
            draws = [(groups[k].view.draw[0], attempt + 1) for k in flat]
            drawn = [session.reading.view(*pair, config) for pair in zip(candidates, draws, strict=True)]
        fresh = collect(run, session, step, drawn)
        for k, group in zip(flat, fresh, strict=True):
            group.rewards = facets(group, config)
            group.advantages = credit(group, config)
            groups[k] = group
        count += len(flat)
    return count


# ---------------------------------------------------------------- update


@dataclass
class MicroBatch:
    """Some groups as tensors: responses int64 [b, G, T] padded on the right, mask bool and advantages [b, G, T], what
    each response was shown [b][G], old log-probabilities [N] or None.

    Masked out: padding, responses that a limit ended (`mask_truncated`), with dynamic sampling groups without variance.
    """

    ids: list[str]
    prompts: list[Prompt]
    responses: Tensor
    mask: Tensor
    advantages: Tensor
    observations: list[list[list[Observation]]]
    old_logp: Tensor | None = None

    @classmethod
    def of(cls, groups: Sequence[Group], config: Config) -> MicroBatch:
        rows, masks = zip(*(group.padded() for group in groups), strict=True)
        for group, mask in zip(groups, masks, strict=True):
            if config.mask_truncated:
                mask &= torch.tensor([[response.finished] for response in group.responses])
            if config.max_redraws:
                mask &= group.advantages.any()
        longest = max(row.shape[1] for row in rows)

        def stacked(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])

        return cls(
            ids=[group.view.sample.id for group in groups],
            prompts=[group.prompt for group in groups],
            responses=stacked(rows),
            mask=stacked(masks),
            advantages=stacked([group.advantages for group in groups]),
            observations=[
                [r.observations if part.any() else [] for r, part in zip(group.responses, mask, strict=True)]
                for group, mask in zip(groups, masks, strict=True)
            ],
        )

    def pass_through(self, policy: Callable, function: Callable[[Tensor, Tensor], object]) -> object:
        """`function` of the hidden states [N, H] before the real tokens, and of the output projection [V, H]."""
        return policy(self.prompts, self.responses, self.mask, function, self.observations)


def update(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    """The updates of one rollout: `updates_per_rollout` mini-batches, one optimiser step each, accumulated over
    micro-batches of `prompts_per_pass`. Returns summed statistics.
    """
    config = run.config
    size = len(groups) // config.updates_per_rollout
    mini = [groups[k : k + size] for k in range(0, len(groups), size)]
    micro = [
        [MicroBatch.of(part[k : k + config.prompts_per_pass], config) for k in range(0, size, config.prompts_per_pass)]
        for part in mini
    ]
    if len(mini) > 1:
        set_old_logp(run, [batch for batches in micro for batch in batches])
    totals: dict[str, float] = defaultdict(float)
    for batches in micro:
        for name, value in policy_step(run, batches).items():
            totals[name] += value
    return dict(totals)


def policy_step(run: Run, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """One optimiser step on Eq. 2's loss of these micro-batches, and those of the other processes. Returns summed
    statistics.
    """
    config, device = run.config, run.accelerator.device
    # What the loss is divided by is counted over all micro-batches and processes before the first backward pass.
    count = sum(loss_count(batch.mask, config.normalise, config.max_tokens) for batch in batches)
    count = run.accelerator.reduce(torch.as_tensor(count, device=device, dtype=torch.float32), "sum")
    totals: dict[str, float] = defaultdict(float)

    def loss_of(batch: MicroBatch) -> Tensor:
        reference = Reference(
            hidden=reference_hidden(run, batch),
            lm_head=run.reference_head,
            weights=run.kl_weights,
            time_tokens=run.time_tokens,
        )
        loss, stats = batch.pass_through(run.policy, partial(objective, batch, reference, count, config))
        for name, value in stats.items():
            totals[name] += float(value)
        return loss

    passes = [(f"samples {', '.join(batch.ids)}", partial(loss_of, batch)) for batch in batches]
    return optimiser_step(run, passes) | totals


def optimiser_step(run: Run, passes: Sequence[tuple[str, Callable[[], Tensor]]]) -> dict[str, float]:
    """One optimiser step on the sum of losses, each named by what it is of, of all processes together.

    A loss is already divided by what is counted over all processes. Returns the gradient's norm before clipping, and
    the learning rate. Raises TrainingError for a loss or gradient that is not finite.
    """
    accelerator = run.accelerator
    for k, (name, loss_of) in enumerate(passes):
        last = k == len(passes) - 1
        # FSDP2 reduces every micro-batch's gradients: kept for later, they would be whole on every process.
        with contextlib.nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(run.policy):
            loss = loss_of()
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss of {name} is {loss.item()}")
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages gradients over processes
    norm = accelerator.clip_grad_norm_(run.policy.parameters(), run.config.max_grad_norm)
    if not math.isfinite(float(norm)):
        raise TrainingError(f"the gradient of {', '.join(name for name, _ in passes)} is not finite")
    figures = {"grad_norm": float(norm), "lr": run.scheduler.get_last_lr()[0]}
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return figures


@torch.no_grad()
def reference_hidden(run: Run, batch: MicroBatch) -> Tensor | None:
    """The frozen reference's hidden states of the same tokens, [N, H]."""
    if run.reference is None:
        return None
    if run.reference is run.model:
        with adapters_off(run.model):
            return batch.pass_through(run.policy, lambda hidden, lm_head: hidden)
    return group_hidden(run.reference, batch.prompts, batch.responses, batch.mask, batch.observations)


@torch.no_grad()
def set_old_logp(run: Run, batches: Sequence[MicroBatch]) -> None:
    """Log-probabilities under the policy that sampled, needed once it will have changed within the rollout."""

    def sampled_logp(batch: MicroBatch, hidden: Tensor, lm_head: Tensor) -> Tensor:
        targets = batch.responses.to(hidden.device)[batch.mask.to(hidden.device)]
        return kl.chunked_weighted_kl(hidden, None, lm_head, None, kl.CHUNK, targets, run.config.temperature).logp

    for batch in batches:
        batch.old_logp = batch.pass_through(run.policy, partial(sampled_logp, batch))


# ---------------------------------------------------------------- the run


def main(arguments: list[str] | None = None) -> None:
    config = configuration.parse(arguments, description=__doc__.splitlines()[0], program="train")
    check_rewards(config)
    accelerator = training_accelerator(config)
    sets, test = main_reads(accelerator, lambda: (load_training(config), load_test(config)), DataError)
    evaluate.check_evaluations(test, config)
    known = evaluate.known_before(test, config, accelerator)
    with claim_folder(config, accelerator):
        start_tracker(config, accelerator)
        run = load_run(config, accelerator)
        with evaluate.before_and_after(run, test, known):
            train(run, sets, test)
        accelerator.print(f"{config.out}/: config.yaml, metrics.jsonl, curves.png, episodes.html, checkpoint/")
        finish(accelerator, run.policy)


if __name__ == "__main__":
    program(main, DataError, ModelError, RewardError, ReportError)

"""The training loop of all three systems: sample, roll out, zoom, score, advantages, update, log.

    accelerate launch train.py                                             # the built-in world, on a laptop
    accelerate launch --config_file recipes/accelerate_fsdp2.yaml train.py --config recipes/zoom_zero_stage1.yaml  # 7B
    accelerate launch train.py --config runs/NAME/config.yaml --resume     # go on with a run that was stopped

What differs from the paper, and why, is named option by option in config.py; recipes/ has the paper's values. Two
things are ours throughout: the KL is exact over the vocabulary and not estimated, and a prompt is computed once for its
whole group (see policy.py).

Ctrl-C and SIGTERM end the run at the next border between phases, with a checkpoint, and the exit code is 130 or 143.
Everything random follows from `seed`, the step and the sample, so a run that was stopped and resumed leaves the same
metrics and weights as one that was not. Other errors end it with a message and exit code 1.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.answer_help("train", __doc__)  # the imports below take seconds

import contextlib
import json
import logging
import math
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, gather_object, set_seed
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

import config as configuration
import evaluate
import kl
import rewards
from advantage import RewardError, credit
from annotations.rows import DataError, Sample
from annotations.samples import DataSet, Epochs, load_test, load_training
from config import Config
from engine.sharding import stream_layers, whole_weights
from episodes import clip_failures, environments
from grpo import grpo_loss, loss_count
from media.file import VideoError
from media.prefetch import prefetch
from policy import (
    ModelError,
    Observation,
    Policy,
    Prompt,
    Vocabulary,
    group_hidden,
    keep_tokens,
    load,
)
from report.curves import plot_curves
from report.episodes import episode_record, episodes_page
from report.results import stored_rows, write_results
from rollout import Group, View, response_seed, roll_out, view_video, zoom_pass

log = logging.getLogger("zoomgrpo")
KL_CHUNK = 1024  # rows of logits held at a time
SPARE = 64  # samples to try in place of one whose video cannot be read
# What a run leaves in `out`; --overwrite deletes it.
LEFT_BEHIND = ("config.yaml", "metrics.jsonl", "state", "checkpoint", "zoomgrpo", "curves.png", "episodes.html")
LEFT_BEHIND += ("evaluation.json", "evaluation.html", "clue.png", "reliability.png")
LEFT_BEHIND += ("results-before.jsonl", "results-after.jsonl")


class TrainingError(Exception):
    """Training cannot go on: the message names the sample or file."""


class Stopped(Exception):
    """The run was told to stop by a signal, and has written a checkpoint."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@dataclass
class Run:
    """What the steps of one run share."""

    config: Config
    accelerator: Accelerator
    policy: torch.nn.Module  # Policy, wrapped by accelerate
    reference: torch.nn.Module | None  # frozen
    vocabulary: Vocabulary
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    kl_weights: Tensor  # [V]
    time_tokens: Tensor  # ids
    drawn: int = 0  # samples taken so far, on all processes
    failures: int = 0  # of those, with an unreadable video
    unreadable: dict[str, VideoError] = field(default_factory=dict)  # by video
    named: set[str] = field(default_factory=set)  # unreadable videos that the log has named

    @property
    def model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.policy).model


# ---------------------------------------------------------------- sample


def draw(run: Run, epochs: Epochs, step: int) -> Iterator[list[Sample]]:
    """For each of this process' prompts of a step: the sample, and others to take if its video cannot be read.

    The order is a permutation per epoch that depends on the seed alone. Each of the step's updates gets a consecutive
    part, and of that each process, so that an update sees the same prompts however many processes there are.
    """
    config, accelerator = run.config, run.accelerator
    per_update = config.prompts_per_step // config.updates_per_rollout
    mine = per_update // accelerator.num_processes
    for number in range(config.updates_per_rollout):
        first = step * config.prompts_per_step + number * per_update + accelerator.process_index * mine
        for position in range(first, first + mine):
            epoch, index = divmod(position, len(epochs))
            spare = torch.randint(len(epochs), (SPARE,), generator=generator(config.seed, "spare", position))
            yield [epochs.sample(epoch, i) for i in [index, *spare.tolist()]]


def generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(response_seed(*parts))


@dataclass
class Drawn:
    """A view, and the samples before it whose videos could not be read: (sample, error)."""

    view: View
    failed: list[tuple[Sample, VideoError]]


def readable_view(candidates: list[Sample], config: Config, unreadable: dict[str, VideoError]) -> Drawn:
    """The first candidate whose video can be read; `unreadable` remembers those that cannot. Raises TrainingError."""
    failed: list[tuple[Sample, VideoError]] = []
    for sample in candidates:
        if sample.video not in unreadable:
            try:
                return Drawn(view_video(sample, config), failed)
            except VideoError as error:
                unreadable[sample.video] = error
        failed.append((sample, unreadable[sample.video]))
    raise TrainingError(f"none of {len(candidates)} videos drawn in a row could be read; the last: {failed[-1][1]}")


def view_batches(run: Run, epochs: Epochs, first_step: int) -> Iterator[list[Drawn]]:
    """This process' views of each step, decoded in the background while the model computes."""
    share = run.config.prompts_per_step // run.accelerator.num_processes
    jobs = (
        partial(readable_view, candidates, run.config, run.unreadable)
        for step in range(first_step, run.config.steps)
        for candidates in draw(run, epochs, step)
    )
    with prefetch(jobs, ahead=2 * share) as views:
        for _ in range(first_step, run.config.steps):
            yield [next(views) for _ in range(share)]


def note_failures(run: Run, drawn: int, failed: list[tuple[Sample, VideoError]]) -> None:
    """Count unreadable videos over all processes, name each once; TrainingError when there are too many."""
    for sample, error in failed:
        if sample.video not in run.named:
            run.named.add(sample.video)
            log.warning("skipping sample %s: %s", sample.id, error)
    counts = torch.tensor([float(drawn), float(len(failed))], device=run.accelerator.device)
    total, failures = run.accelerator.reduce(counts, "sum").tolist()
    run.drawn += int(total)
    run.failures += int(failures)
    if run.failures > run.config.max_failed_videos * max(run.drawn, 100):
        last = f"; the last: {failed[-1][1]}" if failed else ""
        raise TrainingError(
            f"{run.failures} of {run.drawn} samples had an unreadable video, more than max_failed_videos = "
            f"{run.config.max_failed_videos} allows{last}"
        )


# ---------------------------------------------------------------- score and advantages


def check_rewards(config: Config) -> None:
    """Raise ConfigError for rewards that the template's responses cannot have."""
    if config.multi_turn and (config.tokenadv != "off" or config.zoom_reward):
        raise configuration.ConfigError(
            f"template = {config.template} sums its rewards and has no zoom pass: it needs tokenadv = off and "
            "zoom_reward = false"
        )


def score(groups: Sequence[Group], config: Config) -> None:
    """What every response is paid, and the advantages that follow."""
    for group in groups:
        group.rewards = rewards.facets(group, config)
        group.advantages = credit(group, config)


# ---------------------------------------------------------------- update


@dataclass
class MicroBatch:
    """Some groups as tensors: responses int64 [b, G, T], mask bool and advantages [b, G, T], the observations of each
    response [b][G], old log-probabilities [N] or None.
    """

    ids: list[str]
    prompts: list[Prompt]
    responses: Tensor
    mask: Tensor
    advantages: Tensor
    observations: list[list[list[Observation]]] | None = None
    old_logp: Tensor | None = None


def micro_batches(groups: Sequence[Group], config: Config) -> list[MicroBatch]:
    """Cut groups into micro-batches of `prompts_per_pass`, padded on the right."""
    batches = []
    for start in range(0, len(groups), config.prompts_per_pass):
        chunk = groups[start : start + config.prompts_per_pass]
        rows = [group_rows(group, config) for group in chunk]
        longest = max(ids.shape[1] for ids, _, _ in rows)
        stacked = [
            torch.stack([torch.nn.functional.pad(row[k], (0, longest - row[k].shape[1])) for row in rows])
            for k in range(3)
        ]
        shown = None
        if config.multi_turn:
            shown = [
                [r.observations if m.any() else [] for r, m in zip(g.responses, row[1], strict=True)]
                for g, row in zip(chunk, rows, strict=True)
            ]
        batches.append(MicroBatch([g.view.sample.id for g in chunk], [g.prompt for g in chunk], *stacked, shown))
    return batches


def group_rows(group: Group, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and advantages of a group, [G, T] each. The mask leaves out what takes no part in the loss: responses
    that a limit ended (`mask_truncated`), and with dynamic sampling a group that is without variance to the last.
    """
    ids, mask = group.padded()
    if config.mask_truncated:
        mask &= torch.tensor([[response.finished] for response in group.responses])
    if config.max_redraws:
        mask &= group.advantages.any()
    return ids, mask, group.advantages


def update(run: Run, batches: list[MicroBatch]) -> dict[str, float]:
    """One optimiser step on these micro-batches (and those of the other processes); returns sums of statistics."""
    config, accelerator = run.config, run.accelerator
    # What the loss is divided by is counted over all micro-batches and processes before the first backward pass.
    count = sum(loss_count(batch.mask, config.normalise, config.max_tokens) for batch in batches)
    count = accelerator.reduce(torch.as_tensor(count, device=accelerator.device, dtype=torch.float32), "sum")
    totals: dict[str, float] = defaultdict(float)
    for k, batch in enumerate(batches):
        last = k == len(batches) - 1
        # FSDP2 reduces every micro-batch's gradients: kept for later, they would be whole on every process.
        with contextlib.nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(run.policy):
            given = batch.prompts, batch.responses, batch.mask, partial(objective, run, batch, count)
            loss, stats = run.policy(*given, batch.observations)
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss of samples {', '.join(batch.ids)} is {loss.item()}")
            # DDP averages gradients over processes; the loss is already divided by the global count.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in stats.items():
            totals[name] += float(value)
    norm = accelerator.clip_grad_norm_(run.policy.parameters(), config.max_grad_norm)
    if not math.isfinite(float(norm)):
        raise TrainingError(f"the gradient of samples {', '.join(i for b in batches for i in b.ids)} is not finite")
    totals["grad_norm"] += float(norm)
    totals["lr"] += run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return totals


def objective(run: Run, batch: MicroBatch, count: Tensor, hidden: Tensor, lm_head: Tensor) -> tuple[Tensor, dict]:
    """The loss of a micro-batch from the hidden states of its N real tokens [N, H], and sums of statistics."""
    config = run.config
    device = hidden.device
    mask = batch.mask.to(device)
    targets = batch.responses.to(device)[mask]  # [N]
    tokens = kl.chunked_weighted_kl(
        hidden,
        reference_hidden(run, batch),
        lm_head,
        run.kl_weights,
        KL_CHUNK,
        targets,
        config.temperature,
        run.reference.lm_head.weight if run.reference is not None else None,
        run.time_tokens,
    )
    if config.kl == "none":
        penalty = None
    elif config.kl == "exact":
        penalty = tokens.kl  # the weights are the betas
    elif config.kl == "k3":
        penalty = config.beta * kl.k3(tokens.logp, tokens.ref_logp, config.kl_clamp)
    else:
        penalty = config.beta * getattr(kl, config.kl)(tokens.logp, tokens.ref_logp)
    old = tokens.logp.detach() if batch.old_logp is None else batch.old_logp

    def grid(values: Tensor) -> Tensor:
        """[N] values of the real tokens -> [b * G, T]."""
        return values.new_zeros(mask.shape).masked_scatter(mask, values).flatten(0, 1)

    clips = (config.clip_low, config.clip_high) if config.clip_low or config.clip_high else (None, None)
    loss, stats = grpo_loss(
        grid(tokens.logp),
        grid(old),
        batch.advantages.to(device).flatten(0, 1),
        mask.flatten(0, 1),
        None if penalty is None else grid(penalty),
        *clips,
        config.normalise,
        count,
        config.max_tokens,
        grid(config.entropy_bonus * tokens.entropy) if config.entropy_bonus else None,
    )
    stats["loss"] = loss.detach()
    stats["entropy"] = tokens.entropy.detach().sum()
    if config.kl != "none":
        stats["kl_time"], stats["kl_text"] = tokens.kl_time.sum(), tokens.kl_text.sum()
    return loss, stats


@torch.no_grad()
def reference_hidden(run: Run, batch: MicroBatch) -> Tensor | None:
    """The frozen reference's hidden states of the same tokens, [N, H]."""
    if run.reference is None:
        return None
    return group_hidden(run.reference, batch.prompts, batch.responses, batch.mask, batch.observations)


@torch.no_grad()
def set_old_logp(run: Run, batches: list[MicroBatch]) -> None:
    """Log-probabilities under the policy that sampled, needed once it will have changed within the rollout."""

    def sampled_logp(batch: MicroBatch, hidden: Tensor, lm_head: Tensor) -> Tensor:
        targets = batch.responses.to(hidden.device)[batch.mask.to(hidden.device)]
        return kl.chunked_weighted_kl(hidden, None, lm_head, None, KL_CHUNK, targets, run.config.temperature).logp

    for batch in batches:
        given = batch.prompts, batch.responses, batch.mask, partial(sampled_logp, batch)
        batch.old_logp = run.policy(*given, batch.observations)


# ---------------------------------------------------------------- log


def step_metrics(
    run: Run, groups: list[Group], totals: dict[str, float], seconds: dict[str, float]
) -> dict[str, float]:
    """Everything a step reports, over all processes."""
    config, accelerator = run.config, run.accelerator

    def gathered(rows: list[list[float]]) -> Tensor:
        return accelerator.gather(torch.tensor(rows, dtype=torch.float64, device=accelerator.device).float())

    metrics: dict[str, float] = {}
    varied = torch.zeros(config.prompts_per_step, dtype=torch.bool, device=accelerator.device)
    nothing = [math.nan] * config.group_size
    for name in rewards.paid_facets(config):
        values = gathered([group.rewards.get(name, nothing) for group in groups])  # [B, G]
        applies = ~values.isnan().any(-1)
        metrics[f"applies/{name}"] = applies.float().mean().item()
        if not applies.any():
            continue
        differs = values.std(-1, unbiased=False) > 1e-6
        varied |= differs
        metrics[f"reward/{name}_mean"] = values[applies].mean().item()
        metrics[f"reward/{name}_std"] = values[applies].std(unbiased=False).item()
        metrics[f"zero_variance/{name}"] = 1 - differs[applies].float().mean().item()
    metrics["zero_variance_fraction"] = 1 - varied.float().mean().item()

    lengths = gathered([[len(r.ids) for r in group.responses] for group in groups])
    unfinished = gathered([[not r.finished for r in group.responses] for group in groups])
    metrics["response_tokens"] = lengths.mean().item()
    metrics["unfinished_fraction"] = unfinished.mean().item()

    if config.multi_turn:
        counts = {"turns": lambda e: len(e.turns), "calls": lambda e: e.calls, "clips": lambda e: len(e.clips)}
        for name, count in counts.items():
            metrics[f"episode/{name}"] = gathered([[count(r) for r in g.responses] for g in groups]).mean().item()

    names = sorted(totals)
    summed = accelerator.reduce(
        torch.tensor([totals[n] for n in names], dtype=torch.float64, device=accelerator.device), "sum"
    ).tolist()
    sums = dict(zip(names, summed, strict=True))
    tokens = max(1.0, sums["tokens"])  # none if all responses are masked
    updates = config.updates_per_rollout
    metrics["loss"] = sums["loss"] / updates
    if config.max_redraws:
        metrics["redrawn"] = sums["redrawn"] / (config.prompts_per_step + sums["redrawn"])
    for name in ("grad_norm", "lr"):  # the same on every process
        metrics[name] = sums[name] / updates / accelerator.num_processes
    metrics["entropy"] = sums["entropy"] / tokens
    metrics["ratio"] = sums["ratio"] / tokens
    metrics["approx_kl"] = sums["approx_kl"] / tokens
    metrics["clip_fraction"] = (sums["clipped_low"] + sums["clipped_high"]) / tokens
    if config.kl != "none":
        metrics["kl/time"], metrics["kl/text"] = sums["kl_time"] / tokens, sums["kl_text"] / tokens
        metrics["kl/penalty"] = sums["penalty"] / tokens

    prompts = [prompt for group in groups for prompt in group.prompts]
    zooms = {id(r.zoom): r.zoom for group in groups for r in group.responses if r.zoom is not None}
    visual = sum(video.n_tokens for prompt in prompts for video in prompt.videos)
    visual += sum(visual_tokens(zoom.clip.frames.shape) for zoom in zooms.values())
    written = (
        sum(len(prompt) for prompt in prompts) - sum(v.n_tokens for p in prompts for v in p.videos) + int(lengths.sum())
    )
    total = sum(seconds.values())
    counts = accelerator.reduce(torch.tensor([float(visual), float(written)], device=accelerator.device), "sum")
    metrics["visual_tokens_per_second"] = counts[0].item() / total
    metrics["text_tokens_per_second"] = counts[1].item() / total
    metrics["failed_videos"] = run.failures
    metrics.update({f"seconds/{name}": value for name, value in seconds.items()})
    metrics["seconds/step"] = total
    return metrics


def visual_tokens(shape: Sequence[int]) -> int:
    """Visual tokens of frames [N, 3, H, W]: pairs of frames, 28x28 pixels."""
    n, _, height, width = shape
    return math.ceil(n / 2) * (height // 28) * (width // 28)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(run: Run, done: int) -> None:
    """Write `checkpoint/` (for from_pretrained) and `state/` (for --resume); each appears whole or not at all."""
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
        progress = {"step": done, "drawn": run.drawn, "failures": run.failures}
        (out / "state.part" / "step.json").write_text(json.dumps(progress))
        for name in ("state", "checkpoint"):
            shutil.rmtree(out / f"{name}.old", ignore_errors=True)
            if (out / name).exists():
                (out / name).rename(out / f"{name}.old")
            (out / f"{name}.part").rename(out / name)
            shutil.rmtree(out / f"{name}.old", ignore_errors=True)
    accelerator.wait_for_everyone()


def resume(run: Run) -> int:
    """Load the last checkpoint of the run and return the number of steps done. Raises TrainingError without one."""
    out = Path(run.config.out)
    # state.old is the last one if the run was killed between the two renames of save_checkpoint.
    found = [out / name for name in ("state", "state.old") if (out / name / "step.json").exists()]
    if not found:
        raise TrainingError(f"{out / 'state'}: no checkpoint to resume from; run without --resume to start anew")
    run.accelerator.load_state(str(found[0]))
    progress = json.loads((found[0] / "step.json").read_text())
    run.drawn, run.failures = progress["drawn"], progress["failures"]
    return progress["step"]


class StopSignal:
    """While entered, Ctrl-C and SIGTERM only take note; `check` then stops all processes together.

    A second Ctrl-C ends the run at once, without a checkpoint.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log.warning("%s: stopping soon, with a checkpoint", signal.Signals(number).name)

    def check(self) -> None:
        """Raise Stopped if any process was told to stop; all processes must call this at the same point."""
        flag = torch.tensor([self.received], device=self.accelerator.device)
        number = int(self.accelerator.gather(flag).max())
        if number:
            raise Stopped(number)


# ---------------------------------------------------------------- the run


def learning_rate(config: Config, update_number: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0 or constant."""
    if update_number < config.warmup:
        return (update_number + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    total = config.steps * config.updates_per_rollout
    progress = (update_number - config.warmup) / max(1, total - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def prepare(config: Config, accelerator: Accelerator) -> Run:
    """Load policy and reference, and hand them to accelerate."""
    reference = None
    if config.kl != "none" or config.zoom_judge == "reference":
        # Read as half precision, not cast afterwards: that would round the rotary frequencies too.
        reference, _ = load(config.model, torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32)
        reference.requires_grad_(False).eval().to(accelerator.device)
        if config.reference_device == "cpu":
            stream_layers(reference)
    model, tokenizer = load(config.model)
    vocabulary = Vocabulary.of(tokenizer)
    model.model.visual.requires_grad_(config.train_vision)
    policy = Policy(model).train()  # there is no dropout; this only switches checkpointing on
    if config.gradient_checkpointing:
        policy.checkpoint_activations()
    trainable = [p for p in policy.parameters() if p.requires_grad]
    # Otherwise a step on a GPU holds the square roots of all second moments, 4 bytes per parameter.
    fused = True if accelerator.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, config))
    if accelerator.is_fsdp2 and config.mixed_precision == "bf16":
        # accelerate's choice would round the loss, its statistics and the sums of gradients to bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    accelerator.register_for_checkpointing(scheduler)

    time_tokens = kl.time_token_ids(tokenizer).to(accelerator.device)
    weights = torch.full((model.lm_head.weight.shape[0],), config.beta, device=accelerator.device)
    if config.beta_time >= 0:
        weights[time_tokens] = config.beta_time  # LongVTG-R1 Eq. 5
    return Run(config, accelerator, policy, reference, vocabulary, optimizer, scheduler, weights, time_tokens)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of a block to `seconds[name]`."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def train(run: Run, sets: Sequence[DataSet]) -> list[Group]:
    """The loop. Returns the groups of the last step, for the page of episodes. Raises Stopped after a signal."""
    config, accelerator = run.config, run.accelerator
    epochs = Epochs(sets, partial(generator, config.seed))
    done = resume(run) if config.resume else 0
    saved = done if config.resume else None
    keep_metrics(Path(config.out) / "metrics.jsonl", done, accelerator)
    shown = accelerator.is_main_process
    groups: list[Group] = []
    counted = run.drawn, run.failures  # up to the steps done
    with (
        StopSignal(accelerator) as stop,
        contextlib.closing(view_batches(run, epochs, done)) as batches,
        tqdm(total=config.steps, initial=done, unit="step", disable=None if shown else True) as bar,
    ):
        try:
            while done < config.steps:
                seconds: dict[str, float] = {}
                groups = collect(run, batches, done, seconds, stop)
                score(groups, config)
                redrawn = redraw(run, epochs, groups, done, seconds, stop) if config.max_redraws else 0
                with timed(seconds, "update"):
                    totals = update_on_rollout(run, groups) | {"redrawn": float(redrawn)}
                log_step(run, bar, done, step_metrics(run, groups, totals, seconds))
                done += 1
                counted = run.drawn, run.failures
                if done == config.steps or done % config.save_every == 0:
                    save_checkpoint(run, done)
                    saved = done
                stop.check()
        except Stopped:
            run.drawn, run.failures = counted
            if done != saved:
                save_checkpoint(run, done)
            accelerator.wait_for_everyone()  # as at the end of main
            raise
    return groups


def collect(
    run: Run, batches: Iterator[list[Drawn]], step: int, seconds: dict[str, float], stop: StopSignal
) -> list[Group]:
    """The step's groups, rolled out and zoomed. Raises Stopped between phases; the step is then begun again later."""
    config = run.config
    with timed(seconds, "decode"):
        drawn = next(batches)
    stop.check()
    with torch.no_grad(), whole_weights(run.policy), run.accelerator.autocast():
        with timed(seconds, "rollout"):
            if not config.train_vision:  # then rollout, reference and update see the same visual tokens
                keep_tokens(run.model, [d.view.video for d in drawn])
            views = [d.view for d in drawn]
            groups = roll_out(run.model, views, config, run.vocabulary, step, environments(views, config))
        stop.check()
        failed = clip_failures(groups)
        with timed(seconds, "zoom"):
            if config.zoom_reward:
                judge = run.reference if config.zoom_judge == "reference" else run.model
                failed |= zoom_pass(judge, groups, config, run.vocabulary)
    stop.check()
    unreadable = [pair for d in drawn for pair in d.failed]
    unreadable += [(g.view.sample, failed[g.view.sample.id]) for g in groups if g.view.sample.id in failed]
    note_failures(run, len(drawn) + sum(len(d.failed) for d in drawn), unreadable)
    return groups


def redraw(
    run: Run, epochs: Epochs, groups: list[Group], step: int, seconds: dict[str, float], stop: StopSignal
) -> int:
    """Replace groups without variance, which teach nothing, by those of other samples, `max_redraws` times at most.

    No sample is drawn twice in a step, by whatever process, while there are others; each set has its weight. Returns
    how many were replaced by this process; what is left without variance takes no part in the loss. VideoZoomer section
    3.3 (dynamic sampling).
    """
    config, accelerator = run.config, run.accelerator

    def name(sample: Sample) -> tuple[str, str]:
        return sample.video, sample.id

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
        mine = others[accelerator.process_index :: accelerator.num_processes] or others
        drawn = (  # those behind are spare, should a video be unreadable
            readable_view([*mine[k % len(mine) :: len(flat)], *shuffled], config, run.unreadable)
            for k in range(len(flat))
        )
        fresh = collect(run, (list(batch) for batch in [drawn]), step, seconds, stop)
        score(fresh, config)
        for k, group in zip(flat, fresh, strict=True):
            groups[k] = group
        count += len(flat)
    return count


def update_on_rollout(run: Run, groups: list[Group]) -> dict[str, float]:
    """The updates of one rollout: `updates_per_rollout` mini-batches, one optimiser step each. Returns summed
    statistics.
    """
    per_update = len(groups) // run.config.updates_per_rollout
    mini = [micro_batches(groups[k : k + per_update], run.config) for k in range(0, len(groups), per_update)]
    if len(mini) > 1:
        set_old_logp(run, [batch for batches in mini for batch in batches])
    totals: dict[str, float] = defaultdict(float)
    for batches in mini:
        for name, value in update(run, batches).items():
            totals[name] += value
    return totals


def keep_metrics(path: Path, done: int, accelerator: Accelerator) -> None:
    """Start metrics.jsonl, or cut it back to the steps that the checkpoint has (a crash may have cut a line short)."""
    if accelerator.is_main_process:
        lines = path.read_text().splitlines(keepends=True)[:done] if done and path.exists() else []
        kept = [line for line in lines if line.endswith("}\n")]
        if len(kept) < done:
            log.warning("%s: has only %d of the %d steps done", path, len(kept), done)
        part = path.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(path)


def log_step(run: Run, bar: tqdm, step: int, metrics: dict[str, float]) -> None:
    """One line of metrics.jsonl, the tracker, and the figures on the progress bar."""
    run.accelerator.log(metrics, step=step)
    if run.accelerator.is_main_process:
        with open(Path(run.config.out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    means = {name: metrics.get(f"reward/{name}_mean") for name in rewards.paid_facets(run.config)}
    shown = {name: f"{value:.2f}" for name, value in means.items() if value is not None}
    bar.set_postfix(shown | {"s/step": f"{metrics['seconds/step']:.1f}"})
    bar.update()


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


def start_tracker(config: Config, accelerator: Accelerator) -> None:
    """Raises ConfigError if the tracker's package is missing."""
    if config.tracker != "none":
        accelerator.init_trackers("zoomgrpo", config=asdict(config))
        if accelerator.is_main_process and not accelerator.trackers:
            raise configuration.ConfigError(f"tracker = {config.tracker}: its package is not installed")


def results_before(run: Run, test: list[Sample]) -> list[dict]:
    """Rows of the policy before training; a resumed run finds them in its folder."""
    path = Path(run.config.out) / "results-before.jsonl"
    if run.config.resume and path.exists():
        return stored_rows(path)
    rows = results(run, test, "before training")
    if run.accelerator.is_main_process:
        part = path.with_suffix(".part")
        write_results(part, rows)
        part.replace(path)
    return rows


def results(run: Run, test: list[Sample], label: str) -> list[dict]:
    """Rows of the policy as it is."""
    with torch.no_grad(), whole_weights(run.policy):
        return evaluate.evaluate(run.model, test, run.config, run.vocabulary, run.accelerator, label)


def start_processes(config: Config) -> Accelerator:
    """This process among the others, seeded. Raises ConfigError for a tracker unheard of, or prompts that do not share
    out.
    """
    if config.tracker not in ("none", *map(str, LoggerType)):
        raise configuration.ConfigError(
            f"there is no tracker {config.tracker!r}; there are none, {', '.join(map(str, LoggerType))}"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if config.prompts_per_step % (accelerator.num_processes * config.updates_per_rollout):
        raise configuration.ConfigError(
            f"prompts_per_step = {config.prompts_per_step} must be a multiple of {accelerator.num_processes} processes "
            f"x updates_per_rollout = {config.updates_per_rollout}"
        )
    set_seed(config.seed)
    return accelerator


def main(arguments: list[str] | None = None) -> None:
    config = configuration.parse(arguments, description=__doc__.splitlines()[0], program="train")
    check_rewards(config)
    accelerator = start_processes(config)
    with accelerator.main_process_first():  # one process writes the built-in videos, the others find them
        sets = load_training(config)
        test = load_test(config)
    evaluate.check_test_samples(test, config)
    claim_folder(config, accelerator)
    start_tracker(config, accelerator)
    run = prepare(config, accelerator)

    out = Path(config.out)
    before = results_before(run, test) if test else []
    groups = train(run, sets)
    if accelerator.is_main_process:
        plot_curves([out], out / "curves.png")
        if groups:  # none when a finished run is resumed
            episodes = [episode_record(group, config) for group in groups[: config.n_episodes]]
            episodes_page(episodes, out / "episodes.html", f"{out.name}: groups of the last step")
    if test:
        after = results(run, test, "after training")
        if accelerator.is_main_process:
            evaluate.save_and_print({"before": before, "after": after}, out, test, config.data_format)
    accelerator.print(f"{out}/: config.yaml, metrics.jsonl, curves.png, episodes.html, checkpoint/")
    accelerator.wait_for_everyone()  # as in evaluate.py: a process that left right after a gather could deadlock
    accelerator.end_training()


def run_main(job: Callable[[], None]) -> None:
    """Call `job`; expected errors become one line and exit code 1, signals 128 + their number."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        job()
    except (configuration.ConfigError, DataError, ModelError, RewardError, TrainingError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stop:
        print(f"stopped by {signal.Signals(stop.number).name}, with a checkpoint; --resume continues", file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("stopped at once; --resume continues from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run_main(main)

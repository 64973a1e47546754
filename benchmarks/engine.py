"""One computation of a prompt for its whole group, against the naive way and against TRL: seconds and memory per phase.

    python -m benchmarks.engine --quick                # a minute, printed only
    python -m benchmarks.engine --short                # the main job and the vision tower alone, printed only
    python -m benchmarks.engine                        # benchmarks/results/engine.md and .png, 25 minutes on two cores

All engines run in one process, in turn, with the same weights, prompts and responses. Ratios are medians over repeats.

- *ours*: policy.py, engine/, kl.py and grpo.py, as train.py calls them.
- *naive*: transformers alone. `generate(num_return_sequences=G)`, then G copies of the prompt, with their video,
  through the reference and the policy; logits of all response tokens, the KL by autograd. Positions are ours, passed
  explicitly.
- *TRL*: `GRPOTrainer` on the same model with text-only prompts (it has no video), k3 instead of the exact KL. It takes
  part if it is installed beside this project's requirements: `pip install trl==1.16.0`.

The policy is Qwen2.5-VL scaled down to 19 million random parameters (`20m` in `benchmarks/memory.py`), float32, with
gradient checkpointing. Videos are noise of 224x224 pixels: 64 visual tokens per pair of frames. All responses have the
same length, so nothing is padded in the naive way, and it projects only response tokens. The zoom pass answers G
different clips, each as long as the prompt's. An update ends with AdamW's step, at learning rate 0.

The step of the policy before (docs/world.md) is measured with the sizes of its main job: 8 prompts at once, 64
clips of the zoom pass in batches of 32, no checkpointing. And the vision tower alone: transformers' loop over the
windows of its attention against ours, in which windows of equal length are one batch.

Seconds are wall-clock. Memory is the most that torch has allocated beyond what it had before the phase; what the system
gives to the process is more, for both, and depends on malloc. With a GPU, the exact 7B and 3B shapes run too, in
bfloat16 and without optimiser.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.metadata
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each start and stop

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig, Qwen2_5_VLConfig

from benchmarks.kl import processor
from benchmarks.memory import GIB, Parameters, cache_bytes_per_token, head_size, shape
from engine.families import family_of
from engine.qwen2_5_vl import encode_clips
from engine.sampling import generate
from grpo import grpo_loss
from kl import CHUNK as KL_CHUNK
from kl import chunked_weighted_kl, logits, same_dtype
from policy import Policy, Prompt, Video, Vocabulary, build_prompt, group_hidden, last_hidden
from video import normalise_patches
from world import tiny

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "reference", "update", "zoom")
STEP = PHASES[:3]  # what every engine does
GRID = (16, 16)  # patches of a pair of frames: 64 visual tokens
TEXT = (16, 48)  # other tokens of a prompt, before and after the video
ORDINARY = (16, 400)  # ids of text
LETTERS = (10, 11, 12, 13)  # ids of the options' letters
BETA = 0.01
ZOOM_BATCH = 4
NAIVE_MOST = 20_000  # tokens of a problem that the naive way is still measured on, in the table of growth
# Operations of bfloat16 matrix products, and bytes of memory traffic, per second, that GPUs reach at best.
LIMITS = {"H200": (790e12, 4.3e12), "A100": (312e12, 1.8e12)}


# Those of the main job of the policy before (docs/world.md): 20 frames of 56x56 pixels, a short question, responses as
# long as its own, 11 zoomed frames of 112x112 pixels (Eq. 3 with a budget of 176), and the batches of its recipe.
MAIN_JOB = {"visual": 40, "group": 8, "length": 32, "batch": 8, "grid": (4, 4), "text": (22, 2)}
MAIN_JOB |= {"zoom": (96, (8, 8)), "per_pass": 8, "zoom_batch": 32}


@dataclass
class Problem:
    """B prompts with G responses each: ids [B, G, R], mask bool, advantages [B, G, R]; and the clips to zoom on.

    `per_pass` prompts with their groups go through the models together, and `zoom_batch` clips.
    """

    prompts: list[Prompt]
    responses: Tensor
    mask: Tensor
    advantages: Tensor
    zooms: list[Prompt]
    per_pass: int
    zoom_batch: int

    def passes(self) -> list[slice]:
        return [slice(start, start + self.per_pass) for start in range(0, len(self.prompts), self.per_pass)]

    def zoom_passes(self) -> list[list[Prompt]]:
        return [self.zooms[k : k + self.zoom_batch] for k in range(0, len(self.zooms), self.zoom_batch)]


class Letters(Vocabulary):
    """Without a tokenizer: each letter of the text that a family writes between frames is an ordinary token."""

    def ids(self, text: str) -> list[int]:
        return [ORDINARY[0] + ord(letter) for letter in text]


def random_piece(
    model: PreTrainedConfig,
    visual: int,
    generator: torch.Generator,
    text_only: bool = False,
    grid: tuple[int, int] = GRID,
    text: tuple[int, int] = TEXT,
) -> tuple[list[int], list[Video]]:
    """Ids and a clip of `visual` visual tokens, or ids alone, as many as if there were one."""
    before, after = (torch.randint(*ORDINARY, (n,), generator=generator).tolist() for n in text)
    if text_only:
        return before + torch.randint(*ORDINARY, (visual,), generator=generator).tolist() + after, []
    h, w = grid
    grid = (visual * 4 // (h * w), h, w)
    patches = torch.randint(0, 256, (visual * 4, 1176), generator=generator, dtype=torch.uint8)
    clip = Video(patches, grid, 1.0, [float(k) for k in range(2 * grid[0])])
    return [*before[:-1], model.vision_start_token_id, model.video_token_id, *after], [clip]


def random_prompt(model: PreTrainedConfig, visual: int, generator: torch.Generator, **sizes) -> Prompt:
    """A prompt of a `random_piece`."""
    return build_prompt(*random_piece(model, visual, generator, **sizes), model, endless())


def make_problem(
    model: PreTrainedConfig,
    visual: int,
    group: int,
    length: int,
    seed: int = 0,
    batch: int = 1,
    text_only: bool = False,
    grid: tuple[int, int] = GRID,
    text: tuple[int, int] = TEXT,
    zoom: tuple[int, tuple[int, int]] | None = None,
    per_pass: int = 1,
    zoom_batch: int = ZOOM_BATCH,
) -> Problem:
    """`visual` tokens per prompt, from frames of `grid` patches; `zoom`: the same of zoomed clips, if it differs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"text_only": text_only, "grid": grid, "text": text}
    prompts = [random_prompt(model, visual, generator, **sizes) for _ in range(batch)]
    zoomed, zoom_grid = zoom or (visual, grid)
    zooms = [random_prompt(model, zoomed, generator, grid=zoom_grid, text=text) for _ in range(batch * group)]
    responses = torch.randint(*ORDINARY, (batch, group, length), generator=generator)
    advantages = torch.randn(batch, group, 1, generator=generator).expand(responses.shape)
    mask = torch.ones_like(responses, dtype=torch.bool)
    return Problem(prompts, responses, mask, advantages, [] if text_only else zooms, per_pass, zoom_batch)


# ---------------------------------------------------------------- the engines


class Engine:
    """A policy, a frozen reference, and what both ways of computing with them share."""

    def __init__(
        self, model: torch.nn.Module, reference: torch.nn.Module, optimise: bool = True, checkpoint: bool = True
    ):
        self.model, self.reference = model.train(), reference
        if checkpoint:
            self.checkpoint_activations()
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0) if optimise else None

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass."""
        Policy(self.model).checkpoint_activations()

    def phases(self, problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
        """Each phase of a step, ready to be called."""
        yield "rollout", lambda: self.roll_out(problem)
        state: list = []
        yield "reference", lambda: state.extend(self.reference_states(problem))
        yield "update", lambda: self.update(problem, state)
        if problem.zooms:
            yield "zoom", lambda: self.zoom(problem)

    def update(self, problem: Problem, states: Sequence[Tensor]) -> float:
        loss = self.backward(problem, states)
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad()
        return loss


def endless(banned: Sequence[int] = ()) -> Vocabulary:
    """A vocabulary in which no token ends a response, so that all are as long as they may be."""
    return Letters(None, (), tuple(banned))


class Ours(Engine):
    def roll_out(self, problem: Problem, greedy: bool = False) -> Tensor:
        """Ids [B, G, R]."""
        batch, group, length = problem.responses.shape
        seed = None if greedy else lambda row, _: row
        turns = generate(self.model, problem.prompts, group, length, endless(), seed=seed)
        return torch.stack([turn.ids for turn in turns]).view(batch, group, length)

    @torch.no_grad()
    def reference_states(self, problem: Problem) -> list[Tensor]:
        """The reference's hidden states [N, H], per pass."""
        return [self.hidden(self.reference, problem, part) for part in problem.passes()]

    @staticmethod
    def hidden(model: torch.nn.Module, problem: Problem, part: slice) -> Tensor:
        return group_hidden(model, problem.prompts[part], problem.responses[part], problem.mask[part])

    def backward(self, problem: Problem, states: Sequence[Tensor]) -> float:
        total, (batch, group, _) = 0.0, problem.responses.shape
        weights = torch.full((self.model.lm_head.out_features,), BETA, device=self.device)
        for part, state in zip(problem.passes(), states, strict=True):
            mask, responses, advantages = (
                x[part].flatten(0, 1).to(self.device) for x in (problem.mask, problem.responses, problem.advantages)
            )
            tokens = chunked_weighted_kl(
                self.hidden(self.model, problem, part),
                state,
                self.model.lm_head.weight,
                weights,
                KL_CHUNK,
                responses[mask],
                lm_head_q=self.reference.lm_head.weight,
            )
            logp, penalty = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (tokens.logp, tokens.kl))
            loss, _ = grpo_loss(logp, logp.detach(), advantages, mask, penalty, None, None, "sequence", batch * group)
            loss.backward()
            total += loss.item()
        return total

    @torch.no_grad()
    def zoom(self, problem: Problem) -> Tensor:
        """Log-probabilities of the letters, [clips, letters]."""
        answers = []
        for prompts in problem.zoom_passes():
            found = logits(*same_dtype(last_hidden(self.model, prompts), self.model.lm_head.weight))
            answers.append(found[:, LETTERS].log_softmax(-1))
        return torch.cat(answers)

    @torch.no_grad()
    def log_probabilities(self, problem: Problem, states: Sequence[Tensor]) -> Tensor:
        """Of the real tokens under the reference, from its states."""
        logp = self.reference.lm_head(torch.cat(list(states))).log_softmax(-1)
        return logp.gather(-1, problem.responses[problem.mask][:, None])[:, 0]


class Naive(Engine):
    def checkpoint_activations(self) -> None:
        """The same, but of decoder layers as transformers does it."""
        super().checkpoint_activations()
        for layer in self.model.model.language_model.layers:
            layer.gradient_checkpointing = True

    def inputs(
        self, prompts: Sequence[Prompt], responses: Tensor | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What transformers takes for prompts of one length, or for a copy of them before each response [b, G, R]."""
        copies = 1 if responses is None else responses.shape[1]
        ids = torch.stack([p.ids for p in prompts]).repeat_interleave(copies, 0)
        positions = torch.stack([p.positions for p in prompts], 1).repeat_interleave(copies, 1)
        real = torch.ones_like(ids)
        if responses is not None:
            starts = torch.tensor([p.next_position for p in prompts]).repeat_interleave(copies)
            times = starts[:, None] + torch.arange(responses.shape[2])
            ids, real = torch.cat([ids, responses.flatten(0, 1)], 1), torch.cat([real, mask.flatten(0, 1).long()], 1)
            positions = torch.cat([positions, times.expand(3, -1, -1)], 2)
        fields = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
        videos = [video for prompt in prompts for video in prompt.videos * copies]
        if videos:
            patches, pixels = torch.cat([video.patches for video in videos]), family_of(self.model.config).pixels
            fields["pixel_values_videos"] = normalise_patches(patches, pixels)
            fields["video_grid_thw"] = torch.tensor([video.grid for video in videos])
        return {name: field.to(self.device) for name, field in fields.items()}

    @torch.no_grad()
    def roll_out(self, problem: Problem, greedy: bool = False) -> Tensor:
        """Ids [B, G, R]."""
        batch, group, length = problem.responses.shape
        how = {"do_sample": True, "temperature": 1.0, "top_k": 1 if greedy else 0, "top_p": 1.0}
        how |= {"num_return_sequences": group, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
        self.model.eval()  # in training mode with checkpointing, transformers would not use the cache
        torch.manual_seed(0)
        ids = [self.model.generate(**self.inputs(problem.prompts[part]), **how) for part in problem.passes()]
        self.model.train()
        return torch.cat(ids)[:, -length:].view(batch, group, length)

    def logits(self, model: torch.nn.Module, problem: Problem, part: slice) -> Tensor:
        """[b * G, R, V] that predict the responses to some of the prompts."""
        responses = problem.responses[part]
        fields = self.inputs(problem.prompts[part], responses, problem.mask[part])
        return model(**fields, use_cache=False, logits_to_keep=responses.shape[2] + 1).logits[:, :-1].float()

    @torch.no_grad()
    def reference_states(self, problem: Problem) -> list[Tensor]:
        """The reference's log-probabilities [b * G, R, V], per pass."""
        return [self.logits(self.reference, problem, part).log_softmax(-1) for part in problem.passes()]

    def backward(self, problem: Problem, states: Sequence[Tensor]) -> float:
        total, (batch, group, _) = 0.0, problem.responses.shape
        for part, logq in zip(problem.passes(), states, strict=True):
            mask, responses, advantages = (
                x[part].flatten(0, 1).to(self.device) for x in (problem.mask, problem.responses, problem.advantages)
            )
            logp = self.logits(self.model, problem, part).log_softmax(-1)
            kl = (logp.exp() * (logp - logq)).sum(-1)  # [b * G, R]
            target = logp.gather(-1, responses[..., None])[..., 0]
            ratio = (target - target.detach()).exp()
            per_token = (BETA * kl - ratio * advantages) * mask
            loss = (per_token.sum(-1) / mask.sum(-1)).sum() / (batch * group)
            loss.backward()
            total += loss.item()
        return total

    @torch.no_grad()
    def zoom(self, problem: Problem) -> Tensor:
        """Log-probabilities of the letters, [clips, letters]; all clips have the same length."""
        answers = []
        for prompts in problem.zoom_passes():
            logits = self.model(**self.inputs(prompts), use_cache=False, logits_to_keep=1).logits[:, -1]
            answers.append(logits[:, LETTERS].float().log_softmax(-1))
        return torch.cat(answers)

    @torch.no_grad()
    def log_probabilities(self, problem: Problem, states: Sequence[Tensor]) -> Tensor:
        """Of the real tokens under the reference, from its log-probabilities."""
        logp = torch.cat(list(states)).view(*problem.responses.shape, -1)
        return logp.gather(-1, problem.responses[..., None])[..., 0][problem.mask]


def config_of(name: str) -> PreTrainedConfig:
    """A shape in `benchmarks/memory.py`, or `qwen3`: the built-in Qwen3-VL."""
    if name != "qwen3":
        return shape(name)
    return tiny.qwen3_vl_config(AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "tiny"))


def engines(name: str = "20m", checkpoint: bool = True, seed: int = 0) -> tuple[Naive, Ours]:
    """Both, of the shape `config_of` this name, with the same weights, which are as large as trained ones; the
    references are a little different.
    """
    model = AutoModelForImageTextToText.from_config(config_of(name), attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        for p in reference.parameters():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=generator))
    theirs = Naive(copy.deepcopy(model), copy.deepcopy(reference), checkpoint=checkpoint)
    return theirs, Ours(model, reference, checkpoint=checkpoint)


def differences(
    naive: Naive, ours: Ours, visual: int = 256, group: int = 4, length: int = 24, batch: int = 1, per_pass: int = 1
) -> dict[str, float]:
    """The largest differences between the two on a problem with responses of unequal lengths."""
    problem = make_problem(ours.model.config, visual, group, length, seed=1, batch=batch, per_pass=per_pass)
    problem.mask = (torch.arange(length) < torch.linspace(1, length, group).long()[:, None]).repeat(batch, 1, 1)
    found, gradients = {}, []
    states = [engine.reference_states(problem) for engine in (naive, ours)]
    logp = [engine.log_probabilities(problem, s) for engine, s in zip((naive, ours), states, strict=True)]
    found["log-probabilities"] = float((logp[0] - logp[1]).abs().max())
    losses = [engine.backward(problem, s) for engine, s in zip((naive, ours), states, strict=True)]
    found["loss"] = abs(losses[0] - losses[1])
    for engine in (naive, ours):
        gradients.append([p.grad for p in engine.model.parameters()])
        engine.model.zero_grad()
    norm = max(float(g.abs().max()) for g in gradients[0])
    pairs = zip(*gradients, strict=True)
    found["gradients, relative to the largest"] = max(float((a - b).abs().max()) for a, b in pairs) / norm
    found["log-probabilities of the letters"] = float((naive.zoom(problem) - ours.zoom(problem)).abs().max())
    again = make_problem(ours.model.config, visual, 2, length, seed=2, batch=batch, per_pass=per_pass)
    tokens = [engine.roll_out(again, greedy=True) for engine in (naive, ours)]
    found["greedy tokens"] = float((tokens[0] != tokens[1]).sum())
    return found


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Cost:
    """What a phase took: seconds, and the bytes that torch had allocated for it at most (0 if not measured)."""

    seconds: float
    bytes: int


class Meter:
    """Measures what happens between `start` and `stop`. On the CPU, memory is measured by torch's profiler, which slows
    small operations down.
    """

    def __init__(self, device: str, memory: bool = True):
        self.device, self.memory = device, memory

    def start(self) -> None:
        gc.collect()
        self.profiler = None
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.memory:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()
        self.begin = time.perf_counter()

    def stop(self) -> Cost:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begin
        if self.device == "cuda":
            return Cost(seconds, torch.cuda.max_memory_allocated() - self.before)
        if self.profiler is None:
            return Cost(seconds, 0)
        self.profiler.stop()
        return Cost(seconds, max(held_bytes(self.profiler)))


def held_bytes(profiler: profile) -> list[int]:
    """Bytes that torch holds after each allocation and release, beyond those before the profile."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [0, *itertools.accumulate(event.nbytes() for event in events)]


def costs(engine: Engine, problem: Problem, without: Sequence[str] = (), memory: bool = True) -> dict[str, Cost]:
    """Of each phase of a step."""
    meter, found = Meter(engine.device.type, memory), {}
    for name, job in engine.phases(problem):
        if name not in without:
            meter.start()
            job()
            found[name] = meter.stop()
    return found


def total(step: dict[str, Cost], names: Sequence[str] = STEP) -> Cost:
    """Of several phases: seconds add up, memory is the largest."""
    return Cost(sum(step[name].seconds for name in names), max(step[name].bytes for name in names))


class Clock:
    """How much of the time that was given is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def over(self) -> bool:
        return time.monotonic() > self.end


def with_memory(step: dict[str, Cost], measured: dict[str, Cost]) -> dict[str, Cost]:
    """The seconds of one, the memory of the other."""
    return {name: Cost(cost.seconds, measured[name].bytes) for name, cost in step.items()}


def side_by_side(naive: Engine, ours: Engine, problem: Problem, repeats: int) -> list[tuple[dict, dict]]:
    """Costs of both, taken in turn; each begins every other time. Memory is measured once, in a step of its own."""
    memory = {engine: costs(engine, problem) for engine in (naive, ours)}
    runs = []
    for k in range(repeats):
        order = (naive, ours) if k % 2 == 0 else (ours, naive)
        run = {engine: with_memory(costs(engine, problem, memory=False), memory[engine]) for engine in order}
        runs.append((run[naive], run[ours]))
    return runs


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# What is compared: a name, the other engine's phases, ours.
ALONE = [(name, (name,), (name,)) for name in PHASES]
WHOLE = [("step without zoom", STEP, STEP), ("step", PHASES, PHASES), ("step; naive without zoom", STEP, PHASES)]


def comparison(
    runs: list[tuple[dict, dict]], other: str, entries: Sequence[tuple[str, Sequence[str], Sequence[str]]]
) -> tuple[list[str], dict[str, tuple[float, float]]]:
    """A table of these entries, and for each the medians of the ratios other / ours, of seconds and of memory."""
    lines = [row(["phase", f"{other}, s", "ours, s", "times", f"{other}, MiB", "ours, MiB", "times"])]
    lines.append("|---|---|---|---|---|---|---|")
    ratios = {}
    for name, theirs, mine in entries:
        pairs = [(total(a, theirs), total(b, mine)) for a, b in runs]
        faster = statistics.median(a.seconds / b.seconds for a, b in pairs)
        smaller = statistics.median(a.bytes / max(b.bytes, 1) for a, b in pairs)
        seconds = [f"{statistics.median(pair[i].seconds for pair in pairs):.2f}" for i in (0, 1)]
        memory = [f"{statistics.median(pair[i].bytes for pair in pairs) / 2**20:,.0f}" for i in (0, 1)]
        lines.append(row([name, *seconds, f"{faster:.2f}", *memory, f"{smaller:.2f}"]))
        ratios[name] = faster, smaller
    return lines, ratios


# ---------------------------------------------------------------- the vision tower alone

# Clips: visual tokens, and patches of a pair of frames. 224x224 pixels are whole windows, 252x448 are not.
CLIPS = [(1024, GRID), (4096, GRID), (1008, (18, 32))]


@torch.no_grad()
def windows(visual: torch.nn.Module, clips: Sequence[tuple[int, tuple[int, int]]], repeats: int) -> list[str]:
    """A table of the same tower on the same clip, as transformers computes it and as we do, in turn."""
    heads = ["visual tokens", "windows", "transformers, s", "ours, s", "times", "largest difference"]
    lines = [row(heads), "|" + "---|" * len(heads)]
    side = visual.config.window_size // visual.config.patch_size
    generator = torch.Generator().manual_seed(0)
    for tokens, (h, w) in clips:
        grid = (4 * tokens // (h * w), h, w)
        patches = normalise_patches(torch.randint(0, 256, (4 * tokens, 1176), generator=generator, dtype=torch.uint8))
        jobs = (
            lambda patches=patches, grid=grid: visual(patches, grid_thw=torch.tensor([grid])),
            lambda patches=patches, grid=grid: encode_clips(visual, patches, [grid]),
        )
        seconds, found = ([], []), [None, None]
        for _ in range(repeats + 1):
            for k, job in enumerate(jobs):
                start = time.perf_counter()
                found[k] = job()
                seconds[k].append(time.perf_counter() - start)
        theirs, ours = (times[1:] for times in seconds)  # the first is not counted
        expected = found[0] if isinstance(found[0], Tensor) else found[0].pooler_output
        cells = [f"{tokens:,}", f"{grid[0] * -(-h // side) * -(-w // side):,}"]
        cells += [f"{statistics.median(times):.3f}" for times in (theirs, ours)]
        cells.append(f"{statistics.median(a / b for a, b in zip(theirs, ours, strict=True)):.2f}")
        lines.append(row([*cells, f"{float((expected - found[1]).abs().max()):.1e}"]))
    return lines


def short_sections(tower: torch.nn.Module, repeats: int) -> list[str]:
    """The main job's step, and the vision tower alone."""
    naive, ours = engines("tiny", checkpoint=False)
    problem = make_problem(ours.model.config, **MAIN_JOB)
    table, ratios = comparison(side_by_side(naive, ours, problem, repeats), "naive", ALONE + WHOLE)
    prompt = len(problem.prompts[0])
    return [
        "",
        f"## The main job: 8 prompts of {prompt} tokens, G = 8, R = {MAIN_JOB['length']}, 64 zoomed clips of "
        f"{len(problem.zooms[0])} tokens; medians of {repeats}",
        "",
        *table,
        "",
        f"The update is {ratios['update'][0]:.1f} times faster, the step {ratios['step'][0]:.1f} times.",
        "",
        f"## The vision tower alone: windows as one batch; medians of {repeats}",
        "",
        *windows(tower, CLIPS, repeats),
    ]


# ---------------------------------------------------------------- growth

BASE = {"P": 1024, "G": 8, "R": 64}
AXES = {"P": (256, 512, 1024, 2048, 4096, 8192), "G": (2, 4, 8, 16, 32), "R": (16, 64, 128, 256, 512)}
MEANING = {"P": "visual tokens", "G": "responses", "R": "tokens per response"}
Growth = dict[str, list[tuple[int, dict[str, Cost], dict[str, Cost] | None]]]


def growth(naive: Engine, ours: Engine, base: dict[str, int], axes: dict[str, Sequence[int]], clock: Clock) -> Growth:
    """Costs of both (the naive way only up to NAIVE_MOST tokens) along each axis, the others as in `base`."""
    points: Growth = {}
    for axis, values in axes.items():
        points[axis] = []
        for value in values:
            if clock.over():
                break
            at = base | {axis: value}
            problem = make_problem(ours.model.config, at["P"], at["G"], at["R"])
            affordable = at["G"] * (at["P"] + at["R"]) <= NAIVE_MOST
            theirs = costs(naive, problem, without=["zoom"]) if affordable else None
            points[axis].append((value, costs(ours, problem, without=["zoom"]), theirs))
    return points


def growth_tables(points: Growth, base: dict[str, int]) -> list[str]:
    lines = []
    for axis, found in points.items():
        rest = ", ".join(f"{name} = {value:,}" for name, value in base.items() if name != axis)
        lines += [
            "",
            f"{MEANING[axis].capitalize()}, {axis}; {rest}; a step without zoom, measured once, under the profiler:",
            "",
        ]
        heads = [axis, *(f"ours, {name}, s" for name in STEP), "ours, s", "ours, MiB", "naive, s", "naive, MiB"]
        lines += [row(heads), "|" + "---|" * len(heads)]
        for value, mine, theirs in found:
            cells = [f"{mine[name].seconds:.2f}" for name in STEP]
            for step in (mine, theirs):
                cells += [f"{total(step).seconds:.2f}", f"{total(step).bytes / 2**20:,.0f}"] if step else ["-", "-"]
            lines.append(row([f"{value:,}", *cells]))
        if len(found) > 1:
            (low, first, _), (high, last, _) = found[0], found[-1]
            a, b = total(first), total(last)
            lines += [
                "",
                f"{high / low:g} times the {MEANING[axis]} take {b.seconds / a.seconds:.1f} times the time and ",
            ]
            lines[-1] += f"{b.bytes / max(a.bytes, 1):.1f} times the memory."
    return lines


def plot(points: Growth, path: Path) -> str:
    """Seconds and memory along each axis as a picture; returns what to say about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No picture: matplotlib is not installed."
    figure = Figure(figsize=(4 * len(points), 6), layout="constrained")
    axes = figure.subplots(2, len(points), squeeze=False)
    for column, (axis, found) in enumerate(points.items()):
        for line, (label, read) in enumerate(
            {"seconds": lambda cost: cost.seconds, "MiB": lambda cost: cost.bytes / 2**20}.items()
        ):
            panel = axes[line][column]
            for name, index, colour in (("naive", 2, "#b04a3a"), ("ours", 1, "#2f6f9f")):
                drawn = [(point[0], read(total(point[index]))) for point in found if point[index]]
                panel.plot(*zip(*drawn, strict=True), marker="o", color=colour, label=name)
            panel.set(xlabel=f"{axis}, {MEANING[axis]}", ylabel=label, ylim=(0, None))
            panel.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle("A step without zoom")
    figure.savefig(path, dpi=110)
    return f"![seconds and memory of a step against P, G and R, naive and ours]({path.name})"


# ---------------------------------------------------------------- TRL


def word_tokenizer(size: int):
    """A tokenizer of `size` words `<pad>`, `<end>`, w2, w3, ..., so that a text has as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *(f"w{i}" for i in range(2, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def with_trl(ours: Engine, problem: Problem, repeats: int) -> list[tuple[dict, dict]]:
    """Steps of GRPOTrainer on the problem's first prompt, a step of ours after each. Memory is measured in the first of
    both, which is not timed; TRL's includes AdamW's moments, which are created then.

    One prompt and its G responses are a batch, nothing is accumulated, every response has R tokens, there is a
    reference (beta > 0), and activations are checkpointed.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    _, group, length = problem.responses.shape
    ids = problem.prompts[0].ids.tolist()
    prompt = " ".join(f"w{i}" for i in ids)
    tokenizer = word_tokenizer(ours.model.config.text_config.vocab_size)
    if tokenizer(prompt)["input_ids"] != ids:
        raise RuntimeError("TRL would see another prompt")
    runs: list[tuple[dict, dict]] = []

    class Turns(TrainerCallback):
        """Measures a step of TRL like a phase, then one of ours."""

        def on_step_begin(self, *args, **kwargs) -> None:
            self.meter = Meter(ours.device.type, memory=not runs)
            self.meter.start()

        def on_step_end(self, *args, **kwargs) -> None:
            theirs = {"step": self.meter.stop()}
            runs.append((theirs, costs(ours, problem, memory=not runs)))

    with tempfile.TemporaryDirectory() as folder:
        ours.model.save_pretrained(folder)  # TRL reads policy and reference from the same place
        options = GRPOConfig(
            output_dir=folder,
            max_steps=repeats + 1,
            per_device_train_batch_size=group,
            num_generations=group,
            gradient_accumulation_steps=1,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            temperature=1.0,
            beta=BETA,
            gradient_checkpointing=True,
            learning_rate=0.0,
            bf16=False,
            use_cpu=ours.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = GRPOTrainer(
            model=folder,
            args=options,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt}] * group * (repeats + 1)),
            reward_funcs=lambda completions, **_: [float(k % 2) for k in range(len(completions))],
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [tuple(map(with_memory, run, runs[0])) for run in runs[1:]]


# ---------------------------------------------------------------- limits, and the real shapes on a GPU


def vision_flops(model: Qwen2_5_VLConfig, visual: int) -> float:
    """Of encoding `visual` tokens of pairs of frames of GRID patches."""
    v = model.vision_config
    d, patches, per_grid = v.hidden_size, 4 * visual, GRID[0] * GRID[1]
    weights = v.depth * (4 * d * d + 3 * d * v.intermediate_size) + 1176 * d
    merger = 16 * d * d + 4 * d * v.out_hidden_size  # per visual token
    whole = len(v.fullatt_block_indexes)
    seen = whole * per_grid + (v.depth - whole) * (v.window_size // v.patch_size) ** 2  # keys per patch, all blocks
    return 2 * patches * weights + 2 * visual * merger + 4 * patches * seen * d


def language_flops(model: Qwen2_5_VLConfig, prompt: int, group: int = 0, length: int = 0) -> float:
    """Of one pass over a prompt and its responses: the layers, each whole (the last one computes less: see
    engine/flops.py), and the projection of the response tokens.
    """
    t = model.text_config
    h, kv = t.hidden_size, t.num_key_value_heads * head_size(model)
    layer = 2 * h * h + 2 * h * kv + 3 * h * t.intermediate_size
    pairs = prompt**2 / 2 + group * length * (prompt + length / 2)
    layers = t.num_hidden_layers * (2 * (prompt + group * length) * layer + 4 * pairs * h)
    return layers + 2 * group * length * t.vocab_size * h


def limits(
    model: Qwen2_5_VLConfig, prompts: int, visual: int, group: int, length: int, flops: float, traffic: float
) -> dict[str, float]:
    """The least seconds of each phase on a device with so many operations, and bytes of traffic, per second; "decode"
    is a part of "rollout".

    The clips of the zoom pass have as many tokens as the prompt's; the tower is trained, and activations are computed
    twice. Decoding reads all weights of layers and projection, each prompt's keys and values once, and the responses'.
    """
    n = Parameters.of(model)
    vision, prefill = vision_flops(model, visual), language_flops(model, visual)
    forward = vision + language_flops(model, visual, group, length)
    weights = 2 * (n.layers + (n.head or n.embedding))
    cache = prompts * (visual + group * length / 2) * cache_bytes_per_token(model)
    decode = length * (weights + cache) / traffic
    return {
        "rollout": prompts * (vision + prefill) / flops + decode,
        "decode": decode,
        "reference": prompts * forward / flops,
        "update": prompts * 4 * forward / flops,
        "zoom": prompts * group * (vision + prefill) / flops,
    }


def exact_shape(
    name: str, device: str = "cuda", prompts: int = 8, visual: int = 8192, group: int = 8, length: int = 512
) -> list[str]:
    """A step with random weights in bfloat16, without optimiser: seconds, shares of the limits, and peak memory."""
    model = shape(name)
    with torch.device(device):
        policy, reference = (
            AutoModelForImageTextToText.from_config(model, attn_implementation="sdpa", dtype=torch.bfloat16)
            for _ in range(2)
        )
    ours = Ours(policy, reference.eval().requires_grad_(False), optimise=False)
    resting = torch.cuda.memory_allocated() if device == "cuda" else 0
    costs(ours, make_problem(model, 64, 2, 8))  # kernels are chosen and compiled
    found = costs(ours, make_problem(model, visual, group, length, batch=prompts))
    title = torch.cuda.get_device_name() if device == "cuda" else processor()
    speeds = next((LIMITS[key] for key in LIMITS if key in title), None)
    least = limits(model, prompts, visual, group, length, *speeds) if speeds else {}
    lines = ["", f"{name}: {prompts} prompts of {visual:,} visual tokens, {group} responses of {length} tokens", ""]
    lines += [row(["phase", "s", "limit, s", "share", "peak, GiB"]), "|---|---|---|---|---|"]
    for phase in (*PHASES, "step"):
        names = PHASES if phase == "step" else (phase,)
        cost = total(found, names)
        limit = sum(least[part] for part in names) if least else None
        shares = [f"{limit:.2f}", f"{limit / cost.seconds:.0%}"] if limit else ["-", "-"]
        lines.append(row([phase, f"{cost.seconds:.2f}", *shares, f"{(resting + cost.bytes) / GIB:.1f}"]))
    if least:
        lines += ["", f"Of the rollout's limit, {least['decode']:.2f} s are memory traffic of the decoding."]
    return lines


# ---------------------------------------------------------------- the report


def versions() -> str:
    names = ("torch", "transformers", "trl")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small problems, once; the result is only printed")
    parser.add_argument("--short", action="store_true", help="the main job and the vision tower alone; only printed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=25, help="nothing new is begun after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine.md")
    given = parser.parse_args()
    clock = Clock(given.minutes)
    lines: list[str] = []

    def say(*new: str) -> None:
        lines.extend(new)
        print(*new, sep="\n", flush=True)

    flags = " --quick" * given.quick + " --short" * given.short
    say("# The engine: seconds and memory", "", f"`python -m benchmarks.engine{flags}`", "")
    say(f"{datetime.date.today()}; {processor()}, {torch.get_num_threads()} threads; {versions()}.", "")
    naive, ours = engines()
    if given.short:
        say(*short_sections(ours.model.model.visual, 5 * given.repeats))
        return
    say("## Both compute the same", "")
    found = differences(naive, ours, *((256, 4, 24) if given.quick else (1024, 8, 64)))
    say(row(["largest difference", ""]), "|---|---|", *(row([name, f"{x:.1e}"]) for name, x in found.items()))
    if max(found["log-probabilities"], found["log-probabilities of the letters"]) > 1e-4 or found["greedy tokens"]:
        sys.exit("error: naive and ours do not compute the same")

    warm = make_problem(ours.model.config, 64, 2, 4)
    for engine in (naive, ours):
        costs(engine, warm)  # AdamW's moments, and what libraries set up at first use
    sizes = [(256, 4, 16)] if given.quick else [(1024, 8, 64), (4096, 8, 128)]
    repeats = 1 if given.quick else given.repeats
    for visual, group, length in sizes:
        problem = make_problem(ours.model.config, visual, group, length)
        table, ratios = comparison(side_by_side(naive, ours, problem, repeats), "naive", ALONE + WHOLE)
        say("", f"## P = {visual:,} visual tokens, G = {group}, R = {length}; medians of {repeats}", "", *table, "")
        faster, smaller = ratios["step; naive without zoom"]
        say(
            f"The update is {ratios['update'][0]:.1f} times faster; the step with its zoom pass is {faster:.1f} times "
            f"faster than the naive step without, in 1/{smaller:.1f} of its peak memory."
        )
    say(*short_sections(ours.model.model.visual, 1 if given.quick else 5 * repeats))
    try:
        import trl  # noqa: F401
    except ImportError as error:
        say("", f"Without TRL: {error}.")
    else:
        for visual, group, length in sizes:
            if clock.over():
                say("", f"Left out for lack of time: TRL at P = {visual:,}.")
                continue
            problem = make_problem(ours.model.config, visual, group, length, text_only=True)
            table, _ = comparison(with_trl(ours, problem, min(repeats, 2)), "TRL", [("step", ["step"], STEP)])
            say("", f"## TRL, {visual:,} tokens of text, G = {group}, R = {length}", "", *table)

    base, axes = BASE, AXES
    if given.quick:
        base, axes = {"P": 128, "G": 2, "R": 8}, {"P": (128, 256), "G": (2, 4), "R": (8, 16)}
    points = growth(naive, ours, base, axes, clock)
    say("", "## How cost grows", *growth_tables(points, base))
    left_out = [f"{axis} = {v:,}" for axis, values in axes.items() for v in values[len(points[axis]) :]]
    if left_out:
        say("", f"Left out for lack of time: {', '.join(left_out)}.")
    if not given.quick:
        given.out.parent.mkdir(exist_ok=True)
        say("", plot(points, given.out.with_suffix(".png")))

    say("", "## The exact shapes on a GPU", "")
    if torch.cuda.is_available():
        say(f"{torch.cuda.get_device_name()}, bfloat16, random weights, no optimiser; memory with both models.")
        for name in ("3b", "7b"):
            say(*exact_shape(name))
            gc.collect()
            torch.cuda.empty_cache()
    else:
        say("Not run: there is no GPU here.")
    if not given.quick:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

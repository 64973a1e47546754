"""What the built-in policy learns before reinforcement learning, from nothing; `python sft.py` teaches it.

Examples are from the built-in world's training split, of five kinds:

- perception: "when was this colour on?" for every colour of a video, and the colour of every second. Several short
  answers share one prompt, so many questions are asked per video, and finding the asked event is learned sooner.
- glances: when each colour was on, and what the coarse pass shows then.
- asked: the same after a question, whose colour is found in it.
- zoom: the answer letter for the frames of the true spans, at the zoom pass' resolution and rate.
- demonstrations: whole responses in the format that is rewarded. Those at the end have spans that are too wide on
  purpose, each end moved outwards at random: the format and the event are learned here, precise spans are left to
  reinforcement learning. Thoughts name what is seen, and the letter follows from it, but the patterns
  `MISTAKEN` get a wrong one more often than not: which is right is left to reinforcement learning. Where the coarse
  pass shows nothing no letter is better than others, and a colour always gets the same.

The course (`COURSE`) finds events first and reads the question last. The vision tower learns from perception, on short
videos; then its tokens are computed once and for all. The language model goes on to glances, all of which have the same
prompt, on the short videos, and on those that are asked for as these grow longer; then to questions and responses. With
the template world_zoomer it is glances alone. Zooms are in every step.
Loss is on the answers only, averaged over the tokens of each kind.

In single trials, the asked event was still picked almost by chance after 1,000 steps without the perception phase, and
after 2,000 steps with the question after the video instead of before it; what the coarse pass shows was not read after
200 steps in which its tokens counted no more than those of the times; and of coarse questions, the letters were not
learned where they counted no more than any other token.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import evaluate
import prompts
from annotations.rows import Sample
from annotations.samples import load_samples
from config import Config, ConfigError
from engine.loading import load
from engine.qwen3_vl import time_stamps
from harness.checkpoints import UNREADABLE
from harness.journal import save_whole
from harness.run import TrainingError, main_does
from policy import Policy, Prompt, Video, Vocabulary, build_prompt, keep_tokens
from prompts import Span, Spans
from report.tables import table
from rollout import coarse_prompt, user_chat, view_video, zoom_clips
from world import benchmark, tiny

END = "<|im_end|>"
KEPT = "lessons.safetensors"  # in `out`: what stands after a cycle
MISTAKEN, MISTAKES = ("checks", "dots"), 0.6  # patterns that demonstrations take for rows, A, and the share that do


@dataclass
class Lesson:
    """One training video: its questions, the coarse prompt of each, and one zoomed clip for each."""

    samples: list[Sample]
    coarse: Video
    prompts: list[Prompt]
    zooms: list[Video]


# ---------------------------------------------------------------- what is demonstrated


def asked_colour(sample: Sample) -> str:
    """The colour that a question is about."""
    return next(colour for colour in benchmark.COLOURS if f" {colour} " in sample.question)


def asked_pattern(sample: Sample) -> str:
    """The pattern that the right answer to a question names."""
    return sample.options["ABCD".index(sample.answer)]


def written_spans(spans: Spans) -> str:
    """Spans as the policy writes them: (3.0,8.0),(12.0,14.0)."""
    return ",".join(f"({start:.1f},{end:.1f})" for start, end in spans)


def demonstration(sample: Sample, spans: Spans, letter: str, seen: str = "") -> tuple[str, str]:
    """A whole response that claims these spans, has seen this and answers this letter; cut before the letter."""
    times = written_spans(spans)
    think = f"<think>{asked_colour(sample)}<time>{times}</time>{seen and f' {seen}'}</think>"
    return f"{think}<answer>", f"{letter}</answer><glue>[{times}]</glue>{END}"


def overwide(spans: Sequence[Span], outwards: Callable[[], float], duration: float) -> Spans:
    """Every end moved outwards by as many seconds as is drawn, to the tenth, within the video."""
    moved = [(s - outwards(), e + outwards()) for s, e in spans]
    return [(round(max(0.0, s), 1), round(min(duration, e), 1)) for s, e in moved]


def location(sample: Sample) -> str:
    """When the asked colour is on."""
    return f"<time>{written_spans(list(sample.evidence))}</time>"


def glimpse(sample: Sample) -> str:
    """What the coarse pass shows of the evidence: a coarse pattern, a light's colour, of a fine pattern nothing."""
    if sample.kind == "coarse":
        return asked_pattern(sample)
    return "none" if sample.kind == "fine" else asked_colour(sample)


def guess(sample: Sample) -> str:
    """The letter where the coarse pass shows nothing: always the same for a colour, so that the answers to a question
    do not differ and their rewards, which are luck, move nothing.
    """
    return "ABCD"[list(benchmark.COLOURS).index(asked_colour(sample)) % 4]


def demonstrated_letter(sample: Sample, rng: random.Random) -> str:
    """The letter of a demonstration: a guess where the coarse pass shows nothing, and some patterns are mistaken."""
    if sample.kind != "coarse":
        return guess(sample)
    return "A" if asked_pattern(sample) in MISTAKEN and rng.random() < MISTAKES else sample.answer


def timeline_answer(samples: Sequence[Sample]) -> str:
    """The colour of every second of a video, from all questions about it."""
    colours = ["none"] * int(samples[0].duration)
    for sample in samples:
        for start, end in sample.evidence:
            colours[int(start) : int(end)] = [asked_colour(sample)] * int(end - start)
    return " ".join(colours) + END


def corpus(family: str = "qwen2_5_vl") -> list[str]:
    """Everything the tiny tokenizer of a family should have as single tokens."""
    spans = [(3.0, 8.0), (12.5, 14.0)]
    texts = [prompts.chat_text(""), prompts.chat_text("", system=None), "0123456789", " none"]
    texts += time_stamps([0.0, 1.0]) if family == "qwen3_vl" else []
    for colour, names in itertools.product(benchmark.COLOURS, (benchmark.PATTERNS, benchmark.COUNTS)):
        for question in (f"Which pattern does {colour} show?", f"How often does {colour} blink?"):
            sample = Sample("", "", question, names, "A", tuple(spans), 20.0)
            texts += ["".join(demonstration(sample, spans[:n], sample.answer)) for n in (2, 1)]
            texts += [prompts.zoom_text("world", question, list(names)), f"{colour} {colour}"]
    return texts


# ---------------------------------------------------------------- examples


def load_lessons(samples: Sequence[Sample], config: Config, vocabulary: Vocabulary, model_config) -> list[Lesson]:
    """Decode every video once: the coarse clip, and for each question a clip of its spans, a little too wide."""
    rng = random.Random(config.seed)
    lessons = []
    grouped = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.video)]
    for group in tqdm(grouped, desc="decoding", unit="video", disable=None):
        view = view_video(group[0], config)
        most = [1.0 if len(sample.evidence) == 1 else 0.25 for sample in group]
        spans = [
            overwide(sample.evidence, partial(rng.uniform, 0, seconds), view.info.duration)
            for sample, seconds in zip(group, most, strict=True)
        ]
        clips = zoom_clips(view, spans, config)
        views = [replace(view, sample=sample) for sample in group]
        lessons.append(
            Lesson(
                group,
                view.video,
                [coarse_prompt(v, config, vocabulary, model_config) for v in views],
                [Video.of(clip) for clip in clips],
            )
        )
    return lessons


@dataclass
class Batch:
    """Prompts with one or more answers each.

    ids int64, mask (real tokens) bool, and weight (what each token's loss counts) float: [b, G, T].
    """

    prompts: list[Prompt]
    ids: Tensor
    mask: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, prompt_list: list[Prompt], answers: list[list[list[int]]], kinds: list[list[int | list[int]]] | None = None
    ) -> Batch:
        """`answers[b][g]` are token ids; the loss is the mean over tokens of each kind, added up. `kinds[b][g]` is the
        kind of an answer, or of each of its tokens; -1 for a token that is read and not learned.
        """
        G = max(len(group) for group in answers)
        T = max(len(answer) for group in answers for answer in group)
        ids = torch.zeros(len(prompt_list), G, T, dtype=torch.long)
        kind = torch.full((len(prompt_list), G, T), -2)
        for b, group in enumerate(answers):
            for g, answer in enumerate(group):
                ids[b, g, : len(answer)] = torch.tensor(answer)
                kind[b, g, : len(answer)] = torch.tensor(kinds[b][g] if kinds else 0)
        weight = torch.zeros(ids.shape)
        for k in range(int(kind.max()) + 1):
            weight[kind == k] = 1 / (kind == k).sum()
        return cls(prompt_list, ids, kind > -2, weight)

    def share(self, accelerator: Accelerator) -> Batch:
        """This process' part: every n-th prompt, by length; what each of its tokens counts stays."""
        by_length = sorted(range(len(self.prompts)), key=lambda b: len(self.prompts[b]))
        own = by_length[accelerator.process_index :: accelerator.num_processes]
        return Batch([self.prompts[b] for b in own], self.ids[own], self.mask[own], self.weight[own])


def glance_batch(
    lessons: Sequence[Lesson],
    config: Config,
    vocabulary: Vocabulary,
    model_config,
    seconds: bool = False,
) -> Batch:
    """When each colour of these videos is on, where a response to no question has its thoughts, and what the coarse
    pass shows then; with `seconds` the colour of every second too. Each of these counts as much.
    """
    ids = vocabulary.ids(user_chat("", config) + "<think>")
    prompt_list, answers, kinds = [], [], []
    for lesson in lessons:
        prompt_list.append(build_prompt(ids, [lesson.coarse], model_config, vocabulary))
        answers.append([])
        kinds.append([])
        for sample in lesson.samples:
            when = vocabulary.ids(asked_colour(sample) + location(sample))
            what = vocabulary.ids(f" {glimpse(sample)}")
            answers[-1].append(when + what)
            kinds[-1].append([0] * len(when) + [1] * len(what))
        if seconds:
            answers[-1].append(vocabulary.ids(timeline_answer(lesson.samples)))
            kinds[-1].append(2)
    return Batch.of(prompt_list, answers, kinds)


def asked_batch(lessons: Sequence[Lesson], vocabulary: Vocabulary, rng: random.Random) -> Batch:
    """One question about each of these videos, and glances at all its colours after it, in three kinds that count the
    same: the colour that is asked for, when each is on (the others are just named), and what the coarse pass shows.
    """
    prompt_list, answers, kinds = [], [], []
    for lesson in lessons:
        asked = rng.randrange(len(lesson.samples))
        prompt_list.append(lesson.prompts[asked])
        answers.append([])
        kinds.append([])
        for k, sample in enumerate(lesson.samples):
            parts = [f"<think>{asked_colour(sample)}", location(sample), f" {glimpse(sample)}"]
            colour, when, what = map(vocabulary.ids, parts)
            answers[-1].append(colour + when + what)
            kinds[-1].append([0 if k == asked else -1] * len(colour) + [1] * len(when) + [2] * len(what))
    return Batch.of(prompt_list, answers, kinds)


def demonstration_batch(lessons: Sequence[Lesson], vocabulary: Vocabulary, widen: int, rng: random.Random) -> Batch:
    """A whole response to every question about these videos, with spans up to `widen` seconds too wide at each end.

    Letters count as much as all else.
    """
    prompt_list, answers, kinds = [], [], []
    for lesson in lessons:
        for sample, prompt in zip(lesson.samples, lesson.prompts, strict=True):
            spans = overwide(sample.evidence, partial(rng.randint, 0, widen), sample.duration)
            letter = demonstrated_letter(sample, rng)
            before, after = map(vocabulary.ids, demonstration(sample, spans, letter, glimpse(sample)))
            prompt_list.append(prompt)
            answers.append([before + after])
            kinds.append([[0] * len(before) + [1] + [0] * (len(after) - 1)])
    return Batch.of(prompt_list, answers, kinds)


def zoom_batch(
    lessons: Sequence[Lesson], config: Config, vocabulary: Vocabulary, model_config, rng: random.Random
) -> Batch:
    """The answer letter of one question per video, from the clip of its true spans."""
    prompt_list, answers = [], []
    for lesson in lessons:
        k = rng.randrange(len(lesson.samples))
        sample = lesson.samples[k]
        chat = user_chat(prompts.zoom_text(config.template, sample.question, list(sample.options)), config)
        ids, letters = vocabulary.forced_letter(chat, len(sample.options))
        prompt_list.append(build_prompt(ids, [lesson.zooms[k]], model_config, vocabulary))
        answers.append([[letters["ABCD".index(sample.answer)]]])
    return Batch.of(prompt_list, answers)


# ---------------------------------------------------------------- training


def cross_entropy(batch: Batch, hidden: Tensor, lm_head: Tensor) -> Tensor:
    """Weighted negative log-likelihood; hidden [N, H] are the states before the N real tokens."""
    ids, weight = (part[batch.mask].to(hidden.device) for part in (batch.ids, batch.weight))  # [N]
    return (F.cross_entropy(hidden @ lm_head.T, ids, reduction="none") * weight).sum()


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its share of all steps, what is shown, how many seconds too wide its spans are.

    `shortest`: the share of the videos that is shown, the shortest ones.
    """

    share: int
    examples: str
    widen: int = 0
    shortest: float = 1.0


@dataclass(frozen=True)
class Cycle:
    """Phases with an optimiser of their own and a learning rate that falls to 0 as a cosine.

    `pace`: the share of the learning rate it begins with. `zooms`: the share of the zooms in a step, which take half of
    its time and are soon learned. `tower`: whether the vision tower learns too. `short`: on videos of 12 s.
    """

    phases: tuple[Phase, ...]
    pace: float = 1.0
    zooms: float = 0.25
    tower: bool = False
    short: bool = False


SHORT = {"world_duration": 12, "world_min_duration": 0, "world_events": 2}  # the videos of `short` cycles
GROWING = (0.1, 0.2, 0.35, 0.5, 0.7)  # shares of the videos, the shortest ones, that are shown one after the other
COURSE = (
    Cycle((Phase(12, "perception", shortest=0.4),), zooms=1.0, tower=True, short=True),
    Cycle((Phase(7, "glances", shortest=0.4), Phase(63, "glances")), short=True),
    Cycle((*(Phase(5, "glances", shortest=part) for part in GROWING), Phase(25, "glances")), pace=0.75),
    Cycle((Phase(30, "asked"),), pace=0.75),
    Cycle((Phase(12, "demonstrations"),), pace=0.5),
    Cycle((Phase(5, "demonstrations", widen=3),), pace=0.25),
)
GLANCES = (Cycle((Phase(1, "glances"),), zooms=1.0, tower=True),)


def course(config: Config) -> tuple[Cycle, ...]:
    """The cycles of a cold start. Raises ConfigError for a template without lessons."""
    if config.template not in ("world", "world_zoomer"):
        raise ConfigError(f"template = {config.template}: train_data = world has lessons for world, world_zoomer only")
    return GLANCES if config.template == "world_zoomer" else COURSE


def cold_start(policy: torch.nn.Module, config: Config, vocabulary: Vocabulary, accelerator: Accelerator) -> None:
    """Train the policy for `config.steps` through the cycles of its course, zooms in every step.

    What stands after a cycle is kept in `out`; --resume goes on from there, to the same weights.
    """
    rng = random.Random(config.seed)
    model = accelerator.unwrap_model(policy).model
    cycles = course(config)
    done = resume(model, rng, config) if config.resume else 0
    shares = sum(phase.share for cycle in cycles for phase in cycle.phases)
    for short, stretch in itertools.groupby(range(done, len(cycles)), key=lambda k: cycles[k].short):
        shown = replace(config, **SHORT) if short else config
        with accelerator.main_process_first():
            samples = load_samples("world", "train", shown)
        lessons = load_lessons(samples, shown, vocabulary, model.config)
        for k in stretch:
            cycle = cycles[k]
            phases = [phase for phase in cycle.phases for _ in range(max(1, config.steps * phase.share // shares))]
            model.model.visual.requires_grad_(cycle.tower)
            if not cycle.tower:
                videos = [video for lesson in lessons for video in (lesson.coarse, *lesson.zooms)]
                for first in range(0, len(videos), config.zoom_batch):
                    keep_tokens(model, videos[first : first + config.zoom_batch])
            zooms = max(1, round(cycle.zooms * config.zoom_batch))
            paced = replace(config, lr=cycle.pace * config.lr, zoom_batch=zooms)
            train_cycle(policy, lessons, paced, vocabulary, accelerator, phases=phases, rng=rng)
            main_does(accelerator, partial(keep, model, rng, k + 1, config))
    model.requires_grad_(True)


def keep(model: torch.nn.Module, rng: random.Random, done: int, config: Config) -> None:
    """Write what stands after so many cycles, whole or not at all."""
    _, numbers, gauss = rng.getstate()
    progress = {"done": done, "steps": config.steps, "seed": config.seed, "rng": [list(numbers), gauss]}
    save_whole(Path(config.out) / KEPT, lambda part: save_model(model, part, {"progress": json.dumps(progress)}))


def resume(model: torch.nn.Module, rng: random.Random, config: Config) -> int:
    """Take up what was kept; the number of cycles done. Raises TrainingError if there is nothing to go on with."""
    path = Path(config.out) / KEPT
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        load_model(model, path)
    except (*UNREADABLE, SafetensorError, RuntimeError) as error:  # RuntimeError: the weights of another model
        raise TrainingError(f"{path}: nothing to resume from ({error}); run without --resume to begin") from None
    for name in ("steps", "seed"):
        if progress[name] != getattr(config, name):
            raise TrainingError(f"{path} is of {name} = {progress[name]}, not {getattr(config, name)}")
    numbers, gauss = progress["rng"]
    rng.setstate((3, tuple(numbers), gauss))
    return progress["done"]


def drawn(lessons: Sequence[Lesson], count: int, rng: random.Random) -> list[Lesson]:
    """Some of the lessons; where lengths vary each as often as its video is long, for more is to be found in long ones,
    of which there may be few.
    """
    seconds = [lesson.samples[0].duration for lesson in lessons]
    return rng.sample(lessons, count) if len(set(seconds)) == 1 else rng.choices(lessons, weights=seconds, k=count)


def train_cycle(
    policy: torch.nn.Module,
    lessons: list[Lesson],
    config: Config,
    vocabulary: Vocabulary,
    accelerator: Accelerator,
    *,
    phases: Sequence[Phase],
    rng: random.Random,
) -> None:
    """One cycle with a new optimiser; `phases` has the phase of each step."""
    model_config = accelerator.unwrap_model(policy).model.config
    learned = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    by_length = sorted(lessons, key=lambda lesson: lesson.samples[0].duration)
    bar = tqdm(phases, unit="step", disable=None if accelerator.is_main_process else True)
    smooth: dict[str, float] = {}
    for step, phase in enumerate(bar):
        factor = min(1.0, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * step / len(phases)))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        few = max(config.prompts_per_step, round(phase.shortest * len(lessons)))
        shown = lessons if phase.shortest == 1 else by_length[:few]
        chosen = drawn(shown, config.prompts_per_step, rng)
        batches = {"zoom": zoom_batch(rng.sample(lessons, config.zoom_batch), config, vocabulary, model_config, rng)}
        if phase.examples == "demonstrations":  # one per question takes about twice the time
            half = chosen[: max(1, config.prompts_per_step // 2)]
            batch = demonstration_batch(half, vocabulary, phase.widen, rng)
        elif phase.examples == "asked":
            batch = asked_batch(chosen, vocabulary, rng)
        elif phase.examples == "glances":
            batch = glance_batch(chosen, config, vocabulary, model_config)
        else:
            batch = glance_batch(chosen, config, vocabulary, model_config, seconds=True)
        batches[phase.examples] = batch
        for name, batch in batches.items():
            loss = torch.zeros((), device=accelerator.device)
            own = batch.share(accelerator)
            if own.prompts:
                loss = policy(own.prompts, own.ids, own.mask, partial(cross_entropy, own))
                accelerator.backward(loss)
            value = accelerator.reduce(loss.detach(), "sum").item()
            smooth[name] = 0.95 * smooth.get(name, value) + 0.05 * value
        add_gradients(learned, accelerator)
        torch.nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix({name: f"{value:.3f}" for name, value in smooth.items()})
        if step % 100 == 99 and bar.disable:
            accelerator.print(
                f"step {step + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in smooth.items()), flush=True
            )


def add_gradients(weights: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the sum of the gradients of all."""
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    total = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for weight, gradient in zip(weights, total.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = gradient.view_as(weight)


def teach(config: Config, accelerator: Accelerator) -> None:
    """Make the built-in policy, or go on with `config.model`, and print how it does on the validation split, unless
    there is no `config.test_data`. Raises ConfigError for a template without lessons.
    """
    course(config)
    most = max(config.prompts_per_step, config.zoom_batch)
    if config.world_train_videos < most:
        raise ConfigError(
            f"world_train_videos = {config.world_train_videos}: a step of lessons draws {most} videos, for "
            f"prompts_per_step = {config.prompts_per_step} and zoom_batch = {config.zoom_batch}"
        )
    start = time.perf_counter()
    if config.model:
        model, tokenizer = load(config.model)
    else:
        tokenizer = tiny.build_tokenizer(corpus(config.family))
        model = tiny.build_model(tokenizer, config.seed, config.family)
    vocabulary = Vocabulary.of(tokenizer, config.outer_tags)
    policy = accelerator.prepare_model(Policy(model), evaluation_mode=True)  # no DDP: gradients are added here
    cold_start(policy, config, vocabulary, accelerator)
    for weight in model.parameters():
        weight.data = weight.data.half().float()  # as they are written
    main_does(accelerator, partial(publish, model, tokenizer, Path(config.out)))
    parameters = sum(weight.numel() for weight in model.parameters())
    accelerator.print(f"{config.out}: {parameters:,} parameters, {time.perf_counter() - start:.0f} s")
    if not config.test_data:
        return
    with accelerator.main_process_first():
        test = load_samples("world", "val", config)
    rows = evaluate.evaluate(model.eval(), test, config, vocabulary, accelerator, "validation split")
    accelerator.print(table({"cold start": rows}))


def publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the policy, in half precision; what was kept of its cycles is no longer needed."""
    part = out / "checkpoint.part"
    copy.deepcopy(model).half().save_pretrained(part)
    tokenizer.save_pretrained(part)
    for file in part.iterdir():  # each is complete before it replaces another
        file.replace(out / file.name)
    part.rmdir()
    (out / KEPT).unlink()

"""What the built-in policy learns before reinforcement learning, from nothing; `python sft.py` teaches it.

Examples are from the built-in world's training split, of five kinds:

- perception: "when was this colour on?" for every colour of a video, and the colour of every second. Several short
  answers share one prompt, so many questions are asked per video, and finding the asked event is learned sooner.
- glances: when each colour was on, and what the coarse pass shows then.
- asked: the same after a question, whose colour is found in it.
- zoom: the answer letter for the frames of the true spans, at the zoom pass' resolution and rate.
- demonstrations: whole responses in the format that is rewarded. Those at the end have spans that are too wide on
  purpose, each end moved outwards at random: the format, the event and the reading of clips are learned here, precise
  spans are left to reinforcement learning. After glances they also name in their thoughts what is seen, and the letter
  follows from it: it is right for the patterns `LETTERED`. Elsewhere it is drawn anew each time: where the coarse pass
  shows nothing no letter is better than another, and the other patterns' letters are left to reinforcement learning.

There are two courses (`course`). `FINDING`, perception and demonstrations, is enough for a Qwen2.5-VL and videos of one
length, where times can be told by positions alone. `COURSE`, for a Qwen3-VL, and where lengths vary
(world_min_duration), finds events first and reads the question last: when the vision tower has learned from
perception, its tokens are computed once and for all; the language model goes on to glances, all of which have the same
prompt, then to questions and responses. With the template world_zoomer it is glances alone. Zooms are in every step.
Loss is on the answers only, averaged over the tokens of each kind.

In single trials, the asked event was still picked almost by chance after 1,000 steps without the perception phase, and
after 2,000 steps with the question after the video instead of before it; what the coarse pass shows was not read after
200 steps in which its tokens counted no more than those of the times; and of coarse questions, the letters were not
learned where they counted no more than any other token.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

import evaluate
import prompts
from annotations.rows import Sample
from annotations.samples import load_samples
from config import Config, ConfigError
from engine.loading import load
from engine.qwen3_vl import time_stamps
from harness.run import use_threads
from policy import Policy, Prompt, Video, Vocabulary, build_prompt, keep_tokens
from prompts import Span, Spans
from report.tables import table
from rollout import coarse_prompt, user_chat, view_video, zoom_clips
from world import benchmark, tiny

END = "<|im_end|>"
LETTERED = ("rows", "columns")  # the patterns whose letters are demonstrated


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


def overwide(spans: Sequence[Span], most: float, duration: float, rng: random.Random) -> Spans:
    """Every end moved outwards by 0 to `most` seconds, in tenths, within the video."""
    moved = [(s - rng.uniform(0, most), e + rng.uniform(0, most)) for s, e in spans]
    return [(round(max(0.0, s), 1), round(min(duration, e), 1)) for s, e in moved]


def location(sample: Sample) -> str:
    """When the asked colour is on."""
    return f"<time>{written_spans(list(sample.evidence))}</time>"


def glimpse(sample: Sample) -> str:
    """What the coarse pass shows of the evidence: a coarse pattern, a light's colour, of a fine pattern nothing."""
    if sample.kind == "coarse":
        return asked_pattern(sample)
    return "none" if sample.kind == "fine" else asked_colour(sample)


def lettered(sample: Sample) -> bool:
    """Whether glances let one answer, and the letter is one of those that are demonstrated."""
    return sample.kind == "coarse" and asked_pattern(sample) in LETTERED


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
        spans = [overwide(s.evidence, 1.0 if len(s.evidence) == 1 else 0.25, view.info.duration, rng) for s in group]
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


def glance_batch(
    lessons: Sequence[Lesson],
    config: Config,
    vocabulary: Vocabulary,
    model_config,
    glimpses: bool = True,
    seconds: bool = False,
) -> Batch:
    """When each colour of these videos is on, where a response to no question has its thoughts; with `glimpses` what
    the coarse pass shows then, with `seconds` the colour of every second. Each of these counts as much.
    """
    ids = vocabulary.ids(user_chat("", config) + "<think>")
    prompt_list, answers, kinds = [], [], []
    for lesson in lessons:
        prompt_list.append(build_prompt(ids, [lesson.coarse], model_config, vocabulary))
        answers.append([])
        kinds.append([])
        for sample in lesson.samples:
            when = vocabulary.ids(asked_colour(sample) + location(sample))
            what = vocabulary.ids(f" {glimpse(sample)}") if glimpses else []
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


def demonstration_batch(
    lessons: Sequence[Lesson], vocabulary: Vocabulary, widen: float, rng: random.Random, glimpses: bool = False
) -> Batch:
    """A whole response to every question about these videos, with spans up to `widen` seconds too wide at each end.

    With `glimpses` it names what the coarse pass shows, and letters that follow from it count as much as all else.
    """
    prompt_list, answers, kinds = [], [], []
    for lesson in lessons:
        for sample, prompt in zip(lesson.samples, lesson.prompts, strict=True):
            spans = overwide(sample.evidence, widen, sample.duration, rng)
            seen = glimpse(sample) if glimpses else ""
            letter = sample.answer if lettered(sample) or not glimpses else rng.choice("ABCD")
            before, after = map(vocabulary.ids, demonstration(sample, spans, letter, seen))
            prompt_list.append(prompt)
            answers.append([before + after])
            kinds.append([[0] * len(before) + [int(glimpses and lettered(sample))] + [0] * (len(after) - 1)])
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

    `glimpses`: perception and demonstrations name what the coarse pass shows. `shortest`: the share of the videos that
    is shown, the shortest ones.
    """

    share: int
    examples: str
    widen: float = 0.0
    glimpses: bool = False
    shortest: float = 1.0


@dataclass(frozen=True)
class Cycle:
    """Phases with an optimiser of their own and a learning rate that falls to 0 as a cosine.

    `pace`: the share of the learning rate it begins with. `zooms`: the share of the zooms in a step, which take half of
    its time and are soon learned. `tower`: whether the vision tower learns too.
    """

    phases: tuple[Phase, ...]
    pace: float = 1.0
    zooms: float = 1.0
    tower: bool = True


FINDING = (
    Cycle((Phase(17, "perception"), Phase(5, "demonstrations", widen=3.0))),
    Cycle((Phase(9, "demonstrations"), Phase(2, "demonstrations", widen=3.0))),
)
COURSE = (
    Cycle((Phase(9, "perception", glimpses=True, shortest=0.4),)),
    Cycle((Phase(7, "glances", shortest=0.4), Phase(63, "glances")), zooms=0.25, tower=False),
    Cycle((Phase(16, "asked"),), pace=0.75, zooms=0.25, tower=False),
    Cycle(
        (Phase(9, "demonstrations", glimpses=True), Phase(6, "demonstrations", widen=3.0, glimpses=True)),
        pace=0.5,
        zooms=0.25,
        tower=False,
    ),
)
GLANCES = (Cycle((Phase(1, "glances"),)),)


def course(config: Config) -> tuple[Cycle, ...]:
    """The cycles of a cold start. Raises ConfigError for a template without lessons."""
    if config.template not in ("world", "world_zoomer"):
        raise ConfigError(f"template = {config.template}: train_data = world has lessons for world, world_zoomer only")
    if config.template == "world_zoomer":
        return GLANCES
    return FINDING if config.family == "qwen2_5_vl" and not config.world_min_duration else COURSE


def cold_start(policy: torch.nn.Module, config: Config, vocabulary: Vocabulary, accelerator: Accelerator) -> None:
    """Train the policy for `config.steps` through the cycles of its course, zooms in every step."""
    rng = random.Random(config.seed)
    model = accelerator.unwrap_model(policy).model
    lessons = load_lessons(load_samples("world", "train", config), config, vocabulary, model.config)
    shares = sum(phase.share for cycle in course(config) for phase in cycle.phases)
    for cycle in course(config):
        phases = [phase for phase in cycle.phases for _ in range(max(1, config.steps * phase.share // shares))]
        model.model.visual.requires_grad_(cycle.tower)
        if not cycle.tower:
            videos = [video for lesson in lessons for video in (lesson.coarse, *lesson.zooms)]
            for k in range(0, len(videos), config.zoom_batch):
                keep_tokens(model, videos[k : k + config.zoom_batch])
        paced = replace(config, lr=cycle.pace * config.lr, zoom_batch=max(1, round(cycle.zooms * config.zoom_batch)))
        train_cycle(policy, lessons, paced, vocabulary, accelerator, phases=phases, rng=rng)
    model.requires_grad_(True)


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
    optimizer = accelerator.prepare(optimizer)
    by_length = sorted(lessons, key=lambda lesson: lesson.samples[0].duration)
    bar = tqdm(phases, unit="step", disable=None)
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
            batch = demonstration_batch(half, vocabulary, phase.widen, rng, phase.glimpses)
        elif phase.examples == "asked":
            batch = asked_batch(chosen, vocabulary, rng)
        elif phase.examples == "glances":
            batch = glance_batch(chosen, config, vocabulary, model_config)
        else:
            batch = glance_batch(chosen, config, vocabulary, model_config, phase.glimpses, seconds=True)
        batches[phase.examples] = batch
        for name, batch in batches.items():
            loss = policy(batch.prompts, batch.ids, batch.mask, partial(cross_entropy, batch))
            accelerator.backward(loss)
            smooth[name] = 0.95 * smooth.get(name, loss.item()) + 0.05 * loss.item()
        accelerator.clip_grad_norm_(learned, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix({name: f"{value:.3f}" for name, value in smooth.items()})
        if step % 100 == 99 and bar.disable:
            print(f"step {step + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in smooth.items()), flush=True)


def teach(config: Config) -> None:
    """Make the built-in policy, or go on with `config.model`, and print how it does on the validation split, unless
    there is no `config.test_data`. Raises ConfigError for a template without lessons, and in several processes.
    """
    course(config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("train_data = world: one process gives its lessons; start it with python sft.py")
    most = max(config.prompts_per_step, config.zoom_batch)
    if config.world_train_videos < most:
        raise ConfigError(
            f"world_train_videos = {config.world_train_videos}: a step of lessons draws {most} videos, for "
            f"prompts_per_step = {config.prompts_per_step} and zoom_batch = {config.zoom_batch}"
        )
    use_threads(config)
    start = time.perf_counter()
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    if config.model:
        model, tokenizer = load(config.model)
    else:
        tokenizer = tiny.build_tokenizer(corpus(config.family))
        model = tiny.build_model(tokenizer, config.seed, config.family)
    vocabulary = Vocabulary.of(tokenizer, config.outer_tags)
    policy = accelerator.prepare(Policy(model))
    cold_start(policy, config, vocabulary, accelerator)

    out = Path(config.out)
    part = out / "checkpoint.part"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for file in part.iterdir():  # each is complete before it replaces another
        file.replace(out / file.name)
    part.rmdir()
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {time.perf_counter() - start:.0f} s")
    if not config.test_data:
        return
    test = load_samples("world", "val", config)
    rows = evaluate.evaluate(model.eval(), test, config, vocabulary, accelerator, "validation split")
    print(table({"cold start": rows}))

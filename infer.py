"""Questions about videos, answered by one of several strategies: for a file of your own, or for a whole data set.

    python infer.py --video holiday.mp4 --question "When does the dog jump?" --options "at once" later never
    accelerate launch infer.py --strategy divide-and-conquer --test_data world

| strategy           | source                   | what it does                                               |
|--------------------|--------------------------|------------------------------------------------------------|
| one-stage          | Zoom-Zero 5.5 (i)        | the coarse pass alone                                      |
| coarse-to-fine     | Zoom-Zero 4.1, 5.5 (ii)  | zoom on the spans of the coarse pass and answer again      |
| divide-and-conquer | Zoom-Zero 5.5 (iii), D.3 | a pass per window; zoom on the spans of the surest windows |
| ground-then-answer | LongVTG-R1, Table 3      | one model finds, the same or another answers from the clip |
| repeated-zoom      | the papers' future work  | look for spans inside the spans, until they stay           |

What the papers leave open, and how it is here:

- A window is `window` frames at `fps` (256 at 1 per second: 256 s) and gets the whole budget of Eq. 3, or
  `window_budget`. All windows are decoded in one pass over the file and answered in one batch. The model sees a window
  as a video that starts at 0; what it claims is put back into the video's time.
- Confidence is the probability, among all tokens, of the token that carries the letter between <answer> and </answer>
  (tokenizers may fuse it with a bracket). Letter probabilities are the same distribution over the options' letters
  alone. A window without an answer has confidence 0; without options, the confidence is that of the spans: the
  geometric mean of their tokens' probabilities.
- Without any usable span there is nothing to zoom into, and the coarse answer stands; ground-then-answer shows the
  whole video instead, because its answering model has not seen anything yet.
- The released Zoom-Zero code is `--released`: five spans; windows ranked by answer and spans together (here: the
  product of both confidences); the answer of a further pass over the whole video wins if it is surer; no answer becomes
  "C".
- Repeated zoom shows the spans widened by half their length at each end, so that a span can also move and grow. It
  stops when the new spans have an IoU of `stable` with the old ones, when none are found, or after `max_zooms`.

A data set is answered one question at a time; each finished question is one line of the result file, and running again
does only the rest.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import fcntl
import json
import mimetypes
import os
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

import config as configuration
import data
import metrics
import prompts
import report
import world
from config import Config, ConfigError
from data import DataError, Sample
from policy import ModelError, Prompt, Video, Vocabulary, build_prompt, last_hidden, load, sample, window_layout
from rewards import interval_iou, merge
from rollout import (
    Response,
    Spans,
    View,
    chat_text,
    read_response,
    roll_out,
    view_video,
    visible_spans,
    zoom_clips,
)
from video import Clip, VideoError, load_clips, plan_clip, probe

RECIPES = Path(__file__).parent / "recipes"
BUILT_IN = Path(__file__).parent / "checkpoints" / "tiny"
MAX_EMBEDDED = 64 * 2**20  # bytes of a video inside a page


@dataclass(frozen=True)
class Settings:
    """What the strategies can be told."""

    window: int = 256  # frames of a window
    window_budget: int = 0  # visual tokens of a window; 0: as the coarse pass
    top: int = 4  # spans that are zoomed into together
    rank: str = "answer"  # windows are ranked by the confidence of the "answer", or of "answer_and_spans"
    compare_whole: bool = False  # a further pass over the whole video, whose answer wins if it is surer
    unparsable: str = ""  # the letter that stands for no answer
    max_zooms: int = 3
    stable: float = 0.9  # IoU from which two spans count as the same


RELEASED = {"top": 5, "rank": "answer_and_spans", "compare_whole": True, "unparsable": "C"}


@dataclass(frozen=True)
class Agent:
    """A model with its tokenizer, and how it is shown videos."""

    model: torch.nn.Module
    vocabulary: Vocabulary
    config: Config


@dataclass
class Look:
    """One pass of the model over frames of the video: what was shown and what came back.

    `part` is the part of the video that was shown, None for all of it. `spans` are in the video's time, None if there
    were none to read. Probabilities are 0 to 1; `letters` is empty where letters were not asked for or are not single
    tokens.
    """

    kind: str  # "coarse", "window", "closer" or "zoom"
    part: Spans | None
    clip: Clip
    answer: str | None
    confidence: float
    letters: dict[str, float]
    spans: Spans | None
    span_confidence: float
    text: str
    visual_tokens: int
    flops: float


@dataclass
class Result:
    """The answer to a question, with all looks that led to it."""

    answer: str | None
    confidence: float
    letters: dict[str, float]
    spans: Spans | None
    looks: list[Look]
    visual_tokens: int = field(init=False)
    flops: float = field(init=False)

    def __post_init__(self):
        self.visual_tokens = sum(look.visual_tokens for look in self.looks)
        self.flops = sum(look.flops for look in self.looks)

    @classmethod
    def of(cls, look: Look, spans: Spans | None, looks: Sequence[Look]) -> Result:
        """The answer of one of the looks, with these spans."""
        return cls(look.answer, look.confidence, look.letters, spans, list(looks))


# ---------------------------------------------------------------- strategies


def one_stage(agent: Agent, sample: Sample, settings: Settings) -> Result:
    """The coarse pass alone."""
    [coarse] = look(agent, [view_video(sample, agent.config)])
    return Result.of(coarse, coarse.spans, [coarse])


def coarse_to_fine(agent: Agent, sample: Sample, settings: Settings) -> Result:
    """Zoom on the spans of the coarse pass, and answer again. Zoom-Zero section 4.1."""
    view = view_video(sample, agent.config)
    [coarse] = look(agent, [view])
    spans = visible_spans(coarse.spans, view.info.duration)
    if not spans:
        return Result.of(coarse, coarse.spans, [coarse])
    zoomed = zoom(agent, view, spans, coarse.text)
    return Result.of(zoomed, coarse.spans, [coarse, zoomed])


def divide_and_conquer(agent: Agent, sample: Sample, settings: Settings) -> Result:
    """Ask every window, and zoom on the spans of the surest ones. Zoom-Zero section 5.5 and Appendix D.3."""
    windows = window_views(sample, agent.config, settings)
    looks = look(agent, windows, "window")

    def sureness(look: Look) -> float:
        sure = look.confidence if sample.options else look.span_confidence
        return sure * look.span_confidence if settings.rank == "answer_and_spans" else sure

    ranked = sorted(looks, key=sureness, reverse=True)  # windows that are equally sure stay in order
    spans = sorted([span for look in ranked for span in look.spans or []][: settings.top])
    result = Result.of(ranked[0], spans or None, looks)
    if spans and sample.options:
        zoomed = zoom(agent, windows[0], spans)
        looks.append(zoomed)
        result = Result.of(zoomed, spans, looks)
    if settings.compare_whole:
        [whole] = look(agent, [view_video(sample, agent.config)])
        looks.append(whole)
        surer = whole if whole.confidence > result.confidence else result
        result = Result(surer.answer, surer.confidence, surer.letters, spans or whole.spans, looks)
    return result


def ground_then_answer(agent: Agent, sample: Sample, settings: Settings, grounder: Agent | None = None) -> Result:
    """One model finds the spans, the same or another answers from these alone. LongVTG-R1, Table 3."""
    view = view_video(sample, (grounder or agent).config)
    [coarse] = look(grounder or agent, [view])
    zoomed = zoom(agent, view, visible_spans(coarse.spans, view.info.duration))
    return Result.of(zoomed, coarse.spans, [coarse, zoomed])


def repeated_zoom(agent: Agent, sample: Sample, settings: Settings) -> Result:
    """Look for the spans again inside the spans, until they stay, and answer from the last ones."""
    view = view_video(sample, agent.config)
    duration = view.info.duration
    looks = look(agent, [view])
    spans = visible_spans(looks[0].spans, duration)
    for _ in range(settings.max_zooms):
        if not spans:
            break
        part = widened(spans, duration)
        clip = zoom_clips(view, [part], agent.config)[0]
        [closer] = look(agent, [clip_view(view, clip)], "closer", [part])
        looks.append(closer)
        found = visible_spans(closer.spans, duration)
        if not found:
            break
        stays = interval_iou(found, spans) >= settings.stable
        spans = found
        if stays:
            break
    if not spans:
        return Result.of(looks[0], looks[0].spans, looks)
    if sample.options:
        looks.append(zoom(agent, view, spans))
    return Result.of(looks[-1], spans, looks)


Strategy = Callable[[Agent, Sample, Settings], Result]
STRATEGIES: dict[str, Strategy] = {
    "one-stage": one_stage,
    "coarse-to-fine": coarse_to_fine,
    "divide-and-conquer": divide_and_conquer,
    "ground-then-answer": ground_then_answer,
    "repeated-zoom": repeated_zoom,
}
NEED_OPTIONS = ("coarse-to-fine", "ground-then-answer")  # they end with a letter


# ---------------------------------------------------------------- what is shown


def clip_view(view: View, clip: Clip) -> View:
    """The same question about other frames of the same video."""
    return replace(view, clip=clip, video=Video.from_frames(clip.frames, clip.step))


def window_views(sample: Sample, config: Config, settings: Settings) -> list[View]:
    """A view of each window of `settings.window` frames; each frame is decoded once. Raises VideoError."""
    info = probe(sample.video)
    length = settings.window / min(config.fps, info.fps)  # seconds
    starts = [k * length for k in range(max(1, -int(-(info.duration - 1e-6) // length)))]
    budget = settings.window_budget or config.budget
    plans = [
        plan_clip(
            info,
            [(start, min(start + length, info.duration))],
            config.fps,
            budget,
            config.v_min,
            config.v_max,
            paired=config.paired_frames,
        )
        for start in starts
    ]
    clips = load_clips(sample.video, plans)
    return [View(sample, info, clip, Video.from_frames(clip.frames, clip.step)) for clip in clips]


def widened(spans: Spans, duration: float) -> Spans:
    """Each span with half its length more at each end, within the video; overlapping ones are merged."""
    halves = [((end - start) / 2, start, end) for start, end in spans]
    return merge([(max(0.0, start - half), min(duration, end + half)) for half, start, end in halves])


def to_video_time(spans: Spans | None, clip: Clip, duration: float) -> Spans | None:
    """Spans in a clip's own time, where frame k is at k * step, as spans of the video, in seconds.

    A span over a seam of the clip becomes two; what lies after the clip's end is cut off.
    """
    if spans is None:
        return None
    placed: Spans = []
    for start, end in spans:
        for k, shown in enumerate(clip.times):
            low, high = max(start - k * clip.step, 0.0), min(end - k * clip.step, clip.step)
            if low >= high:
                continue
            first, last = shown + low, min(shown + high, duration)
            # The next frame continues this span unless there is a seam between them.
            if placed and k > 0 and start < k * clip.step and shown - clip.times[k - 1] < 1.5 * clip.step:
                placed[-1] = (placed[-1][0], last)
            else:
                placed.append((first, last))
    return placed


# ---------------------------------------------------------------- what is asked


@contextlib.contextmanager
def recorded_hidden(model) -> Iterator[list[Tensor]]:
    """The hidden states [B, ...] that each call of the output projection gets: those that each token is chosen from."""
    states: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    try:
        yield states
    finally:
        hook.remove()


@torch.no_grad()
def look(agent: Agent, views: Sequence[View], kind: str = "coarse", parts: Sequence[Spans] | None = None) -> list[Look]:
    """Ask for reasoning, answer and spans about each view, greedily; a "coarse" view shows the whole video.

    A question without options asks for the spans of an event, with LongVTG-R1's prompt.
    """
    config = agent.config if views[0].sample.options else replace(agent.config, template="longvtg_r1")
    looks = []
    for start in range(0, len(views), config.rollout_batch):
        chunk = views[start : start + config.rollout_batch]
        with recorded_hidden(agent.model) as states:
            groups = roll_out(agent.model, chunk, config, agent.vocabulary, step=None)
        hidden = torch.stack([state[:, 0] for state in states], dim=1)  # [B, T, H]
        for group, row in zip(groups, hidden, strict=True):
            view, response = group.view, group.responses[0]
            shown, spans = None, response.spans
            if kind != "coarse":
                shown = parts[len(looks)] if parts else [(view.clip.times[0], view.clip.times[-1] + view.clip.step)]
                spans = to_video_time(response.spans, view.clip, view.info.duration)
            letters, confidence = letter_probabilities(agent, response, row, len(view.sample.options))
            looks.append(
                Look(
                    kind,
                    shown,
                    view.clip,
                    response.answer,
                    confidence,
                    letters,
                    spans,
                    span_probability(agent, response, row),
                    response.text,
                    view.video.n_tokens,
                    forward_flops(agent.model, group.prompt, len(response.ids)),
                )
            )
    return looks


@torch.no_grad()
def zoom(agent: Agent, view: View, spans: Spans, response: str = "") -> Look:
    """Ask for the letter again, showing only these spans (none: the whole video), closer and at a higher frame rate."""
    config, question = agent.config, view.sample
    clip = zoom_clips(view, [spans], config)[0]
    think = prompts.parse_think(response) if config.zoom_sees_think else None
    words = prompts.zoom_text(config.template, question.question, list(question.options), think)
    chat = chat_text(words, config)
    video = Video.from_frames(clip.frames, clip.step)
    if config.zoom_answer == "decode":
        prompt = build_prompt(agent.vocabulary.ids(chat), [video], agent.model.config)
        with recorded_hidden(agent.model) as states:
            ids, _ = sample(agent.model, [prompt], 1, 32, agent.vocabulary.eos, agent.vocabulary.banned)
        reply = read_response(ids[0, 0].cpu(), agent.vocabulary)
        reply.answer = reply.answer or prompts.parse_answer(reply.text, bare=True)
        letters, confidence = letter_probabilities(
            agent, reply, torch.stack([s[0, 0] for s in states]), len(question.options)
        )
        answer, text, written = reply.answer, reply.text, len(reply.ids)
    else:
        ids, candidates = agent.vocabulary.forced_letter(chat, len(question.options))
        prompt = build_prompt(ids, [video], agent.model.config)
        hidden = last_hidden(agent.model, [prompt])
        probabilities = agent.model.lm_head(hidden)[0].float().softmax(-1)[candidates]
        letters, confidence = shares(probabilities), float(probabilities.max())
        answer = max(letters, key=letters.get)
        text, written = answer, 1
    flops = forward_flops(agent.model, prompt, written)
    return Look("zoom", spans or None, clip, answer, confidence, letters, None, 0.0, text, video.n_tokens, flops)


def shares(probabilities: Tensor) -> dict[str, float]:
    """Probabilities [n] of n letters as parts of their sum."""
    return dict(zip(prompts.LETTERS, (probabilities / probabilities.sum()).tolist(), strict=False))


def token_probabilities(agent: Agent, hidden: Tensor) -> Tensor:
    """Probabilities [n, V] of all tokens that can be sampled, from hidden states [n, H]."""
    logits = agent.model.lm_head(hidden).float()
    banned = torch.tensor(agent.vocabulary.banned, device=logits.device)
    return logits.index_fill(-1, banned, float("-inf")).softmax(-1)


def answer_position(text: str) -> int:
    """The character of a reply at which the letter stands that `parse_answer` reads: the first one after the tag."""
    reply = text.rfind("</think>") + 1
    tag = text.find("<answer>", reply)
    start = reply if tag < 0 else tag + len("<answer>")
    return next(k for k in range(start, len(text)) if text[k].isalpha())


def letter_probabilities(
    agent: Agent, response: Response, hidden: Tensor, n_options: int
) -> tuple[dict[str, float], float]:
    """The probabilities of the options' letters at the answer, and that of the answer's token among all tokens.

    hidden [T, H]: what each token of the response was chosen from. Nothing and 0 without an answer; nothing where the
    tokenizer would not write another letter as one token. Zoom-Zero section 5.5: c = p(t), t between <answer> and
    </answer>.
    """
    if response.answer is None or not n_options:
        return {}, 0.0
    place = answer_position(response.text)
    token = next(k for k, (start, end) in enumerate(response.offsets) if start <= place < end)
    probabilities = token_probabilities(agent, hidden[token : token + 1])[0]
    confidence = float(probabilities[response.ids[token]])
    start, end = response.offsets[token]
    before, after = response.text[start:place], response.text[place + 1 : end]
    others = prompts.LETTERS if response.text[place].isupper() else prompts.LETTERS.lower()
    candidates = [agent.vocabulary.ids(before + letter + after) for letter in others[:n_options]]
    if any(len(ids) != 1 for ids in candidates):
        return {}, confidence
    return shares(probabilities[[ids[0] for ids in candidates]]), confidence


def span_probability(agent: Agent, response: Response, hidden: Tensor) -> float:
    """The geometric mean of the probabilities of the tokens that write the claimed spans; 0 without any."""
    if not response.spans:
        return 0.0
    after = response.text.rfind("</think>") + 1
    ranges = [r for tag in ("glue", "timestamp") for r in prompts.tag_ranges(response.text[after:], tag)]
    first, last = (after + edge for edge in ranges[0])
    tokens = [k for k, (start, end) in enumerate(response.offsets) if start < last and end > first]
    chosen = token_probabilities(agent, hidden[tokens])[torch.arange(len(tokens)), response.ids[tokens]]
    return float(chosen.log().mean().exp())


# ---------------------------------------------------------------- cost


def forward_flops(model, prompt: Prompt, written: int) -> float:
    """Floating-point operations of one forward pass over a prompt of P tokens and `written` = T tokens after it.

    Two per weight and token (n_layers and n_blocks count the weights of the language layers and the vision blocks), and
    two products of 2 d operations for each pair of positions that attention compares (d: all heads together):

        vision    2 (n_embed + n_blocks) patches + 2 n_merger patches / 4 + sum over blocks and windows 4 d length^2
        language  2 n_layers (P + T - 1) + 2 n_head T + layers d (2 P^2 + sum over t < T of 4 (P + t))

    The last token is chosen but not fed back, and only chosen tokens go through the output projection. The prompt's
    attention is causal: half of all pairs.
    """
    visual, layers = model.model.visual, model.model.language_model.layers
    patches, pairs = 0, 0
    window = visual.config.window_size // visual.config.patch_size // visual.config.spatial_merge_size
    for video in prompt.videos:
        patches += video.grid[0] * video.grid[1] * video.grid[2]
        for block in range(len(visual.blocks)):
            whole = block in visual.config.fullatt_block_indexes
            groups = window_layout([video.grid], None if whole else window).groups
            pairs += sum(n * length**2 for n, length in groups)
    flops = (
        2 * (weights(visual.patch_embed) + weights(visual.blocks)) * patches + 2 * weights(visual.merger) * patches / 4
    )
    flops += 4 * visual.config.hidden_size * pairs
    P, T = len(prompt), written
    d = layers[0].self_attn.q_proj.out_features
    flops += 2 * weights(layers) * (P + T - 1) + 2 * weights(model.lm_head) * T
    flops += len(layers) * d * (2 * P**2 + 4 * ((T - 1) * P + T * (T - 1) / 2))
    return float(flops)


def weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- a data set


def answer_row(agent: Agent, ask: Strategy, sample: Sample, settings: Settings) -> dict:
    """One question's row, as metrics.py has them, with confidence, letters, cost, seconds and the "error" of an
    unreadable video (unanswered then) or None."""
    start = time.perf_counter()
    try:
        result, error = ask(agent, sample, settings), None
    except VideoError as problem:
        result, error = Result(None, 0.0, {}, None, []), str(problem)
    if agent.model.device.type == "cuda":
        torch.cuda.synchronize()
    answer = result.answer or settings.unparsable or None
    spans = None if result.spans is None else [[round(t, 3) for t in span] for span in result.spans]
    return {
        **metrics.row_of(sample, answer, spans),
        "confidence": round(result.confidence, 6),
        "letters": {letter: round(p, 6) for letter, p in result.letters.items()},
        "passes": len(result.looks),
        "visual_tokens": result.visual_tokens,
        "flops": result.flops,
        "seconds": round(time.perf_counter() - start, 4),
        "error": error,
    }


def answer_all(
    agent: Agent,
    ask: Strategy,
    samples: Sequence[Sample],
    settings: Settings,
    path: str | Path,
    made_with: dict,
    accelerator: Accelerator,
) -> list[dict]:
    """Answer the samples that the result file `path` does not have yet; returns all rows, on every process.

    `made_with` goes into each row; DataError if the file has rows that were made with something else or are about
    other questions. Split over processes, which all append to the one file.
    """
    path = Path(path)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_half_line(path)
    accelerator.wait_for_everyone()
    done = finished(path, samples, made_with)
    rest = [sample for sample in samples if sample.id not in done]
    accelerator.wait_for_everyone()  # everybody has read the file before anybody adds to it
    mine = rest[accelerator.process_index :: accelerator.num_processes]
    label = f"{path.name}: {len(done)} done, {len(rest)} to do"
    for one in tqdm(mine, desc=label, unit="question", disable=None if accelerator.is_main_process else True):
        with accelerator.autocast():
            append(path, {**answer_row(agent, ask, one, settings), "made_with": made_with})
    accelerator.wait_for_everyone()
    rows = finished(path, samples, made_with)
    return [rows[sample.id] for sample in samples]


def drop_half_line(path: Path) -> None:
    """Cut off what an interruption has left after the last complete line."""
    if path.exists():
        with path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def append(path: Path, row: dict) -> None:
    """Add a row as one line, under a lock: lines of several processes never mix."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def finished(path: Path, samples: Sequence[Sample], made_with: dict) -> dict[str, dict]:
    """The rows of a result file by question; DataError if they are not about these samples, made in this way."""
    if not path.exists() or not path.stat().st_size:
        return {}
    metrics.read_results(path, list(samples))  # checks ids, videos, answers, spans
    rows = {}
    for line in data.read_rows(path):
        theirs = line.get("made_with", dict)
        changed = [k for k in {**theirs, **made_with} if theirs.get(k) != made_with.get(k)]
        if changed:
            name = changed[0]
            raise line.error(
                "made_with",
                f"{name} was {theirs.get(name)!r} and is {made_with.get(name)!r} now; give another --out",
            )
        rows[str(line.fields["id"])] = line.fields
    return rows


def cost(rows: Sequence[dict]) -> dict[str, float]:
    """Means per question of what answering cost: visual tokens, forward GFLOP, seconds, passes of the model."""
    read = [row for row in rows if row["error"] is None]
    means = {
        name: sum(row[name] for row in read) / max(1, len(read))
        for name in ("visual_tokens", "flops", "seconds", "passes")
    }
    return {**means, "gflop": means.pop("flops") / 1e9}


def summary(rows: list[dict]) -> str:
    """Scores with their 95% intervals over videos, and the cost, as text."""
    scores, between = metrics.summarise(rows), metrics.bootstrap(rows)
    lines = [
        f"{name:14}{scores[name]:.3f}  [{between[name][0]:.3f}, {between[name][1]:.3f}]"
        for name in ("accuracy", "mIoU", "mIoP", "R@0.3", "R@0.5", "Acc@GQA")
        if name in scores
    ]
    spent = cost(rows)
    lines += [
        f"{'questions':14}{len(rows)}, {scores['unanswered']} unanswered, {scores['without_span']} without a span",
        f"{'a question':14}{spent['passes']:.1f} passes, {spent['visual_tokens']:.0f} visual tokens, "
        f"{spent['gflop']:.2f} GFLOP, {spent['seconds']:.2f} s",
    ]
    unreadable = [row for row in rows if row["error"]]
    if unreadable:
        lines.append(f"{'unreadable':14}{len(unreadable)} videos' questions, the first: {unreadable[0]['error']}")
    return "\n".join(lines)


# ---------------------------------------------------------------- a video of your own


def describe(result: Result, options: Sequence[str]) -> str:
    """Answer, confidence, spans and cost as text, times as mm:ss.s."""
    lines = []
    if options:
        answer = "none that can be read"
        if result.answer is not None:
            index = prompts.LETTERS.index(result.answer)
            answer = result.answer + (f" {options[index]}" if index < len(options) else " (not an option)")
        lines.append(f"answer      {answer}")
        lines.append(f"confidence  {result.confidence:.1%}")
        others = ", ".join(f"{letter} {p:.1%}" for letter, p in result.letters.items())
        if others:
            lines.append(f"letters     {others}")
    elif result.spans:
        sure = max(look.span_confidence for look in result.looks)
        lines.append(f"confidence  {sure:.1%} (of the spans)")
    lines.append(f"spans       {report.span_text(result.spans)}")
    seen = ", ".join(look.kind for look in result.looks)
    lines.append(f"looked      {seen}: {result.visual_tokens} visual tokens, {result.flops / 1e9:.2f} GFLOP")
    return "\n".join(lines)


def page_record(result: Result, sample: Sample, duration: float) -> dict:
    """What report.answer_page shows."""
    return {
        "video": sample.video,
        "question": sample.question,
        "options": list(sample.options),
        "letters": result.letters,
        "answer": result.answer,
        "confidence": result.confidence if sample.options else None,
        "duration": duration,
        "spans": result.spans,
        "looks": [
            {
                "kind": look.kind,
                "part": look.part,
                "times": look.clip.times,
                "frames": look.clip.frames.numpy(),
                "answer": look.answer,
                "confidence": look.confidence,
                "spans": look.spans,
                "text": look.text,
            }
            for look in result.looks
        ],
        "cost": {"visual tokens": result.visual_tokens, "GFLOP": f"{result.flops / 1e9:.2f}"},
    }


def play_source(video: str | Path, page: str | Path, embed: bool) -> str:
    """The player's source: the file, relative to the page, or the whole file in it. Raises ConfigError if too large."""
    video, page = Path(video), Path(page)
    if not embed:
        return urllib.parse.quote(os.path.relpath(video.resolve(), page.resolve().parent))
    if video.stat().st_size > MAX_EMBEDDED:
        size, most = (n / 2**20 for n in (video.stat().st_size, MAX_EMBEDDED))
        raise ConfigError(f"{video}: {size:.0f} MiB are too many to embed (at most {most:.0f}); leave out --embed")
    kind = mimetypes.guess_type(video)[0] or "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(video.read_bytes()).decode('ascii')}"


# ---------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """infer's own options; those of config.py (--fps, --budget, ...) are accepted beside them."""
    own = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Every option of config.py can be given too: --fps 2, --budget 16384, --test_data file.jsonl, ...",
        allow_abbrev=False,
    )
    add = own.add_argument
    add("--video", help="a video file of your own; without it, the data set --test_data is answered")
    add("--question", help="what is asked about it")
    add("--options", nargs="+", default=[], help="the answers to choose from, without letters; none: spans only")
    add("--strategy", choices=STRATEGIES, help="default: coarse-to-fine, or one-stage without --options")
    add("--model", help="checkpoint folder or hub name (default: checkpoints/tiny)")
    add("--ground_model", help="ground-then-answer: the checkpoint that finds the spans, if it is another one")
    add("--config", help="recipe (default: the one that suits the model)")
    add("--out", help="page (default: the video's name with .html) or result file (runs/infer/STRATEGY.jsonl)")
    add("--embed", action="store_true", help="put the video into the page, instead of a reference to the file")
    add("--released", action="store_true", help="divide-and-conquer as in the released Zoom-Zero code")
    add("--window", type=int, help=f"frames of a window (default {Settings.window})")
    add("--window_budget", type=int, help="visual tokens of a window (default: --budget)")
    add("--top", type=int, help=f"spans zoomed into together (default {Settings.top})")
    add("--rank", choices=("answer", "answer_and_spans"), help="the confidence by which windows are ranked")
    add("--compare_whole", action="store_true", default=None, help="let the whole video's answer win if it is surer")
    add("--unparsable", help="the letter that stands for no answer (default: none)")
    add("--max_zooms", type=int, help=f"most repetitions of repeated-zoom (default {Settings.max_zooms})")
    add("--stable", type=float, help=f"IoU at which repeated-zoom stops (default {Settings.stable})")
    return own


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings, Config]:
    """The command line. Raises ConfigError, naming the nearest option for an unknown one."""
    own = parser()
    given, rest = own.parse_known_args(arguments)
    mine = [word.removeprefix("--") for action in own._actions for word in action.option_strings]
    theirs = [f.name for f in fields(Config)]
    for word in rest:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name not in theirs:
            [near] = difflib.get_close_matches(name, mine + theirs, n=1, cutoff=0.0)
            raise ConfigError(f"command line: there is no option {name!r}; the nearest is {near!r}")
    config = configuration.parse(rest, recipe=given.config or suiting_recipe(given.model))
    config = replace(config, model=given.model or str(BUILT_IN))
    changed = {f.name: getattr(given, f.name) for f in fields(Settings) if getattr(given, f.name) is not None}
    settings = Settings(**{**(RELEASED if given.released else {}), **changed})
    check(given, settings)
    return given, settings, config


def suiting_recipe(model: str | None) -> Path:
    """How a model is shown videos: a run's checkpoint as the run did, the built-in one by its recipe, others by the
    paper's values for long videos."""
    if model is None or Path(model).resolve() == BUILT_IN.resolve():
        return RECIPES / "cpu_world.yaml"
    beside = Path(model).resolve().parent / "config.yaml"
    return beside if beside.is_file() else RECIPES / "long_video.yaml"


def check(given: argparse.Namespace, settings: Settings) -> None:
    """Raise ConfigError for options that cannot work together."""
    for name in ("window", "top", "max_zooms"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(settings, name)}")
    if settings.window_budget < 0 or not 0 < settings.stable <= 1:
        raise ConfigError("window_budget must not be negative, and stable is above 0 and at most 1")
    if settings.unparsable and settings.unparsable not in set(prompts.LETTERS):
        raise ConfigError(f"unparsable is one capital letter, not {settings.unparsable!r}")
    if given.video is None and (given.question or given.options or given.embed):
        raise ConfigError("--question, --options and --embed are about a --video of your own; name its file")
    if given.video is not None and not (given.question or "").strip():
        raise ConfigError('--video needs a --question "..."')
    if any(not option.strip() for option in given.options):
        raise ConfigError("--options: one of them is empty")
    if given.ground_model and given.strategy != "ground-then-answer":
        raise ConfigError("--ground_model is for --strategy ground-then-answer")


def check_question(strategy: str, config: Config, options: Sequence[str], where: str) -> None:
    """Raise ConfigError for a question without options where letters are needed, and for more options than letters."""
    if not options and strategy in NEED_OPTIONS:
        raise ConfigError(f"{where}: {strategy} ends with the letter of an option; give --options, or use one-stage")
    if not options and config.template == "world":
        raise ConfigError(
            f"{where}: the built-in policy answers by letters only; give --options, such as "
            f"{' '.join(world.COUNTS)} or {' '.join(world.PATTERNS)}"
        )
    if len(options) > len(prompts.LETTERS):
        raise ConfigError(f"{where}: {len(options)} options, but only {len(prompts.LETTERS)} letters")


def load_agent(path: str, config: Config, device: torch.device) -> Agent:
    """A checkpoint that can be asked about videos. Raises ModelError naming what it lacks."""
    check_vision_weights(path)
    half = config.mixed_precision == "bf16" and device.type == "cuda"
    try:
        model, tokenizer = load(path, torch.bfloat16 if half else torch.float32)
        vocabulary = Vocabulary.of(tokenizer)
    except (ValueError, SafetensorError) as error:
        name = f"model {path}: "
        raise ModelError(name + str(error).removeprefix(name)) from None
    theirs, ours = model.config.video_token_id, vocabulary.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    if theirs != ours or len(vocabulary.tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"model {path}: tokenizer and weights do not belong together: <|video_pad|> is {ours} for one and {theirs} "
            f"for the other, {len(vocabulary.tokenizer)} tokens for {model.get_input_embeddings().num_embeddings} rows"
        )
    return Agent(model.to(device).eval(), vocabulary, config)


def check_vision_weights(path: str) -> None:
    """Raise ModelError for a checkpoint without a vision tower, which would otherwise be filled with random numbers."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    try:
        if index:
            names = list(json.loads(Path(index).read_text())["weight_map"])
        elif single:
            with safe_open(single, "pt") as weights:
                names = list(weights.keys())
        else:
            return  # another format, or no checkpoint at all: loading it tells
    except (ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model {path}: the weights cannot be read: {error!r}") from None
    if not any("visual." in name for name in names):
        raise ModelError(
            f"model {path}: a checkpoint without vision weights (none of its {len(names)} tensors is in 'visual.'); "
            "it cannot see a video, give a Qwen2.5-VL"
        )


def own_video(given: argparse.Namespace, settings: Settings, config: Config) -> None:
    """Answer one question about one file: print the answer, write the page."""
    strategy = given.strategy or ("coarse-to-fine" if given.options else "one-stage")
    check_question(strategy, config, given.options, "question")
    page = Path(given.out or f"{Path(given.video).stem}.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {page}: the page's name ends with .html")
    info = probe(given.video)
    source = play_source(given.video, page, given.embed)
    asked = Sample("own", given.video, given.question, tuple(given.options), None, (), info.duration)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ask, agent = prepare(given, strategy, config, device)
    result = ask(agent, asked, settings)
    result.answer = result.answer or settings.unparsable or None
    print(describe(result, given.options))
    report.answer_page({**page_record(result, asked, info.duration), "strategy": strategy}, page, source)
    print(f"page        {page}")


def whole_data_set(given: argparse.Namespace, settings: Settings, config: Config) -> None:
    """Answer all questions of a data set that are not answered yet, and print the scores."""
    strategy = given.strategy or "coarse-to-fine"
    if not config.test_data:
        raise ConfigError("nothing to answer: give --video and --question, or --test_data")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    with accelerator.main_process_first():
        samples = world.load_samples(config.test_data, "test", config)
    for number, one in enumerate(samples, 1):
        check_question(strategy, config, one.options, f"{config.test_data}: row {number} ({one.id})")
    ask, agent = prepare(given, strategy, config, accelerator.device)
    out = Path(given.out or f"runs/infer/{strategy}.jsonl")
    same = made_with(strategy, given.ground_model, settings, config)
    rows = answer_all(agent, ask, samples, settings, out, same, accelerator)
    if accelerator.is_main_process:
        print(summary(rows))
        print(f"results in {out}")


def made_with(strategy: str, ground_model: str | None, settings: Settings, config: Config) -> dict:
    """What rows of a result file must have in common."""
    shown = (
        "template",
        "system_prompt",
        "question_first",
        "fps",
        "zoom_fps",
        "budget",
        "zoom_budget",
        "v_min",
        "v_max",
        "paired_frames",
    )
    written = ("max_tokens", "zoom_sees_think", "zoom_answer", "mixed_precision")
    return {
        "strategy": strategy,
        "model": config.model,
        "ground_model": ground_model,
        **asdict(settings),
        **{name: getattr(config, name) for name in (*shown, *written)},
    }


def prepare(given: argparse.Namespace, strategy: str, config: Config, device: torch.device) -> tuple[Strategy, Agent]:
    """The strategy as a function, and the model that answers."""
    ask = STRATEGIES[strategy]
    if given.ground_model:
        grounding = configuration.parse([], recipe=suiting_recipe(given.ground_model))
        ask = partial(ground_then_answer, grounder=load_agent(given.ground_model, grounding, device))
    return ask, load_agent(config.model, config, device)


def main(arguments: list[str] | None = None) -> None:
    given, settings, config = parse(arguments)
    disable_progress_bar()  # of loading weights
    if config.threads:
        torch.set_num_threads(config.threads)
    if given.video is None:
        whole_data_set(given, settings, config)
    else:
        own_video(given, settings, config)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, ModelError, VideoError, report.ReportError) as error:
        sys.exit(f"error: {error}")

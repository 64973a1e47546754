"""Rollouts: the coarse pass with G responses per question, and the zoom pass on the spans they name.

Coarse pass: the whole video under Eq. 3's budget, G sampled responses of reasoning, answer and spans. Zoom pass: only
the predicted spans, decoded from the file again, with the same budget for fewer frames (so more tokens per frame) and
at a higher frame rate; the answer is the option letter that is most probable after a forced `<answer>`. Responses of a
group that name the same spans share one zoom.

Everything here runs without gradients. Times are seconds, spans are lists of (start, end).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kl
import prompts as text
from advantage import token_offsets
from annotations.rows import Sample
from config import Config
from policy import Observation, Prompt, Video, Vocabulary, build_prompt, last_hidden, sample
from video import Budget, Clip, ClipPlan, FrameCache, VideoError, VideoInfo, load_clip, load_clips, plan_clip, probe

Spans = list[tuple[float, float]]


@dataclass
class View:
    """A sample and what the coarse pass shows of its video: the frames, and the same as patches."""

    sample: Sample
    info: VideoInfo
    clip: Clip
    video: Video


@dataclass
class Zoom:
    """One zoom pass: the clip that was shown, the letter answered, and how probable each letter was there.

    `letters` are probabilities among all tokens (see `letter_probabilities`); `text` is what was written: `n_written`
    tokens after a prompt of `n_prompt`.
    """

    clip: Clip
    answer: str | None
    letters: dict[str, float]
    text: str
    n_prompt: int
    n_written: int


@dataclass
class Response:
    """One sampled response: token ids int64 [T], their text and character offsets, and what was parsed from it."""

    ids: Tensor
    text: str
    offsets: list[tuple[int, int]]
    answer: str | None
    spans: Spans | None
    finished: bool  # ended by itself, not by the limit on its length
    zoom: Zoom | None = None
    hidden: Tensor | None = None  # [T, H], what each token was chosen from, where that was asked for
    observations: list[Observation] = field(default_factory=list)  # what an episode was shown between its turns


@dataclass
class Group:
    """The G responses to one prompt, with `rewards` [G] per facet once they are scored."""

    view: View
    prompt: Prompt
    responses: list[Response]
    rewards: dict[str, list[float]] = field(default_factory=dict)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids int64 [G, T] padded on the right, and mask bool [G, T]."""
        ids = torch.nn.utils.rnn.pad_sequence([response.ids for response in self.responses], batch_first=True)
        lengths = torch.tensor([len(response.ids) for response in self.responses])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def response_seed(*parts: object) -> int:
    """A seed from what a response is (run, step, prompt, number), so that it does not depend on the batch it is sampled
    in.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def view_video(sample: Sample, config: Config, cache: FrameCache | None = None) -> View:
    """Decode what the coarse pass sees of a sample's video (Eq. 3). Raises VideoError."""
    info = probe(sample.video, cache=cache)
    clip = load_clip(coarse_plan(info, config), sample.video, cache=cache)
    return View(sample, info, clip, Video.from_frames(clip.frames, clip.step))


def coarse_plan(info: VideoInfo, config: Config) -> ClipPlan:
    """Which frames of a video the coarse pass shows. Raises VideoError."""
    fps = max(config.fps, config.min_frames / info.duration)
    if config.max_frames:
        fps = min(fps, config.max_frames / info.duration)
    return plan_clip(info, None, fps, Budget(config.budget, config.v_min, config.v_max, config.paired_frames))


def chat_text(words: str, config: Config) -> str:
    """One video and these words as the user's turn, as configured."""
    return text.chat_text(words, system=config.system_prompt or None, text_first=config.question_first)


def episode_limits(config: Config) -> text.Limits:
    """The limits of an episode of several turns, as configured."""
    return text.Limits(config.max_turns, config.max_calls, config.frames_per_call, config.total_frames)


def coarse_words(view: View, config: Config) -> str:
    """What is asked in the coarse pass."""
    duration = view.info.duration if config.state_duration else None
    question, options = view.sample.question, list(view.sample.options)
    return text.coarse_text(config.template, question, options, duration, episode_limits(config))


def coarse_prompt(view: View, config: Config, vocabulary: Vocabulary, model_config) -> Prompt:
    """The prompt of the coarse pass."""
    chat = chat_text(coarse_words(view, config), config)
    return build_prompt(vocabulary.ids(chat), [view.video], model_config)


def roll_out(
    model,
    views: Sequence[View],
    config: Config,
    vocabulary: Vocabulary,
    step: int | None,
    keep_hidden: bool = False,
) -> list[Group]:
    """Sample a group of responses for each view; `step` seeds them, None decodes one greedy response each.

    `keep_hidden` keeps what each token was chosen from in `response.hidden`.
    """
    groups = []
    for start in range(0, len(views), config.rollout_batch):
        chunk = views[start : start + config.rollout_batch]
        prompts = [coarse_prompt(view, config, vocabulary, model.config) for view in chunk]
        size = 1 if step is None else config.group_size
        seeds = None
        if step is not None:
            seeds = [[response_seed(config.seed, step, view.sample.id, g) for g in range(size)] for view in chunk]
        states: list[Tensor] | None = [] if keep_hidden else None
        eos, banned, temperature = vocabulary.eos, vocabulary.banned, config.temperature
        ids, mask = sample(model, prompts, size, config.max_tokens, eos, banned, temperature, seeds, states=states)
        for b, (view, prompt, rows, real) in enumerate(zip(chunk, prompts, ids.cpu(), mask.cpu(), strict=True)):
            responses = [read_response(i[m], vocabulary) for i, m in zip(rows, real, strict=True)]
            if states is not None:
                for g, response in enumerate(responses):
                    response.hidden = torch.stack([state[b, g] for state in states[: len(response.ids)]])
            groups.append(Group(view, prompt, responses))
    return groups


def read_response(ids: Tensor, vocabulary: Vocabulary) -> Response:
    """Text, character offsets, answer and spans of one response's ids [T]; nothing is tokenised again."""
    finished = int(ids[-1]) in vocabulary.eos
    words, offsets = token_offsets(vocabulary.tokenizer, ids.tolist())
    return Response(ids, words, offsets, text.parse_answer(words), text.parse_spans(words), finished)


# ---------------------------------------------------------------- the zoom pass


def visible_spans(spans: Spans | None, duration: float) -> Spans:
    """The parts of the spans that lie in the video, without empty ones."""
    clipped = [(max(0.0, start), min(end, duration)) for start, end in spans or []]
    return [(start, end) for start, end in clipped if start < end]


def zoom_clips(view: View, requests: Sequence[Spans], config: Config, cache: FrameCache | None = None) -> list[Clip]:
    """The zoomed clips of one video, one per list of spans (an empty list is the whole video); each frame is decoded
    once.
    """
    budget = Budget(config.zoom_budget or config.budget, config.v_min, config.v_max, config.paired_frames)
    plans = [plan_clip(view.info, spans or None, config.zoom_fps, budget) for spans in requests]
    return load_clips(view.sample.video, plans, cache=cache)


def zoom_pass(model, groups: Sequence[Group], config: Config, vocabulary: Vocabulary) -> dict[str, VideoError]:
    """Answer every response's question again from its own spans, and keep the answer in `response.zoom`.

    Without a usable span there is no zoom (`invalid_span = zero`), or one on the whole video (`uniform`, the released
    code). A video that was readable in the coarse pass may be damaged elsewhere: then none of its group's responses has
    a zoom, so that R_zoom teaches nothing about them. Returns these samples' ids and errors. Questions without options
    have no zoom: there is no letter to answer with.
    """
    jobs: list[tuple[View, Clip, str | None, list[Response]]] = []
    failed: dict[str, VideoError] = {}
    for group in groups:
        wanted: dict[tuple, list[Response]] = {}
        for response in group.responses:
            response.zoom = None
            if not group.view.sample.options:
                continue
            spans = visible_spans(response.spans, group.view.info.duration)
            if not spans and config.invalid_span == "zero":
                continue
            think = text.parse_think(response.text) if config.zoom_sees_think else None
            wanted.setdefault((tuple(spans), think), []).append(response)
        try:
            clips = zoom_clips(group.view, [list(spans) for spans, _ in wanted], config)
        except VideoError as error:
            failed[group.view.sample.id] = error
            continue
        for (_, think), clip, responses in zip(wanted, clips, wanted.values(), strict=True):
            jobs.append((group.view, clip, think, responses))
    zooms = answer_clips(model, [(view.sample, clip, think) for view, clip, think, _ in jobs], config, vocabulary)
    for (_, _, _, responses), zoom in zip(jobs, zooms, strict=True):
        for response in responses:
            response.zoom = zoom
    return failed


@torch.no_grad()
def answer_clips(
    model, jobs: Sequence[tuple[Sample, Clip, str | None]], config: Config, vocabulary: Vocabulary
) -> list[Zoom]:
    """The answer to each (sample, clip, reasoning to show or None).

    `zoom_answer = letters` compares the letters after a forced `<answer>` in one forward pass; `decode` lets the model
    write up to 32 tokens (the answer may then be None).
    """
    prompts, candidates = [], []
    for sample_, clip, think in jobs:
        words = text.zoom_text(config.template, sample_.question, list(sample_.options), think)
        chat = chat_text(words, config)
        if config.zoom_answer == "letters":
            ids, letters = vocabulary.forced_letter(chat, len(sample_.options))
        else:
            ids, letters = vocabulary.ids(chat), []
        prompts.append(build_prompt(ids, [Video.from_frames(clip.frames, clip.step)], model.config))
        candidates.append(letters)
    zooms: list[Zoom] = []
    for start in range(0, len(jobs), config.zoom_batch):
        part = slice(start, start + config.zoom_batch)
        batch = prompts[part]
        if config.zoom_answer == "decode":
            states: list[Tensor] = []
            ids, mask = sample(model, batch, 1, 32, vocabulary.eos, vocabulary.banned, states=states)
            for b, (sample_, clip, _) in enumerate(jobs[part]):
                reply = read_response(ids[b, 0][mask[b, 0]].cpu(), vocabulary)
                reply.answer = reply.answer or text.parse_answer(reply.text, bare=True)
                reply.hidden = torch.stack([state[b, 0] for state in states[: len(reply.ids)]])
                shares = letter_probabilities(model, reply, len(sample_.options), vocabulary)
                zooms.append(Zoom(clip, reply.answer, shares, reply.text, len(batch[b]), len(reply.ids)))
            continue
        logits = kl.logits(*kl.aligned(last_hidden(model, batch), model.lm_head.weight))
        for (_, clip, _), prompt, letters, row in zip(jobs[part], batch, candidates[part], logits, strict=True):
            best = text.LETTERS[int(row[letters].argmax())]
            shares = dict(zip(text.LETTERS, row.softmax(-1)[letters].tolist(), strict=False))
            zooms.append(Zoom(clip, best, shares, best, len(prompt), 1))
    return zooms


# ---------------------------------------------------------------- how sure the model is


def token_probabilities(model, hidden: Tensor) -> Tensor:
    """Hidden states [N, H] -> probabilities [N, V] of the next token."""
    return kl.logits(*kl.aligned(hidden, model.lm_head.weight)).softmax(-1)


def letter_probabilities(model, response: Response, n_options: int, vocabulary: Vocabulary) -> dict[str, float]:
    """The probability, among all tokens, of the options' letters in the place of the response's answer.

    Zoom-Zero section 5.5: c = p(t) for the token t between <answer> and </answer>. A tokenizer may fuse it with a
    bracket; where it would not write another letter as one token there, only the answer is measured. {} without an
    answer. Needs `response.hidden`.
    """
    if response.answer is None:
        return {}
    place = answer_position(response.text)
    token = next(k for k, (start, end) in enumerate(response.offsets) if start <= place < end)
    probabilities = token_probabilities(model, response.hidden[token][None])[0]
    start, end = response.offsets[token]
    before, after = response.text[start:place], response.text[place + 1 : end]
    letters = text.LETTERS[:n_options]
    written = letters if response.text[place].isupper() else letters.lower()
    candidates = [vocabulary.ids(before + letter + after) for letter in written]
    answered = {response.answer: float(probabilities[response.ids[token]])}
    if any(len(ids) != 1 for ids in candidates):
        return answered
    others = probabilities[[ids[0] for ids in candidates]].tolist()
    return dict(zip(letters, others, strict=True)) | answered  # an answer that is no option comes last


def reply_start(response: str) -> int:
    """The character after the last `</think>`, where answer and spans begin to be read."""
    return len(response) - len(response.rpartition("</think>")[2])


def answer_position(response: str) -> int:
    """The character at which the letter stands that `parse_answer` reads: the first one after the tag."""
    start = reply_start(response)
    tag = response.find("<answer>", start)
    start = start if tag < 0 else tag + len("<answer>")
    return next(k for k in range(start, len(response)) if response[k].isalpha())


def span_probability(model, response: Response) -> float:
    """The geometric mean of the probabilities of the tokens that write the claimed spans; 0 without any.

    Needs `response.hidden`.
    """
    if not response.spans:
        return 0.0
    start = reply_start(response.text)
    reply = response.text[start:]
    closed = [
        r for tag in ("glue", "timestamp") for r in text.tag_ranges(reply, tag) if reply[: r[1]].endswith(tag + ">")
    ]
    first, last = (start + edge for edge in closed[0])
    tokens = [k for k, (low, high) in enumerate(response.offsets) if low < last and high > first]
    chosen = token_probabilities(model, response.hidden[tokens])[torch.arange(len(tokens)), response.ids[tokens]]
    return float(chosen.log().mean().exp())

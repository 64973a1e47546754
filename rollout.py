"""Rollouts: the coarse pass with G responses per question, and the zoom pass on the spans they name.

Coarse pass: the whole video under Eq. 3's budget, G sampled responses of reasoning, answer and spans. A response is a
list of turns: one, or as many as it takes where there is an environment that shows the policy what it asks for
(episodes.py). Zoom pass: only the predicted spans, decoded from the file again, with the same budget for fewer frames
(so more tokens per frame) and at a higher frame rate; the answer is the option letter that is most probable after a
forced `<answer>`. Responses of a group that name the same spans share one zoom.

Everything here runs without gradients. Times are seconds, spans are lists of (start, end).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

import kl
import prompts
from advantage import token_offsets
from annotations.rows import Sample
from annotations.samples import warn_of_misfit
from config import Config
from engine.confidence import letter_probabilities
from engine.loading import patch_side
from engine.sampling import Sampler, generate, stops_at
from media.prefetch import prefetch
from policy import Observation, Prompt, Video, Vocabulary, build_prompt, keep_tokens, last_hidden
from prompts import Spans, ToolCall
from video import Budget, Clip, ClipPlan, FrameCache, VideoError, VideoInfo, load_clip, load_clips, plan_clip, probe


@dataclass
class View:
    """A sample and what is shown of its video, as frames and as patches; if `closer`, just what was claimed before.
    `draw`, its place in a training run and how often that was redrawn, is in the responses' seeds: they are new then.
    """

    sample: Sample
    info: VideoInfo
    clip: Clip
    video: Video
    draw: tuple[int, ...] = ()
    closer: bool = False


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
class ToolReply:
    """What a call brought: frames, each a clip of its own for the model, or a sentence that says why there are none.

    `text` is the user's turn, with prompts.VIDEO where each frame stands. `error`: the frames could not be decoded.
    `planned`: how many frames share the budget, more than there are where the file shows one for longer than a step.
    """

    call: ToolCall | None = None  # None: refused
    planned: int = 0
    clip: Clip | None = None
    videos: list[Video] = field(default_factory=list)
    text: str = ""
    error: VideoError | None = None


@dataclass
class Turn:
    """What the policy wrote in a turn: ids int64 [T], their text and character offsets, and what was parsed from it.

    `finished`: it ended by itself, not by the limit on its length. `call`: in an environment, the call in it or what is
    wrong with one. `reply`: what came back, None in the last turn; `observation`: the same for the model. `hidden`
    [T, H]: what each token was chosen from, where that was asked for.
    """

    ids: Tensor
    text: str
    offsets: list[tuple[int, int]]
    finished: bool
    call: ToolCall | str | None
    answer: str | None
    spans: Spans | None
    reply: ToolReply | None = None
    observation: Observation | None = None
    hidden: Tensor | None = None

    @classmethod
    def of(cls, words: str, may_call: bool, ids: Tensor, offsets: list[tuple[int, int]], finished: bool = True) -> Turn:
        """A turn with this text. In an environment it `may_call`, which is no answer, and it claims no spans."""
        call = prompts.parse_tool_call(words) if may_call else None
        answer = prompts.parse_answer(words) if call is None else None
        return cls(ids, words, offsets, finished, call, answer, None if may_call else prompts.parse_spans(words))


@dataclass
class Response:
    """One attempt at a question: the turns so far, and the zoom on its spans. Its tokens are all that was sampled."""

    turns: list[Turn] = field(default_factory=list)
    zoom: Zoom | None = None

    @property
    def ids(self) -> Tensor:
        """int64 [T], of all turns."""
        return torch.cat([turn.ids for turn in self.turns])

    @property
    def text(self) -> str:
        return "".join(turn.text for turn in self.turns)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Which characters of `text` each id wrote."""
        starts = itertools.accumulate((len(turn.text) for turn in self.turns), initial=0)
        return [
            (first + a, first + b) for first, turn in zip(starts, self.turns, strict=False) for a, b in turn.offsets
        ]

    @property
    def over(self) -> bool:
        """Whether the last turn got nothing back."""
        return bool(self.turns) and self.turns[-1].reply is None

    @property
    def finished(self) -> bool:
        """Whether the policy ended it, and not a limit on tokens or turns."""
        last = self.turns[-1]
        return not self.over or (last.finished and last.call is None)

    @property
    def answer(self) -> str | None:
        """The letter in the last turn."""
        return self.turns[-1].answer if self.over else None

    @property
    def spans(self) -> Spans | None:
        """The claimed spans, None without any; of an episode, where the calls that returned frames have looked."""
        return [reply.call.span for reply in self.replies if reply.call] or self.turns[-1].spans

    @property
    def observations(self) -> list[Observation]:
        """What the model was shown between its turns."""
        return [turn.observation for turn in self.turns if turn.observation]

    @property
    def replies(self) -> list[ToolReply]:
        """What came back, frames or not."""
        return [turn.reply for turn in self.turns if turn.reply]

    @property
    def clips(self) -> list[Clip]:
        """What the calls returned."""
        return [reply.clip for reply in self.replies if reply.clip]

    @property
    def calls(self) -> int:
        """Turns that tried a call, legal or not."""
        return sum(turn.call is not None for turn in self.turns)


@dataclass
class Group:
    """The G responses to one prompt; once they are paid, `rewards` [G] per facet and `advantages` [G, T]."""

    view: View
    prompt: Prompt
    responses: list[Response]
    rewards: dict[str, list[float]] = field(default_factory=dict)
    advantages: Tensor | None = None

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids int64 [G, T] padded on the right, and mask bool [G, T]."""
        ids = [response.ids for response in self.responses]
        lengths = torch.tensor(list(map(len, ids)))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt, and what its responses were shown on the way."""
        return [self.prompt, *(seen.prompt for response in self.responses for seen in response.observations)]

    @property
    def visual_tokens(self) -> int:
        """Of all that the model was shown, zooms too."""
        zooms = {id(response.zoom): response.zoom for response in self.responses if response.zoom}
        shown = sum(video.n_tokens for prompt in self.prompts for video in prompt.videos)
        return shown + sum(zoom.clip.visual_tokens for zoom in zooms.values())

    @property
    def text_tokens(self) -> int:
        """Of prompts, observations and responses."""
        visual = sum(video.n_tokens for prompt in self.prompts for video in prompt.videos)
        return sum(map(len, self.prompts)) - visual + sum(len(response.ids) for response in self.responses)


class Environment(Protocol):
    """What a policy acts in while it answers the question of a view; see episodes.py."""

    view: View

    def respond(self, response: Response) -> None:
        """Set the last turn's `reply` to what it asked for; leave it None if that ends the response."""


def response_seed(*parts: object) -> int:
    """A seed from what a response is (run, step, prompt, number): it does not depend on the batch it is sampled in."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def view_video(sample: Sample, config: Config, cache: FrameCache | None = None) -> View:
    """Decode what the coarse pass sees of a sample's video (Eq. 3). Raises VideoError."""
    info = probe(sample.video)
    warn_of_misfit(sample, info.duration)
    clip = load_clip(coarse_plan(info, config), sample.video, cache=cache)
    return View(sample, info, clip, Video.of(clip))


def coarse_plan(info: VideoInfo, config: Config) -> ClipPlan:
    """Which frames of a video the coarse pass shows. Raises VideoError."""
    fps = max(config.fps, config.min_frames / info.duration)
    if config.max_frames:
        fps = min(fps, config.max_frames / info.duration)
    limits = config.budget, config.v_min, config.v_max
    return plan_clip(info, None, fps, Budget(*limits, config.paired_frames, patch_side(config.model)))


def user_chat(words: str, config: Config) -> str:
    """One video and these words as the user's turn, as configured."""
    return prompts.chat_text(words, system=config.system_prompt or None, text_first=config.question_first)


def episode_limits(config: Config) -> prompts.Limits:
    """The limits of an episode of several turns, as configured."""
    return prompts.Limits(config.max_turns, config.max_calls, config.frames_per_call, config.total_frames)


def coarse_words(view: View, config: Config) -> str:
    """What is asked in the coarse pass."""
    duration = view.info.duration if config.state_duration else None
    question, options = view.sample.question, list(view.sample.options)
    event = view.sample.meta.get("wording") != "question"
    return prompts.coarse_text(config.template, question, options, duration, episode_limits(config), event)


def coarse_prompt(view: View, config: Config, vocabulary: Vocabulary, model_config) -> Prompt:
    """The prompt of the coarse pass."""
    chat = user_chat(coarse_words(view, config), config)
    return build_prompt(vocabulary.ids(chat), [view.video], model_config, vocabulary)


def roll_out(
    model,
    views: Sequence[View],
    config: Config,
    vocabulary: Vocabulary,
    step: int | None,
    *,
    environments: Sequence[Environment] = (),
    keep_hidden: bool = False,
) -> list[Group]:
    """Sample a group of responses for each view; `step` seeds them, None decodes one greedy response each.

    environments: one per view, for responses of several turns. Responses to `rollout_batch` views are decoded together,
    while they are at different turns. `keep_hidden` keeps what each token was chosen from.
    """
    groups = []
    for start in range(0, len(views), config.rollout_batch):
        part = slice(start, start + config.rollout_batch)
        groups += roll_out_batch(
            model, views[part], config, vocabulary, step, environments=environments[part], keep_hidden=keep_hidden
        )
    return groups


def roll_out_batch(
    model,
    views: Sequence[View],
    config: Config,
    vocabulary: Vocabulary,
    step: int | None,
    *,
    environments: Sequence[Environment],
    keep_hidden: bool,
) -> list[Group]:
    """`roll_out` of views that are decoded together."""
    coarse_prompts = [coarse_prompt(view, config, vocabulary, model.config) for view in views]
    size = 1 if step is None else config.group_size
    groups = [Group(v, p, [Response() for _ in range(size)]) for v, p in zip(views, coarse_prompts, strict=True)]
    responses = [response for group in groups for response in group.responses]

    def seed(row: int, number: int) -> int:
        view, turn = views[row // size], [number] if environments else []
        return response_seed(config.seed, step, *view.draw, view.sample.id, row % size, *turn)

    stop = stops_at(vocabulary.tokenizer, [prompts.CALL_END]) if environments else None
    sampler = Sampler(
        model,
        coarse_prompts,
        size,
        config.max_tokens,
        vocabulary,
        temperature=config.temperature,
        seed=None if step is None else seed,
        stop=stop,
        keep_hidden=keep_hidden,
    )
    while ended := sampler.sample():
        asked, observed = [], {}
        for sampled in ended:
            turn = read_turn(sampled.ids, vocabulary, bool(environments))
            turn.hidden = sampled.hidden
            responses[sampled.row].turns.append(turn)
            if environments:
                asked.append(partial(environments[sampled.row // size].respond, responses[sampled.row]))
        with prefetch(asked, ahead=len(asked)) as shown:  # the next clip is decoded while one is encoded
            for sampled, _ in zip(ended, shown, strict=False):
                turn = responses[sampled.row].turns[-1]
                if turn.reply:
                    keep_tokens(model, [video for video in turn.reply.videos if video.tokens is None])
                    observed[sampled.row] = observation_ids(turn, vocabulary), turn.reply.videos
        for row, observation in sampler.observe(observed).items():
            responses[row].turns[-1].observation = observation
    if config.train_vision:  # then the update encodes what the policy asked for anew
        for reply in (reply for response in responses for reply in response.replies):
            for video in reply.videos:
                video.tokens = None
    return groups


def read_turn(ids: Tensor, vocabulary: Vocabulary, may_call: bool = False) -> Turn:
    """Sampled ids [T] as a turn, which may be a call; nothing is tokenised again."""
    words, offsets = token_offsets(vocabulary.tokenizer, ids.tolist())
    return Turn.of(
        words, may_call, ids, offsets, int(ids[-1]) in vocabulary.eos or (may_call and prompts.CALL_END in words)
    )


def observation_ids(turn: Turn, vocabulary: Vocabulary) -> list[int]:
    """What stands between a turn and the next one, with one <|video_pad|> per frame."""
    return vocabulary.ids(prompts.next_turn(turn.reply.text, int(turn.ids[-1]) == vocabulary.eos[0]))


# ---------------------------------------------------------------- the zoom pass


def visible_spans(spans: Spans | None, duration: float) -> Spans:
    """The parts of the spans that lie in the video, without empty ones."""
    clipped = [(max(0.0, start), min(end, duration)) for start, end in spans or []]
    return [(start, end) for start, end in clipped if start < end]


def zoom_clips(view: View, requests: Sequence[Spans], config: Config, cache: FrameCache | None = None) -> list[Clip]:
    """The zoomed clips of one video, one per list of spans (an empty list is the whole video), decoded together."""
    budget = Budget(*config.zoom_limits, config.paired_frames, patch_side(config.model))
    # The rate is raised where the coarse pass was sparse, and never lowered (Zoom-Zero, footnote 1 and Table 13).
    fps = max(config.zoom_fps, 1 / view.clip.step)
    plans = [plan_clip(view.info, spans or None, fps, budget) for spans in requests]
    return load_clips(view.sample.video, plans, cache=cache)


def zoom_pass(model, groups: Sequence[Group], config: Config, vocabulary: Vocabulary) -> dict[str, VideoError]:
    """Answer every response's question again from its own spans, and keep the answer in `response.zoom`.

    Without a usable span there is no zoom (`invalid_span = zero`), or one on the whole video (`uniform`, the released
    code). A video that was readable in the coarse pass may be damaged elsewhere: then none of its group's responses has
    a zoom, so that R_zoom teaches nothing about them. Returns these samples' ids and errors. Questions without options
    have no zoom: there is no letter to answer with.
    """
    asked: list[tuple[View, dict[tuple, list[Response]]]] = []  # who wants which zoom of a view
    failed: dict[str, VideoError] = {}
    zoomed: list[list[Response]] = []  # who wants the clips that were decoded
    for group in groups:
        wanted: dict[tuple, list[Response]] = {}
        for response in group.responses:
            response.zoom = None
            if not group.view.sample.options:
                continue
            spans = visible_spans(response.spans, group.view.info.duration)
            if not spans and config.invalid_span == "zero":
                continue
            think = prompts.parse_think(response.text) if config.zoom_sees_think else None
            wanted.setdefault((tuple(spans), think), []).append(response)
        asked.append((group.view, wanted))

    def jobs() -> Iterator[tuple[Sample, Clip, str | None]]:
        spans = (partial(zoom_clips, view, [list(spans) for spans, _ in wanted], config) for view, wanted in asked)
        with prefetch(spans, ahead=config.zoom_batch) as decoded:
            for view, wanted in asked:
                try:
                    clips = next(decoded)
                except VideoError as error:
                    failed[view.sample.id] = error
                    continue
                for (_, think), clip, responses in zip(wanted, clips, wanted.values(), strict=True):
                    zoomed.append(responses)
                    yield view.sample, clip, think

    for zoom, responses in zip(answer_clips(model, jobs(), config, vocabulary), zoomed, strict=True):
        for response in responses:
            response.zoom = zoom
    return failed


@torch.no_grad()
def answer_clips(
    model, jobs: Iterable[tuple[Sample, Clip, str | None]], config: Config, vocabulary: Vocabulary
) -> list[Zoom]:
    """The answer to each (sample, clip, reasoning to show or None), `zoom_batch` at a time, as they come.

    `zoom_answer = letters` compares the letters after a forced `<answer>` in one forward pass; `decode` lets the model
    write up to 32 tokens (the answer may then be None).
    """
    zooms, jobs = [], iter(jobs)
    while part := list(itertools.islice(jobs, config.zoom_batch)):
        batch, candidates = [], []
        for sample, clip, think in part:
            chat = user_chat(prompts.zoom_text(config.template, sample.question, list(sample.options), think), config)
            ids, letters = vocabulary.ids(chat), []
            if config.zoom_answer == "letters":
                ids, letters = vocabulary.forced_letter(chat, len(sample.options))
            batch.append(build_prompt(ids, [Video.of(clip)], model.config, vocabulary))
            candidates.append(letters)
        if config.zoom_answer == "decode":
            replies = generate(model, batch, 1, 32, vocabulary, keep_hidden=True)
            for (sample, clip, _), prompt, sampled in zip(part, batch, replies, strict=True):
                reply = read_turn(sampled.ids, vocabulary)
                reply.answer = reply.answer or prompts.parse_answer(reply.text, bare=True)
                reply.hidden = sampled.hidden
                shares = letter_probabilities(model, reply, len(sample.options), vocabulary)
                zooms.append(Zoom(clip, reply.answer, shares, reply.text, len(prompt), len(reply.ids)))
            continue
        logits = kl.logits(*kl.same_dtype(last_hidden(model, batch), model.lm_head.weight))
        for (_, clip, _), prompt, letters, row in zip(part, batch, candidates, logits, strict=True):
            best = prompts.LETTERS[int(row[letters].argmax())]
            shares = dict(zip(prompts.LETTERS, row.softmax(-1)[letters].tolist(), strict=False))
            zooms.append(Zoom(clip, best, shares, best, len(prompt), 1))
    return zooms

"""VideoZoomer's episodes: the policy sees a coarse overview of a video and asks for the clips it needs.

An episode is a list of turns. The policy writes a turn; if it ends with a call, `Scene.answer` gives it frames, or one
sentence that says why there are none, and the policy writes the next turn. Without a call the episode is over.

- Limits (options of config.py, stated in the prompt): 5 turns, 4 calls, 16 frames per call, 128 frames in all, those of
  the overview included. An illegal call costs its turn only. Whoever has no turn, call or frame left is told to answer;
  a call in the last turn ends the episode without an answer.
- The overview is the coarse pass with at most `max_frames` frames. Each frame of a clip follows its time as text, so
  each is a clip of one frame for the model; Eq. 3 sizes them, with the clip's own budget (`zoom_budget`).
- A turn that a limit on its length cut short ends the episode too: half a call is none.

The summary of the paper leaves open what is said to the model; the wording is in prompts.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import prompts as text
from advantage import token_offsets
from config import Config
from media.frames import FrameCache
from media.source import VideoError
from policy import Episodes, Observation, Prompt, Video, Vocabulary, build_prompt, keep_tokens, stops_at
from prompts import ToolCall
from rollout import Group, Spans, View, coarse_prompt, coarse_words, episode_limits, response_seed
from video import Budget, Clip, ClipPlan, load_clip, plan_clip

CALL_END = "</video_zoom>"  # where the writing of a turn stops
SCENE_BYTES = 2**26  # of decoded frames kept for further calls about the same video


@dataclass
class Shown:
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
    """What the policy wrote in a turn, ids int64 [T] with text and character offsets.

    `finished`: it ended by itself, not by the limit on its length. `shown`: what came back, None in the last turn;
    `observation`: the same for the model. `hidden` [T, H]: what each token was chosen from, where that was asked for.
    """

    ids: Tensor
    text: str
    offsets: list[tuple[int, int]]
    finished: bool = True
    shown: Shown | None = None
    observation: Observation | None = None
    hidden: Tensor | None = None

    @property
    def calls(self) -> bool:
        """Whether there is a call in it, legal or not."""
        return text.parse_tool_call(self.text) is not None

    @property
    def answer(self) -> str | None:
        """The letter, if there is no call."""
        return None if self.calls else text.parse_answer(self.text)


@dataclass
class Episode:
    """The turns so far of one attempt at a question. To a `rollout.Group` it is a response: all that was sampled."""

    turns: list[Turn] = field(default_factory=list)
    zoom: None = None

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
    def observations(self) -> list[Observation]:
        """What the model was shown between its turns."""
        return [turn.observation for turn in self.turns if turn.observation]

    @property
    def finished(self) -> bool:
        return not self.truncated

    @property
    def clips(self) -> list[Clip]:
        """What the calls returned."""
        return [shown.clip for shown in self.shown if shown.clip]

    @property
    def shown(self) -> list[Shown]:
        """What came back, frames or not."""
        return [turn.shown for turn in self.turns if turn.shown]

    @property
    def spans(self) -> Spans | None:
        """Where the calls that returned frames have looked; None without any."""
        return [shown.call.span for shown in self.shown if shown.call] or None

    @property
    def over(self) -> bool:
        """Whether the last turn got nothing back."""
        return bool(self.turns) and self.turns[-1].shown is None

    @property
    def calls(self) -> int:
        """Turns that tried a call, legal or not."""
        return sum(turn.calls for turn in self.turns)

    @property
    def answer(self) -> str | None:
        """The letter in the last turn."""
        return self.turns[-1].answer if self.over else None

    @property
    def truncated(self) -> bool:
        """Whether a limit on tokens or turns ended it, and not the policy."""
        last = self.turns[-1]
        return self.over and (last.calls or not last.finished)


class Scene:
    """What episodes about one view can be shown: each clip is decoded once, whoever asks for it, and whenever."""

    def __init__(self, view: View, config: Config, cache: FrameCache | None = None):
        self.view, self.config, self.limits = view, config, episode_limits(config)
        self.cache = cache or FrameCache(SCENE_BYTES)
        self.shown: dict[ClipPlan, tuple[Clip, list[Video]]] = {}

    def left(self, episode: Episode) -> tuple[int, int]:
        """How many calls and frames the episode has left; no calls where the next turn is the last."""
        frames = self.limits.frames - len(self.view.clip.times) - sum(len(clip.times) for clip in episode.clips)
        calls = self.limits.calls - len(episode.clips)
        return (calls if len(episode.turns) < self.limits.turns - 1 else 0), max(0, frames)

    def respond(self, episode: Episode) -> None:
        """Show what the last turn asked for, unless it ends the episode."""
        last = episode.turns[-1]
        call = text.parse_tool_call(last.text)
        if call is None or not last.finished or len(episode.turns) == self.limits.turns:
            return
        refused = call if isinstance(call, str) else self.refusal(call, episode)
        last.shown = Shown()
        if not refused:
            try:
                plan = self.plan(call)
                last.shown = Shown(call, len(plan.times), *self.load(plan))
            except VideoError as error:
                last.shown.error, refused = error, "That part of the video cannot be read."
        times = last.shown.clip.times if last.shown.clip else []
        last.shown.text = text.observation_text(self.config.template, times, refused, *self.left(episode))

    def refusal(self, call: ToolCall, episode: Episode) -> str:
        """Why this readable call of the last turn is illegal, as a sentence; "" if it is not."""
        (start, end), fps = call
        info, limits = self.view.info, self.limits
        calls, frames = limits.calls - len(episode.clips), self.left(episode)[1]
        if not calls or not frames:
            return f"You have no {'frames' if calls else 'calls'} left."
        if start >= info.duration or end > max(info.duration, round(info.duration, 1)):  # as the prompt may state it
            return f"The video ends at {info.duration:.1f} seconds."
        if fps > info.fps + 0.01:
            return f"The video has only {info.fps:.4g} frames per second."
        asked = max(1, math.ceil((end - start) * fps - 1e-6))
        if asked > limits.frames_per_call:
            return f"A call returns at most {limits.frames_per_call} frames, you asked for {asked}."
        if asked > frames:
            return f"You have only {frames} frames left, you asked for {asked}."
        return ""

    def plan(self, call: ToolCall) -> ClipPlan:
        """The frames of a legal call. Raises VideoError."""
        config = self.config
        fps = max(call.fps, 1 / self.view.info.duration)  # no step is longer than the video
        budget = Budget(config.zoom_budget or config.budget, config.v_min, config.v_max)
        return plan_clip(self.view.info, [call.span], fps, budget)

    def load(self, plan: ClipPlan) -> tuple[Clip, list[Video]]:
        """These frames, together and one by one. Raises VideoError."""
        if plan not in self.shown:
            clip = load_clip(plan, self.view.sample.video, cache=self.cache)
            self.shown[plan] = clip, [Video.from_frames(frame[None], clip.step) for frame in clip.frames]
        return self.shown[plan]


def read_turn(ids: Tensor, vocabulary: Vocabulary) -> Turn:
    """Sampled ids [T] as a turn; nothing is tokenised again."""
    words, offsets = token_offsets(vocabulary.tokenizer, ids.tolist())
    return Turn(ids, words, offsets, int(ids[-1]) in vocabulary.eos or CALL_END in words)


# ---------------------------------------------------------------- rollout


def roll_out_episodes(
    model,
    views: Sequence[View],
    config: Config,
    vocabulary: Vocabulary,
    step: int | None,
    keep_hidden: bool = False,
    cache: FrameCache | None = None,
) -> list[Group]:
    """A group of episodes for each view; `step` seeds them, None decodes one greedy episode each.

    The episodes of `rollout_batch` views are decoded together while they are at different turns. `keep_hidden` keeps
    what each token was chosen from.
    """
    groups = []
    for start in range(0, len(views), config.rollout_batch):
        chunk = views[start : start + config.rollout_batch]
        groups += play(model, [Scene(view, config, cache) for view in chunk], config, vocabulary, step, keep_hidden)
    return groups


def clip_failures(groups: Sequence[Group]) -> dict[str, VideoError]:
    """By sample, why a clip that an episode asked for could not be decoded."""
    shown = [(group.view.sample.id, seen) for group in groups for episode in group.responses for seen in episode.shown]
    return {id: seen.error for id, seen in shown if seen.error}


def observation_ids(turn: Turn, vocabulary: Vocabulary) -> list[int]:
    """What stands between a turn and the next one, with one <|video_pad|> per frame."""
    return vocabulary.ids(text.next_turn(turn.shown.text, int(turn.ids[-1]) == vocabulary.eos[0]))


def play(
    model, scenes: Sequence[Scene], config: Config, vocabulary: Vocabulary, step: int | None, keep_hidden: bool
) -> list[Group]:
    """`roll_out_episodes` of one batch."""
    views = [scene.view for scene in scenes]
    prompts = [coarse_prompt(view, config, vocabulary, model.config) for view in views]
    size = 1 if step is None else config.group_size
    groups = [Group(v, p, [Episode() for _ in range(size)]) for v, p in zip(views, prompts, strict=True)]
    played = [episode for group in groups for episode in group.responses]

    def seed(row: int, number: int) -> int:
        return response_seed(config.seed, step, views[row // size].sample.id, row % size, number)

    stop = stops_at(vocabulary.tokenizer, [CALL_END])
    sampling = (config.max_tokens, vocabulary.eos, vocabulary.banned, config.temperature)
    engine = Episodes(model, prompts, size, *sampling, None if step is None else seed, stop, keep_hidden)
    while said := engine.sample():
        shown = {}
        for turn in said:
            episode = played[turn.row]
            episode.turns.append(read_turn(turn.ids, vocabulary))
            episode.turns[-1].hidden = turn.hidden
            scenes[turn.row // size].respond(episode)
            if seen := episode.turns[-1].shown:
                keep_tokens(model, [video for video in seen.videos if video.tokens is None])
                shown[turn.row] = observation_ids(episode.turns[-1], vocabulary), seen.videos
        for row, observation in engine.observe(shown).items():
            played[row].turns[-1].observation = observation
    if config.train_vision:  # then the update encodes them anew
        for _, videos in itertools.chain.from_iterable(scene.shown.values() for scene in scenes):
            for video in videos:
                video.tokens = None
    return groups


# ---------------------------------------------------------------- as messages


def messages(episode: Episode, view: View, config: Config) -> list[dict]:
    """The episode as alternating messages of "user" and "assistant": {"role", "text"}, and with frames "videos", for
    each <video> of the text the file, the times of its frames in seconds, and the step between them.

    The first message is the prompt. `replay` needs those of the assistant only.
    """

    def said(role: str, words: str, shown: Sequence[Sequence[float]] = (), step: float = 1.0) -> dict:
        message = {"role": role, "text": words.replace(text.VIDEO, "<video>")}
        videos = [{"video": view.sample.video, "times": [round(t, 6) for t in times], "step": step} for times in shown]
        return message | ({"videos": videos} if videos else {})

    words = coarse_words(view, config)
    prompt = words + text.VIDEO if config.question_first else text.VIDEO + words
    history = [said("user", prompt, [view.clip.times], view.clip.step)]
    for turn in episode.turns:
        history.append(said("assistant", turn.text))
        if seen := turn.shown:
            times, step = (seen.clip.times, seen.clip.step) if seen.clip else ([], 1.0)
            message = said("user", seen.text, [[time] for time in times], step)
            history.append(message | ({"planned": seen.planned} if seen.planned > len(times) else {}))
    return history


def written_ids(reply: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a turn as the policy would write it: it stops where a call ends, or with <|im_end|>.

    Raises ValueError for text after the end of a call, and for a special token in the text.
    """
    said, end, more = reply.partition(CALL_END)
    if more.strip():
        raise ValueError(f"a turn ends with {CALL_END}, but here {more.strip()[:20]!r} follows")
    ids = vocabulary.ids(said + end)
    if special := {*ids} & {*vocabulary.eos, *vocabulary.banned}:
        raise ValueError(f"the text has the special token {vocabulary.tokenizer.decode(special.pop())}")
    return ids + ([] if end else [vocabulary.eos[0]])


def replay(scene: Scene, replies: Sequence[str], vocabulary: Vocabulary) -> Episode:
    """The episode in which the policy writes these turns, all of which it has the right to write.

    Raises ValueError for a turn after the one that ended the episode, and for one that has a special token in its text
    or goes on after a call.
    """
    episode = Episode()
    for number, reply in enumerate(replies, 1):
        if episode.over:
            raise ValueError(f"turn {number} of {len(replies)}: the episode ended with the turn before")
        try:
            ids = written_ids(reply, vocabulary)
        except ValueError as error:
            raise ValueError(f"turn {number} of {len(replies)}: {error}") from None
        episode.turns.append(read_turn(torch.tensor(ids), vocabulary))
        scene.respond(episode)
    return episode


def lay_out(episode: Episode, prompt: Prompt, vocabulary: Vocabulary, model_config) -> None:
    """Give a replayed episode the observations, after this prompt, that a rollout gives to its own."""
    after, position = 0, prompt.next_position
    for turn in episode.turns:
        after, position = after + len(turn.ids), position + len(turn.ids)
        if turn.shown:
            ids = observation_ids(turn, vocabulary)
            turn.observation = Observation(after, build_prompt(ids, turn.shown.videos, model_config, position))
            position = turn.observation.prompt.next_position

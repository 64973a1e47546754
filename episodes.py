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

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import prompts as text
from advantage import token_offsets
from config import Config
from decode import FrameCache, VideoError
from policy import Video, Vocabulary
from prompts import ToolCall
from rollout import View, coarse_words, episode_limits
from video import Clip, ClipPlan, load_clip, plan_clip

CALL_END = "</video_zoom>"  # where the writing of a turn stops
SCENE_BYTES = 2**26  # of decoded frames kept for further calls about the same video


@dataclass
class Shown:
    """What a call brought: frames, each a clip of its own for the model, or a sentence that says why there are none.

    `text` is the user's turn, with prompts.VIDEO where each frame stands.
    """

    call: ToolCall | None = None  # None: refused
    clip: Clip | None = None
    videos: list[Video] = field(default_factory=list)
    text: str = ""


@dataclass
class Turn:
    """What the policy wrote in a turn, ids int64 [T] with text and character offsets.

    `finished`: it ended by itself, not by the limit on its length. `shown`: what came back, None in the last turn.
    """

    ids: Tensor
    text: str
    offsets: list[tuple[int, int]]
    finished: bool = True
    shown: Shown | None = None


@dataclass
class Episode:
    """The turns so far of one attempt at a question."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def clips(self) -> list[Clip]:
        """What the calls returned."""
        return [turn.shown.clip for turn in self.turns if turn.shown and turn.shown.clip]

    @property
    def over(self) -> bool:
        """Whether the last turn got nothing back."""
        return bool(self.turns) and self.turns[-1].shown is None

    @property
    def calls(self) -> int:
        """Turns that tried a call, legal or not."""
        return sum(text.parse_tool_call(turn.text) is not None for turn in self.turns)

    @property
    def answer(self) -> str | None:
        """The letter in the last turn, if that has no call."""
        last = self.turns[-1].text if self.over else "<video_zoom>"
        return None if text.parse_tool_call(last) is not None else text.parse_answer(last)

    @property
    def truncated(self) -> bool:
        """Whether a limit on tokens or turns ended it, and not the policy."""
        last = self.turns[-1]
        return self.over and (not last.finished or text.parse_tool_call(last.text) is not None)


class Scene:
    """What episodes about one view can be shown: each clip is decoded once, whoever asks for it, and whenever."""

    def __init__(self, view: View, config: Config, cache: FrameCache | None = None):
        self.view, self.config, self.limits = view, config, episode_limits(config)
        self.cache = cache or FrameCache(SCENE_BYTES)
        self.shown: dict[ClipPlan, tuple[Clip, list[Video]]] = {}
        self.error: VideoError | None = None  # of the last clip that could not be decoded

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
        found = None if refused else self.load(call)
        if not refused and found is None:
            refused = "That part of the video cannot be read."
        last.shown = Shown(call, *found) if found else Shown()
        times = found[0].times if found else []
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

    def load(self, call: ToolCall) -> tuple[Clip, list[Video]] | None:
        """The frames of a legal call, together and one by one; None (and `error`) if they cannot be decoded."""
        config = self.config
        budget = config.zoom_budget or config.budget
        plan = plan_clip(self.view.info, [call.span], call.fps, budget, config.v_min, config.v_max)
        if plan not in self.shown:
            try:
                clip = load_clip(plan, self.view.sample.video, cache=self.cache)
            except VideoError as error:
                self.error = error
                return None
            self.shown[plan] = clip, [Video.from_frames(frame[None], clip.step) for frame in clip.frames]
        return self.shown[plan]


def read_turn(ids: Tensor, vocabulary: Vocabulary) -> Turn:
    """Sampled ids [T] as a turn; nothing is tokenised again."""
    words, offsets = token_offsets(vocabulary.tokenizer, ids.tolist())
    return Turn(ids, words, offsets, int(ids[-1]) in vocabulary.eos or CALL_END in words)


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
            history.append(said("user", seen.text, [[time] for time in times], step))
    return history


def written_ids(reply: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a turn as the policy would write it: it stops where a call ends, or with <|im_end|>."""
    return vocabulary.ids(reply) + ([] if CALL_END in reply else [vocabulary.eos[0]])


def replay(scene: Scene, replies: Sequence[str], vocabulary: Vocabulary) -> Episode:
    """The episode in which the policy writes these turns, all of which it has the right to write.

    Raises ValueError for a turn after the one that ended the episode, and for one with a special token in its text.
    """
    episode = Episode()
    for number, reply in enumerate(replies, 1):
        if episode.over:
            raise ValueError(f"turn {number} of {len(replies)}: the episode ended with the turn before")
        ids = written_ids(reply, vocabulary)
        if special := set(vocabulary.ids(reply)) & {*vocabulary.eos, *vocabulary.banned}:
            name = vocabulary.tokenizer.decode(special.pop())
            raise ValueError(f"turn {number} of {len(replies)}: the text has the special token {name}")
        episode.turns.append(read_turn(torch.tensor(ids), vocabulary))
        scene.respond(episode)
    return episode

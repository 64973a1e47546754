"""VideoZoomer's episodes: the policy sees a coarse overview of a video and asks for the clips it needs.

An episode is a response of several turns. The policy writes a turn; if it ends with a call, `ClipEnvironment.respond`
gives it frames, or one sentence that says why there are none, and the policy writes the next turn. Without a call the
episode is over.

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
from dataclasses import replace

import torch

import prompts
from config import Config
from engine.loading import patch_side
from media.file import VideoError
from media.frames import FrameCache
from policy import Observation, Prompt, Video, Vocabulary, build_prompt
from prompts import CALL_END, ToolCall
from rollout import Group, Response, ToolReply, View, coarse_words, episode_limits, observation_ids, read_turn
from video import Budget, Clip, ClipPlan, load_clip, plan_clip

KEPT_BYTES = 2**28  # of decoded frames kept for further calls about the same videos


class ClipEnvironment:
    """What episodes about one view can be shown: each clip is decoded once, whoever asks for it, and whenever."""

    def __init__(self, view: View, config: Config, cache: FrameCache | None = None):
        self.view, self.config, self.limits = view, config, episode_limits(config)
        self.cache = cache or FrameCache(KEPT_BYTES)
        self.loaded: dict[ClipPlan, tuple[Clip, list[Video]]] = {}

    def left(self, episode: Response) -> tuple[int, int]:
        """How many calls and frames the episode has left; no calls where the next turn is the last."""
        frames = self.limits.frames - len(self.view.clip.times) - sum(len(clip.times) for clip in episode.clips)
        calls = self.limits.calls - len(episode.clips)
        return (calls if len(episode.turns) < self.limits.turns - 1 else 0), max(0, frames)

    def respond(self, episode: Response) -> None:
        """Show what the last turn asked for, unless it ends the episode."""
        last = episode.turns[-1]
        call = last.call
        if call is None or not last.finished or len(episode.turns) == self.limits.turns:
            return
        refused = call if isinstance(call, str) else self.refusal(call, episode)
        last.reply = ToolReply()
        if not refused:
            try:
                plan = self.plan(call)
                last.reply = ToolReply(call, len(plan.times), *self.load(plan))
            except VideoError as error:
                last.reply.error, refused = error, "That part of the video cannot be read."
        times = last.reply.clip.times if last.reply.clip else []
        last.reply.text = prompts.observation_text(self.config.template, times, refused, *self.left(episode))

    def refusal(self, call: ToolCall, episode: Response) -> str:
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
        budget = Budget(*config.zoom_limits, patch=patch_side(config.model))
        return plan_clip(self.view.info, [call.span], fps, budget)

    def load(self, plan: ClipPlan) -> tuple[Clip, list[Video]]:
        """These frames, together and one by one. Raises VideoError."""
        if plan not in self.loaded:
            clip = load_clip(plan, self.view.sample.video, cache=self.cache)
            frames = zip(clip.frames, clip.times, strict=True)
            alone = [replace(clip, frames=frame[None], times=[time]) for frame, time in frames]
            self.loaded[plan] = clip, list(map(Video.of, alone))
        return self.loaded[plan]


def environments(views: Sequence[View], config: Config, cache: FrameCache | None = None) -> list[ClipEnvironment]:
    """One per view where the template's responses are episodes, else none."""
    cache = cache or FrameCache(KEPT_BYTES)
    return [ClipEnvironment(view, config, cache) for view in views] if config.multi_turn else []


def clip_failures(groups: Sequence[Group]) -> dict[str, VideoError]:
    """By sample, why a clip that an episode asked for could not be decoded."""
    replies = [(group.view.sample.id, reply) for group in groups for r in group.responses for reply in r.replies]
    return {id: reply.error for id, reply in replies if reply.error}


# ---------------------------------------------------------------- as messages


def messages(episode: Response, view: View, config: Config) -> list[dict]:
    """The episode as alternating messages of "user" and "assistant": {"role", "text"}, and with frames "videos", for
    each <video> of the text the file, the times of its frames in seconds, and the step between them.

    The first message is the prompt. `replay` needs those of the assistant only.
    """

    def message(role: str, words: str, clips: Sequence[Sequence[float]] = (), step: float = 1.0) -> dict:
        words = {"role": role, "text": words.replace(prompts.VIDEO, "<video>")}
        videos = [{"video": view.sample.video, "times": [round(t, 6) for t in times], "step": step} for times in clips]
        return words | ({"videos": videos} if videos else {})

    words = coarse_words(view, config)
    prompt = words + prompts.VIDEO if config.question_first else prompts.VIDEO + words
    history = [message("user", prompt, [view.clip.times], view.clip.step)]
    for turn in episode.turns:
        history.append(message("assistant", turn.text))
        if reply := turn.reply:
            times, step = (reply.clip.times, reply.clip.step) if reply.clip else ([], 1.0)
            observed = message("user", reply.text, [[time] for time in times], step)
            history.append(observed | ({"planned": reply.planned} if reply.planned > len(times) else {}))
    return history


def written_ids(reply: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a turn as the policy would write it: it stops where a call ends, or with <|im_end|>.

    Raises ValueError for text after the end of a call, and for a special token in the text.
    """
    written, end, more = reply.partition(CALL_END)
    if more.strip():
        raise ValueError(f"a turn ends with {CALL_END}, but here {more.strip()[:20]!r} follows")
    ids = vocabulary.ids(written + end)
    if special := {*ids} & {*vocabulary.eos, *vocabulary.banned}:
        raise ValueError(f"the text has the special token {vocabulary.tokenizer.decode(special.pop())}")
    return ids + ([] if end else [vocabulary.eos[0]])


def replay(environment: ClipEnvironment, replies: Sequence[str], vocabulary: Vocabulary) -> Response:
    """The episode in which the policy writes these turns, all of which it has the right to write.

    Raises ValueError for a turn after the one that ended the episode, and for one that has a special token in its text
    or goes on after a call.
    """
    episode = Response()
    for number, reply in enumerate(replies, 1):
        if episode.over:
            raise ValueError(f"turn {number} of {len(replies)}: the episode ended with the turn before")
        try:
            ids = written_ids(reply, vocabulary)
        except ValueError as error:
            raise ValueError(f"turn {number} of {len(replies)}: {error}") from None
        episode.turns.append(read_turn(torch.tensor(ids), vocabulary, may_call=True))
        environment.respond(episode)
    return episode


def lay_out(episode: Response, prompt: Prompt, vocabulary: Vocabulary, model_config) -> None:
    """Give a replayed episode the observations, after this prompt, that a rollout gives to its own."""
    after, position = 0, prompt.next_position
    for turn in episode.turns:
        after, position = after + len(turn.ids), position + len(turn.ids)
        if turn.reply:
            ids = observation_ids(turn, vocabulary)
            piece = build_prompt(ids, turn.reply.videos, model_config, vocabulary, position)
            turn.observation, position = Observation(after, piece), piece.next_position

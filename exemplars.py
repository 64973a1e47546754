"""Trajectories for VideoZoomer's cold start: an expert plays episodes, and continues those in which the policy failed.

    python exemplars.py play --expert oracle --train_data world --config recipes/cpu_world_agent_sft.yaml
    python exemplars.py play --expert endpoint --judge_model NAME --config recipes/videozoomer_rl.yaml --video_root DIR
    accelerate launch exemplars.py reflect --expert oracle --train_data world --config recipes/cpu_world_agent_sft.yaml
        --model CHECKPOINT --exemplars runs/play/train.jsonl --share 0.3

- `play`: the expert plays an episode about each question of `train_data`, in the environment of the policy
  (`episodes.py`), which answers and limits its calls as it does those of the policy.
- `reflect`: the policy `--model`, trained on exemplars, plays `group_size` episodes about each question. A failed one
  loses its last message, which was wrong, and the expert goes on from there (if it had no other, from the beginning,
  but knowing what was wrong). Mixed with the exemplars, these trajectories are the `--share` of the training file.

Kept is what ends with the right answer and in which every turn of the expert follows the template to the letter. The
turns of the failed policy have weight 0: they are what the expert's turns follow, not what is to be learned (the
summary of the paper leaves this open); `--learn_failures` gives them weight 1.

An expert is a vision-language model at a chat endpoint (chat.py), which sees frames with their times, or the oracle of
the built-in world, which knows the evidence (world/oracle.py).

`--out` gets episodes.jsonl, a line per question with "kept" and "reason", and train.jsonl, the trajectories to learn
from. What has a line is not played again.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("exemplars", __doc__)  # the imports below take seconds

import argparse
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import config as configuration
import prompts
from annotations import trajectories
from annotations.rows import DataError, Sample
from annotations.samples import check_samples, check_videos, load_samples
from config import Config, ConfigError
from engine.families import BANNED_TOKENS, EOS_TOKENS
from episodes import ClipEnvironment, environments, messages
from filters import finished_rows, identity
from harness import journal
from harness.asking import Agent
from harness.batches import view_all
from harness.chat import Cached, Chat, ChatError, Message, RequestError, Shown, connect
from harness.folder import claimed
from harness.run import patient_accelerator, program, share
from infer import load_agent
from policy import ModelError
from prompts import CALL_END
from report.tables import aligned
from rewards import format_reward
from rollout import Response, Turn, View, roll_out
from video import Clip
from world import oracle
from world.oracle import Stuck

NOTE = (
    "Answer by the protocol in the user's message. Each of your turns is <think>...</think> and then either one call "
    "or an answer, nothing else. Call for a part whenever the frames so far leave a doubt."
)
CORRECT = (
    " Your earlier turns came to nothing ({failure}). Say what the frames so far do not show, or what was overlooked, "
    "and go on."
)


class Expert(Protocol):
    """Who plays. `name` tells apart what may play differently."""

    name: str

    def turn(self, scene: ClipEnvironment, episode: Response, failure: str | None) -> str:
        """The next turn of an episode that is not over; `failure` says what a failed attempt came to. Raises Stuck, and
        ChatError for what ends the run.
        """
        ...


# ---------------------------------------------------------------- a chat model


class Dialogue:
    """A vision-language model that plays by the policy's own prompt."""

    def __init__(self, chat: Chat):
        self.chat, self.name = chat, chat.name

    def turn(self, scene: ClipEnvironment, episode: Response, failure: str | None) -> str:
        """What it says, up to the end of its first call."""
        note = NOTE + (CORRECT.format(failure=failure) if failure else "")
        try:
            reply = self.chat.reply([Message("system", (note,)), *dialogue(episode, scene)]).text
        except RequestError as error:
            raise Stuck(f"request refused: {error}") from None
        before, call, _ = reply.strip().partition(CALL_END)
        return before + call


def dialogue(episode: Response, scene: ClipEnvironment) -> list[Message]:
    """An episode as a chat: each frame is an image after its time."""
    view = scene.view
    clips = iter([view.clip, *(turn.reply.clip for turn in episode.turns if turn.reply and turn.reply.clip)])
    chat_messages = []
    for message in messages(episode, view, scene.config):
        first, *rest = message["text"].split(trajectories.MARK)
        parts: list[str | Shown] = [first]
        videos = message.get("videos", [])
        frames = iter(single_frames(view.sample.video, next(clips)) if videos else [])
        for words, video in zip(rest, videos, strict=True):
            timed = len(video["times"]) > 1  # a single frame has its time before it
            for time, frame in itertools.islice(frames, len(video["times"])):
                parts += [f"{prompts.time_text(time)}s", frame] if timed else [frame]
            parts.append(words)
        chat_messages.append(Message(message["role"], tuple(part for part in parts if part)))
    return chat_messages


def single_frames(video: str, clip: Clip) -> Iterator[tuple[float, Shown]]:
    """Each frame of a clip with its time."""
    for k, time in enumerate(clip.times):
        yield time, Shown(video, (time, time + clip.step), replace(clip, frames=clip.frames[k : k + 1], times=[time]))


# ---------------------------------------------------------------- episodes


def finish_episode(expert: Expert, scene: ClipEnvironment, episode: Response, failure: str | None = None) -> str | None:
    """The expert goes on with an episode to its end. Returns why it is not worth learning from, or None.

    Raises ChatError.
    """
    before = len(episode.turns)
    while not episode.over:
        try:
            words = expert.turn(scene, episode, failure)
        except Stuck as reason:
            return str(reason)
        if any(token in words for token in (*EOS_TOKENS, *BANNED_TOKENS)):
            return "a special token in the text"
        episode.turns.append(Turn.of(words, True, torch.zeros(0, dtype=torch.long), []))
        scene.respond(episode)
    if error := next((reply.error for reply in episode.replies if reply.error), None):
        return f"unreadable video: {error}"
    return fault(episode, before, scene)


def fault(episode: Response, first: int, scene: ClipEnvironment) -> str | None:
    """What is wrong with the answer, or with the format of the turns from `first` on; None if both are right."""
    if episode.answer is None:
        return "no answer"
    if episode.answer != scene.view.sample.answer:
        return f"wrong answer: {episode.answer}"
    turns = [turn.text for turn in episode.turns[first:]]
    return None if format_reward(turns, scene.config.template) else "not the template's format"


def reflect(expert: Expert, scene: ClipEnvironment, attempts: Sequence[Response]) -> tuple[Response, int, str | None]:
    """The expert goes on with the first failed attempt, without its last message; it is one that has other turns, if
    there is any.

    Returns the episode, how many turns of it are the policy's, and why it is not worth learning from, or None.
    """
    for attempt in sorted(attempts, key=lambda attempt: len(attempt.turns) == 1):
        if failure := fault(attempt, 0, scene):
            episode = Response(attempt.turns[:-1])
            return episode, len(episode.turns), finish_episode(expert, scene, episode, failure)
    return Response(), 0, "no attempt failed"


def episode_row(episode: Response, n_failed: int, reason: str | None, view: View, config: Config, learn: bool) -> dict:
    """A line of the journal about a sample; the first `n_failed` turns are the policy's own."""
    about = identity(view.sample, config)
    history = messages(episode, view, config) if episode.turns else []
    for message in history:
        for video in message.get("videos", []):
            video["video"] = about["video"]
    if not learn:
        for message in history[1 : 2 * n_failed : 2]:
            message["weight"] = 0
    calls = {"calls": episode.calls, "clips": len(episode.clips), "failed_turns": n_failed}
    return {**about, **calls, "kept": reason is None, "reason": reason, "messages": history}


# ---------------------------------------------------------------- a data set


def play_all(
    samples: Sequence[Sample], expert: Expert, options: argparse.Namespace, config: Config, model: Agent | None
) -> Iterator[dict]:
    """The line of each sample, as they are done. Without a model, the expert plays alone."""
    for start in range(0, len(samples), config.rollout_batch):
        batch = samples[start : start + config.rollout_batch]
        views, unreadable = view_all(batch, config)
        for sample in batch:
            if sample.video in unreadable:
                reason = f"unreadable video: {unreadable[sample.video]}"
                yield {**identity(sample, config), "kept": False, "reason": reason, "messages": []}
        groups: list[Sequence[Response]] = [()] * len(views)
        if model is not None:
            with torch.no_grad():
                rolled = roll_out(
                    model.model, views, config, model.vocabulary, 0, environments=environments(views, config)
                )
            groups = [group.responses for group in rolled]

        def line(view: View, attempts: Sequence[Response]) -> dict:
            scene = ClipEnvironment(view, config)
            if model is None:
                episode, n = Response(), 0
                reason = finish_episode(expert, scene, episode)
            else:
                episode, n, reason = reflect(expert, scene, attempts)
            return episode_row(episode, n, reason, view, config, options.learn_failures)

        with ThreadPoolExecutor(options.workers) as pool:
            yield from pool.map(line, views, groups)


def mixed(exemplars: Sequence[dict], reflections: Sequence[dict], share: float, seed: int) -> list[dict]:
    """All exemplars, and as many reflections, drawn at random, as make `share` of the whole; all if there are fewer."""
    n_reflections = round(share / (1 - share) * len(exemplars))
    return [*exemplars, *random.Random(seed).sample(reflections, min(n_reflections, len(reflections)))]


def run(options: argparse.Namespace, config: Config, accelerator: Accelerator) -> None:
    """Play what is not played yet, write the training file. Raises DataError, ModelError, ChatError, ConfigError."""
    out = Path(options.out)
    exemplars = read_exemplars(options.exemplars, config) if options.exemplars else []
    with accelerator.main_process_first():
        samples = load_samples(config.train_data, "train", config)
    check_samples(samples, ("options", "answer"), config.train_data)
    check_playable(samples, options.expert, config.train_data)
    expert = load_expert(options, out, config)
    made_with = {"what": options.what, "expert": expert.name, **configuration.decisive(config)}
    if options.what == "reflect":
        made_with |= {name: getattr(config, name) for name in ("model", "seed", "group_size", "temperature")}
        made_with["learn_failures"] = options.learn_failures
    path, training = out / "episodes.jsonl", out / "train.jsonl"
    done = finished_rows(path, samples, made_with, config, accelerator)
    rest = [sample for sample in samples if sample.id not in done]
    if rest:
        rest = check_videos(rest, options.skip_missing)
        local_samples = [rest[i] for i in share(rest, accelerator)]
        model = load_agent(config, accelerator.device) if options.what == "reflect" else None
        bar = {"desc": f"{path}: {len(done)} done", "disable": None if accelerator.is_main_process else True}
        for row in tqdm(
            play_all(local_samples, expert, options, config, model), total=len(local_samples), unit="episode", **bar
        ):
            journal.append(path, {**row, "made_with": made_with})
    done = finished_rows(path, samples, made_with, config, accelerator)
    if accelerator.is_main_process:
        rows = [done[sample.id] for sample in samples if sample.id in done]
        kept = [{"id": row["id"], "messages": row["messages"]} for row in rows if row["kept"]]
        print(exemplar_summary(rows))
        if not kept:
            raise DataError(f"{training}: not written, since no episode is kept; {path} has the reasons")
        if options.what == "reflect":
            together = mixed(exemplars, kept, options.share, config.seed)
            n = len(together) - len(exemplars)
            begun = sum(row["kept"] and row["failed_turns"] > 0 for row in rows)
            print(f"{len(kept)} reflections, {begun} of them with turns of the policy")
            print(f"{n} of them are {n / len(together):.3f} of {len(together)} trajectories")
            kept = together
        journal.save_whole(training, partial(trajectories.save_rows, rows=kept))
        print(f"{training}: what is to be learned; {path}: a line per question")


def read_exemplars(path: str, config: Config) -> list[dict]:
    """The rows of a file of trajectories, each of which can be read. Raises DataError."""
    return [trajectory.row.fields for trajectory in trajectories.load_trajectories(path, config.video_root)]


def check_playable(samples: Sequence[Sample], expert: str, path: str) -> None:
    """Raise DataError for a question that a trajectory cannot have, or that the oracle does not know."""
    for number, sample in enumerate(samples, 1):
        problem = ""
        if trajectories.MARK in sample.question + "".join(sample.options):
            problem = f"{trajectories.MARK} in the question would stand for a clip in a trajectory"
        elif expert == "oracle" and not oracle.knows(sample):
            problem = "the oracle knows the questions of the built-in world only"
        if problem:
            raise DataError(f"{path}: row {number} ({sample.id}): {problem}")


def load_expert(options: argparse.Namespace, out: Path, config: Config) -> Expert:
    """Raises ChatError naming what an endpoint lacks."""
    if options.expert == "oracle":
        return oracle.Oracle()
    return Dialogue(Cached(connect(options.endpoint, options.judge_model, config.max_tokens), out / "replies"))


def exemplar_summary(rows: Sequence[Mapping]) -> str:
    """How many episodes are kept and why others are not, as text."""
    kept = [row for row in rows if row["kept"]]
    lines = [("", "episodes", "calls"), ("played", str(len(rows)), ""), ("kept", str(len(kept)), "")]
    if kept:
        lines[-1] = ("kept", str(len(kept)), f"{fmean(row['calls'] for row in kept):.2f}")
    reasons = Counter(row["reason"].split(":")[0] for row in rows if not row["kept"])
    lines += [(f"dropped: {reason}", str(n), "") for reason, n in reasons.items()]
    return aligned(lines)


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    options, config = configuration.parse_for_model(
        commands.extra("exemplars", __doc__), arguments, program="exemplars"
    )
    if options.what is None:
        raise ConfigError("play or reflect?")
    if not config.multi_turn:
        known = ", ".join(prompts.multi_turn_templates())
        raise ConfigError(f"template = {config.template} has no episodes; there are {known}")
    if options.workers < 1 or not 0 < options.share < 1:
        raise ConfigError(f"--workers {options.workers} must be positive, --share {options.share} between 0 and 1")
    if (options.what == "reflect") != bool(options.exemplars):
        raise ConfigError("reflect, and only it, needs --exemplars, the train.jsonl that play has left")
    disable_progress_bar()  # of loading weights
    options.out = options.out or f"runs/{options.what}"
    accelerator = patient_accelerator(config)
    with claimed(options.out, accelerator):
        run(options, config, accelerator)


if __name__ == "__main__":
    program(main, DataError, ModelError, ChatError)

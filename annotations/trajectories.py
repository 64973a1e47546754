"""Trajectories: dialogues with clips that a policy learns from: JSON lines, a JSON list, or parquet.

Four layouts are read, told apart row by row:

| layout                  | messages                                                  | clips                         |
|-------------------------|-----------------------------------------------------------|-------------------------------|
| ours, of `episodes.py`  | "messages": {"role", "text"}                              | "videos" of each message      |
| LLaMA-Factory, ms-swift | "messages": {"role", "content"}                           | "videos" of the row, in order |
| LLaMA-Factory, Qwen     | "conversations": {"from": "human" or "gpt", "value"}      | "videos" or "video" of it     |
| OpenAI                  | "messages": {"role", "content": [{"type", ...}]}          | entries of the content        |

A system prompt is the field "system" or the first message. In the text of a user, `<video>` stands where a clip is
shown; in a list of contents the entries {"type": "video", "video"} and {"type": "video_url", "video_url": {"url"}} do.
A clip is a file's path, then it is shown as the coarse pass would (the first message) or as a whole call (later ones),
or {"video", "times", "step"}: the frames at these seconds. All frames of a message share the budget, `budget`
in the first one and `zoom_budget` later (Eq. 3); with "planned" in the message, so many frames share it, of which some
were the same picture and are shown once.

Learned are the turns of the assistant alone, those with a "weight" of 0 or a "loss" of false excepted. As in a rollout,
a turn ends with its call, where more text is an error, or with <|im_end|>.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import prompts
from annotations.rows import DataError, Row, as_float, as_row, read_rows, short
from annotations.samples import video_path
from config import Config
from engine.loading import patch_side
from episodes import written_ids
from media.decode import VideoInfo, probe
from media.file import VideoError
from policy import Observation, Prompt, Video, Vocabulary, build_prompt
from rollout import coarse_plan
from video import Budget, ClipPlan, frame_budget, frame_size, load_clips, plan_clip

MARK = "<video>"
MAX_STEP = 86400  # seconds from frame to frame: a day
MAX_PLANNED = 10_000  # frames of a message
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class TrajectoryClip:
    """Frames at these seconds, `step` seconds apart to the model; without times, the whole file."""

    video: str
    times: tuple[float, ...] = ()
    step: float = 1.0


@dataclass(frozen=True)
class TrajectoryTurn:
    """A turn of the dialogue: `role` is "user" or "assistant", `weight` what its tokens count in the loss, `planned`
    how many frames share the budget, if more than there are.
    """

    role: str
    text: str
    videos: tuple[TrajectoryClip, ...] = ()
    weight: float = 1.0
    planned: int = 0


@dataclass(frozen=True)
class Trajectory:
    """Messages from a user's to an assistant's, in turns. `system`: None for the configured one; `row`: its place."""

    row: Row
    messages: tuple[TrajectoryTurn, ...]
    system: str | None = None

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.row.file}: {self.row.where}: {problem}")


# ---------------------------------------------------------------- reading


def load_trajectories(path: str | Path, video_root: str = "") -> list[Trajectory]:
    """The trajectories of a file. Raises DataError naming file, row and field."""
    return [read_trajectory(row, video_root) for row in read_rows(Path(path))]


def read_trajectory(row: Row, video_root: str = "") -> Trajectory:
    """One row, of any layout. Raises DataError."""
    name = "conversations" if "conversations" in row.fields else "messages"
    turns = [as_row(row.file, f"{row.where}, {name}[{k}]", turn) for k, turn in enumerate(row.get(name, list))]
    if row.fields.get("images"):
        raise row.error("images", "frames as images are not read; give videos, with times")
    apart = any("videos" in turn.fields for turn in turns)  # then the row's "video" says what it is about
    clips = iter([] if apart else read_clips(row, video_root))
    messages, system = [], None if row.fields.get("system") is None else row.text("system")
    for turn in turns:
        role = read_role(turn)
        words, turn_clips = read_contents(turn, video_root)
        if found := prompts.control(words):
            raise DataError(f"{row.file}: {row.where}: the {role}'s text {found}; remove it")
        if role == "system" and not messages:
            system = words
            continue
        marks = words.count(MARK) if role == "user" else 0
        if not turn_clips:
            turn_clips = read_clips(turn, video_root) if "videos" in turn.fields else list(islice(clips, marks))
        if len(turn_clips) != marks:
            raise turn.error("videos", f"{marks} {MARK} in the text, but {len(turn_clips)} clips")
        planned = turn.get("planned", int) if "planned" in turn.fields else 0
        if not 0 <= planned <= MAX_PLANNED:
            raise turn.error("planned", f"expected 0 to {MAX_PLANNED} frames, got {short(planned)}")
        messages.append(TrajectoryTurn(role, words, tuple(turn_clips), read_weight(turn), planned))
    if left := sum(1 for _ in clips):
        raise row.error("videos", f"{left} clips more than {MARK} in the texts")
    check_turns(row, name, messages)
    return Trajectory(row, tuple(messages), system)


def read_role(turn: Row) -> str:
    name = "from" if "from" in turn.fields else "role"
    role = turn.text(name)
    if role not in ROLES:
        raise turn.error(name, f"{short(role)} is none of {', '.join(ROLES)}")
    return ROLES[role]


def read_contents(turn: Row, video_root: str) -> tuple[str, list[TrajectoryClip]]:
    """A message's text, and the clips that are entries of it: then `<video>` stands in the text for each."""
    name = next((n for n in ("text", "content", "value") if n in turn.fields), "text")
    if not isinstance(turn.fields.get(name), list):
        return turn.get(name, str), []
    words, clips = [], []
    for k, value in enumerate(turn.fields[name]):
        entry = as_row(turn.file, f"{turn.where}, {name}[{k}]", value)
        kind = entry.text("type")
        if kind == "text":
            words.append(entry.get("text", str))
            if MARK in words[-1]:
                raise entry.error("text", f"{MARK} stands for a clip, which is an entry of the list here")
            continue
        if kind not in ("video", "video_url"):
            raise entry.error("type", f"{short(kind)} is none of text, video, video_url")
        if isinstance(entry.fields.get(kind), dict):
            entry = as_row(turn.file, f"{entry.where}, {kind}", entry.fields[kind])
            kind = "url" if "url" in entry.fields else "video"
        words.append(MARK)
        clips.append(TrajectoryClip(clip_path(entry, kind, video_root)))
    return "".join(words), clips


def clip_path(row: Row, name: str, video_root: str) -> str:
    """The path in a field, which may be written as an address of a file."""
    path = row.text(name).removeprefix("file://")
    if not path.strip() or "://" in path:
        raise row.error(name, f"expected the path of a video file, got {short(path)}")
    return video_path(path, video_root or None)


def read_weight(turn: Row) -> float:
    """What a turn counts: its "weight", or its "loss" (of ms-swift: true, false or null), 1 without either."""
    loss = turn.fields.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise turn.error("loss", f"expected true or false, got {short(loss)}")
    weight = turn.get("weight", int, float) if turn.fields.get("weight") is not None else 1
    if weight not in (0, 1):
        raise turn.error("weight", f"expected 0 or 1, got {short(weight)}")
    return float(weight and loss is not False)


def read_clips(row: Row, video_root: str) -> list[TrajectoryClip]:
    """The clips in the field "videos", or the one or more in "video"; none without either."""
    values = row.get("videos", list, type(None)) if "videos" in row.fields else None
    if not values and row.fields.get("video"):
        value = row.get("video", str, list)
        values = value if isinstance(value, list) else [value]
    found = []
    for k, clip in enumerate(values or []):
        if isinstance(clip, str):
            entry = Row(row.file, f"{row.where}, videos[{k}]", {"video": clip})
            found.append(TrajectoryClip(clip_path(entry, "video", video_root)))
            continue
        entry = as_row(row.file, f"{row.where}, videos[{k}]", clip)
        path = clip_path(entry, "video", video_root)
        times = entry.get("times", list)
        known = all(type(t) in (int, float) and 0 <= as_float(t) < math.inf for t in times)
        if not times or not known or times != sorted(times):
            raise entry.error("times", f"expected rising seconds, got {short(times)}")
        step = entry.number("step") if "step" in entry.fields else 1.0
        if step > MAX_STEP:
            raise entry.error("step", f"expected at most {MAX_STEP} seconds, got {step:g}")
        found.append(TrajectoryClip(path, tuple(map(float, times)), step))
    return found


def check_turns(row: Row, name: str, messages: Sequence[TrajectoryTurn]) -> None:
    """Raise DataError unless user and assistant take turns, from a user's first to an assistant's last, and there is
    something to learn.
    """
    roles = [message.role for message in messages]
    if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        there = ", ".join(roles[:12]) + (", ..." if len(roles) > 12 else "")
        raise row.error(name, f"user and assistant must take turns, and the assistant ends: {there}")
    if not any(message.weight for message in messages[1::2]):
        raise row.error(name, "every turn of the assistant has weight 0")


def check_files(trajectories: Sequence[Trajectory]) -> None:
    """Raise DataError naming the first row whose video is missing."""
    there: set[str] = set()
    for trajectory in trajectories:
        for path in {clip.video for message in trajectory.messages for clip in message.videos} - there:
            if not Path(path).is_file():
                raise trajectory.error(f"there is no video {path}; check video_root")
            there.add(path)


def save_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- as the policy sees them


@dataclass
class Example:
    """A trajectory for `group_hidden`: the prompt, the assistant's ids int64 [T], what stood between its turns, and
    what each id counts in the loss, float [T].
    """

    name: str
    prompt: Prompt
    ids: Tensor
    observations: list[Observation]
    weight: Tensor


def build_example(trajectory: Trajectory, config: Config, vocabulary: Vocabulary, model_config) -> Example:
    """The trajectory with its frames. Raises VideoError, and DataError for a special token in a text."""
    special = {*vocabulary.eos, *vocabulary.banned}
    for message in trajectory.messages:
        if found := special.intersection(vocabulary.ids(message.text)):
            name = vocabulary.tokenizer.decode(found.pop())
            raise trajectory.error(f"the {message.role}'s text has the special token {name}")
    user_clips = iter(load_shown(trajectory, config))
    first, *rest = trajectory.messages
    system = config.system_prompt if trajectory.system is None else trajectory.system
    chat = prompts.chat_text(first.text.replace(MARK, prompts.VIDEO), 0, system or None)
    prompt = build_prompt(vocabulary.ids(chat), next(user_clips), model_config, vocabulary)
    written: list[int] = []
    weight: list[float] = []
    observations = []
    position = prompt.next_position
    for message in rest:
        if message.role == "assistant":
            try:
                ids = written_ids(message.text, vocabulary)
            except ValueError as error:
                raise trajectory.error(str(error)) from None
            written, weight, position = written + ids, weight + [message.weight] * len(ids), position + len(ids)
        else:
            between = prompts.next_turn(message.text.replace(MARK, prompts.VIDEO), written[-1] == vocabulary.eos[0])
            piece = build_prompt(vocabulary.ids(between), next(user_clips), model_config, vocabulary, position)
            observations.append(Observation(len(written), piece))
            position = piece.next_position
    name = f"{trajectory.row.file}: {trajectory.row.where}"
    return Example(name, prompt, torch.tensor(written), observations, torch.tensor(weight))


def load_shown(trajectory: Trajectory, config: Config) -> list[list[Video]]:
    """The clips of each of the user's messages; each file is read once. Raises VideoError."""
    users = trajectory.messages[::2]
    plans: dict[str, list[ClipPlan]] = {clip.video: [] for message in users for clip in message.videos}
    infos = {path: probe(path) for path in plans}
    for k, message in enumerate(users):
        for clip in message.videos:
            plans[clip.video].append(plan_shown(clip, message, k == 0, infos[clip.video], config))
    clips = {path: iter(load_clips(path, file_plans)) for path, file_plans in plans.items()}
    taken = [[next(clips[clip.video]) for clip in message.videos] for message in users]
    return [[Video.of(clip) for clip in turn_clips] for turn_clips in taken]


def plan_shown(clip: TrajectoryClip, message: TrajectoryTurn, first: bool, info: VideoInfo, config: Config) -> ClipPlan:
    """Times and size of the frames of one of a message's clips; it is the `first` message or a later one."""
    patch = patch_side(config.model)
    limits = (config.budget, config.v_min, config.v_max) if first else config.zoom_limits
    if clip.times:
        if clip.times[-1] >= info.duration:
            cause = f"the trajectory shows {clip.times[-1]:g} s of a video of {info.duration:.3f} s"
            raise VideoError(info.path, cause, "leave it out")
        n = max(message.planned, sum(len(other.times) or 1 for other in message.videos))
        paired = config.paired_frames and first  # later frames are clips of one
        tokens = frame_budget(n, 1.0, *limits, paired)[1]
        size = frame_size(info.height, info.width, tokens, config.v_min, patch)
        return ClipPlan(clip.times, clip.step, *size, patch=patch)
    if first:
        return coarse_plan(info, config)
    fps = min(config.zoom_fps, config.frames_per_call / info.duration)
    return plan_clip(info, None, fps, Budget(*limits, patch=patch))

"""Trajectories: dialogues with clips that a policy learns from, as JSON lines (or a JSON list) of messages.

Three layouts are read, told apart row by row:

| layout                  | messages                                                  | clips                         |
|-------------------------|-----------------------------------------------------------|-------------------------------|
| ours, of `episodes.py`  | "messages": {"role", "text"}                              | "videos" of each message      |
| LLaMA-Factory, OpenAI   | "messages": {"role", "content"}                           | "videos" of the row, in order |
| LLaMA-Factory, ShareGPT | "conversations": {"from": "human" or "gpt", "value"}      | "videos" of the row, in order |

A system prompt is the field "system" or the first message. In the text of a user, `<video>` stands where a clip is
shown. A clip is a file's path, then it is shown as the coarse pass would (the first message) or as a whole call (later
ones), or {"video", "times", "step"}: the frames at these seconds. All frames of a message share the budget, `budget`
in the first one and `zoom_budget` later (Eq. 3); with "planned" in the message, so many frames share it, of which some
were the same picture and are shown once.

Learned are the turns of the assistant alone, those with a "weight" of 0 excepted. As in a rollout, a turn ends with its
call, where more text is an error, or with <|im_end|>.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prompts as text
from annotations.rows import DataError, Row, as_row, read_rows
from annotations.samples import video_path
from config import Config
from episodes import written_ids
from media.decode import VideoInfo, probe
from media.source import VideoError
from policy import Observation, Prompt, Video, Vocabulary, build_prompt
from rollout import coarse_plan
from video import Budget, ClipPlan, frame_budget, frame_size, load_clips, plan_clip

MARK = "<video>"
MAX_STEP = 86400  # seconds from frame to frame: a day
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Shown:
    """A clip: frames at these seconds, `step` seconds apart to the model; without times, the whole file."""

    video: str
    times: tuple[float, ...] = ()
    step: float = 1.0


@dataclass(frozen=True)
class Message:
    """A turn of the dialogue: `role` is "user" or "assistant", `weight` what its tokens count in the loss, `planned`
    how many frames share the budget, if more than there are.
    """

    role: str
    text: str
    videos: tuple[Shown, ...] = ()
    weight: float = 1.0
    planned: int = 0


@dataclass(frozen=True)
class Trajectory:
    """Messages from a user's to an assistant's, in turns. `system`: None for the configured one; `row`: its place."""

    row: Row
    messages: tuple[Message, ...]
    system: str | None = None

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.row.file}: {self.row.where}: {problem}")


# ---------------------------------------------------------------- reading


def load(path: str | Path, video_root: str = "") -> list[Trajectory]:
    """The trajectories of a file. Raises DataError naming file, row and field."""
    return [read_trajectory(row, video_root) for row in read_rows(Path(path))]


def read_trajectory(row: Row, video_root: str = "") -> Trajectory:
    """One row, of any layout. Raises DataError."""
    name = "conversations" if "conversations" in row.fields else "messages"
    turns = [as_row(row.file, f"{row.where}, {name}[{k}]", turn) for k, turn in enumerate(row.get(name, list))]
    if "images" in row.fields:
        raise row.error("images", "frames as images are not read; give videos, with times")
    clips = iter(read_clips(row, video_root))
    messages, system = [], row.text("system") if "system" in row.fields else None
    for turn in turns:
        role = read_role(turn)
        words = turn.text(next((n for n in ("text", "content", "value") if n in turn.fields), "text"))
        if role == "system" and not messages:
            system = words
            continue
        marks = words.count(MARK) if role == "user" else 0
        own = read_clips(turn, video_root) if "videos" in turn.fields else [c for _, c in zip(range(marks), clips)]  # noqa: B905
        if len(own) != marks:
            raise turn.error("videos", f"{marks} {MARK} in the text, but {len(own)} clips")
        planned = turn.get("planned", int) if "planned" in turn.fields else 0
        messages.append(Message(role, words, tuple(own), read_weight(turn), planned))
    if left := sum(1 for _ in clips):
        raise row.error("videos", f"{left} clips more than {MARK} in the texts")
    check_turns(row, name, messages)
    return Trajectory(row, tuple(messages), system)


def read_role(turn: Row) -> str:
    name = "from" if "from" in turn.fields else "role"
    role = turn.text(name)
    if role not in ROLES:
        raise turn.error(name, f"{role!r} is none of {', '.join(ROLES)}")
    return ROLES[role]


def read_weight(turn: Row) -> float:
    weight = turn.get("weight", int, float) if "weight" in turn.fields else 1
    if weight not in (0, 1):
        raise turn.error("weight", f"expected 0 or 1, got {weight!r}")
    return float(weight)


def read_clips(row: Row, video_root: str) -> list[Shown]:
    """The clips in the field "videos", none without it."""
    found = []
    for k, clip in enumerate(row.get("videos", list) if "videos" in row.fields else []):
        if isinstance(clip, str):
            found.append(Shown(video_path(clip, video_root or None)))
            continue
        entry = as_row(row.file, f"{row.where}, videos[{k}]", clip)
        path = video_path(entry.text("video"), video_root or None)
        times = entry.get("times", list)
        known = all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t < math.inf for t in times)
        if not times or not known or times != sorted(times):
            raise entry.error("times", f"expected rising seconds, got {times!r}")
        step = entry.number("step") if "step" in entry.fields else 1.0
        if step > MAX_STEP:
            raise entry.error("step", f"expected at most {MAX_STEP} seconds, got {step:g}")
        found.append(Shown(path, tuple(map(float, times)), step))
    return found


def check_turns(row: Row, name: str, messages: Sequence[Message]) -> None:
    """Raise DataError unless user and assistant take turns, from a user's first to an assistant's last, and there is
    something to learn.
    """
    roles = [message.role for message in messages]
    if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise row.error(name, f"user and assistant must take turns, and the assistant ends: {', '.join(roles)}")
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


def save(path: str | Path, rows: Iterable[dict]) -> None:
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
    shown = iter(load_shown(trajectory, config))
    first, *rest = trajectory.messages
    system = config.system_prompt if trajectory.system is None else trajectory.system
    chat = text.chat_text(first.text.replace(MARK, text.VIDEO), 0, system or None)
    prompt = build_prompt(vocabulary.ids(chat), next(shown), model_config)
    said: list[int] = []
    weight: list[float] = []
    observations = []
    position = prompt.next_position
    for message in rest:
        if message.role == "assistant":
            try:
                ids = written_ids(message.text, vocabulary)
            except ValueError as error:
                raise trajectory.error(str(error)) from None
            said, weight, position = said + ids, weight + [message.weight] * len(ids), position + len(ids)
        else:
            between = text.next_turn(message.text.replace(MARK, text.VIDEO), said[-1] == vocabulary.eos[0])
            piece = build_prompt(vocabulary.ids(between), next(shown), model_config, position)
            observations.append(Observation(len(said), piece))
            position = piece.next_position
    name = f"{trajectory.row.file}: {trajectory.row.where}"
    return Example(name, prompt, torch.tensor(said), observations, torch.tensor(weight))


def load_shown(trajectory: Trajectory, config: Config) -> list[list[Video]]:
    """The clips of each of the user's messages; each file is read once. Raises VideoError."""
    users = trajectory.messages[::2]
    plans: dict[str, list[ClipPlan]] = {clip.video: [] for message in users for clip in message.videos}
    infos = {path: probe(path) for path in plans}
    for k, message in enumerate(users):
        for clip in message.videos:
            plans[clip.video].append(plan_shown(clip, message, k == 0, infos[clip.video], config))
    clips = {path: iter(load_clips(path, wanted)) for path, wanted in plans.items()}
    taken = [[next(clips[clip.video]) for clip in message.videos] for message in users]
    return [[Video.from_frames(clip.frames, clip.step) for clip in some] for some in taken]


def plan_shown(clip: Shown, message: Message, first: bool, info: VideoInfo, config: Config) -> ClipPlan:
    """Times and size of the frames of one of a message's clips; it is the `first` message or a later one."""
    budget = config.budget if first else config.zoom_budget or config.budget
    if clip.times:
        if clip.times[-1] >= info.duration:
            cause = f"the trajectory shows {clip.times[-1]:g} s of a video of {info.duration:.3f} s"
            raise VideoError(info.path, cause, "leave it out")
        n = max(message.planned, sum(len(other.times) or 1 for other in message.videos))
        paired = config.paired_frames and first  # later frames are clips of one
        tokens = frame_budget(n, 1.0, budget, config.v_min, config.v_max, paired)[1]
        return ClipPlan(clip.times, clip.step, *frame_size(info.height, info.width, tokens, config.v_min))
    if first:
        return coarse_plan(info, config)
    fps = min(config.zoom_fps, config.frames_per_call / info.duration)
    return plan_clip(info, None, fps, Budget(budget, config.v_min, config.v_max))

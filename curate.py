"""SceneTG: questions with clear and unambiguous evidence, from any folder of long videos (LongVTG-R1, section 3.4).

    python curate.py --videos movies/ --detector runs/scenes/detector.safetensors \\
        --endpoint https://api.example.com/v1 --judge_model NAME
    python curate.py --oracle world     # the built-in long videos, asked and judged by the ground truth

"Propose, then annotate": scenes come first, questions second. Every stage leaves a journal in `--out`:

| file              | a line per | what it holds                                                                       |
|-------------------|------------|-------------------------------------------------------------------------------------|
| `shots.jsonl`     | video      | the shots, by PySceneDetect or from `--shots`                                       |
| `scenes.jsonl`    | video      | the probability of each cut to begin a scene, and the scenes: above 0.3             |
| `questions.jsonl` | scene      | a question with options, answer and clues: what in it leads to this scene           |
| `unique.jsonl`    | question   | whether it is kept: no scene of five before and after has all clues, or the answer  |

and a line that something is wrong with says why, as "skipped" or "reason". `train.jsonl` has the kept questions as
records of annotations/records.py, with the scene as evidence; `statistics.txt` and `.png` show durations and shares of
the video, as Figure 3 does.

Questions and verdicts are asked for (harness/chat.py) of an endpoint, a checkpoint (`--model`), or the ground truth. A
reply that cannot be used is answered with the reason, up to `--tries` times. What was interrupted goes on where it was;
replies are kept in `--out`/replies. Under `accelerate launch`, processes share the videos.

What the paper leaves open, and how it is here: a scene gets one question; verdicts are asked for scene by scene, and
not beyond the first that rejects; a scene that cannot be judged rejects, since uniqueness is not known then; a video of
a single scene gets no question, because there is nothing to find in it.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("curate", __doc__)  # the imports below take seconds

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

import config as configuration
import scenes
from annotations.answers import letter_of_answer, strip_letters
from annotations.rows import DataError, Row, Sample, read_rows
from annotations.samples import VIDEO_SUFFIXES, spread, write_samples
from config import Config, ConfigError
from engine.loading import patch_side
from harness import chat, journal
from harness.chat import Cached, Chat, ChatError, Local, Message, Reply, RequestError, Shown, Usage, one_line
from harness.folder import claimed
from harness.run import patient_accelerator, program, share
from media.decode import probe
from media.file import VideoError
from media.frames import FrameCache
from policy import ModelError
from prompts import LETTERS, Spans, control
from report.plots import plot_statistics, round_edges
from scenes import SceneError
from video import PATCH, Budget, load_clip, plan_clip
from world import films

NEIGHBOURS = 5  # scenes before, and as many after
MAX_CLUES = 8
MAX_OPTIONS = 8
FRAME_BYTES = 2**30  # decoded frames that are kept for the next question
ENDPOINT_RECIPE = configuration.RECIPES / "scenetg.yaml"  # for an endpoint

QUESTION = """These frames, in order, are one scene of a longer video. Write one multiple-choice question about the \
video that only this scene answers. Ask for something discriminative: a unique object, a fine-grained action, or an \
interaction that depends on the situation. Mention neither times nor frames, and do not speak of a scene.
Reply with one JSON object and nothing else:
{"question": "...", "options": ["...", "...", "...", "..."], "answer": "B", "clues": ["...", "..."]}
"options" are two to eight short answers, exactly one of them right; "answer" is its letter; "clues" are all things in \
the question by which somebody would find this scene, each a short phrase that can be checked by looking. If nothing \
here is distinctive, reply {"question": null}."""
VERDICT = """These frames, in order, are one scene of a longer video. Below are a question about the video, the clues \
in it, and its answer. Which of the clues does this scene contain, and does it contain the answer?
Reply with one JSON object and nothing else, such as {"clues": [true, false], "answer": false}: true or false for each \
clue, in order, and for the answer.
"""
AGAIN = "This cannot be used: {problem}. Reply again, with the JSON object alone."
REFUSAL = re.compile(r"\b(can ?not|can['’]t|won['’]t|unable|not able|sorry|apologi[sz]e|decline)\b", re.I)


class CurateError(Exception):
    """Nothing to curate, or nothing left: the message says what was found and what to do."""


class ReplyError(Exception):
    """A reply that cannot be used, and why."""


class NothingToAskError(ReplyError):
    """The reply that says so."""


@dataclass(frozen=True)
class Task:
    """What one line of a journal will be about: its id, its video, and what the stages before have found."""

    id: str
    video: str
    row: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Viewer:
    """How parts of the videos in a folder are shown."""

    folder: Path
    config: Config
    patch: int = PATCH  # of who looks
    frames: FrameCache = field(default_factory=lambda: FrameCache(FRAME_BYTES))

    def path(self, video: str) -> str:
        return str(self.folder / video)

    def show(self, video: str, span: tuple[float, float]) -> Shown:
        """The frames of [start, end) seconds, under Eq. 3's budget. Raises VideoError."""
        info, config = probe(self.path(video)), self.config
        budget = Budget(config.budget, config.v_min, config.v_max, config.paired_frames, self.patch)
        plan = plan_clip(info, [span], config.fps, budget)
        return Shown(video, span, load_clip(plan, self.path(video), cache=self.frames))


# ---------------------------------------------------------------- replies


def ask(judge: Chat, messages: Sequence[Message], read: Callable[[str], dict], tries: int) -> dict:
    """What `read` makes of the reply. One that it rejects is answered with the reason, `tries` replies in all.

    Raises ReplyError, ChatError.
    """
    for number in range(1, tries + 1):
        reply = judge.reply(messages)
        try:
            return read(reply.text)
        except NothingToAskError:
            raise
        except ReplyError as problem:
            if number == tries:
                raise
            attempt = Message("assistant", (reply.text.strip() or "(nothing)",))
            messages = [*messages, attempt, Message("user", (AGAIN.format(problem=problem),))]
    raise ValueError(f"tries must be at least 1, not {tries}")


def read_reply_object(text: str, names: Sequence[str], request: str) -> dict:
    """The JSON object that a reply is, in a code fence or without, with exactly these fields. Raises ReplyError."""
    bare = re.sub(r"^```(?:json)?\s*\n(.*)\n```$", r"\1", text.strip(), flags=re.S)
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        if folded(text) and folded(text) in folded(request):
            raise ReplyError("it repeats the request")
        if "{" not in text and REFUSAL.search(text):
            raise ReplyError(f"it refuses: {one_line(text, 80)!r}")
        raise ReplyError(f"it is not a JSON object: {one_line(text, 80)!r}")
    if not writable(json.dumps(value, ensure_ascii=False)):
        raise ReplyError("it has half a character")
    if value == {"question": None}:
        raise NothingToAskError("nothing distinctive")
    for name in names:
        if name not in value:
            raise ReplyError(f"it has no {name!r}")
    for name in value:
        if name not in names:
            raise ReplyError(f"it has {one_line(name, 40)!r}, which was not asked for")
    return value


def read_question(text: str) -> dict:
    """A proposed question: {"question", "options", "answer": a letter, "clues"}, options without letters. Raises
    ReplyError.
    """
    value = read_reply_object(text, ("question", "options", "answer", "clues"), QUESTION)
    question, answer = value["question"], value["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ReplyError("its question is not a text")
    if folded(question) in folded(QUESTION):
        raise ReplyError("it repeats the request")
    options = strip_letters(distinct_texts(value, "options", 2, MAX_OPTIONS))
    clues = distinct_texts(value, "clues", 1, MAX_CLUES)
    letter = letter_of_answer(answer, options) if isinstance(answer, str) else None
    if found := control("\n".join([question, *options, *clues])):
        raise ReplyError(f"it {found}")
    if letter is None:
        raise ReplyError(f"its answer is not the letter of an option: {one_line(repr(answer), 40)}")
    return {"question": question.strip(), "options": list(options), "answer": letter, "clues": clues}


def read_verdict(text: str, n_clues: int) -> dict:
    """A verdict on a scene: {"clues": whether it has all of them, "answer": whether it has the answer}. Raises
    ReplyError.
    """
    value = read_reply_object(text, ("clues", "answer"), VERDICT)
    found, answer = value["clues"], value["answer"]
    if not isinstance(found, list) or len(found) != n_clues or not all(isinstance(one, bool) for one in found):
        raise ReplyError(f"its clues are not true or false {n_clues} times")
    if not isinstance(answer, bool):
        raise ReplyError("its answer is not true or false")
    return {"clues": all(found), "answer": answer}


def distinct_texts(value: dict, name: str, least: int, most: int) -> list[str]:
    """The field's texts: a number of them between least and most, none empty, none twice. Raises ReplyError."""
    texts = value[name]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ReplyError(f"its {name} are not texts")
    if not least <= len(texts) <= most:
        raise ReplyError(f"it has {len(texts)} {name}, not {least} to {most}")
    if len({folded(text) for text in texts}) < len(texts):
        raise ReplyError(f"its {name} repeat")
    return [text.strip() for text in texts]


def writable(text: str) -> bool:
    """Whether UTF-8 can write it: names of files and texts of JSON may have what it cannot."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


def folded(text: str) -> str:
    """A text without case and repeated space, to be compared."""
    return " ".join(text.split()).casefold()


# ---------------------------------------------------------------- the ground truth as a model


class Truth:
    """Long videos whose questions are known (`films.build_long`), asked as a model is: it looks up what it is shown.

    A scene contains a clue, here the text of a question, if that question is about it, and an answer if one of its
    questions has that answer.
    """

    def __init__(self, rows: Sequence[Row]):
        self.name = f"the truth of {rows[0].file}"
        self.questions = {row.text("video"): row.get("questions", list) for row in rows}

    def reply(self, messages: Sequence[Message]) -> Reply:
        frames, words = messages[0].parts
        start, end = frames.span
        here = [
            one for one in self.questions.get(frames.video, []) if all(start <= s and e <= end for s, e in one["glue"])
        ]
        if words == QUESTION:
            if not here:
                return Reply('{"question": null}')
            one = here[0]
            letter = one["answer"].strip("()")
            content = {
                "question": one["question"],
                "options": one["options"],
                "answer": letter,
                "clues": [one["question"]],
            }
        else:
            asked = json.loads(words.removeprefix(VERDICT))
            answers = [one["options"][LETTERS.index(one["answer"].strip("()"))] for one in here]
            there = [clue in [one["question"] for one in here] for clue in asked["clues"]]
            content = {"clues": there, "answer": asked["answer"] in answers}
        return Reply(json.dumps(content))


# ---------------------------------------------------------------- one line of each stage


def shots_row(task: Task, viewer: Viewer, known: dict[str, Row] | None) -> dict:
    """The shots of a video: known ones, or PySceneDetect's. Raises SceneError if that is not installed."""
    row = {"video": task.video, "duration": None, "shots": [], "skipped": None}
    try:
        row["duration"] = probe(viewer.path(task.video)).duration
        if not writable(task.video):
            return {**row, "skipped": "its name is not UTF-8"}
        if known is None:
            shots = scenes.find_shots(viewer.path(task.video))
        elif task.video in known:
            shots = scenes.spans_of(known[task.video], "shots")
        else:
            return {**row, "skipped": "its shots are not known"}
    except VideoError as error:
        return {**row, "skipped": f"unreadable: {error}"}
    return {**row, "shots": shots, "skipped": None if shots else "no shots"}


def task_scenes(task: Task, find: Callable[[str, Spans], list[float]]) -> dict:
    """The scenes of a video whose shots are found; `find` gives the probability of each cut to begin one."""
    shots = [tuple(shot) for shot in task.row["shots"]]
    row = {"video": task.video, "duration": task.row["duration"], "boundaries": [], "scenes": [], "skipped": None}
    try:
        row |= scenes.scenes_row(task.video, shots, find(task.video, shots))
    except VideoError as error:
        return {**row, "skipped": f"unreadable: {error}"}
    return {**row, "skipped": None if len(row["scenes"]) > 1 else "one scene: there is nothing to find in it"}


def question_row(task: Task, viewer: Viewer, judge: Chat, tries: int) -> dict:
    """A question about one scene, or why there is none. Raises ChatError where going on makes no sense."""
    start, end = task.row["scene"]
    row = {"id": task.id, "video": task.video, **task.row, "skipped": None}
    try:
        if end - start < 1 / probe(viewer.path(task.video)).fps:
            return {**row, "skipped": "shorter than a frame"}
        frames = viewer.show(task.video, (start, end))
        return {**row, **ask(judge, [Message("user", (frames, QUESTION))], read_question, tries)}
    except VideoError as error:
        return {**row, "skipped": f"unreadable: {error}"}
    except RequestError as error:
        return {**row, "skipped": f"request refused: {error}"}
    except ReplyError as error:
        return {**row, "skipped": str(error)}


def unique_row(task: Task, spans: dict[str, Spans], viewer: Viewer, judge: Chat, tries: int) -> dict:
    """Whether a question is kept: whether its scene alone is meant, among its neighbours in `spans`, by video."""
    others = spans[task.video]
    row = {name: value for name, value in task.row.items() if name not in ("skipped", "made_with")}
    answer = row["options"][LETTERS.index(row["answer"])]
    asked = json.dumps({"question": row["question"], "clues": row["clues"], "answer": answer}, ensure_ascii=False)
    for number in neighbours(row["number"], len(others)):
        try:
            frames = viewer.show(task.video, others[number])
            messages = [Message("user", (frames, VERDICT + asked))]
            verdict = ask(judge, messages, lambda text: read_verdict(text, len(row["clues"])), tries)
        except (VideoError, ReplyError, RequestError) as error:
            return {**row, "kept": False, "reason": f"no verdict: scene {number}: {error}"}
        if verdict["clues"]:
            return {**row, "kept": False, "reason": f"another scene has all clues: scene {number}"}
        if verdict["answer"]:
            return {**row, "kept": False, "reason": f"another scene has the answer: scene {number}"}
    return {**row, "kept": True, "reason": ""}


def neighbours(number: int, n_scenes: int) -> list[int]:
    """The scenes that are compared with one: five before and five after, where there are as many, nearest first."""
    near = [number + side * distance for distance in range(1, NEIGHBOURS + 1) for side in (-1, 1)]
    return [one for one in near if 0 <= one < n_scenes]


# ---------------------------------------------------------------- stages


def run_stage(
    path: Path,
    tasks: Sequence[Task],
    make: Callable[[Task], dict],
    made_with: dict,
    accelerator: Accelerator,
    workers: int = 1,
) -> list[dict]:
    """The rows of all tasks, on every process: those that the journal has, and new ones.

    Processes share the videos, `workers` threads of each make rows at a time. Raises DataError for a journal that was
    made with something else, and whatever `make` raises: finished rows are kept then.
    """
    done = {id_of(row.fields): row for row in journal.resume(path, accelerator)}
    journal.check_made_with(done.values(), made_with)
    local_tasks = [tasks[k] for k in share(tasks, accelerator) if tasks[k].id not in done]

    def add(task: Task) -> None:
        journal.append(path, {**make(task), "made_with": made_with})

    label = f"{path.name}: {sum(task.id in done for task in tasks)} of {len(tasks)} done"
    with ThreadPoolExecutor(workers) as pool:
        added = [pool.submit(add, task) for task in local_tasks]
        try:
            bar = {"total": len(local_tasks), "disable": None if accelerator.is_main_process else True}
            for one in tqdm(as_completed(added), desc=label, **bar):
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    accelerator.wait_for_everyone()
    rows = {id_of(row.fields): row.fields for row in journal.read(path)}
    return [rows[task.id] for task in tasks]


def id_of(row: dict) -> str:
    return row["id"] if "id" in row else row["video"]


def usable(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row["skipped"] is None]


def curate(options: argparse.Namespace, config: Config, accelerator: Accelerator) -> None:
    """All stages, one after the other; at the end the main process writes the training file and its statistics."""
    out = Path(options.out)
    with accelerator.main_process_first():
        source = sources(options, config)
    patch = patch_side(options.model) if options.model else PATCH
    viewer, known = Viewer(source.folder, config, patch), source.known
    judge = connect_judge(options, config, source.truth, accelerator.device)
    find = scene_finder(options, viewer, known)
    in_turn = partial(run_stage, accelerator=accelerator)
    at_once = partial(in_turn, workers=options.workers if options.judge_model else 1)

    made_with = {"shots": "PySceneDetect" if known is None else options.shots or options.oracle}
    tasks = [Task(video, video) for video in source.videos]
    shots = in_turn(out / "shots.jsonl", tasks, lambda task: shots_row(task, viewer, known), made_with)

    found_by = made_with["shots"]
    if options.detector:  # may be trained again in its place
        found_by = (
            f"{options.detector} {hashlib.sha256(Path(options.detector).read_bytes()).hexdigest()[:8]} {options.tower}"
        )
    made_with = {**made_with, "scenes": found_by, "threshold": scenes.THRESHOLD}
    tasks = [Task(row["video"], row["video"], row) for row in usable(shots)]
    found = in_turn(out / "scenes.jsonl", tasks, lambda task: task_scenes(task, find), made_with)

    made_with = {**made_with, "judge": judge.name, **configuration.decisive(config, "curate", configuration.SEEN)}
    tasks = [
        Task(f"{row['video']}:{n}", row["video"], {"duration": row["duration"], "number": n, "scene": scene})
        for row in usable(found)
        for n, scene in enumerate(row["scenes"])
    ]
    make = partial(question_row, viewer=viewer, judge=judge, tries=options.tries)
    questions = at_once(out / "questions.jsonl", tasks, make, made_with)

    spans = {row["video"]: [tuple(scene) for scene in row["scenes"]] for row in usable(found)}
    tasks = [Task(row["id"], row["video"], row) for row in usable(questions)]
    make = partial(unique_row, spans=spans, viewer=viewer, judge=judge, tries=options.tries)
    unique = at_once(out / "unique.jsonl", tasks, make, made_with)

    usage = sum(gather_object([judge.usage]), Usage())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(stage_text(shots, found, questions, unique))
        print(f"asked      {usage.describe(*options.prices)}")
        finish_curation(out, unique, source.folder)


def finish_curation(out: Path, unique: Sequence[dict], folder: Path) -> None:
    """Write the training file, whole or not at all, and the statistics as text and picture. Raises CurateError."""
    kept = [row for row in unique if row["kept"]]
    (out / "train.jsonl").unlink(missing_ok=True)  # of an earlier run
    if not kept:
        raise CurateError(f"{out}: no question is left; unique.jsonl and questions.jsonl say why")
    samples = [
        Sample(
            id=row["id"],
            video=row["video"],
            question=row["question"],
            options=tuple(row["options"]),
            answer=row["answer"],
            evidence=(tuple(row["scene"]),),
            duration=row["duration"],
            kind="scenetg",
            meta={"clues": row["clues"]},
        )
        for row in kept
    ]
    part = out / "train.jsonl.part"
    write_samples(part, samples)
    part.replace(out / "train.jsonl")
    durations = list({sample.video: sample.duration for sample in samples}.values())
    shares = [(end - start) / sample.duration for sample in samples for start, end in sample.evidence]
    figures = statistics_text(durations, shares)
    (out / "statistics.txt").write_text(f"{figures}\n")
    print(f"\n{figures}")
    plot_statistics(durations, shares, out / "statistics.png")
    print(
        f"\n{out}/train.jsonl: {len(samples)} questions; train.py --train_data {out}/train.jsonl --video_root {folder}"
    )


# ---------------------------------------------------------------- statistics


def stage_text(shots: Sequence[dict], found: Sequence[dict], questions: Sequence[dict], unique: Sequence[dict]) -> str:
    """What every stage kept and left out, and why."""
    n_cuts = sum(len(row["shots"]) for row in usable(shots))
    n_scenes = sum(len(row["scenes"]) for row in usable(found))
    kept = sum(row["kept"] for row in unique)
    lines = [f"videos     {len(shots)}, {n_cuts} shots", *reason_counts(row["skipped"] for row in shots)]
    lines += [f"scenes     {n_scenes} in {len(usable(found))} videos", *reason_counts(row["skipped"] for row in found)]
    lines += [f"questions  {len(unique)}", *reason_counts(row["skipped"] for row in questions)]
    lines += [f"unique     {kept}", *reason_counts(row["reason"] for row in unique)]
    return "\n".join(lines)


def reason_counts(texts) -> list[str]:
    """A line per kind of reason, what stands before its colon, the most frequent first."""
    kinds = Counter(text.split(":")[0] for text in texts if text)
    return [f"  {count} x {kind}" for kind, count in kinds.most_common()]


def statistics_text(durations: Sequence[float], shares: Sequence[float]) -> str:
    """The figures of LongVTG-R1's Figure 3: durations in seconds, one per video, and shares of the video, one per
    question.
    """
    lines = [
        f"seconds of a video             {spread(list(durations))}",
        *text_bars(durations, round_edges(durations)),
    ]
    percent = [100 * share for share in shares]
    lines += [f"percent of it in a question     {spread(percent)}", *text_bars(percent, round_edges(percent))]
    return "\n".join(lines)


def text_bars(values: Sequence[float], edges: np.ndarray, width: int = 40) -> list[str]:
    """A histogram, a line per bin [low, high), the last one [low, high]."""
    counts, _ = np.histogram(values, edges)
    return [
        f"{low:>9g} to {high:<6g} {count:>6}  {'#' * round(width * count / counts.max())}".rstrip()
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


# ---------------------------------------------------------------- command line


@dataclass(frozen=True)
class Sources:
    """The videos in a folder, and rows by video: `known` has shots, perhaps scenes; the `truth` asks and judges."""

    folder: Path
    videos: list[str]
    known: dict[str, Row] | None
    truth: dict[str, Row] | None


def sources(options: argparse.Namespace, config: Config) -> Sources:
    """What there is to curate. Raises CurateError, DataError."""
    if options.oracle == "world":
        options.oracle = str(films.build_long(config.cache, "train", options.world_videos, config.world_seed))
    truth = read_by_video(options.oracle) if options.oracle else None
    known = read_by_video(options.shots) if options.shots else None if options.detector else truth
    if options.videos is None:
        if truth is None:
            raise CurateError("which videos? Give --videos FOLDER, or --oracle world")
        return Sources(Path(options.oracle).parent, list(truth), known, truth)
    folder = Path(options.videos)
    if not folder.is_dir():
        raise CurateError(f"--videos {folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise CurateError(f"--videos {folder}: there are no videos in it ({', '.join(VIDEO_SUFFIXES)})")
    return Sources(folder, [file.relative_to(folder).as_posix() for file in files], known, truth)


def read_by_video(path: str) -> dict[str, Row]:
    return {row.text("video"): row for row in read_rows(Path(path))}


def connect_judge(
    options: argparse.Namespace, config: Config, truth: dict[str, Row] | None, device: torch.device
) -> Cached:
    """Who asks and judges, with replies kept in `--out`/replies. Raises ChatError, ModelError."""
    judge: Chat
    if truth is not None:
        judge = Truth(list(truth.values()))
    elif options.model:
        judge = Local(options.model, device, config.max_tokens)
    else:
        judge = chat.connect(options.endpoint, options.judge_model, config.max_tokens, options.timeout)
    return Cached(judge, Path(options.out) / "replies")


def scene_finder(
    options: argparse.Namespace, viewer: Viewer, known: dict[str, Row] | None
) -> Callable[[str, Spans], list[float]]:
    """From a video and its shots to the probability of each cut to begin a scene: the detector's, or 1 or 0 if known.

    Raises SceneError, ModelError for a detector that cannot be used, and CurateError if there is nothing to find with.
    """
    if options.detector:
        tower = scenes.load_tower(options.tower)
        detector = scenes.Detector.load(options.detector, tower)
        kept = Path(viewer.config.cache) / "shots"
        return lambda video, shots: detector(
            scenes.shot_features(tower, viewer.path(video), shots, detector.tokens, kept)
        )
    if not known or any("scenes" not in row.fields for row in known.values()):
        raise CurateError(
            'what are the scenes? Give --detector FILE (python scenes.py --train), or "scenes" in the rows of --shots'
        )

    def look_up(video: str, shots: Spans) -> list[float]:
        begins = [start for start, _ in scenes.spans_of(known[video], "scenes")]
        return [float(any(abs(cut - start) <= 1e-3 for start in begins)) for cut, _ in shots[1:]]

    return look_up


def parse_curate(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """What is asked, and how scenes are shown: by the recipe that suits who looks. Raises ConfigError."""

    def recipe(options: argparse.Namespace) -> Path:
        return configuration.suiting_recipe(options.model) if options.model or options.oracle else ENDPOINT_RECIPE

    options, config = configuration.parse_with(commands.extra("curate", __doc__), arguments, recipe, "curate")
    asked = [name for name in ("endpoint", "model", "oracle") if getattr(options, name)]
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]}: one of them asks and judges")
    if options.judge_model and asked and asked != ["endpoint"]:
        raise ConfigError(f"--judge_model is for --endpoint, not for --{asked[0]}")
    for name in ("tries", "workers", "world_videos", "timeout"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"{name} must be positive, not {getattr(options, name)}")
    return options, config


def main(arguments: list[str] | None = None) -> None:
    options, config = parse_curate(arguments)
    accelerator = patient_accelerator(config)
    with claimed(options.out, accelerator):
        curate(options, config, accelerator)


if __name__ == "__main__":
    program(main, CurateError, ChatError, SceneError, DataError, ModelError, VideoError)

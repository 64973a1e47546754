"""One reader per published annotation format, listed in `FORMATS`: adding a format is one function and one entry.

A reader takes a file's path and a `Report`, and yields a `Sample` per question. Rules that hold for every format:

- Times are seconds. Spans stay as published, also where they start below 0, end after the video, overlap, are unsorted
  or have zero length, because the official scores count them so. Only a reversed span has its ends swapped.
- Options lose their letter ("A. ", "(A) ", "A) ", "A: ") when every option of the question carries its own.
- The answer is a letter. Where the file gives the option's text, it is the first option with that text.
- A row with an empty question, or with an answer that is not among its options, is dropped and reported.
- A video without a known file suffix gets ".mp4".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from annotations.answers import letter_of_answer, letter_of_text, strip_letters
from annotations.records import NOT_AN_OPTION, read_letter, read_options, read_records
from annotations.rows import (
    DataError,
    Report,
    Row,
    Sample,
    as_float,
    as_row,
    open_text,
    read_csv,
    read_object,
    read_rows,
    short,
)
from prompts import LETTERS

KIND_SEPARATOR = " + "  # between the types of a question that has several
PLM_FPS = 24  # frame numbers of PLM-Video count the frames of SA-V videos
CHARADES_LINE = re.compile(r"(\S+) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)##(.*)")
TIMES = re.compile(r"\s*(?:<answer>)?\s*(\d+(?:\.\d+)?)\s+to\s+(\d+(?:\.\d+)?)\s*(?:</answer>)?\s*")


# ---------------------------------------------------------------- question answering with evidence


def read_nextgqa(path: Path, report: Report) -> Iterator[Sample]:
    """NExT-GQA: `val.csv` or `test.csv`, with `gsub_val.json` (spans) and `map_vid_vidorID.json` (folders) beside it.

    A question is known by video and qid together. The duration is frame_count / fps, since the published one is
    rounded to a second. TP questions count as TN, as in the paper. Questions without an entry in the gsub file (all
    of `train.csv`) have no evidence.
    """
    spans_file = path.with_name(f"gsub_{path.stem}.json")
    folders_file = path.with_name("map_vid_vidorID.json")
    videos = read_object(spans_file) if spans_file.is_file() else {}
    folders = Row(folders_file, "top level", read_object(folders_file) if folders_file.is_file() else {})
    if not folders.fields:
        report.remarks.append(f"no {folders_file.name} beside it: videos are named without their folder")
    for row in read_csv(path):
        video, qid = row.text("video_id"), row.text("qid")
        options = tuple(row.text(f"a{i}").strip() for i in range(5))
        answer = letter_of_text(row.text("answer"), options)
        if answer is None:
            report.drop(row.where, NOT_AN_OPTION, row.text("answer"))
            continue
        spans, duration = (), None
        if video in videos:
            entry = as_row(spans_file, f"video {video}", videos[video])
            locations = Row(spans_file, f"video {video}, location", entry.get("location", dict))
            spans = locations.spans(qid, report) if qid in locations.fields else ()
            duration = row.cell_number("frame_count") / entry.number("fps")
        if not spans:
            report.notes["questions without evidence"] += 1
        kind = row.text("type")
        yield Sample(
            id=f"{video}_{qid}",
            video=folders.text(video) if folders.has(video) else video,
            question=row.text("question"),
            options=options,
            answer=answer,
            evidence=spans,
            duration=duration,
            kind="TN" if kind == "TP" else kind,
        )


def read_rextime(path: Path, report: Report) -> Iterator[Sample]:
    """ReXTime: the repository's JSON lines (letters, but no options) or the hosted JSON list (with options)."""
    for row in read_rows(path):
        hosted = row.has("options")
        options = read_options(row, "options") if hosted else ()
        if hosted:
            spans = (row.span("span", row.get("span", list), report),)
        else:
            spans = row.spans("relevant_windows", report)
        yield Sample(
            id=row.text("qid"),
            video=row.text("vid"),
            question=row.text("question" if hosted else "query"),
            options=options,
            answer=read_letter(row, "ans", options),
            evidence=spans,
            duration=row.number("duration"),
            kind=row.text("category") if hosted else "",
        )


def read_cgbench(path: Path, report: Report) -> Iterator[Sample]:
    """CG-Bench: `cgbench_mini.json` or `cgbench.json`; the exact duration is in `video_meta_info.json` beside it."""
    exact_file = path.with_name("video_meta_info.json")
    exact = read_object(exact_file) if exact_file.is_file() else {}
    for row in read_rows(path):
        video = row.text("video_uid")
        options = read_options(row, "choices")
        yield Sample(
            id=str(row.get("qid", int, str)),
            video=video,
            question=row.text("question"),
            options=options,
            answer=read_letter(row, "right_answer", options),
            evidence=row.spans("clue_intervals", report),
            duration=(as_row(exact_file, f"video {video}", exact[video]) if video in exact else row).number("duration"),
            kind=row.text("sub_category"),
        )


# ---------------------------------------------------------------- temporal grounding: no options, no answer


def read_qvhighlights(path: Path, report: Report) -> Iterator[Sample]:
    """QVHighlights, and whatever shares its JSON lines; the test file has no windows."""
    for row in read_rows(path):
        yield Sample(
            id=str(row.get("qid", int, str)),
            video=row.text("vid"),
            question=row.text("query"),
            options=(),
            answer=None,
            evidence=row.spans("relevant_windows", report) if row.has("relevant_windows") else (),
            duration=row.number("duration"),
        )


def read_charades_sta(path: Path, report: Report) -> Iterator[Sample]:
    """Charades-STA: the txt lines `ID start end##sentence`, or the JSON list of the same lines.

    The duration is the `length` in `Charades_v1_{test,train}.csv` beside it, or else in `charades.json`.
    """
    durations = charades_durations(path)
    if not durations:
        report.remarks.append("no Charades_v1_*.csv or charades.json beside it: durations are unknown")
    rows = read_rows(path) if path.suffix == ".json" else charades_lines(path)
    for number, row in enumerate(rows):
        video = Path(row.text("video")).stem
        yield Sample(
            id=f"{video}_{number}",
            video=video,
            question=row.text("caption"),
            options=(),
            answer=None,
            evidence=(row.span("timestamp", row.get("timestamp", list), report),),
            duration=durations.get(video),
        )


def charades_lines(path: Path) -> Iterator[Row]:
    """The lines of the txt as rows of the JSON list."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            match = CHARADES_LINE.fullmatch(line.rstrip("\r\n"))
            if not match:
                text = line.rstrip("\r\n")
                raise DataError(f"{path}: row {number}: expected 'ID start end##sentence', got {short(text)}")
            fields = {"video": match[1], "timestamp": [float(match[2]), float(match[3])], "caption": match[4]}
            yield Row(path, f"row {number}", fields)


def charades_durations(path: Path) -> dict[str, float]:
    tables = sorted(path.parent.glob("Charades_v1_*.csv"))
    if tables:
        return {row.text("id"): row.cell_number("length") for table in tables for row in read_csv(table)}
    listing = path.with_name("charades.json")
    if not listing.is_file():
        return {}
    return {video: as_row(listing, video, entry).number("duration") for video, entry in read_object(listing).items()}


def read_captions(path: Path, report: Report) -> Iterator[Sample]:
    """ActivityNet Captions and TACoS: `{video: {timestamps, sentences}}`.

    TACoS gives frame numbers and `fps`: seconds are frame / fps. Space and newlines inside a sentence become single
    spaces. The file's name is part of the id, because ActivityNet's val_1 and val_2 describe the same videos.
    """
    for video, entry in read_object(path).items():
        row = as_row(path, f"video {video}", entry)
        fps = row.number("fps") if row.has("fps") else 1
        sentences = row.texts("sentences")
        frames = row.spans("timestamps", report)
        if len(sentences) != len(frames):
            raise row.error("timestamps", f"{len(frames)} for {len(sentences)} sentences")
        for number, (sentence, (start, end)) in enumerate(zip(sentences, frames, strict=True)):
            yield Sample(
                id=f"{path.stem}:{video}_{number}",
                video=video,
                question=" ".join(sentence.split()),
                options=(),
                answer=None,
                evidence=((start / fps, end / fps),),
                duration=row.number("num_frames") / fps if row.has("fps") else row.number("duration"),
            )


def read_ego4d_nlq(path: Path, report: Report) -> Iterator[Sample]:
    """Ego4D-NLQ: the official JSON of videos, clips and annotations, or JSON lines like QVHighlights'.

    The video is the clip and times count from its start. Queries that are absent, null or empty are dropped. They are
    questions without options: a prompt asks them as such (LongVTG-R1, Appendix C), not as events.
    """
    asked = {"wording": "question"}
    if path.suffix == ".jsonl":
        for sample in read_qvhighlights(path, report):
            yield replace(sample, meta=asked)
        return
    top = Row(path, "top level", read_object(path))
    for video in top.get("videos", list):
        for clip_object in as_row(path, "videos", video).get("clips", list):
            clip = as_row(path, "clips", clip_object)
            clip_id = clip.text("clip_uid")
            start, end = (as_float(clip.get(f"clip_{which}_sec", int, float)) for which in ("start", "end"))
            for annotation_object in clip.get("annotations", list):
                annotation = as_row(path, f"clip {clip_id}", annotation_object)
                for number, query in enumerate(annotation.get("language_queries", list)):
                    id = f"{clip_id}_{annotation.text('annotation_uid')}_{number}"
                    row = as_row(path, f"query {id}", query)
                    if not row.fields.get("query"):
                        report.drop(row.where, "empty question")
                        continue
                    labelled = row.has("clip_end_sec")  # the test file has no times
                    ends = [row.get(f"clip_{end}_sec", int, float) for end in ("start", "end")] if labelled else []
                    yield Sample(
                        id=id,
                        video=clip_id,
                        question=row.text("query"),
                        options=(),
                        answer=None,
                        evidence=(row.span("clip_start_sec", ends, report),) if labelled else (),
                        duration=end - start,
                        kind=row.text("template") if row.has("template") else "",
                        meta=asked,
                    )


# ---------------------------------------------------------------- long videos: options, mostly without evidence


def read_videomme(path: Path, report: Report) -> Iterator[Sample]:
    """Video-MME as a JSON list; its `duration` is a class (short, medium, long), so seconds are unknown."""
    for row in read_rows(path):
        options = read_options(row, "options")
        yield Sample(
            id=row.text("question_id"),
            video=row.text("videoID"),
            question=row.text("question"),
            options=options,
            answer=read_letter(row, "answer", options),
            evidence=(),
            duration=None,
            kind=row.text("task_type"),
            meta={"length": row.text("duration")},
        )


def read_mlvu(path: Path, report: Report) -> Iterator[Sample]:
    """MLVU: one task's JSON list, or the folder of all of them; videos are in a folder named like the task's file.

    The two tasks without candidates (free text) have no options; their answer is the reference.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no .json files in this folder")
    for file in files:
        for number, row in enumerate(read_rows(file), start=1):
            options = read_options(row, "candidates") if row.has("candidates") else ()
            answer = row.text("answer") if row.has("answer") else None
            letter = letter_of_text(answer, options) if answer is not None else None
            if options and answer is not None and letter is None:
                report.drop(f"{file.name}, {row.where}", NOT_AN_OPTION, answer)
                continue
            yield Sample(
                id=str(row.get("question_id", str, int)) if row.has("question_id") else f"{file.stem}:{number}",
                video=f"{file.stem}/{row.text('video')}",
                question=row.text("question"),
                options=options,
                answer=letter,
                evidence=(),
                duration=row.number("duration"),
                kind=row.text("question_type"),
                meta={} if options or answer is None else {"reference": answer},
            )


def read_lvbench(path: Path, report: Report) -> Iterator[Sample]:
    """LVBench: the original JSON lines (one video each, options inside the question) or the cleaned JSON list.

    `time_reference` is "MM:SS-MM:SS" with minutes above 99; anything else (an open end, none) is no evidence. Many are
    a single second ("00:52-00:52"), a span of zero length: an IoU with them says nothing.
    A question of several types has them all in `kind`, joined by KIND_SEPARATOR.
    """
    for number, row in enumerate(read_rows(path), start=1):
        if not row.has("qa"):
            options = read_options(row, "candidates")
            answer = letter_of_answer(row.text("answer"), options)
            if answer is None:
                report.drop(row.where, NOT_AN_OPTION, row.text("answer"))
                continue
            yield lvbench_sample(
                row,
                report,
                id=f"{path.stem}:{number}",
                video=row.text("video"),
                question=row.text("question"),
                options=options,
                answer=answer,
            )
            continue
        for question_object in row.get("qa", list):
            qa = as_row(path, row.where, question_object)
            question, *options = re.split(r"\n(?=\([A-H]\))", qa.text("question"))
            options = strip_letters(options)
            answer = read_letter(qa, "answer", options)
            uid = str(qa.get("uid", str, int))
            video = row.text("key")
            yield lvbench_sample(qa, report, id=uid, video=video, question=question, options=options, answer=answer)


def lvbench_sample(
    row: Row, report: Report, *, id: str, video: str, question: str, options: tuple[str, ...], answer: str
) -> Sample:
    reference = row.get("time_reference", str, type(None))
    clock = re.fullmatch(r"(\d+(?::\d\d)+)-(\d+(?::\d\d)+)", reference or "")
    evidence = ()
    if clock:
        evidence = (row.span("time_reference", [clock_seconds(clock[1]), clock_seconds(clock[2])], report),)
    else:
        report.notes["questions without evidence"] += 1
    return Sample(
        id=id,
        video=video,
        question=question,
        options=options,
        answer=answer,
        evidence=evidence,
        duration=None,
        kind=KIND_SEPARATOR.join(row.texts("question_type")),
    )


def clock_seconds(text: str) -> float:
    """Seconds of "MM:SS" or "H:MM:SS"; the first part may be any number."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def read_longvideobench(path: Path, report: Report) -> Iterator[Sample]:
    """LongVideoBench: `lvb_val.json`, or a JSON list with `option0`..`option4` in which "N/A" means no option.

    `correct_choice` counts from 0 and is absent in the test split. `position` gives frames of a video whose frame
    rate the file does not tell, so there is no evidence.
    """
    for row in read_rows(path):
        if row.has("candidates"):
            options = read_options(row, "candidates")
        else:
            options = tuple(row.text(f"option{i}") for i in range(5) if row.text(f"option{i}") != "N/A")
        choice = row.get("correct_choice", int) if row.has("correct_choice") else None
        if choice is not None and not 0 <= choice < len(options):
            raise row.error("correct_choice", f"expected 0 to {len(options) - 1}, got {choice}")
        yield Sample(
            id=row.text("id"),
            video=row.text("video_path"),
            question=row.text("question"),
            options=options,
            answer=None if choice is None else LETTERS[choice],
            evidence=(),
            duration=row.number("duration"),
            kind=row.text("question_category"),
            meta={"length": str(row.get("duration_group", int))},
        )


def read_plm_video(path: Path, report: Report) -> Iterator[Sample]:
    """PLM-VideoBench: rtloc (a caption to find, frame numbers) and fgqa (two options; counts only with its group).

    Seconds are frame / PLM_FPS; an IoU does not depend on that number. The times in fgqa's metadata belong to the
    video from which the clip was cut, so it has no evidence.
    """
    for row in read_rows(path):
        if row.has("start_frame"):
            frames = [row.get(name, int) for name in ("start_frame", "end_frame")]
            yield Sample(
                id=str(row.get("uid", int, str)),
                video=row.text("video"),
                question=row.text("caption"),
                options=(),
                answer=None,
                evidence=(row.span("start_frame", [as_float(frame) / PLM_FPS for frame in frames], report),),
                duration=row.number("total_frames") / PLM_FPS,
            )
            continue
        named = row.get("options", dict)
        options = tuple(Row(path, f"{row.where}, options", named).text(f"option_{i}") for i in range(len(named)))
        answer = letter_of_text(row.text("answer"), options)
        if answer is None:
            report.drop(row.where, NOT_AN_OPTION, row.text("answer"))
            continue
        about = Row(path, f"{row.where}, metadata", row.get("metadata", dict) if row.has("metadata") else {})
        yield Sample(
            id=row.text("uid"),
            video=row.text("video"),
            question=row.text("question"),
            options=options,
            answer=answer,
            evidence=(),
            duration=None,
            kind=about.text("question_type") if about.has("question_type") else "",
            meta={"group": row.text("qa_uid" if row.has("qa_uid") else "qa_id")},
        )


# ---------------------------------------------------------------- what others train on


def read_time_r1(path: Path, report: Report) -> Iterator[Sample]:
    """Time-R1: `train_2k5.json` (a sentence, a timestamp) or `tvgbench.json` (a question, an answer "start-end").

    Rows of a part of a video ("video_start" or "start" and its end) count times from the part's beginning: here they
    count from the file's, whose duration is then unknown.
    """
    for number, row in enumerate(read_rows(path), start=1):
        bench = not row.has("sentence")
        if bench:
            numbers = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", row.text("answer"))
            if not numbers:
                raise row.error("answer", f"expected 'start-end', got {short(row.fields['answer'])}")
            start, end = row.span("answer", [float(numbers[1]), float(numbers[2])], report)
        else:
            start, end = row.span("timestamp", row.get("timestamp", list), report)
        part = row.fields.get("start" if bench else "video_start")
        if part is not None:
            part, _ = row.span("start" if bench else "video_start", [part, part], report)
            report.notes["parts of a video, with times of the whole file"] += 1
        kind = row.fields.get("qsemtype") if bench else None
        yield Sample(
            id=row.text("qid") if row.has("qid") else f"{path.stem}:{number}",
            video=row.text("path" if bench else "video"),
            question=row.text("question" if bench else "sentence"),
            options=(),
            answer=None,
            evidence=((start + (part or 0), end + (part or 0)),),
            duration=row.number("duration") if part is None else None,
            kind=kind if isinstance(kind, str) else "",
        )


def read_timelens(path: Path, report: Report) -> Iterator[Sample]:
    """TimeLens-Bench (`{video: {duration, spans, queries}}`, a span per query) or TimeLens-100K (lines with events)."""
    if path.suffix == ".jsonl":
        for number, row in enumerate(read_rows(path), start=1):
            for n, value in enumerate(row.get("events", list)):
                event = as_row(path, f"{row.where}, events[{n}]", value)
                pairs = event.get("span", list)
                several = bool(pairs) and isinstance(pairs[0], list)
                evidence = event.spans("span", report) if several else (event.span("span", pairs, report),)
                duration = row.number("duration") if row.has("duration") else None
                kind = row.text("source") if row.has("source") else ""
                yield grounding(f"{path.stem}:{number}_{n}", row.text("video_path"), event, evidence, duration, kind)
        return
    for video, entry in read_object(path).items():
        row = as_row(path, f"video {video}", entry)
        queries, spans = row.texts("queries"), row.spans("spans", report)
        if len(queries) != len(spans):
            raise row.error("spans", f"{len(spans)} for {len(queries)} queries")
        for n, (query, span) in enumerate(zip(queries, spans, strict=True)):
            event = Row(path, row.where, {"query": query})
            yield grounding(f"{path.stem}:{video}_{n}", video, event, (span,), row.number("duration"), "")


def grounding(
    id: str, video: str, event: Row, evidence: tuple[tuple[float, float], ...], duration: float | None, kind: str
) -> Sample:
    """A sentence to find: the field "query", its spaces made single."""
    question = " ".join(event.text("query").split())
    return Sample(id, video, question, (), None, evidence, duration, kind)


def read_video_r1(path: Path, report: Report) -> Iterator[Sample]:
    """Video-R1: `Video-R1-260k.json`, its rows with a video. A solution that is no option's letter is the reference."""
    for number, row in enumerate(read_rows(path), start=1):
        if row.text("data_type") != "video":
            report.left_out["not about a video"] += 1
            continue
        options = read_options(row, "options") if row.fields.get("options") else ()
        solution = row.text("solution")
        letter = letter_of_answer(solution, options) if options else None
        if options and letter is None:
            report.drop(row.where, NOT_AN_OPTION, solution)
            continue
        inner = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", solution, re.DOTALL)
        yield Sample(
            id=f"{path.stem}:{number}",
            video=row.text("path"),
            question=row.text("problem"),
            options=options,
            answer=letter,
            evidence=(),
            duration=None,
            kind=row.text("problem_type"),
            meta={} if options else {"reference": inner[1].strip() if inner else solution},
        )


def read_videochat_r1(path: Path, report: Report) -> Iterator[Sample]:
    """VideoChat-R1: records that leave out what they have not: "options", "answer", "glue" or "duration"."""
    yield from read_records(path, report, others=True)


def read_easy_r1(path: Path, report: Report) -> Iterator[Sample]:
    """EasyR1: "problem" with `<video>` in it, "answer" and "videos", which has one.

    Options are in the field "options" or are the problem's lines "A. ...", "B. ...". Without any, an answer "3.5 to
    7.25" is the evidence, and any other the reference.
    """
    for number, row in enumerate(read_rows(path), start=1):
        videos = row.get("videos", list) if row.has("videos") else []
        if not videos:
            report.left_out["not about a video"] += 1
            continue
        if len(videos) > 1:
            raise row.error("videos", f"expected one video, got {len(videos)}")
        entry = videos[0] if isinstance(videos[0], dict) else {"video": videos[0]}
        question, options = split_options(row.text("problem").replace("<video>", "").strip())
        if row.fields.get("options"):
            options = read_options(row, "options")
        answer = row.text("answer")
        letter = letter_of_answer(answer, options) if options else None
        if options and letter is None:
            report.drop(row.where, NOT_AN_OPTION, answer)
            continue
        times = None if options else TIMES.fullmatch(answer)
        evidence = (row.span("answer", [float(times[1]), float(times[2])], report),) if times else ()
        yield Sample(
            id=f"{path.stem}:{number}",
            video=Row(path, f"{row.where}, videos", entry).text("video"),
            question=question,
            options=options,
            answer=letter,
            evidence=evidence,
            duration=None,
            kind=row.text("problem_type") if row.has("problem_type") else "",
            meta={} if options or times else {"reference": answer},
        )


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A problem without its lines "A. ...", "B. ...", and these without their letters; all of it and () without any."""
    lines = text.split("\n")
    for first in range(len(lines)):
        last = first
        while last < len(lines) and last - first < len(LETTERS):
            letter = LETTERS[last - first]
            if not re.match(rf"\s*(\({letter}\)|{letter}[.):])\s*\S", lines[last]):
                break
            last += 1
        if last - first >= 2:
            rest = "\n".join([*lines[:first], *lines[last:]])
            return rest.strip(), strip_letters(lines[first:last])
    return text, ()


# ---------------------------------------------------------------- the formats


class Format(NamedTuple):
    """How a format is read, and the fields by which a row of it is known, of which one group is enough."""

    read: Callable[[Path, Report], Iterator[Sample]]
    fields: tuple[tuple[str, ...], ...]


FORMATS = {
    "records": Format(read_records, (("video", "question", "options", "answer", "glue", "duration"),)),
    "nextgqa": Format(read_nextgqa, (("video_id", "frame_count", "a0"),)),
    "rextime": Format(read_rextime, (("vid", "relevant_windows", "ans"), ("vid", "span", "ans"))),
    "cgbench": Format(read_cgbench, (("video_uid", "clue_intervals", "right_answer"),)),
    "qvhighlights": Format(read_qvhighlights, (("vid", "qid", "query"),)),
    "charades_sta": Format(read_charades_sta, (("video", "caption", "timestamp"),)),
    "activitynet": Format(read_captions, (("duration", "timestamps", "sentences"),)),
    "tacos": Format(read_captions, (("fps", "num_frames", "timestamps", "sentences"),)),
    "ego4d_nlq": Format(read_ego4d_nlq, (("version", "videos"),)),
    "videomme": Format(read_videomme, (("videoID", "question_id", "task_type"),)),
    "mlvu": Format(
        read_mlvu,
        (
            ("video", "question", "candidates", "question_type", "duration"),
            ("video", "question", "answer", "question_type", "duration"),
        ),
    ),
    "lvbench": Format(read_lvbench, (("key", "qa"), ("video", "candidates", "time_reference"))),
    "longvideobench": Format(read_longvideobench, (("video_path", "question_category", "duration_group"),)),
    "plm_video": Format(read_plm_video, (("start_frame", "total_frames"), ("uid", "qa_uid"), ("uid", "qa_id"))),
    "time_r1": Format(read_time_r1, (("video", "sentence", "timestamp"), ("path", "question", "answer", "start"))),
    "timelens": Format(read_timelens, (("duration", "spans", "queries"), ("video_path", "events"))),
    "video_r1": Format(read_video_r1, (("problem", "data_type", "solution", "path"),)),
    "videochat_r1": Format(read_videochat_r1, (("video", "question", "answer"), ("video", "question", "glue"))),
    "easy_r1": Format(read_easy_r1, (("problem", "answer", "videos"),)),
}


def looks_like(path: Path) -> str | None:
    """The format, or "dialogues", that the fields of a file's first row belong to; None if nothing is known of them."""
    fields = first_fields(path)
    if fields & {"messages", "conversations"}:
        return "dialogues"
    known = [(len(group), name) for name, format in FORMATS.items() for group in format.fields if fields >= set(group)]
    return max(known, key=lambda entry: entry[0])[1] if known else None


def first_fields(path: Path) -> set[str]:
    """The names of the fields of a file's first row: of a table, or of the first entry of an object of objects."""
    try:
        if path.suffix == ".csv":
            return set(next(read_csv(path)).fields)
        if path.suffix == ".txt":
            return set(next(charades_lines(path)).fields)
        fields = next(read_rows(path)).fields
    except (DataError, StopIteration):
        return set()
    first = next(iter(fields.values()), None)
    return {*fields, *(first if isinstance(first, dict) else ())}

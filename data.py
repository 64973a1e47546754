"""Samples: a question about a video, its answer, and where in time the evidence is.

`load` turns an annotation file into a list of `Sample`; one reader per published format, listed in `READERS`. `save`
writes our own JSON lines, the record format released with Zoom-Zero: a JSON list, or one JSON object per line, of

    {"video": "a.mp4", "question": "...", "options": ["...", ...], "answer": "(C)", "glue": [[3, 8]], "duration": 16}

with optional "id", "kind" and "meta". All six fields must be there: an absence is written out (`[]` for no options
or no evidence, `null` for no answer or an unknown duration).

Rules that hold for every format:

- Times are seconds. Spans stay as published, also where they start below 0, end after the video, overlap, are unsorted
  or have zero length, because the official scores count them so. Only a reversed span has its ends swapped.
  `clip_spans=True` cuts them to the video.
- Options lose their letter ("A. ", "(A) ", "A) ", "A: ") when every option of the question carries its own.
- The answer is a letter. Where the file gives the option's text, it is the first option with that text.
- A row with an empty question, or with an answer that is not among its options, is dropped and reported.
- A video without a known file suffix gets ".mp4".

`python data.py --format nextgqa --path test.csv --videos DIR` prints what is in a file and which videos are missing.
"""

import argparse
import ast
import csv
import json
import logging
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

LETTERS = "ABCDEFGH"
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts")
KIND_SEPARATOR = " + "  # between the types of a question that has several
PLM_FPS = 24  # frame numbers of PLM-Video count the frames of SA-V videos


class DataError(Exception):
    """An annotation file that cannot be used: the message names file, row and field."""


@dataclass(frozen=True)
class Sample:
    """One question about one video.

    `video` is a path or file name, `options` have no letters, `answer` is a letter "A".."H" or None, `spans` are the
    evidence in seconds (start <= end), `duration` is the video's in seconds or None where the file does not tell,
    `kind` is the question type. `meta` holds what only some formats have: "reference" (the answer to a question
    without options), "length" (Video-MME and LongVideoBench: the class of video length) and "group" (PLM-Video:
    questions that count only together).
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: str | None
    spans: tuple[tuple[float, float], ...]
    duration: float | None
    kind: str = ""
    meta: dict = field(default_factory=dict)


@dataclass
class Report:
    """What `load` did with a file: how many rows it kept, which it dropped and why, how often it applied a rule."""

    path: Path
    format: str
    kept: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (row, reason)
    notes: Counter = field(default_factory=Counter)  # what was seen: number of rows or spans
    remarks: list[str] = field(default_factory=list)  # files that would have told more

    def drop(self, row: str, reason: str) -> None:
        self.dropped.append((row, reason))


# ---------------------------------------------------------------- files and fields


@dataclass(frozen=True)
class Row:
    """A JSON object (or a csv row) of an annotation file, with the place it came from for error messages."""

    file: Path
    where: str
    fields: dict

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.file}: {self.where}, field '{name}': {problem}")

    def get(self, name: str, *types: type):
        """The field's value, which must be there and of one of the types (NoneType for null)."""
        if name not in self.fields:
            there = ", ".join(sorted(self.fields)[:12]) + (", ..." if len(self.fields) > 12 else "")
            raise self.error(name, f"is missing; there are {there}")
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, types):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise self.error(name, f"expected {expected}, got {value!r}")
        return value

    def text(self, name: str) -> str:
        return self.get(name, str)

    def texts(self, name: str) -> list[str]:
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.error(name, f"expected texts, got {values!r}")
        return values

    def options(self, name: str) -> tuple[str, ...]:
        """The field's texts without letters; at most eight, since the answer is a letter "A".."H"."""
        options = strip_letters(self.texts(name))
        if len(options) > len(LETTERS):
            raise self.error(name, f"at most {len(LETTERS)} options have letters, got {len(options)}")
        return options

    def letter(self, name: str, options: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in tuple(LETTERS[: len(options)] if options else LETTERS):
            raise self.error(name, f"expected the letter of one of {len(options)} options, got {value!r}")
        return value

    def number(self, name: str) -> float:
        """The field's value, positive and finite."""
        value = self.get(name, int, float)
        if not math.isfinite(value) or value <= 0:
            raise self.error(name, f"expected a positive number, got {value!r}")
        return float(value)

    def cell_number(self, name: str) -> float:
        """The number written in a csv cell, positive and finite."""
        text = self.text(name)
        if not re.fullmatch(r"\d+(\.\d+)?", text.strip()) or float(text) <= 0:
            raise self.error(name, f"expected a positive number, got {text!r}")
        return float(text)

    def span(self, name: str, pair: object, report: Report) -> tuple[float, float]:
        """A finite [start, end]; a reversed one is swapped."""
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(x) in (int, float) for x in pair)
        if not numbers or not all(math.isfinite(x) for x in pair):
            raise self.error(name, f"expected [start, end], got {pair!r}")
        if pair[0] > pair[1]:
            report.notes["reversed spans swapped"] += 1
        return float(min(pair)), float(max(pair))

    def spans(self, name: str, report: Report) -> tuple[tuple[float, float], ...]:
        return tuple(self.span(name, pair, report) for pair in self.get(name, list))


def read_text(path: Path) -> str:
    """The file's text; DataError if it is missing, empty or not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".parquet":
        raise DataError(f"{path}: parquet is not read; convert it to a JSON list of its rows")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text file ({error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def read_json(path: Path) -> object:
    """The file's JSON value."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error


def read_object(path: Path) -> dict:
    """The file's JSON object."""
    value = read_json(path)
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: expected a JSON object with entries, got {type(value).__name__}")
    return value


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON list (row = position from 1) or of JSON lines (row = line number)."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        objects = list(enumerate(read_json(path), start=1))
    else:
        objects = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    objects.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}: row {number}: not JSON: column {error.colno}: {error.msg}") from error
    if not objects:
        raise DataError(f"{path}: no rows")
    return [as_row(path, f"row {number}", value) for number, value in objects]


def as_row(path: Path, where: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {where}: expected a JSON object, got {type(value).__name__}")
    return Row(path, where, value)


def read_csv(path: Path) -> list[Row]:
    """The rows of a csv file with a header (row = position from 1, without the header)."""
    reader = csv.DictReader(read_text(path).splitlines())
    rows = [Row(path, f"row {number}", fields) for number, fields in enumerate(reader, start=1)]
    for row in rows:
        if None in row.fields or None in row.fields.values():
            raise DataError(f"{path}: {row.where}: expected {len(reader.fieldnames)} cells, got another number")
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def strip_letters(options: Iterable[str]) -> tuple[str, ...]:
    """Options without "A. ", "(A) ", "A) " or "A: ", removed only when every option starts with its own letter."""
    options = tuple(option.strip() for option in options)
    matches = [
        re.match(rf"(\({letter}\)|{letter}[.):])\s*", option) for letter, option in zip(LETTERS, options, strict=False)
    ]
    if len(matches) < len(options) or not all(matches):
        return options
    return tuple(option[match.end() :] for option, match in zip(options, matches, strict=True))


def letter_of_text(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of the first option equal to the text (surrounding space ignored), or None."""
    text = text.strip()
    return LETTERS[options.index(text)] if text in options else None


def letter_of_answer(text: str, options: tuple[str, ...]) -> str | None:
    """The letter meant by "(C)", "C", "C." or "(C) text", or else by an option's text; None if there is none.

    A letter wins over an option whose text is that letter.
    """
    match = re.fullmatch(r"(\([A-H]\)|[A-H][.):]?)\s*", text) or re.match(r"\([A-H]\)", text)
    if match:
        letter = match[0].strip("(.): ")
        if LETTERS.index(letter) < len(options) or not options:
            return letter
    return letter_of_text(text, options)


# ---------------------------------------------------------------- our own format


def read_records(path: Path, report: Report) -> Iterator[Sample]:
    """Our records, also as released with Zoom-Zero, where "glue" may be a text holding the list.

    Without an "id", the sample's id is the file's name and the row. Without options, an answer other than "(C)" is
    the free-text reference.
    """
    for number, row in enumerate(read_rows(path), start=1):
        options = row.options("options")
        given = row.get("answer", str, type(None))
        bare_text = given is not None and not options and not re.fullmatch(r"\([A-H]\)", given)
        answer = None if given is None or bare_text else letter_of_answer(given, options)
        if given is not None and not bare_text and answer is None:
            report.drop(row.where, "the answer is not among the options")
            continue
        meta = row.get("meta", dict) if "meta" in row.fields else {}
        yield Sample(
            id=str(row.get("id", str, int)) if "id" in row.fields else f"{path.stem}:{number}",
            video=row.text("video"),
            question=row.text("question"),
            options=options,
            answer=answer,
            spans=written_out(row, "glue").spans("glue", report),
            duration=None if row.fields.get("duration", "") is None else row.number("duration"),
            kind=row.text("kind") if "kind" in row.fields else "",
            meta={**meta, "reference": given} if bare_text else meta,
        )


def written_out(row: Row, name: str) -> Row:
    """The row with a list that is written as a text, "[[1, 2]]", turned into that list."""
    value = row.fields.get(name)
    if not isinstance(value, str):
        return row
    try:
        return replace(row, fields={**row.fields, name: ast.literal_eval(value)})
    except (ValueError, SyntaxError) as error:
        raise row.error(name, f"expected a list, got the text {value!r}") from error


def save(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSON lines of our record format, which `load` reads back unchanged."""
    lines = []
    for s in samples:
        record = {
            "id": s.id,
            "video": s.video,
            "question": s.question,
            "options": list(s.options),
            "answer": s.meta.get("reference") if s.answer is None else f"({s.answer})",
            "glue": [list(span) for span in s.spans],
            "duration": s.duration,
            "kind": s.kind,
        }
        meta = {key: value for key, value in s.meta.items() if key != "reference"}
        if meta:
            record["meta"] = meta
        lines.append(json.dumps(record, ensure_ascii=False))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    folders = read_object(folders_file) if folders_file.is_file() else {}
    if not folders:
        report.remarks.append(f"no {folders_file.name} beside it: videos are named without their folder")
    for row in read_csv(path):
        video, qid = row.text("video_id"), row.text("qid")
        options = tuple(row.text(f"a{i}").strip() for i in range(5))
        answer = letter_of_text(row.text("answer"), options)
        if answer is None:
            report.drop(row.where, "the answer is not among the options")
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
            video=folders.get(video, video),
            question=row.text("question"),
            options=options,
            answer=answer,
            spans=spans,
            duration=duration,
            kind="TN" if kind == "TP" else kind,
        )


def read_rextime(path: Path, report: Report) -> Iterator[Sample]:
    """ReXTime: the repository's JSON lines (letters, but no options) or the hosted JSON list (with options)."""
    for row in read_rows(path):
        hosted = "options" in row.fields
        options = row.options("options") if hosted else ()
        if hosted:
            spans = (row.span("span", row.get("span", list), report),)
        else:
            spans = row.spans("relevant_windows", report)
        yield Sample(
            id=row.text("qid"),
            video=row.text("vid"),
            question=row.text("question" if hosted else "query"),
            options=options,
            answer=row.letter("ans", options),
            spans=spans,
            duration=row.number("duration"),
            kind=row.text("category") if hosted else "",
        )


def read_cgbench(path: Path, report: Report) -> Iterator[Sample]:
    """CG-Bench: `cgbench_mini.json` or `cgbench.json`; the exact duration is in `video_meta_info.json` beside it."""
    exact_file = path.with_name("video_meta_info.json")
    exact = read_object(exact_file) if exact_file.is_file() else {}
    for row in read_rows(path):
        video = row.text("video_uid")
        options = row.options("choices")
        yield Sample(
            id=str(row.get("qid", int, str)),
            video=video,
            question=row.text("question"),
            options=options,
            answer=row.letter("right_answer", options),
            spans=row.spans("clue_intervals", report),
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
            spans=row.spans("relevant_windows", report) if "relevant_windows" in row.fields else (),
            duration=row.number("duration"),
        )


def read_charades_sta(path: Path, report: Report) -> Iterator[Sample]:
    """Charades-STA: the txt lines `ID start end##sentence`, or the JSON list of the same lines.

    The duration is the `length` in `Charades_v1_{test,train}.csv` beside it, or else in `charades.json`.
    """
    durations = charades_durations(path)
    if not durations:
        report.remarks.append("no Charades_v1_*.csv or charades.json beside it: durations are unknown")
    if path.suffix == ".json":
        triples = [
            (Path(r.text("video")).stem, r.get("timestamp", list), r.text("caption"), r) for r in read_rows(path)
        ]
    else:
        triples = [charades_line(path, n, line) for n, line in enumerate(read_text(path).splitlines(), start=1) if line]
    for number, (video, span, sentence, row) in enumerate(triples):
        yield Sample(
            id=f"{video}_{number}",
            video=video,
            question=sentence,
            options=(),
            answer=None,
            spans=(row.span("timestamp", span, report),),
            duration=durations.get(video),
        )


def charades_line(path: Path, number: int, line: str) -> tuple[str, list[float], str, Row]:
    match = re.fullmatch(r"(\S+) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)##(.*)", line)
    if not match:
        raise DataError(f"{path}: row {number}: expected 'ID start end##sentence', got {line!r}")
    return match[1], [float(match[2]), float(match[3])], match[4], Row(path, f"row {number}", {})


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
        fps = row.number("fps") if "fps" in row.fields else 1
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
                spans=((start / fps, end / fps),),
                duration=row.number("num_frames") / fps if "fps" in row.fields else row.number("duration"),
            )


def read_ego4d_nlq(path: Path, report: Report) -> Iterator[Sample]:
    """Ego4D-NLQ: the official JSON of videos, clips and annotations, or JSON lines like QVHighlights'.

    The video is the clip and times count from its start. Queries that are absent, null or empty are dropped.
    """
    if path.suffix == ".jsonl":
        yield from read_qvhighlights(path, report)
        return
    top = Row(path, "top level", read_object(path))
    for video in top.get("videos", list):
        for clip_object in as_row(path, "videos", video).get("clips", list):
            clip = as_row(path, "clips", clip_object)
            clip_id = clip.text("clip_uid")
            duration = clip.get("clip_end_sec", int, float) - clip.get("clip_start_sec", int, float)
            for annotation_object in clip.get("annotations", list):
                annotation = as_row(path, f"clip {clip_id}", annotation_object)
                for number, query in enumerate(annotation.get("language_queries", list)):
                    id = f"{clip_id}_{annotation.text('annotation_uid')}_{number}"
                    row = as_row(path, f"query {id}", query)
                    if not row.fields.get("query"):
                        report.drop(row.where, "empty question")
                        continue
                    labelled = "clip_end_sec" in row.fields  # the test file has no times
                    ends = [row.get(f"clip_{end}_sec", int, float) for end in ("start", "end")] if labelled else []
                    yield Sample(
                        id=id,
                        video=clip_id,
                        question=row.text("query"),
                        options=(),
                        answer=None,
                        spans=(row.span("clip_start_sec", ends, report),) if labelled else (),
                        duration=duration,
                        kind=row.fields.get("template") or "",
                    )


# ---------------------------------------------------------------- long videos: options, mostly without evidence


def read_videomme(path: Path, report: Report) -> Iterator[Sample]:
    """Video-MME as a JSON list; its `duration` is a class (short, medium, long), so seconds are unknown."""
    for row in read_rows(path):
        options = row.options("options")
        yield Sample(
            id=row.text("question_id"),
            video=row.text("videoID"),
            question=row.text("question"),
            options=options,
            answer=row.letter("answer", options),
            spans=(),
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
            options = row.options("candidates") if "candidates" in row.fields else ()
            given = row.text("answer") if "answer" in row.fields else None
            answer = letter_of_text(given, options) if given is not None else None
            if options and given is not None and answer is None:
                report.drop(f"{file.name}, {row.where}", "the answer is not among the options")
                continue
            yield Sample(
                id=str(row.fields.get("question_id", f"{file.stem}:{number}")),
                video=f"{file.stem}/{row.text('video')}",
                question=row.text("question"),
                options=options,
                answer=answer,
                spans=(),
                duration=row.number("duration"),
                kind=row.text("question_type"),
                meta={} if options or given is None else {"reference": given},
            )


def read_lvbench(path: Path, report: Report) -> Iterator[Sample]:
    """LVBench: the original JSON lines (one video each, options inside the question) or the cleaned JSON list.

    `time_reference` is "MM:SS-MM:SS" with minutes above 99; anything else (an open end, none) is no evidence. Many are
    a single second ("00:52-00:52"), a span of zero length: an IoU with them says nothing.
    A question of several types has them all in `kind`, joined by KIND_SEPARATOR.
    """
    for number, row in enumerate(read_rows(path), start=1):
        if "qa" not in row.fields:
            options = row.options("candidates")
            answer = letter_of_answer(row.text("answer"), options)
            if answer is None:
                report.drop(row.where, "the answer is not among the options")
                continue
            yield lvbench_sample(
                row, f"{path.stem}:{number}", row.text("video"), row.text("question"), options, answer, report
            )
            continue
        for question_object in row.get("qa", list):
            qa = as_row(path, row.where, question_object)
            question, *options = re.split(r"\n(?=\([A-H]\))", qa.text("question"))
            options = strip_letters(options)
            answer = qa.letter("answer", options)
            yield lvbench_sample(qa, str(qa.get("uid", str, int)), row.text("key"), question, options, answer, report)


def lvbench_sample(
    row: Row, id: str, video: str, question: str, options: tuple[str, ...], answer: str, report: Report
) -> Sample:
    reference = row.get("time_reference", str, type(None))
    clock = re.fullmatch(r"(\d+(?::\d\d)+)-(\d+(?::\d\d)+)", reference or "")
    if not clock:
        report.notes["questions without evidence"] += 1
    return Sample(
        id=id,
        video=video,
        question=question,
        options=options,
        answer=answer,
        spans=(row.span("time_reference", [clock_seconds(clock[1]), clock_seconds(clock[2])], report),)
        if clock
        else (),
        duration=None,
        kind=KIND_SEPARATOR.join(row.texts("question_type")),
    )


def clock_seconds(text: str) -> int:
    """Seconds of "MM:SS" or "H:MM:SS"; the first part may be any number."""
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


def read_longvideobench(path: Path, report: Report) -> Iterator[Sample]:
    """LongVideoBench: `lvb_val.json`, or a JSON list with `option0`..`option4` in which "N/A" means no option.

    `correct_choice` counts from 0 and is absent in the test split. `position` gives frames of a video whose frame
    rate the file does not tell, so there is no evidence.
    """
    for row in read_rows(path):
        if "candidates" in row.fields:
            options = row.options("candidates")
        else:
            options = tuple(row.text(f"option{i}") for i in range(5) if row.text(f"option{i}") != "N/A")
        choice = row.get("correct_choice", int) if "correct_choice" in row.fields else None
        if choice is not None and not 0 <= choice < len(options):
            raise row.error("correct_choice", f"expected 0 to {len(options) - 1}, got {choice}")
        yield Sample(
            id=row.text("id"),
            video=row.text("video_path"),
            question=row.text("question"),
            options=options,
            answer=None if choice is None else LETTERS[choice],
            spans=(),
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
        if "start_frame" in row.fields:
            frames = [row.get(name, int) for name in ("start_frame", "end_frame")]
            yield Sample(
                id=str(row.get("uid", int, str)),
                video=row.text("video"),
                question=row.text("caption"),
                options=(),
                answer=None,
                spans=(row.span("start_frame", [frame / PLM_FPS for frame in frames], report),),
                duration=row.number("total_frames") / PLM_FPS,
            )
            continue
        named = row.get("options", dict)
        options = tuple(Row(path, f"{row.where}, options", named).text(f"option_{i}") for i in range(len(named)))
        answer = letter_of_text(row.text("answer"), options)
        if answer is None:
            report.drop(row.where, "the answer is not among the options")
            continue
        yield Sample(
            id=row.text("uid"),
            video=row.text("video"),
            question=row.text("question"),
            options=options,
            answer=answer,
            spans=(),
            duration=None,
            kind=row.get("metadata", dict).get("question_type", "") if "metadata" in row.fields else "",
            meta={"group": row.text("qa_uid" if "qa_uid" in row.fields else "qa_id")},
        )


READERS = {
    "records": read_records,
    "nextgqa": read_nextgqa,
    "rextime": read_rextime,
    "cgbench": read_cgbench,
    "qvhighlights": read_qvhighlights,
    "charades_sta": read_charades_sta,
    "activitynet": read_captions,
    "tacos": read_captions,
    "ego4d_nlq": read_ego4d_nlq,
    "videomme": read_videomme,
    "mlvu": read_mlvu,
    "lvbench": read_lvbench,
    "longvideobench": read_longvideobench,
    "plm_video": read_plm_video,
}


# ---------------------------------------------------------------- loading


def load(
    path: str | Path, format: str = "records", video_root: str | Path | None = None, clip_spans: bool = False
) -> list[Sample]:
    """The samples of an annotation file; dropped rows are logged as a warning.

    `format` is a key of READERS. `video_root` is put before relative video paths. `clip_spans` cuts evidence to
    [0, duration] seconds. Raises DataError, naming file, row and field, for a file that cannot be used.
    """
    samples, report = load_with_report(path, format, video_root, clip_spans)
    if report.dropped:
        reasons = Counter(reason for _, reason in report.dropped)
        counts = ", ".join(f"{count} because {reason}" for reason, count in reasons.items())
        logging.getLogger(__name__).warning("%s: %d rows dropped: %s", path, len(report.dropped), counts)
    return samples


def load_with_report(
    path: str | Path, format: str = "records", video_root: str | Path | None = None, clip_spans: bool = False
) -> tuple[list[Sample], Report]:
    """Like `load`, but also returns the Report."""
    if format not in READERS:
        raise DataError(f"unknown format '{format}'; known: {', '.join(READERS)}")
    path = Path(path)
    report = Report(path, format)
    samples, seen = [], set()
    for sample in READERS[format](path, report):
        if not sample.question.strip():
            report.drop(sample.id, "empty question")
            continue
        if sample.id in seen:
            raise DataError(f"{path}: two rows have the id '{sample.id}'")
        seen.add(sample.id)
        note_spans(sample, report)
        spans = clipped(sample.spans, sample.duration) if clip_spans else sample.spans
        samples.append(replace(sample, video=video_path(sample.video, video_root), spans=spans))
    if not samples:
        raise DataError(f"{path}: none of the {len(report.dropped)} rows can be used: {report.dropped[:3]}")
    report.kept = len(samples)
    return samples, report


def note_spans(sample: Sample, report: Report) -> None:
    for start, end in sample.spans:
        report.notes["spans of zero length"] += start == end
        report.notes["spans that start below 0"] += start < 0
        report.notes["spans that end after the video"] += sample.duration is not None and end > sample.duration


def clipped(spans: tuple[tuple[float, float], ...], duration: float | None) -> tuple[tuple[float, float], ...]:
    """Spans cut to [0, duration]; an unknown duration cuts nothing at the end."""
    limit = math.inf if duration is None else duration
    return tuple((min(max(start, 0.0), limit), min(max(end, 0.0), limit)) for start, end in spans)


def video_path(video: str, root: str | Path | None) -> str:
    """The video's path: under the root if it is relative, with ".mp4" if it has no suffix.

    If that file is not there but the same name with another video suffix is, that one is taken.
    """
    if not video.lower().endswith(VIDEO_SUFFIXES):
        video += ".mp4"
    if root is None:
        return video
    path = Path(root) / video
    if not path.is_file():
        for suffix in VIDEO_SUFFIXES:
            if path.with_suffix(suffix).is_file():
                return str(path.with_suffix(suffix))
    return str(path)


def missing_videos(samples: Iterable[Sample]) -> list[str]:
    """The video files that do not exist, each once, in order."""
    return [video for video in dict.fromkeys(s.video for s in samples) if not Path(video).is_file()]


def check_videos(samples: list[Sample], skip_missing: bool = False) -> list[Sample]:
    """The samples whose video file exists; DataError if one is missing, unless `skip_missing`."""
    missing = missing_videos(samples)
    if missing and not skip_missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{len(missing)} video files are missing: {shown}; check the videos' folder, or --skip_missing")
    gone = set(missing)
    left = [s for s in samples if s.video not in gone]
    if not left:
        raise DataError(f"all {len(missing)} video files are missing, the first is {missing[0]}")
    return left


# ---------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class Entry:
    """A file of a mixture: where it is, how it is read, and how often each of its samples comes per epoch."""

    data: str
    format: str = "records"
    video_root: str = ""
    weight: float = 1.0


def read_mixture(path: str | Path) -> list[Entry]:
    """The files of a mixture, a YAML list of `{data, format, video_root, weight}`; all but `data` may be left out.

    Paths are relative to the current folder. Raises DataError naming file, entry and field.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: a mixture is a list of `- data: FILE` entries, not {type(values).__name__}")
    entries = []
    for number, value in enumerate(values, start=1):
        row = as_row(path, f"entry {number}", value)
        known = [f.name for f in fields(Entry)]
        for name in row.fields:
            if name not in known:
                raise row.error(name, f"is not known; there are {', '.join(known)}")
        given = {name: row.text(name) for name in ("data", "format", "video_root") if name in row.fields}
        if "format" in given and given["format"] not in READERS:
            raise row.error("format", f"{given['format']!r} is none of {', '.join(READERS)}")
        row.text("data")
        weight = row.number("weight") if "weight" in row.fields else 1.0
        entries.append(Entry(**given, weight=weight))
    return entries


# ---------------------------------------------------------------- summary


def summary(samples: list[Sample], report: Report) -> str:
    """A few lines on what is in a file: rows, answers, spans, durations, kinds, and the rules that were applied."""
    reasons = Counter(reason for _, reason in report.dropped)
    lengths = [end - start for s in samples for start, end in s.spans]
    durations = [s.duration for s in samples if s.duration is not None]
    lines = [
        f"{report.format}: {report.path}",
        f"rows kept           {report.kept}",
        f"rows dropped        {len(report.dropped)}",
        *(f"  {count} x {reason}: {first_rows(report, reason)}" for reason, count in reasons.items()),
        f"videos              {len({s.video for s in samples})}",
        f"with an answer      {sum(s.answer is not None for s in samples)}",
        f"options             {counts(len(s.options) for s in samples)}",
        f"spans per question  {counts(len(s.spans) for s in samples)}",
        f"span lengths, s     {spread(lengths)}",
        f"durations, s        {spread(durations)}, unknown {len(samples) - len(durations)}",
        f"kinds               {counts(s.kind or '-' for s in samples)}",
        *(f"{note}: {count}" for note, count in report.notes.items() if count),
        *report.remarks,
    ]
    return "\n".join(lines)


def first_rows(report: Report, reason: str) -> str:
    rows = [row for row, r in report.dropped if r == reason]
    return ", ".join(rows[:5]) + (", ..." if len(rows) > 5 else "")


def counts(values: Iterable) -> str:
    return ", ".join(f"{value}: {count}" for value, count in sorted(Counter(values).items()))


def spread(numbers: list[float]) -> str:
    if not numbers:
        return "none"
    return f"min {min(numbers):.1f}, median {statistics.median(numbers):.1f}, max {max(numbers):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Summary of an annotation file, and a check of its videos.")
    parser.add_argument("--format", default="records", choices=READERS, help="which reader")
    parser.add_argument("--path", required=True, help="the annotation file (mlvu: also a folder)")
    parser.add_argument("--videos", help="folder of the videos: list those that are missing")
    parser.add_argument("--skip_missing", action="store_true", help="go on without questions whose video is missing")
    parser.add_argument("--out", help="write the samples as JSON lines of our own format")
    args = parser.parse_args()
    try:
        samples, report = load_with_report(args.path, args.format, args.videos)
        print(summary(samples, report))
        if args.videos:
            missing = missing_videos(samples)
            print(f"videos missing      {len(missing)}", *missing, sep="\n  ")
            samples = check_videos(samples, args.skip_missing)
            print(f"questions left      {len(samples)}")
        if args.out:
            save(args.out, samples)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

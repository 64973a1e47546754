"""Rows of annotation files: what a file holds, read and checked field by field, and the `Sample` that a row becomes.

An error names the file, the row and the field. What is read how is in formats.py, answers are read in answers.py.

Files are read as a stream, so that a million rows need no more memory than what is kept of them. Rows come from

- JSON lines (row = line), a JSON list (row = position from 1), also one in the field "data" of an object, or JSON
  objects one after another over several lines;
- csv with a header (row = position without the header);
- parquet, if pyarrow is installed.
"""

from __future__ import annotations

import csv
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from prompts import control

MISSING_NAMED = 3  # videos that a report names
READ_CHARACTERS = 1 << 20  # characters of a JSON list that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
BRACKETS = str.maketrans("()", "[]")
# Lists in a YAML file that name each other can stand for more text than there is memory.
BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxlist, BRIEF.maxtuple, BRIEF.maxdict = 3, 20, 20, 20
BRIEF.maxstring = BRIEF.maxlong = BRIEF.maxother = 1000


class DataError(Exception):
    """An annotation file that cannot be used: the message names file, row and field."""


@dataclass(slots=True)  # a frozen one takes several times as long to make
class Sample:
    """One question about one video. Nothing changes it after it was read.

    `video` is a path or file name, `options` have no letters, `answer` is a letter "A".."Z" or None, `evidence` are
    spans in seconds (start <= end), `duration` is the video's in seconds or None where the file does not tell,
    `kind` is the question type. `meta` holds what only some formats have: "reference" (the answer to a question
    without options), "length" (Video-MME and LongVideoBench: the class of video length), "group" (PLM-Video: questions
    that count only together) and "wording" ("question" where one without options is not an event to be found).
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: str | None
    evidence: tuple[tuple[float, float], ...]
    duration: float | None
    kind: str = ""
    meta: dict = field(default_factory=dict)


class Dropped(NamedTuple):
    """A row that cannot be used, or only in part: where it is, why, and the value that is wrong."""

    row: str
    reason: str
    value: str = ""


@dataclass
class Report:
    """What was done with a file: how many rows it kept, which it dropped and why, how often it applied a rule."""

    path: Path
    format: str
    kept: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)  # rows that are no questions about videos: number by reason
    notes: Counter = field(default_factory=Counter)  # what was seen: number of rows or spans
    remarks: list[str] = field(default_factory=list)  # files that would have told more
    with_evidence: int = 0
    out_of_reach: list[Dropped] = field(default_factory=list)  # samples with evidence that no span can hit
    missing: int = 0  # samples whose video is not there
    missing_videos: list[str] = field(default_factory=list)  # the first of these

    def drop(self, row: str, reason: str, value: object = "") -> None:
        self.dropped.append(Dropped(row, reason, str(value)[:60]))

    def add(self, later: Report) -> None:
        """Count in what was done with a later part of the file."""
        for name in ("kept", "dropped", "left_out", "notes", "remarks", "with_evidence", "out_of_reach", "missing"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.missing_videos = list(dict.fromkeys(self.missing_videos + later.missing_videos))[:MISSING_NAMED]


def by_reason(dropped: list[Dropped]) -> list[str]:
    """A line for each reason: how many rows, the first three of them and their values."""
    lines = []
    for reason, count in Counter(entry.reason for entry in dropped).items():
        first = [entry for entry in dropped if entry.reason == reason][:3]
        rows = ", ".join(entry.row + (f" {entry.value!r}" if entry.value else "") for entry in first)
        lines.append(f"{count} x {reason}: {rows}" + (", ..." if count > len(first) else ""))
    return lines


# ---------------------------------------------------------------- fields


@dataclass(slots=True)
class Row:
    """A JSON object (or a csv row) of an annotation file, with the place it came from for error messages."""

    file: Path
    where: str
    fields: dict

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.file}: {self.where}, field '{name}': {problem}")

    def get(self, name: str, *types: type):
        """The field's value, which must be there and of one of the types (NoneType for null)."""
        value = self.fields.get(name)
        if value is None and name not in self.fields:
            there = ", ".join(sorted(self.fields)[:12]) + (", ..." if len(self.fields) > 12 else "")
            raise self.error(name, f"is missing; there are {there}")
        if isinstance(value, bool) or not isinstance(value, types):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise self.error(name, f"expected {expected}, got {short(value)}")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null, as parquet writes what is absent."""
        return self.fields.get(name) is not None

    def text(self, name: str) -> str:
        """The field's text, which has no special token."""
        value = self.get(name, str)
        if found := control(value):
            raise self.error(name, f"{found}; remove it")
        return value

    def texts(self, name: str) -> list[str]:
        values = self.get(name, list)
        for value in values:
            if not isinstance(value, str):
                raise self.error(name, f"expected texts, got {short(values)}")
            if found := control(value):
                raise self.error(name, f"{found}; remove it")
        return values

    def number(self, name: str) -> float:
        """The field's value, positive and finite."""
        value = as_float(self.get(name, int, float))
        if not math.isfinite(value) or value <= 0:
            raise self.error(name, f"expected a positive number, got {short(self.fields[name])}")
        return value

    def cell_number(self, name: str) -> float:
        """The number written in a csv cell, positive and finite."""
        text = self.text(name)
        if not re.fullmatch(r"\d{1,300}(\.\d+)?", text.strip()) or float(text) <= 0:
            raise self.error(name, f"expected a positive number, got {short(text)}")
        return float(text)

    def span(self, name: str, pair: object, report: Report) -> tuple[float, float]:
        """A finite [start, end]; a reversed one is swapped."""
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(x) in (int, float) for x in pair)
        start, end = (as_float(x) for x in pair) if numbers else (math.nan, math.nan)
        if not math.isfinite(start - end):
            raise self.error(name, f"expected [start, end], got {short(pair)}")
        if start > end:
            report.notes["reversed spans swapped"] += 1
            return end, start
        return start, end

    def spans(self, name: str, report: Report) -> tuple[tuple[float, float], ...]:
        """The field's list of spans, which may be written as a text, "[[1, 2], (3, 4)]"."""
        value = self.get(name, list, str)
        if isinstance(value, str):
            try:
                value = json.loads(re.sub(r",\s*(?=[\])])", "", value.translate(BRACKETS)))
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, list):
                raise self.error(name, f"expected a list of [start, end], got {short(self.fields[name])}")
        return tuple([self.span(name, pair, report) for pair in value])


def as_float(number: int | float) -> float:
    """A number of any size, infinite where a float is too small for it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def short(value: object) -> str:
    """A value for an error message, cut to 80 characters."""
    try:
        text = BRIEF.repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of more digits than Python prints
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- files


RECORDS = 'JSON lines of {"video", "question", "options", "answer": "(C)", "glue": [[start, end], ...], "duration"}'
# Files that recipes name and that nobody has before they are made or fetched.
MADE = {
    "zoom_zero_stage1.jsonl": f"Zoom-Zero's authors publish its 15,303 questions, {RECORDS}",
    "zoom_zero_stage2.jsonl": "filters.py makes it of Stage I's; the commands are in recipes/zoom_zero_stage2.yaml",
    "longvtg_r1.yaml": "a mixture that you write, a list of {data, format, video_root, weight} (docs/longvtg_r1.md)",
    "videozoomer_rl.jsonl": f"questions with options, {RECORDS}",
    "videozoomer_sft.jsonl": "exemplars.py makes its trajectories; the commands are in docs/videozoomer.md",
    "spans.jsonl": "dialogues that claim their evidence, which you write; a row is in recipes/spans_sft.yaml",
}


def whence(path: Path) -> str:
    """Where a file comes from that a recipe names as data/NAME, and which format it has, for a message."""
    made = MADE.get(path.name) if path.parent.name == "data" else None
    return f"; {made}. --train_data names another file, in any format of docs/data.md" if made else ""


@contextmanager
def open_text(path: Path, newline: str | None = "\n") -> Iterator[TextIO]:
    """A UTF-8 text file. Raises DataError if it is missing, unreadable or something else."""
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file' + whence(path)}")
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The file's text; DataError if it is missing, empty or not UTF-8."""
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def read_json(path: Path) -> object:
    """The file's JSON value."""
    return parse_json(read_text(path), f"{path}: ")


def parse_json(text: str, place: str) -> object:
    """The text's JSON value; `place` begins the message of the DataError if it has none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place}{unreadable(error)}") from None


def unreadable(error: RecursionError | ValueError) -> str:
    """Why JSON without a mistake cannot be read."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deep"
    return f"not JSON that can be read: {str(error).partition(';')[0]}"  # a number of thousands of digits


def read_object(path: Path) -> dict:
    """The file's JSON object."""
    value = read_json(path)
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: expected a JSON object with entries, got {type(value).__name__}")
    return value


def read_values(path: Path) -> Iterator[tuple[int, object]]:
    """The values of a JSON or parquet file with their row, in order. Raises DataError, also for a file without rows."""
    number = 0
    for number, value in parquet_values(path) if path.suffix == ".parquet" else json_values(path):
        yield number, value
    if not number:
        raise DataError(f"{path}: no rows")


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON or parquet file, in order. Raises DataError, also for a file without rows."""
    for number, value in read_values(path):
        yield as_row(path, f"row {number}", value)


def as_row(path: Path, where: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {where}: expected a JSON object, got {type(value).__name__}")
    return Row(path, where, value)


def json_values(path: Path) -> Iterator[tuple[int, object]]:
    """The values of a JSON list or of JSON lines, with their row."""
    with open_text(path) as file:
        head = file.read(READ_CHARACTERS)
        while head.isspace() and (more := file.read(READ_CHARACTERS)):
            head += more
        if not head.strip():
            raise DataError(f"{path}: the file is empty")
        if head.lstrip()[0] == "[":
            yield from list_values(path, head, file)
        else:
            file.seek(0)
            yield from line_values(path, file)


def line_values(
    path: Path, file: TextIO | Iterable[str], start: int = 1, whole: bool = True
) -> Iterator[tuple[int, object]]:
    """The values of JSON lines, with the number of their line; that of the first is `start`.

    `whole`: it is the whole file. If its first line alone is no JSON value, it is read as values one after another.
    """
    first = whole
    for number, line in enumerate(file, start):
        if line.isspace():
            continue
        try:
            value, end = DECODER.raw_decode(line) if line[0] == "{" else (None, 0)
            if line[end:] not in ("\n", "\r\n"):  # blanks around the value, or a mistake
                value = DECODER.decode(line)
        except json.JSONDecodeError as error:
            if not first or line[error.pos :].strip():  # the mistake is in the line
                raise DataError(f"{path}: row {number}: not JSON: column {error.colno}: {error.msg}") from error
            yield from stacked_values(path, line + file.read())
            return
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}: row {number}: {unreadable(error)}") from None
        if first and is_table(value):
            yield from enumerate(value["data"], start=1)
        else:
            yield number, value
        first = False


def stacked_values(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """JSON values one after another, each over several lines, with their position from 1."""
    at, number = SPACE.match(text).end(), 0
    while at < len(text):
        try:
            value, end = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: row {number + 1}: not JSON: line {error.lineno}: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}: row {number + 1}: {unreadable(error)}") from None
        for entry in value["data"] if is_table(value) else [value]:
            number += 1
            yield number, entry
        at = SPACE.match(text, end).end()


def is_table(value: object) -> bool:
    """Whether an object holds the rows in its field "data"."""
    return isinstance(value, dict) and isinstance(value.get("data"), list)


def list_values(path: Path, text: str, file: TextIO) -> Iterator[tuple[int, object]]:
    """The entries of a JSON list with their position from 1; `text` is the beginning, `file` the rest."""
    lines, at, number = 0, text.index("[") + 1, 0  # lines before `text`, the place in it, entries so far
    last = SPACE.match(text, at).end() < len(text) and text[SPACE.match(text, at).end()] == "]"
    while not last:
        try:
            value, after, last = list_entry(text, at)
        except json.JSONDecodeError as error:
            if more := file.read(max(READ_CHARACTERS, len(text) - at)):
                lines += text.count("\n", 0, at)
                text, at = text[at:] + more, 0
                continue
            lines += text.count("\n", 0, error.pos) + 1
            raise DataError(f"{path}: not JSON: line {lines}, row {number + 1}: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}: row {number + 1}: {unreadable(error)}") from None
        number, at = number + 1, after
        yield number, value
    rest = (text[at:] if number else text[at:].lstrip().removeprefix("]")) + file.read()
    if rest.strip():
        raise DataError(f"{path}: not JSON: after the list's end comes {short(rest.strip())}")


def list_entry(text: str, at: int) -> tuple[object, int, bool]:
    """The value at a place in a list, the place after its comma or bracket, and whether it was the last."""
    value, end = DECODER.raw_decode(text, SPACE.match(text, at).end())
    end = SPACE.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return value, end + 1, text[end] == "]"


def parquet_values(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a parquet file, with their position from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: needs pyarrow: pip install pyarrow, or convert it to a JSON list of its rows"
        ) from None
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file' + whence(path)}")
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a csv file with a header, in order."""
    number = 0
    with open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(f"{path}: row {number}: expected {len(header)} cells, got {len(cells)}")
                yield Row(path, f"row {number}", dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path}: row {number + 1}: {error}; is a quotation mark left open?") from error
    if number == 0:
        raise DataError(f"{path}: no rows")

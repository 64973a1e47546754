"""Rows of annotation files: what a file holds, read and checked field by field, and the `Sample` that a row becomes.

An error names the file, the row and the field. What is read how is in formats.py.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LETTERS = "ABCDEFGH"


class DataError(Exception):
    """An annotation file that cannot be used: the message names file, row and field."""


@dataclass(frozen=True)
class Sample:
    """One question about one video.

    `video` is a path or file name, `options` have no letters, `answer` is a letter "A".."H" or None, `evidence` are
    spans in seconds (start <= end), `duration` is the video's in seconds or None where the file does not tell,
    `kind` is the question type. `meta` holds what only some formats have: "reference" (the answer to a question
    without options), "length" (Video-MME and LongVideoBench: the class of video length) and "group" (PLM-Video:
    questions that count only together).
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


@dataclass
class Report:
    """What was done with a file: how many rows it kept, which it dropped and why, how often it applied a rule."""

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

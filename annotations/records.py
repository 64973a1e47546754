"""Our own format, and what its reader shares with others: options, letters.

It is the record released with Zoom-Zero: a JSON list, or one JSON object per line, of

    {"video": "a.mp4", "question": "...", "options": ["...", ...], "answer": "(C)", "glue": [[3, 8]], "duration": 16}

with optional "id", "kind" and "meta". A video and a question are all that is needed to ask. The other fields may be
missing, or empty (`[]`, `null`), where a row has none but these: with a field that is not ours, a row is of another
format, or a name is misspelled, and what is missing is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from annotations.answers import letter_of_answer, strip_letters
from annotations.rows import Report, Row, Sample, as_row, read_values, short
from prompts import LETTERS, control, half_character

RECORD_FIELDS = itemgetter("id", "video", "question", "options", "answer", "glue", "duration")
# A usual record: its id, video, question, options "(A) ...", answer "(A)", spans, seconds and kind, as they were read.
Usual = tuple[str, str, str, list[str], str, list[list[float]], float | None, str]
MARKED = {f"({letter})": place for place, letter in enumerate(LETTERS)}  # in order
NUMBERS = (int, float)
EXACT = 2**53  # up to here, whole numbers are floats, too
ABSENT = {"options": [], "answer": None, "glue": [], "duration": None}  # what a field that is not there stands for
OURS = {"id", "video", "question", "kind", "meta", *ABSENT}
NOT_AN_OPTION = "the answer is not among the options"


def read_records(
    path: Path, report: Report, others: bool = False, values: Iterable[tuple[int, object]] | None = None
) -> Iterator[Sample | Usual]:
    """Our records, also as released with Zoom-Zero, where "glue" may be a text holding the list.

    Without an "id", the sample's id is the file's name and the row. Without options, an answer other than "(C)" is
    the free-text reference. `others`: fields that are not ours may be there, too. A usual record comes as its fields.
    `values`: those of a part of the file, with their rows; all must have an "id".
    """
    for number, (place, value) in enumerate(read_values(path) if values is None else values, start=1):
        if usual := usual_record(value):
            yield usual
            continue
        row = as_row(path, f"row {place}", value)
        if others or row.fields.keys() <= OURS:
            row = Row(row.file, row.where, ABSENT | row.fields)
        video, question = row.text("video"), row.text("question")  # first: without them a row is none of ours
        options = read_options(row, "options")
        answer = row.get("answer", str, type(None))
        reference = answer is not None and not options and not re.fullmatch(r"\([A-Z]\)", answer)
        letter = None if answer is None or reference else letter_of_answer(answer, options)
        if answer is not None and not reference and letter is None:
            report.drop(row.where, NOT_AN_OPTION, answer)
            continue
        meta = row.get("meta", dict) if row.has("meta") else {}
        if found := half_character(json.dumps(meta, ensure_ascii=False)):
            raise row.error("meta", f"{found}; remove it")
        yield Sample(
            id=str(row.get("id", str, int)) if "id" in row.fields or values is not None else f"{path.stem}:{number}",
            video=video,
            question=question,
            options=options,
            answer=letter,
            evidence=row.spans("glue", report),
            duration=None if row.fields.get("duration", "") is None else row.number("duration"),
            kind=row.text("kind") if row.has("kind") else "",
            meta={**meta, "reference": row.text("answer")} if reference else meta,
        )


def usual_record(fields: object) -> Usual | None:
    """The fields of a record with an id, options "(A) ...", an answer "(A)", and nothing unusual; None for any other.

    A million rows are loaded in seconds because most of them pass here, in a quarter of the time that `read_records`
    takes: all texts are looked at as one, and nothing is made of them before `usual_sample` is asked for it.
    """
    try:
        id, video, question, options, answer, glue, duration = RECORD_FIELDS(fields)
        kind = fields.get("kind", "")
        text = "\n".join([id, video, question, kind, *options])
        if "meta" in fields or ((not text.isascii() or "<|" in text) and control(text)):  # rarely worth the call
            return None
        if type(options) is not list or type(glue) is not list:
            return None
        if not MARKED[answer] < len(options) <= len(LETTERS) or not all(map(str.startswith, options, MARKED)):
            return None
        for start, end in glue:
            if not (type(start) in NUMBERS and type(end) in NUMBERS and -EXACT < start <= end < EXACT):
                return None
        if duration is not None and not (type(duration) in NUMBERS and 0 < duration < EXACT):
            return None
        return id, video, question, options, answer, glue, duration, kind
    except (KeyError, TypeError, ValueError):
        return None


def usual_sample(fields: Usual) -> Sample:
    """The sample of a usual record: what `read_records` makes of it."""
    id, video, question, options, answer, glue, duration, kind = fields
    texts = tuple([option[3:].strip() for option in options])
    evidence = tuple([(float(start), float(end)) for start, end in glue])
    return Sample(id, video, question, texts, answer[1], evidence, None if duration is None else float(duration), kind)


def read_options(row: Row, name: str) -> tuple[str, ...]:
    """The field's texts without letters; at most 26, since the answer is a letter."""
    options = strip_letters(row.texts(name))
    if len(options) > len(LETTERS):
        raise row.error(name, f"at most {len(LETTERS)} options have letters, got {len(options)}")
    return options


def read_letter(row: Row, name: str, options: tuple[str, ...]) -> str:
    """The letter of an option that the field must mean; any letter without options."""
    letter = letter_of_answer(row.text(name), options)
    if letter is None:
        raise row.error(name, f"expected the letter of one of {len(options)} options, got {short(row.fields[name])}")
    return letter

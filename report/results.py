"""Result files: JSON lines of rows, one per question, as scores.py has them but for two names (`FILE_NAMES`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from annotations.rows import DataError, Row, Sample, as_float, read_rows, short
from report.calibration import ANSWERS

if TYPE_CHECKING:
    from infer import Result


FILE_NAMES = {"evidence": "glue", "predicted": "spans"}  # of a row, and in a file, as Zoom-Zero's data has it


def row_of(sample: Sample, predicted_answer: str | None, predicted: list | None) -> dict:
    """The row of one question."""
    return {
        "id": sample.id,
        "video": sample.video,
        "kind": sample.kind,
        "duration": sample.duration,
        "answer": sample.answer,
        "predicted_answer": predicted_answer,
        "evidence": [list(span) for span in sample.evidence],
        "predicted": predicted,
    }


def priced_row(sample: Sample, predicted_answer: str | None, result: Result, seconds: float, error: str | None) -> dict:
    """The row of a question that a strategy has answered, with its confidence and what it cost; error: of an unreadable
    video.
    """
    spans = None if result.spans is None else [[round(t, 3) for t in span] for span in result.spans]
    return {
        **row_of(sample, predicted_answer, spans),
        "confidence": round(result.confidence, 6),
        "letters": {letter: round(p, 6) for letter, p in result.letters.items()},
        "passes": len(result.looks),
        "frames": result.frames,
        "visual_tokens": result.visual_tokens,
        "flops": result.flops,
        "seconds": round(seconds, 4),
        "error": error,
    }


def is_span(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(x) in (int, float) for x in pair)


def read_results(path: str | Path, samples: list[Sample]) -> list[dict]:
    """One row per sample, in the samples' order, with the predictions of a result file.

    A line needs "id", "predicted_answer" and "spans", and may have a confidence; the truth comes from the samples.
    Samples that the file does not mention are unanswered. A question whose video could not be read ("error") may come
    again: the last line counts. Raises DataError for an id that is not among the samples, one that comes twice, or a
    line about another video or with another right answer: then the file belongs to something else.
    """
    path = Path(path)
    known = {sample.id: sample for sample in samples}
    predictions, unknown, unreadable = {}, [], set()
    for line in read_rows(path):
        id = str(line.get("id", str, int))
        answer = line.get("predicted_answer", str, type(None))
        if answer is not None and not re.fullmatch("[A-Z]", answer):
            raise line.error("predicted_answer", f"expected a capital letter or null, got {short(answer)}")
        spans = line.get("spans", list, type(None))
        for pair in spans or []:
            if not is_span(pair) or not -np.inf < as_float(pair[0]) <= as_float(pair[1]) < np.inf:
                raise line.error("spans", f"expected [start, end] in seconds, start <= end, got {short(pair)}")
        if id in predictions and id not in unreadable:
            raise line.error("id", f"'{id}' comes twice")
        unreadable.discard(id)
        if line.fields.get("error"):
            unreadable.add(id)
        if id not in known:
            unknown.append(id)
            continue
        for name, truth in (("video", Path(known[id].video).stem), ("answer", known[id].answer)):
            stated = line.fields.get(name, truth)
            if stated != truth and (name != "video" or Path(str(stated)).stem != truth):
                raise line.error(
                    name, f"the question '{id}' has {short(truth)}, not {short(stated)}: results of another data set?"
                )
        predictions[id] = row_of(known[id], answer, spans) | read_confidence(line)
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} of {len(unknown) + len(predictions)} question ids are unknown, "
            f"first {unknown[:3]}; ids look like {[sample.id for sample in samples[:2]]}: results of another benchmark?"
        )
    return [predictions.get(sample.id) or row_of(sample, None, None) for sample in samples]


def read_confidence(line: Row) -> dict[str, float]:
    """The confidences of calibration.py that a line has. Raises DataError for one that is no probability."""
    found = {name: line.fields[name] for _, name in ANSWERS.values() if line.fields.get(name) is not None}
    for name, value in found.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise line.error(name, f"expected a probability, got {short(value)}")
    return found


def write_results(path: str | Path, rows: list[dict]) -> None:
    """Write rows as a result file."""
    lines = (json.dumps(to_file(row), ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text("".join(lines), encoding="utf-8")


def stored_rows(path: str | Path) -> list[dict]:
    """The rows of a file that `write_results` has written, with all that they had. Raises DataError."""
    return [from_file(line.fields) for line in read_rows(Path(path))]


def to_file(row: dict) -> dict:
    """A row under the names of a file."""
    return {FILE_NAMES.get(name, name): value for name, value in row.items()}


def from_file(fields: dict) -> dict:
    """The row of a file's line."""
    names = {in_file: name for name, in_file in FILE_NAMES.items()}
    return {names.get(name, name): value for name, value in fields.items()}

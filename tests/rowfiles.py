"""Annotation files that tests write."""

import json
from pathlib import Path

RECORD = {
    "video": "a.mp4",
    "question": "Which pattern?",
    "options": ["(A) dots", "(B) lines", "(C) grid"],
    "answer": "(C)",
    "glue": [[3, 8], [12.5, 10]],
    "duration": 16,
}


def write_rows(path: Path, rows: list) -> Path:
    """The rows as JSON lines."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path

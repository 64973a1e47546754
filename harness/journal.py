"""Files that survive what interrupts a program: journals, to which finished work is added line by line, and files that
appear whole or not at all.

A journal's line is written under a lock, so lines of several processes never mix, and is on disk when `append` returns.
What a process killed in the middle of a line (`kill -9`) or a full disk leaves behind is never read, and is cut off
before the next line is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from annotations.rows import DataError, Row, as_row

if TYPE_CHECKING:  # so that reading and writing a file needs no torch
    from accelerate import Accelerator


class JournalError(OSError):
    """A line that could not be written, for instance because the disk is full: the message names file and cause."""


def append(path: str | Path, row: dict) -> None:
    """Add a row as one line. Raises JournalError if it cannot be written; the file is then as it was before."""
    line = as_line(row)
    with open_locked(path, "ab+", fcntl.LOCK_EX) as file:
        size = cut_half_line(file)
        try:
            written = 0
            while written < len(line):  # a disk that fills up takes a part of it first
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise JournalError(f"{path}: {error.strerror}; its {size} bytes of complete lines are kept") from error


def begin(path: str | Path) -> None:
    """Make the journal, with its folder, unless it is there, and cut off half a line at its end. Raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open_locked(path, "ab+", fcntl.LOCK_EX) as file:
        cut_half_line(file)


def read(path: str | Path) -> list[Row]:
    """The complete lines, none if there is no file. Raises DataError for one that is not a JSON object."""
    path = Path(path)
    if not path.exists():
        return []
    with open_locked(path, "rb", fcntl.LOCK_SH) as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is half a line
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, thousands of brackets
                raise DataError(f"{path}: row {number}: not JSON: {error}; repair or delete the row") from None
            rows.append(as_row(path, f"row {number}", value))
    return rows


def resume(path: str | Path, accelerator: Accelerator) -> list[Row]:
    """The rows that an earlier run has left, the same for every process: nobody adds to the file before all have read
    it.
    """
    if accelerator.is_main_process:
        begin(path)
    accelerator.wait_for_everyone()
    rows = read(path)
    accelerator.wait_for_everyone()
    return rows


def check_made_with(rows: Iterable[Row], made_with: dict) -> None:
    """Raise DataError, naming row and option, if a row's "made_with" is another one."""
    for row in rows:
        theirs = row.get("made_with", dict)
        changed = [name for name in {**theirs, **made_with} if theirs.get(name) != made_with.get(name)]
        if changed:
            name = changed[0]
            then, now = theirs.get(name), made_with.get(name)
            raise row.error("made_with", f"{name} was {then!r} and is {now!r} now; give another --out")


def save_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file, which appears under its name whole or not at all, whatever interrupts it."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    write(part)
    sync(part)
    part.replace(path)
    sync(path.parent)


def sync(path: str | Path) -> None:
    """Have a file's content, or the names in a folder, on disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot with a folder
            raise
    finally:
        os.close(number)


def as_line(row: dict) -> bytes:
    """A row's line. What UTF-8 cannot write, such as a file name in another encoding, is escaped."""
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row)}\n".encode()


@contextlib.contextmanager
def open_locked(path: str | Path, mode: str, lock: int) -> Iterator[io.FileIO]:
    """The file, unbuffered, under a lock that ends with its closing."""
    with open(path, mode, buffering=0) as file:
        fcntl.flock(file, lock)
        yield file


def cut_half_line(file: io.FileIO) -> int:
    """Cut off what follows the last complete line; returns the file's size in bytes then."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
    return size

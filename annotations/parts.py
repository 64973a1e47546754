"""A large file of JSON lines, read by several processes at once.

Each reads a part of the file as one process reads all of it. Where that may not come to the same, or anything fails,
nothing is returned: the file is then read in one, so that what is wrong with it is always found and said there.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NamedTuple

from annotations.packed import Packed
from annotations.records import Usual
from annotations.rows import DECODER, READ_CHARACTERS, DataError, Report, Sample, is_table, line_values, open_text
from media.decode import all_cores

LARGE = 16 << 20  # bytes from which a file is read in parts: a second's work, against a tenth of one for the processes
MOST_WORKERS = 8
STOPPING = (signal.SIGINT, signal.SIGTERM)

Values = Iterable[tuple[int, object]]
Rows = Callable[[Report, Values], Iterator[Sample | Usual]]


class Part(NamedTuple):
    """Lines of a file."""

    start: int  # bytes before them
    first: int  # the number of the first
    lines: int  # how many; of the last part, more than there are


def read_in_parts(report: Report, rows: Rows) -> Packed | None:
    """The samples of a report's file of our records, and the report complete. None, and the report as it was, for a
    file that must be read in one. `rows` makes samples of a report and the values of a part of its file.
    """
    try:
        tasks = [partial(read_part, report, rows, part) for part in parts_of(report.path)]
        results = in_processes(tasks) if tasks else []
    except OSError:  # the file cannot be read, or there can be no more processes or pipes
        results = []
    seen: set[int] = set()
    for _, keys, _ in results:
        if not seen.isdisjoint(keys):  # two parts have the same id
            return None
        seen.update(keys)
    if not seen:
        return None
    samples = Packed([])
    for packed, _, done in results:
        samples.extend(packed)
        report.add(done)
    return samples


def parts_of(path: Path) -> list[Part]:
    """Parts of about the same size, one for each core; none of a file that is small, or is not just JSON lines."""
    size = path.stat().st_size
    workers = min(all_cores(), MOST_WORKERS)  # all: the other processes of a launch wait for what this one reads
    if workers < 2 or size < LARGE or not hasattr(os, "fork") or not is_json_lines(path):
        return []
    with open(path, "rb") as file:
        starts = [(len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0, 1)]
        file.seek(0)
        for k in range(1, workers):
            line = starts[-1][1]
            while (left := size * k // workers - file.tell()) > 0 and (chunk := file.read(min(left, 1 << 20))):
                line += chunk.count(b"\n")
            line += len(file.readline()) > 0  # the part ends with a whole line
            starts.append((file.tell(), line))
    ends = [line for _, line in starts[1:]] + [sys.maxsize]
    return [Part(start, first, end - first) for (start, first), end in zip(starts, ends, strict=True)]


def is_json_lines(path: Path) -> bool:
    """Whether a file's first line that is not blank is a JSON object, and no table of rows."""
    try:
        with open_text(path) as file:
            line, end, _ = file.read(READ_CHARACTERS).lstrip().partition("\n")
        value = DECODER.decode(line) if end else None
    except (DataError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not is_table(value) and path.suffix != ".parquet"


def read_part(report: Report, rows: Rows, part: Part) -> tuple[Packed, array, Report]:
    """The samples of a part, the hashes of their ids, and what was done with it."""
    gc.disable()  # nothing here is circular, and a tenth of the time would go into looking for it
    done, keys = Report(report.path, report.format), array("q")

    def noted(samples: Iterable[Sample | Usual]) -> Iterator[Sample | Usual]:
        for sample in samples:
            keys.append(hash(sample[0] if isinstance(sample, tuple) else sample.id))  # a fork's hashes are its parent's
            yield sample

    with open(report.path, "rb") as file:
        file.seek(part.start)
        lines = islice(TextIOWrapper(file, encoding="utf-8", newline="\n"), part.lines)
        values = line_values(report.path, lines, part.first, whole=False)
        return Packed(noted(rows(done, values))), keys, done


# ---------------------------------------------------------------- processes


def in_processes(tasks: list[Callable[[], object]]) -> list:
    """What each task returns, done in a fork of this process each; nothing if one of them fails or is killed.

    Forks of a process with threads are safe here. A fork has none of those threads, and of the locks that they may
    have held it needs only those that the C library and Python set free in it: it imports, logs and prints nothing, and
    has nothing to do with torch. It ends without what a program does at its end.
    """
    workers: dict[Connection, int] = {}
    try:
        with signals_held_back() as came:
            for task in tasks:
                receiver, sender = Pipe(duplex=False)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about threads
                    pid = os.fork()
                if not pid:
                    work(task, sender, [*workers, receiver], came)
                workers[receiver] = pid
                sender.close()
        results: dict[Connection, object] = {}
        while missing := [receiver for receiver in workers if receiver not in results]:
            ready = wait(missing, timeout=1)  # a signal just before it would be seen only after it
            results.update({receiver: receiver.recv() for receiver in ready})
        return [results[receiver] for receiver in workers]
    except EOFError:  # a worker ended without a word
        return []
    finally:
        for receiver, pid in workers.items():
            receiver.close()
            with suppress(ProcessLookupError, ChildProcessError):  # where the system itself buries them
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@contextmanager
def signals_held_back() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait until all workers are known, and can be ended; yields the list of those that wait.

    A mask would hold them back from this thread alone: another would take them, and this one would run their handler.
    """
    came: list[int] = []
    first = threading.current_thread() is threading.main_thread()  # no other runs handlers
    handlers = {number: signal.getsignal(number) for number in STOPPING if first}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def work(task: Callable[[], object], sender: Connection, others: list[Connection], came: list[int]) -> None:
    """In a fork: send what the task returns, and end at once; if it fails or a signal `came`, without a word."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to all, and the parent ends its workers
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came:
            return
        for other in others:
            other.close()  # if the parent is gone, sending must fail
        sender.send(task())
    finally:
        os._exit(0)

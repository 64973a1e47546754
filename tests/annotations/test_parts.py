"""A large file read in parts: what comes of it is what one process reads, and no worker outlives its program."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import fields
from itertools import chain
from multiprocessing import connection
from pathlib import Path

import pytest
from rowfiles import write_rows

from annotations import parts
from annotations.packed import Packed
from annotations.rows import DataError, Report
from annotations.samples import read_packed, review
from config import Config

ROOT = Path(__file__).resolve().parents[2]
USUAL = {"video": "a.mp4", "question": "Which?", "options": ["(A) x", "(B) y"], "answer": "(B)", "glue": [[3, 8.5]]}
CHANGES = [
    *({"question": " "}, {"answer": "neither"}),  # dropped
    *({"glue": [[8, 3]]}, {"glue": [[-1, 3], [9, 9]]}, {"glue": "[[1, 2]]"}, {"glue": [[9, 9]]}),  # noted
    *({"video": f"gone {k}"} for k in range(4)),
    *(
        {"options": ["x", "y"]},
        {"kind": "fine", "duration": 16},
        {"meta": {"clues": ["é\u2028"]}},
        {"question": "Qué?"},
    ),
]


def drawn(seed: int, changed: float = 0.3, n: int = 200) -> list[dict]:
    """Rows with ids of their own, a share of them changed."""
    draw = random.Random(seed)
    return [{"id": f"q{k}", **USUAL, **(draw.choice(CHANGES) if draw.random() < changed else {})} for k in range(n)]


@pytest.fixture
def loaded(monkeypatch, tmp_path, caplog):
    """What comes of a file with so many cores: its samples and report, or its error, and what is logged; and whether it
    was read in parts.
    """
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(parts, "LARGE", 1)
    config = Config(template="zoom_zero", grounding="iou", video_root=str(tmp_path))

    def load(path: Path, cores: int) -> tuple[object, bool]:
        caplog.clear()
        in_parts, report = [], Report(path, "records")
        with monkeypatch.context() as patch:
            patch.setattr(parts, "all_cores", lambda: cores)
            patch.setattr(Packed, "extend", lambda self, other, real=Packed.extend: in_parts.append(real(self, other)))
            try:
                samples = list(map(repr, read_packed(report, tmp_path, config, "x")))  # repr: 3 is not 3.0
                review(report)
                outcome = samples, report, list(report.notes), list(report.left_out)
            except DataError as error:
                outcome = str(error)
        return (outcome, caplog.messages[:]), bool(in_parts)

    return load


@pytest.mark.parametrize("cores", [2, 3, 8])
def test_what_is_read_in_parts_is_what_one_process_reads(loaded, tmp_path, cores):
    for seed, changed in enumerate([0, 0.15, 0.15, 0.15]):
        path = write_rows(tmp_path / "x.jsonl", drawn(seed, changed))
        (whole, _), (outcome, in_parts) = loaded(path, 1), loaded(path, cores)
        assert in_parts and outcome == whole and len(whole[0][0]) > 150
        assert bool(whole[1]) == bool(changed)


def test_too_many_rows_that_cannot_be_used_in_parts_are_the_same_error(loaded, tmp_path):
    rows = [{**row, "answer": "neither"} if k % 9 == 0 else row for k, row in enumerate(drawn(0, 0))]
    path = write_rows(tmp_path / "x.jsonl", rows)
    outcome, in_parts = loaded(path, 3)
    assert in_parts and outcome == loaded(path, 1)[0] and "23 of 200 rows cannot be used, more than 5%" in outcome[0]


def written(rows: list[dict], between: str = "\n") -> str:
    return between.join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: written(rows) + "\n",
        lambda rows: written(rows, "\r\n") + "\r\n",
        lambda rows: written(rows, "\n\n \r\n"),
        lambda rows: "\n \n" + written(rows) + "\n\n",
        lambda rows: "\ufeff" + written(rows),
        lambda rows: written([{**row, "question": "\u2028é\x85\x1c\r" * 9} for row in rows]),
    ],
)
@pytest.mark.parametrize("cores", [2, 7])
def test_lines_are_those_that_one_process_counts(loaded, tmp_path, change, cores):
    """Rows that are dropped are named by their line."""
    path = tmp_path / "x.jsonl"
    rows = [{**row, "answer": "neither"} if k % 30 == 29 else row for k, row in enumerate(drawn(0, 0))]
    path.write_text(change(rows), encoding="utf-8", newline="")
    outcome, in_parts = loaded(path, cores)
    assert in_parts and outcome == loaded(path, 1)[0] and len(outcome[0][1].dropped) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: written([{k: v for k, v in row.items() if k != "id"} for row in rows]),
        lambda rows: written([*rows[:-1], {**USUAL, "video": "b"}]),
        lambda rows: written([*rows, rows[0]]),
        lambda rows: written([*rows[:-1], {**rows[-1], "id": rows[100]["id"]}]),
        lambda rows: json.dumps({"data": rows}) + "\n",
        lambda rows: written([{"data": rows[:9]}, *rows[9:]]),
        lambda rows: json.dumps(rows) + "\n" + written(rows),
        lambda rows: json.dumps(rows, indent=1),
        lambda rows: written([{**USUAL, "id": k} for k in range(20)]).replace(", ", ",\n "),
        lambda rows: written([*rows, *({**USUAL, "id": f"d{k}", "question": ""} for k in range(300))]),
        lambda rows: written(rows).replace("\n", "\n\ufeff", 150),
        lambda rows: "\n" * 10**5 + written(rows),
        lambda rows: "",
        lambda rows: " \n" * 100,
        lambda rows: "{" * 10**5 + "\n" + written(rows),
        *(lambda rows, k=k: written([*rows[:k], {**rows[k], "options": 3}, *rows[k + 1 :]]) for k in (0, 99, 199)),
        *(lambda rows, k=k: written([*rows[:k], {**rows[k], "glue": []}, *rows[k + 1 :]]) for k in (0, 99, 199)),
        *(lambda rows, k=k: written(rows[:k]) + "\n{\n" + written(rows[k:]) for k in (1, 100, 200)),
        lambda rows: written([{**row, "id": "\udcff" if k == 150 else k} for k, row in enumerate(rows)]),
    ],
)
def test_what_is_not_plain_is_read_by_one_process(loaded, tmp_path, change):
    path = tmp_path / "x.jsonl"
    path.write_bytes(change(drawn(0, 0)).encode("utf-8", "surrogateescape"))
    outcome, in_parts = loaded(path, 3)
    assert not in_parts and outcome == loaded(path, 1)[0]


def test_a_file_of_lines_that_is_named_parquet_is_no_file_of_lines(loaded, tmp_path):
    path = write_rows(tmp_path / "x.parquet", drawn(0))
    assert loaded(path, 2) == loaded(path, 1)


def test_only_large_files_are_read_in_parts(loaded, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "x.jsonl", drawn(0, 0))
    monkeypatch.setattr(parts, "LARGE", path.stat().st_size + 1)
    assert not loaded(path, 2)[1]
    monkeypatch.setattr(parts, "LARGE", path.stat().st_size)
    assert loaded(path, 2)[1]


@pytest.mark.parametrize("seed", range(20))
def test_parts_hold_every_line_once(tmp_path, monkeypatch, seed):
    """Whatever is in the lines that follow the first."""
    draw = random.Random(seed)
    lines = [b"".join(draw.choices([b"a", b"\r", "é".encode(), b"", b"long" * 99], k=3)) + b"\n" for _ in range(30)]
    text = draw.choice([b"", b"\xef\xbb\xbf"]) + b"{}\n" + b"".join(lines) + draw.choice([b"", b"z"])
    (tmp_path / "x").write_bytes(text)
    monkeypatch.setattr(parts, "LARGE", 1)
    monkeypatch.setattr(parts, "all_cores", lambda: draw.randint(2, 20))
    found = parts.parts_of(tmp_path / "x")
    assert 2 <= len(found) <= 8 and found[0].first == 1
    plain = text.removeprefix(b"\xef\xbb\xbf")
    of_parts = [text[part.start :].split(b"\n")[: part.lines] for part in found]
    assert list(chain(*of_parts)) == plain.split(b"\n")
    assert [part.first - 1 for part in found] == [sum(map(len, of_parts[:k])) for k in range(len(found))]


def test_a_report_of_parts_leaves_nothing_out(tmp_path):
    report = Report(tmp_path, "records")
    before = {field.name: repr(getattr(report, field.name)) for field in fields(Report)}
    later = Report(tmp_path, "records")
    for name in before.keys() - {"path", "format"}:
        value = getattr(later, name)
        setattr(later, name, 1 if isinstance(value, int) else [name] if isinstance(value, list) else type(value)("a"))
    report.add(later)
    assert report == later
    report.add(later)
    assert report.kept == 2 and report.dropped == ["dropped"] * 2 and report.notes == {"a": 2}
    assert report.missing_videos == ["missing_videos"]


# ---------------------------------------------------------------- workers


def test_results_come_in_the_order_of_the_tasks(tmp_path):
    """The first waits for the last."""

    def first():
        while not (tmp_path / "last").exists():
            pass
        return "first"

    assert parts.in_processes([first, lambda: "x" * 10**6, lambda: (tmp_path / "last").touch()]) == [
        "first",
        "x" * 10**6,
        None,
    ]


@pytest.fixture
def forked(monkeypatch) -> list[int]:
    """The workers; at the end of the test there must be none."""
    pids = []

    def fork(real=os.fork):
        if pid := real():
            pids.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", fork)
    yield pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def waits():
    while True:
        signal.pause()


@pytest.mark.parametrize(
    "task",
    [
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: 1 / 0,
        lambda: os.kill(os.getpid(), signal.SIGTERM),
        sys.exit,
    ],
)
def test_when_a_worker_fails_or_is_killed_all_end(forked, capfd, task):
    assert parts.in_processes([waits, task, waits]) == []
    assert len(forked) == 3 and capfd.readouterr() == ("", "")


def test_a_worker_that_is_killed_while_it_tells_what_it_read_is_one_that_failed(forked):
    def task():
        send = connection.Connection._send
        connection.Connection._send = lambda self, some: (send(self, some), os.kill(os.getpid(), signal.SIGKILL))
        return b"x" * 10**6  # of which only the length is sent

    assert parts.in_processes([waits, task]) == []


class Stopped(Exception):
    pass


@pytest.fixture
def stopped_by_sigterm():
    def stop(*_):
        os.write(2, b"stopped")
        raise Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("stopped_by_sigterm")
def test_a_signal_at_the_moment_of_a_fork_ends_a_worker_without_a_word(forked, monkeypatch, capfd):
    def fork(real=os.fork):
        if not (pid := real()):
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", fork)
    assert parts.in_processes([waits] * 2) == [] and capfd.readouterr().err == ""


@pytest.mark.parametrize("beside", [0, 1])
@pytest.mark.usefixtures("stopped_by_sigterm")
def test_a_signal_between_two_forks_ends_all_workers(forked, monkeypatch, capfd, beside):
    """Also where there are other threads that the system may give the signal to."""
    through = threading.Event()
    threads = [threading.Thread(target=through.wait) for _ in range(beside)]
    for thread in threads:
        thread.start()

    def fork(real=os.fork):
        if (pid := real()) and len(forked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(Stopped):
        parts.in_processes([waits] * 3)
    through.set()
    assert len(forked) == 3 and capfd.readouterr().err == "stopped"


@pytest.mark.usefixtures("stopped_by_sigterm")
def test_a_signal_that_does_not_interrupt_waiting_ends_all_workers(forked, tmp_path, capfd):
    """As one does that comes between the last look for signals and the system call; here another thread gets it."""

    def finish():
        time.sleep(15)
        (tmp_path / "finished").touch()

    def later():
        while len(forked) < 2 or signal.getsignal(signal.SIGTERM).__name__ != "stop":
            pass
        time.sleep(0.2)  # until the first thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    threading.Thread(target=later, daemon=True).start()  # which ends with pytest if there is no second fork
    with pytest.raises(Stopped):
        parts.in_processes([finish] * 2)
    assert capfd.readouterr().err == "stopped" and not (tmp_path / "finished").exists()


def test_a_file_whose_worker_is_killed_is_read_by_one_process(loaded, tmp_path, monkeypatch, forked):
    path, parent = write_rows(tmp_path / "x.jsonl", drawn(0, 0)), os.getpid()
    whole, _ = loaded(path, 1)
    real = parts.line_values

    def deadly(path, lines, start, whole):
        for number, value in real(path, lines, start, whole):
            if number == 150 and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number, value

    monkeypatch.setattr(parts, "line_values", deadly)
    assert loaded(path, 3) == (whole, False) and len(forked) == 3


def test_where_no_process_can_be_had_one_process_reads(loaded, tmp_path, monkeypatch, forked):
    path = write_rows(tmp_path / "x.jsonl", drawn(0, 0))
    whole, _ = loaded(path, 1)
    fork = os.fork

    def third():
        if len(forked) == 2:
            raise BlockingIOError("Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", third)
    assert loaded(path, 3) == (whole, False) and len(forked) == 2
    monkeypatch.delattr(os, "fork")
    assert loaded(path, 3) == (whole, False)


@pytest.mark.filterwarnings("error")
def test_a_warning_of_threads_is_no_error(monkeypatch, forked):
    """Python 3.12 gives it in the parent, of which it costs the worker's number where it is an error."""
    fork = os.fork

    def warning():
        if pid := fork():
            warnings.warn("This process is multi-threaded, use of fork() may lead to deadlocks", DeprecationWarning, 2)
        return pid

    monkeypatch.setattr(os, "fork", warning)
    assert parts.in_processes([lambda: 1, lambda: 2]) == [1, 2]


PARENT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from annotations import parts
from harness import commands
commands.begin("train", "A test.")
parent = os.getpid()
def task():
    os.write(1, b"ready\\n")
    while os.getppid() == parent:
        time.sleep(0.01)
    return b"x" * 10**6  # more than a pipe holds
parts.in_processes([task] * 3)
"""


@pytest.mark.parametrize(
    ("send", "number"), [(os.kill, signal.SIGTERM), (os.kill, signal.SIGINT), (os.killpg, signal.SIGINT), (os.kill, 9)]
)
def test_a_signal_while_parts_are_read_ends_all_with_one_line(tmp_path, send, number):
    """Ctrl-C is sent to all of them."""
    (tmp_path / "parent.py").write_text(PARENT.format(root=str(ROOT)))
    command = [sys.executable, str(tmp_path / "parent.py")]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert [program.stdout.readline() for _ in range(3)] == ["ready\n"] * 3
    send(program.pid, number)
    said, errors = program.communicate(timeout=60)  # until the workers, too, have closed them
    if number == signal.SIGKILL:
        assert (program.returncode, said, errors) == (-number, "", "")
    else:
        line = f"stopped by {signal.Signals(number).name}; what was finished is kept\n"
        assert (program.returncode, said, errors) == (128 + number, "", line)

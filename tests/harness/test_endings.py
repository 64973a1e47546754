"""How programs end: one line for what is expected, whoever ends them."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from torch import distributed

from annotations.rows import DataError
from harness import commands, run
from harness.run import TrainingError, main_does, program

ROOT = Path(__file__).resolve().parents[2]


def ending(error: Exception) -> object:
    """What a program says and returns that ends with this error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        program(main)
    return end.value.code


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b.json"), "error: a/b.json: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: writing: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "error: a: Permission denied"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"),
            "error: another process of this run has ended; its own message says why",
        ),
    ],
)
def test_a_full_disk_and_a_lost_process_are_one_line(error, said):
    assert ending(error) == said


def test_a_message_has_nothing_that_a_terminal_obeys_and_an_end():
    """Names, ids and values in it are those of files that a stranger may have written."""
    assert ending(TrainingError("a\x1b[2J\x9b31mb\tc\nd é \ud800")) == r"error: a\x1b[2J\x9b31mb\tc" + "\nd é \\ud800"
    said = ending(TrainingError("x" * 10**6))
    assert said.startswith("error: xxx") and said.endswith("xxx...") and len(said) < 2500
    record = logging.LogRecord("zoomgrpo", logging.WARNING, "", 0, "%s", ("a\x1b]0;b\x07",), None)
    assert run.Readable("%(message)s").format(record) == r"a\x1b]0;b\x07"


def test_an_error_in_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        program(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_in_the_main_process_fails_in_all(monkeypatch, rank):
    """What the others are told comes from its broadcast."""

    def failing():
        raise OSError(errno.EACCES, "Permission denied", "runs/x")

    monkeypatch.setattr(run, "broadcast_object_list", lambda told: told if rank == 0 else ["runs/x: Permission denied"])
    accelerator = SimpleNamespace(is_main_process=rank == 0, wait_for_everyone=lambda: None)
    with pytest.raises(TrainingError, match="runs/x: Permission denied"):
        main_does(accelerator, failing)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_what_the_main_process_reads_all_have(monkeypatch, rank, fails):
    """What the others are told comes from its broadcast, as pickles."""
    told, reads = [], []

    def broadcast(objects):
        told.append(pickle.loads(pickle.dumps(objects)))
        return told[-1] if rank == 0 else [None, "x: no such file"] if fails else [["rows"], None]

    def read():
        reads.append(rank)
        if fails:
            raise DataError("x: no such file")
        return ["rows"]

    monkeypatch.setattr(run, "broadcast_object_list", broadcast)
    accelerator = SimpleNamespace(is_main_process=rank == 0, num_processes=2, wait_for_everyone=lambda: None)
    if fails:
        with pytest.raises(TrainingError, match="x: no such file"):
            run.main_reads(accelerator, read, DataError)
    else:
        assert run.main_reads(accelerator, read, DataError) == ["rows"]
    assert reads == [0] * (rank == 0)


def test_a_process_alone_raises_what_it_has_read(monkeypatch):
    monkeypatch.setattr(run, "broadcast_object_list", lambda _: pytest.fail("there is nobody to tell"))

    def read():
        raise DataError("x: no such file")

    with pytest.raises(DataError):
        run.main_reads(SimpleNamespace(num_processes=1), read, DataError)


# ---------------------------------------------------------------- processes of their own


def waits_for_nobody(there: Path) -> None:
    there.touch()
    time.sleep(1000)


def waits_in_a_thread(errors: Path, there: list[Path]) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    processes.tell_when_stopped()
    threading.Thread(target=waits_for_nobody, args=there[:1], daemon=True).start()
    waits_for_nobody(there[1])


def test_processes_of_which_none_ends_tell_where_they_stand(tmp_path, monkeypatch):
    errors = tmp_path / "errors"
    there = [[tmp_path / f"{number}-{thread}" for thread in "ab"] for number in range(2)]
    fork = multiprocessing.get_context("fork").Process
    both = [fork(target=waits_in_a_thread, args=(errors, paths)) for paths in there]
    for one in both:
        one.start()

    def nobody(*_, timeout: float) -> list:
        while not all(path.exists() for paths in there for path in paths):
            time.sleep(0.01)
        return []

    monkeypatch.setattr(processes, "connection", SimpleNamespace(wait=nobody))
    assert processes.exit_codes_of(both, errors) == [-signal.SIGUSR1] * 2
    for number, told in enumerate(errors.read_text().split("\nprocess ")[1:]):
        assert told.startswith(f"{number}, after 600 s") and told.count("in waits_for_nobody") == 2


def test_garbage_is_looked_for_while_a_program_is_at_work_alone(monkeypatch):
    """Among what it imports there is none, and at its end it does not matter."""
    at_end, seen = [], []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(atexit, "register", at_end.append)
    monkeypatch.setattr(commands, "follow_launcher", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    try:
        commands.begin("train", "A test.")
        assert not gc.isenabled() and at_end == [gc.freeze]
        program(lambda: seen.append((gc.isenabled(), gc.get_freeze_count() > 0)))
    finally:
        gc.enable()
    assert seen == [(True, True)]


def test_nobody_else_is_given_the_port_at_which_processes_meet():
    with processes.meeting_place() as place:
        address = place["MASTER_ADDR"], int(place["MASTER_PORT"])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        store = distributed.TCPStore(*address, 1, is_master=True)
        store.set("a", "b")
        assert distributed.TCPStore(*address, is_master=False).get("a") == b"b"


CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from harness import commands
commands.begin("train", "A test.")
parent = os.getppid()
print("ready", flush=True)
while os.getppid() == parent or {follows}:
    time.sleep(0.01)
time.sleep(0.3)
print("alone", flush=True)
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, {child!r}]).wait()
"""


@pytest.mark.parametrize(("name", "follows"), [("accelerate", True), ("torchrun", True), ("job.sh", False)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_does_not_outlive_its_launcher_and_does_outlive_a_shell(tmp_path, name, follows, number):
    """`accelerate launch` passes no signal on; a program that a shell has left behind goes on, as after nohup."""
    (tmp_path / "child.py").write_text(CHILD.format(root=str(ROOT), follows=follows))
    (tmp_path / name).write_text(PARENT.format(child=str(tmp_path / "child.py")))
    command = [sys.executable, str(tmp_path / name), "launch", "train.py"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(number)
    said, errors = launcher.communicate(timeout=60)  # until the child, too, has closed them
    assert (said, errors) == (("", "stopped by SIGTERM; what was finished is kept\n") if follows else ("alone\n", ""))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_program_loads_ends_it_with_a_line(tmp_path, number):
    (tmp_path / "child.py").write_text(CHILD.format(root=str(ROOT), follows=True))
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "child.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert errors == f"stopped by {signal.Signals(number).name}; what was finished is kept\n"

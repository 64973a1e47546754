"""Who may write into a folder, and what is told to whoever may not."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from harness import folder
from harness.folder import claimed, claimed_file, lock
from harness.run import TrainingError


def test_the_second_program_is_told_who_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--out", "two words"])
    with claimed(tmp_path / "run", None):
        holder = rf"process {os.getpid()} on {socket.gethostname()} since 2.*: train.py --out 'two words'"
        with (
            pytest.raises(TrainingError, match=f"run is being written to by {holder}"),
            claimed(tmp_path / "run", None),
        ):
            pytest.fail("two at a time")
    assert not list(tmp_path.iterdir())  # a program that has written nothing leaves nothing behind
    with claimed(tmp_path / "run", None):
        (tmp_path / "run" / "a").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]


def test_a_journal_has_a_lock_of_its_own(tmp_path):
    with (
        claimed_file(tmp_path / "a.jsonl", None),
        claimed_file(tmp_path / "b.jsonl", None),
        pytest.raises(TrainingError, match="is being written to"),
        claimed_file(tmp_path / "a.jsonl", None),
    ):
        pytest.fail("two at a time")


def test_a_killed_program_leaves_no_lock(tmp_path):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = lock(tmp_path / ".lock")
        os.write(tell, str(held.fileno()).encode())
        signal.pause()
    os.read(told, 1)
    try:
        with pytest.raises(TrainingError, match=f"process {child} on "):
            lock(tmp_path / ".lock")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with claimed(tmp_path, None):
        pass


def test_a_lock_that_its_holder_has_deleted_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Opened before, locked after the other program's end: the file under this name is another one by then."""
    flock, path = fcntl.flock, tmp_path / ".lock"
    deleted = []

    def late(file, operation):
        if not deleted:
            path.unlink()
            deleted.append(file)
        flock(file, operation)

    monkeypatch.setattr(folder.fcntl, "flock", late)
    with lock(path) as file:
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())
        with pytest.raises(TrainingError, match="is being written to"):
            lock(path)


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", none)
    with claimed(tmp_path / "run", None):
        assert "no locks on this file system (No locks available)" in caplog.text


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_in_the_way_is_named(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    said = f"{out}: a file is in the way, not a folder; choose another --out"
    with pytest.raises(TrainingError, match=said), claimed(tmp_path / out, None):
        pytest.fail("claimed")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left")])
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch, number, words):
    def refuse(self, **_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = f"run cannot be written to: {words}.*; choose another --out"
    with pytest.raises(TrainingError, match=said), claimed(tmp_path / "run", None):
        pytest.fail("claimed")


def test_what_is_there_is_replaced_only_if_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = r"has config\.json: write over it with --overwrite, or choose another --out"
    with pytest.raises(TrainingError, match=said), claimed(tmp_path, None, ["config.json"]):
        pytest.fail("claimed")
    with claimed(tmp_path, None, ["config.json"], overwrite=True):
        pass

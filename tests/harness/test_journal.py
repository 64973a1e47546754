"""What is left of a journal after kill -9, a full disk and several processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from annotations.rows import DataError
from harness import journal
from harness.journal import JournalError

ROOT = Path(__file__).resolve().parents[2]


def rows_of(path: Path) -> list[dict]:
    return [row.fields for row in journal.read(path)]


def run(script: str, *arguments: object) -> subprocess.Popen:
    head = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom harness import journal\n"
    return subprocess.Popen([sys.executable, "-c", head + script, *map(str, arguments)])


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b"", []),
        (b'{"id": "a"}\n', ["a"]),
        (b'{"id": "a"}\n{"id": "b', ["a"]),
        (b'{"i', []),
        (b'{"id": "a"}\n{"id": "b"}', ["a"]),  # without its end, nobody can tell that it is whole
        ('{"id": "a"}\n{"id": "é'.encode()[:-1], ["a"]),  # half a letter
    ],
)
def test_half_a_line_is_not_read_and_is_cut_off(tmp_path, left, kept):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(left)
    assert [row["id"] for row in rows_of(path)] == kept
    journal.append(path, {"id": "é\n"})
    assert [row["id"] for row in rows_of(path)] == [*kept, "é\n"]
    path.write_bytes(left)
    journal.begin(path)
    assert path.read_bytes() == left[: left.rfind(b"\n") + 1]


def test_no_file_has_no_rows_and_begin_makes_it(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert journal.read(path) == []
    assert journal.resume(path, Accelerator(cpu=True)) == [] and path.read_bytes() == b""


@pytest.mark.parametrize("line", [b'{"id": 1,}', b"[1]", b"\xff", b"7", b"[" * 100_000])
def test_a_complete_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2: ") as caught:
        journal.read(path)
    assert "\n" not in str(caught.value)


def test_what_utf8_cannot_write_comes_back(tmp_path):
    row = {"video": os.fsdecode(b"caf\xe9.mp4"), "text": "\ud800 é\u2028"}
    journal.append(tmp_path / "rows.jsonl", row)
    assert rows_of(tmp_path / "rows.jsonl") == [row]


def test_other_options_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    journal.append(path, {"made_with": {"fps": 1, "model": "a"}})
    journal.check_made_with(journal.read(path), {"model": "a", "fps": 1})
    with pytest.raises(DataError, match=r"row 1, field 'made_with': model was 'a' and is 'b' now"):
        journal.check_made_with(journal.read(path), {"model": "b", "fps": 1})
    with pytest.raises(DataError, match="seed was None and is 3 now"):
        journal.check_made_with(journal.read(path), {"model": "a", "fps": 1, "seed": 3})
    journal.append(path, {"id": 2})
    with pytest.raises(DataError, match="row 2, field 'made_with': is missing"):
        journal.check_made_with(journal.read(path), {"model": "a", "fps": 1})


def test_lines_of_processes_that_write_at_once_stay_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    script = "for n in range(40): journal.append(sys.argv[1], {'by': sys.argv[2], 'n': n, 'text': 'x' * 5000})"
    writers = [run(script, path, name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    rows = rows_of(path)
    for name in "ab":
        assert [row["n"] for row in rows if row["by"] == name] == list(range(40))


# Writes the first half of the third line, as the kernel may leave it, and dies.
KILLED = """
class Dying:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, line):
        self.file.write(line[: len(line) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
locked = journal.open_locked
import contextlib
@contextlib.contextmanager
def dying(*arguments):
    with locked(*arguments) as file:
        yield Dying(file)
for n in range(3):
    if n == 2:
        journal.open_locked = dying
    journal.append(sys.argv[1], {"n": n})
"""


def test_kill_9_in_the_middle_of_a_line_loses_only_that_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert run(KILLED, path).wait() == -signal.SIGKILL
    assert path.read_bytes() == b'{"n": 0}\n{"n": 1}\n{"n"'
    assert rows_of(path) == [{"n": 0}, {"n": 1}]
    journal.append(path, {"n": 2})  # the lock has died with its process
    assert rows_of(path) == [{"n": 0}, {"n": 1}, {"n": 2}]


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for n in range(100):
        journal.append(sys.argv[1], {"n": n, "text": "x" * 80})
except journal.JournalError as error:
    sys.exit(7 if str(error).startswith(sys.argv[1] + ": File too large; its 909 bytes") else str(error))
"""


def test_a_file_that_may_not_grow_keeps_its_complete_lines(tmp_path):
    """The system takes the first bytes of the last line before it refuses the rest."""
    path = tmp_path / "rows.jsonl"
    assert run(FULL, path).wait() == 7
    assert [row["n"] for row in rows_of(path)] == list(range(9))
    assert path.read_bytes().endswith(b"\n")


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    journal.append(path, {"n": 0})
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        with pytest.raises(JournalError, match=r"rows\.jsonl: No space left on device; its 9 bytes .* are kept"):
            journal.append(path, {"n": 1})
    assert path.read_text() == '{"n": 0}\n'
    journal.append(path, {"n": 1})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1]

"""How many threads a process takes."""

from types import SimpleNamespace

import pytest

from config import Config
from harness import run
from media import decode


@pytest.mark.parametrize(
    ("threads", "environment", "taken"),
    [
        (3, {}, [3]),
        (3, {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, [3]),
        (0, {"OMP_NUM_THREADS": "1"}, []),  # somebody has said so
        (0, {}, []),
        (0, {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, [6]),  # the launcher has said so
        (0, {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "4"}, []),
        (0, {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, [1]),
        (0, {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, [1]),
    ],
)
def test_threads_are_asked_for_or_a_share_of_the_cores(monkeypatch, threads, environment, taken):
    """On a machine of six cores."""
    monkeypatch.setattr(decode.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in (*run.LAUNCHED, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[int] = []
    monkeypatch.setattr(run, "torch", SimpleNamespace(set_num_threads=asked.append))
    run.use_threads(Config(threads=threads))
    assert asked == taken

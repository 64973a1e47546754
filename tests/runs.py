"""Runs of the programs in processes of their own, and what they leave behind, compared."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from transformers import Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds/", "visual_tokens_per_second", "text_tokens_per_second")

# accelerate launch --cpu starts several processes with MPI only; torch's launcher needs nothing else.
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
TWO_SHARDED = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate_fsdp2.yaml"]
TWO_SHARDED += ["--num_processes", "2", "--main_process_port", "0", "tests/fsdp2_on_cpu.py"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def call(*arguments: object, script: Sequence[str] = ("train.py",)) -> subprocess.CompletedProcess:
    command = [sys.executable, *script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


def end_of(script: str, *arguments: object) -> object:
    """What a program that is called in this process as from the command line gives to sys.exit."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)  # whoever runs the tests handles them
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "checkpoint").state_dict()


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    for one, two in zip(without_times(read_metrics(a)), without_times(read_metrics(b)), strict=True):
        assert one == pytest.approx(two, abs=max(tolerance, 1e-12), rel=tolerance)
    theirs = weights(b)
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, theirs[name], atol=tolerance, rtol=0)

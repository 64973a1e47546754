"""Runs of the programs in processes of their own, and what they leave behind, compared.

A program needs seconds to import what it uses, and so does every process of it. So these are forks of a server that has
imported it all, and computed nothing.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import left_out, read_metrics
from processes import exit_codes_of, meeting_place, tell_when_stopped
from transformers import Qwen2_5_VLForConditionalGeneration

from harness import watch
from report import drawing

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds/", "visual_tokens_per_second", "text_tokens_per_second")
PROGRAMS = ["train", "sft", "evaluate", "infer", "curate", "filters", "exemplars", "scenes", "report.curves"]
PROGRAMS += ["report.plots"]

SHARDED = ["--config_file", "recipes/accelerate_fsdp2.yaml", "--num_processes", "2", "--main_process_port", "0"]
NODES = ["--config_file", "recipes/accelerate_multinode.yaml", "--main_process_ip", "127.0.0.1", *SHARDED[2:]]
ON_CPU = "tests/fsdp2_on_cpu.py"


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@functools.cache
def forks():
    """Makes processes that begin as forks of the server, which is started here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", *PROGRAMS])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        for name, value in environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def as_program(script: str, arguments: Sequence[str], given: dict[str, str], errors: str) -> None:
    """In a fork: what `python script arguments` does in this environment."""
    os.environ.clear()
    os.environ |= given
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    tell_when_stopped()
    leave_out_pictures()
    sys.path[:0] = [folder for folder in given.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def leave_out_pictures() -> None:
    """In a fork: curves and pictures, which take as long as a small run, are empty files."""
    drawing.save_figure = watch.plot_curves = left_out


def start(errors: Path, *arguments: object, script: str = "train.py", given: dict[str, str] | None = None):
    """The process of a program; what it says on its standard error goes to the end of a file."""
    words = [*map(str, arguments)]
    process = forks().Process(target=as_program, args=(script, words, given or environment(), str(errors)))
    process.start()
    return process


def ranks(given: dict[str, str], nodes: int) -> list[dict[str, str]]:
    """What torch's launcher, or one on each of two nodes, would tell each of two processes."""
    both = given | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // nodes), "TORCHELASTIC_RUN_ID": "tests"}
    return [both | {"RANK": rank, "LOCAL_RANK": rank if nodes == 1 else "0"} for rank in "01"]


def sharding(nodes: int) -> dict[str, str]:
    """The environment that accelerate's launcher makes of recipes/accelerate_fsdp2.yaml, or for two nodes of
    recipes/accelerate_multinode.yaml.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in environment().items():
            patch.setenv(name, value)
        arguments, _, _ = launch._validate_launch_command(
            launch.launch_command_parser().parse_args([*(NODES if nodes > 1 else SHARDED), ON_CPU])
        )
        return prepare_multi_gpu_env(arguments)


def in_two(
    errors: Path,
    *arguments: object,
    script: str = "train.py",
    shards: bool = False,
    nodes: int = 1,
    told: bool = True,
) -> None:
    """Run a program in two processes, each with the whole model or with a shard of it; they must end well. `told`: in
    their environment is that they are on a CPU.
    """
    script, given = (ON_CPU, sharding(nodes)) if shards else (script, environment())
    if not told:
        given = {name: value for name, value in given.items() if name != "ACCELERATE_USE_CPU"}
    with meeting_place() as place:
        each = ranks(given | place, nodes)
        processes = [start(errors, *arguments, script=script, given=one) for one in each]
        codes = exit_codes_of(processes, errors)
    assert codes == [0, 0], f"exit codes {codes}\n{errors.read_text()}"


def launched(script: Path, *arguments: object) -> None:
    """A script in two processes, by `accelerate launch` itself, as for weights that are sharded."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *SHARDED, str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


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

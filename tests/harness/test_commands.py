"""The command lines of the programs: quick help, and names that agree with the programs'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import config
import filters
import infer
from harness import chat, commands

ROOT = Path(__file__).resolve().parents[2]


def lines_of_help(program: str, monkeypatch, columns: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    return config.build_parser(commands.extra(program, "What it does."), program).format_help().splitlines()


@pytest.mark.parametrize("program", ["evaluate", "infer"])
def test_help_fits_two_screens(program, monkeypatch):
    lines = lines_of_help(program, monkeypatch, 100)
    assert len(lines) <= 100 and max(map(len, lines)) <= 100


def test_help_names_defaults_choices_and_groups(monkeypatch):
    text = "\n".join(lines_of_help("train", monkeypatch, 130))
    for words in (
        "\ndata:\n",
        "\nadvantages and loss:\n",
        "[exact | k1 | k2 | k3 | none]",
        "--lr ",
        "[1e-06]",
        "[true]",
    ):
        assert words in text


@pytest.mark.parametrize("program", config.PROGRAMS)
def test_help_comes_before_the_slow_imports(program, monkeypatch):
    """And by then torch, when it is loaded, will be told that its threads sleep while they wait."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = f"""
import os, runpy, sys
sys.argv = ["{program}.py", "--help"]
try:
    runpy.run_path("{program}.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
slow = {{"torch", "transformers", "accelerate", "matplotlib"}} & set(sys.modules)
sys.exit(f"imported: {{slow}}" if slow or os.environ.get("OMP_WAIT_POLICY") != "PASSIVE" else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: {program}.py" in done.stdout


def test_threads_of_a_benchmark_sleep_while_they_wait(monkeypatch):
    """`python -m benchmarks.NAME` says so before torch is loaded."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = "import os, sys, benchmarks; sys.exit('torch' in sys.modules or os.environ['OMP_WAIT_POLICY'] != 'PASSIVE')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_names_and_defaults_agree_with_what_they_stand_for():
    assert list(infer.STRATEGIES) == commands.strategies()
    assert tuple(filters.FILTERS) == commands.FILTER_NAMES
    curate = commands.extra("curate", "What it does.").parse_args([])
    assert curate.timeout == chat.Endpoint.timeout
    assert filters.FILTERS["stage2"].threshold == 0.1 and filters.FILTERS["qvhighlights"].threshold == 120
    assert chat.ADDRESS in commands.ENDPOINT and chat.KEY in commands.ENDPOINT

"""Pictures are drawn by programs that start without Matplotlib."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
def test_no_program_imports_matplotlib_before_it_draws():
    """Importing it takes a second, which everybody would wait for who asks for --help."""
    programs = "train, sft, evaluate, infer, curate, filters, exemplars, scenes, report.curves, report.plots"
    script = f"import sys, {programs}; assert 'matplotlib' not in sys.modules, 'imported'"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

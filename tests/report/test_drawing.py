"""Pictures are drawn by programs that start without Matplotlib."""

import importlib
import sys

import pytest
from runs import PROGRAMS, forks


def import_all() -> None:
    """Exits with 1 if Matplotlib is among what was imported with the programs."""
    for name in PROGRAMS:
        importlib.import_module(name)
    sys.exit("matplotlib" in sys.modules)


@pytest.mark.processes
def test_no_program_imports_matplotlib_before_it_draws():
    """Importing it takes a second, which everybody would wait for who asks for --help."""
    process = forks().Process(target=import_all)
    process.start()
    process.join(300)
    assert process.exitcode == 0

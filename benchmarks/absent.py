"""A stand-in for PyAV where it is not installed, for programs that decode nothing; to be imported first."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from unittest import mock

import transformers  # noqa: F401  (it looks for PyAV before there is a stand-in for it)


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """PyAV and whatever is imported from it, where it is not installed: nothing is decoded here."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] == "av"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> mock.MagicMock:
        return mock.MagicMock(__path__=[])

    def exec_module(self, module: mock.MagicMock) -> None:
        pass


if importlib.util.find_spec("av") is None:
    sys.meta_path.append(StandIn())

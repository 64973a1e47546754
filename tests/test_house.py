"""The layout of the repository: who may import whom, and how long files and functions may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    if path.parent.name not in ("tests", "benchmarks") and path.name != "__init__.py"
}


def listed_files() -> list[str]:
    """The files of README's table, in its order; a room stands for all of its files that are not listed themselves."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What to read")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([\w/]+\.py)`", cell)]


def imports_of(tree: ast.AST) -> set[str]:
    """The files that a file imports, at its top or inside functions; those for type checkers alone are left out."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in SOURCES}
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    types_alone = {id(node) for guard in guards for node in ast.walk(guard)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in types_alone:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {modules[name] for name in found if name in modules}


def test_every_file_is_in_the_table_once():
    assert sorted(listed_files()) == sorted(SOURCES)


def test_a_file_imports_only_from_files_above_it():
    place = {name: k for k, name in enumerate(listed_files())}
    below = [
        f"{name} imports {other}"
        for name, tree in SOURCES.items()
        for other in sorted(imports_of(tree))
        if place[other] >= place[name]
    ]
    assert not below


def test_the_formulas_need_nothing_but_torch():
    """They are read and tested alone, in seconds."""
    allowed = {"prompts", "rewards", "advantage", "kl", "grpo", "torch"}
    for name in ("prompts", "rewards", "advantage", "kl", "grpo"):
        for node in ast.walk(SOURCES[f"{name}.py"]):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            outside = {module.partition(".")[0] for module in modules} - allowed - STANDARD
            assert not outside, f"{name}.py imports {outside}"


STANDARD = {"collections", "dataclasses", "json", "math", "re", "typing"}


def test_files_and_functions_are_short():
    assert sum("/" not in name for name in SOURCES) <= 19
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in SOURCES}
    assert lines["train.py"] <= 400
    assert {name: n for name, n in lines.items() if n > 700} == {}
    functions = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in functions.items() if n > 60} == {}


def test_one_step_can_be_read_in_an_evening():
    """The files that a step of Zoom-Zero passes through from the batch to the optimiser, as README counts them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"wc -l ((?:\w+\.py\s)+)", text)
    assert command, "README has a command that counts the files of one step"
    names = command[1].split()
    assert {"train.py", "rollout.py", "rewards.py", "advantage.py", "policy.py", "kl.py", "grpo.py"} <= set(names)
    total = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names)
    assert total <= 2000, f"{total} lines"

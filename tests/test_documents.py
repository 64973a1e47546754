"""README and docs/: links lead somewhere, files exist, commands are taken by the parsers of the programs."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

import config as configuration
from harness import commands

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
PROGRAM = re.compile(r"(?:^|&& )((?:\w+=\S+ )*(?:python|accelerate launch|torchrun|pytest|bash|wc|ruff|\.ci/run)\b.*)")
OURS = ("recipes/", "benchmarks/", "docs/", "tests/", "checkpoints/", ".ci/", ".github/")
MADE = ("checkpoints/tiny-",)  # beside those that are committed, recipes name some that they make


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def plain(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> list[str]:
    """Commands of blocks of code, their continued lines joined, and of code within a line."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [line.partition("  #")[0].strip() for line in re.sub(r"\\\n\s*", "", blocks).splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", plain(text)) if "\n\n" not in code]
    found = [match[1] for line in lines + inline if (match := PROGRAM.search(line))]
    return [part.strip() for line in found for part in line.split("&&")]


@functools.cache
def docstring(script: str) -> str:
    return ast.get_docstring(ast.parse(text_of(script)))


def check_program(script: str, words: list[str]) -> None:
    """Raise for words that a program of ours does not take."""
    program = script.removesuffix(".py")
    extra = commands.extra(program, docstring(script))
    if program == "walkthrough":
        _, words = extra.parse_known_args(words)
        program, extra = "train", argparse.ArgumentParser(add_help=False)
    parsed, rest = configuration.build_parser(extra, program).parse_known_args([w for w in words if w != "--help"])
    assert not rest, f"{script} does not take {rest}"
    if parsed.config and parsed.config.startswith("recipes/") and parsed.config != "recipes/x.yaml":
        configuration.read_recipe(ROOT / parsed.config)
    for name in configuration.OPTIONS:
        value = getattr(parsed, name, None)
        if value not in (None, "value"):
            configuration.convert(name, value, script)


def check_module(module: str, words: list[str]) -> None:
    """Raise for a module that is not there, and for options that its source does not name."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.is_file(), f"no module {module}"
    source = path.read_text(encoding="utf-8")
    if "--" in words:
        check_program("train.py", words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    for word in words:
        option = word[2:].partition("=")[0]
        passed_on = "build_parser" in source or "configuration.parse" in source
        known = f'"--{option}"' in source or (passed_on and option in {*configuration.OPTIONS, "config"})
        assert not word.startswith("--") or known, f"{module} does not take {word}"


def check_command(command: str) -> None:
    """Raise for a command whose file is not there, or which its program would not take."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    match words:
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            assert launched.config_file is None or (ROOT / launched.config_file).is_file(), launched.config_file
            check_program(launched.training_script, launched.training_script_args)
        case ["python", "-m", "venv", _]:
            pass
        case ["torchrun", *rest] | ["python", "-m", "torch.distributed.run", *rest]:
            launched = torchrun_parser().parse_args(rest)
            check_program(launched.training_script, [w for w in launched.training_script_args if w != "..."])
        case ["python", "-m", module, *rest]:
            check_module(module, rest)
        case ["python", script, *rest] if script != "NAME":
            check_program(script, rest)
        case ["pytest", *rest]:
            for word in pytest_parser().parse_args(rest).files:
                assert (ROOT / word).is_file(), f"no file {word}"
        case ["wc" | "bash", *rest]:
            for word in rest:
                assert word.startswith("-") or (ROOT / word).is_file(), f"no file {word}"


def pytest_parser() -> argparse.ArgumentParser:
    """Of the options that documents use: a marker of ours, and pytest-xdist's."""
    markers = re.findall(r'^    "(\w+): ', text_of("pyproject.toml"), re.MULTILINE)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("files", nargs="*")
    parser.add_argument("-m", choices=[f"not {marker}" for marker in markers])
    parser.add_argument("-n", type=int)
    parser.add_argument("--dist", choices=["loadfile"])
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\n", " ", plain(text_of(name))))
    for link in links:
        if not link.startswith(("https://", "#")):
            assert ((ROOT / name).parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    for code in re.findall(r"`([^`\n]+)`", plain(text_of(name))):
        for word in code.split():
            ours = word.startswith(OURS) or re.fullmatch(r"[\w/]+\.py", word)
            if ours and not re.search(r"NAME|RECIPE|LABEL|/x\.yaml|\*", word) and not word.startswith(MADE):
                assert (ROOT / word.rstrip(",;:")).exists(), f"{name} names {word}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_taken_by_the_programs_parsers(name):
    for command in commands_in(text_of(name)):
        try:
            check_command(command)
        except (AssertionError, SystemExit, argparse.ArgumentError, configuration.ConfigError) as error:
            pytest.fail(f"{name}: {command}\n{error}")


def test_the_readme_has_a_command_of_each_kind():
    """So that the test above looks at something."""
    found = commands_in(text_of("README.md"))
    for program in ("accelerate launch train.py", "python walkthrough.py", "python infer.py", "python -m annotations"):
        assert any(command.startswith(program) for command in found), program


@pytest.mark.parametrize(
    "command",
    [
        "python infer.py --vidoe a.mp4",
        "accelerate launch --num_proceses 4 train.py",
        "torchrun --nproc_per_node 2 train.py --stesp 3",
        "torchrun --nproces 2 train.py",
        "accelerate launch train.py --config recipes/gone.yaml",
        "python train.py --steps many",
        "python walkthrough.py --world_traine_videos 3",
        "python -m benchmarks.gone",
        "python -m annotations.samples --paht x",
        "pytest tests/test_gone.py",
        'pytest -m "not gone"',
    ],
)
def test_a_wrong_command_is_noticed(command, capsys):
    with pytest.raises((AssertionError, SystemExit, configuration.ConfigError)):
        check_command(command)


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 120


def test_the_readme_s_scores_are_lines_of_the_main_job_s_results():
    """`python -m benchmarks.main_job` writes both tables: that over seeds, and the one of a console."""
    section = text_of("README.md").partition("## Try it")[2].partition("\n## ")[0]
    row = re.compile(r"(?:score|mIoU|accuracy|coarse|zoom_accuracy|Acc@GQA|format)\b")
    lines = [line for line in section.splitlines() if row.match(line)]
    assert len(lines) == 7
    assert not set(lines) - set(text_of("benchmarks/results/main_job-default.md").splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_named_exist(name):
    known = {*configuration.OPTIONS, "config", "help"}
    for program in commands.EXTRA:
        known |= {action.dest for action in commands.extra(program, "one line")._actions}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    sources += [(ROOT / "report" / "curves.py").read_text(), (ROOT / "annotations" / "samples.py").read_text()]
    known |= {option for source in sources for option in re.findall(r'"--([\w-]+)"', source)}
    launchers = [*launch_command_parser()._actions, *torchrun_parser()._actions]
    known |= {option[2:] for action in launchers for option in action.option_strings}
    known |= {"check", "name", "dist"}  # of ruff, of a placeholder, and of pytest-xdist
    for code in re.findall(r"`([^`\n]+)`", plain(text_of(name))):
        for option in re.findall(r"(?<!\S)--([a-z][a-z_-]*)", code):
            assert option in known, f"{name} names --{option}"


def test_options_in_tables_of_paper_and_code_exist():
    cells = [line.split("|")[1] for line in text_of("docs/paper_and_code.md").splitlines() if line.startswith("| `")]
    for option in [option for cell in cells for option in re.findall(r"`(\w+)`", cell)]:
        assert option in configuration.OPTIONS, option

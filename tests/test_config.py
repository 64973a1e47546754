"""Options: where they come from, and how mistakes are named."""

from __future__ import annotations

import argparse
import ast
import functools
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import config as configuration
from config import (
    OPTION_TYPES,
    OPTIONS,
    PROGRAMS,
    Config,
    ConfigError,
    check,
    decisive,
    parse,
    parse_for_model,
    parse_with,
    read_recipe,
    save,
    suiting_recipe,
)

ROOT = Path(configuration.__file__).parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 7\nlr: 1e-6\nresume: false\n")
    return path


def test_command_line_over_recipe_over_defaults(recipe):
    config = parse(["--config", str(recipe), "--steps", "9", "--kl=k3", "--beta_time", "-1"])
    assert (config.steps, config.lr, config.kl, config.group_size) == (9, 1e-6, "k3", 8)
    assert isinstance(config.lr, float)  # YAML reads 1e-6, without a point, as text


def test_without_config_the_default_recipe_counts():
    assert asdict(parse([])) == asdict(Config(**read_recipe(configuration.DEFAULT_RECIPE)))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["--resume"], True), (["--resume", "true"], True), (["--resume", "False"], False), (["--resume=true"], True)],
)
def test_switches(recipe, arguments, value):
    assert parse(["--config", str(recipe), *arguments]).resume is value


def test_every_recipe_is_valid_and_every_key_known():
    assert len(RECIPES) >= 2
    for path in (path for path in RECIPES if "accelerate" not in path.name):
        parse(["--config", str(path)])


def test_a_saved_configuration_reads_back(tmp_path, recipe):
    config = parse(["--config", str(recipe), "--out", "123", "--system_prompt", "", "--lr", "3.3e-7"])
    save(config, tmp_path / "saved.yaml")
    assert parse(["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize("name", ["group_sise", "groupsize", "GROUP_SIZE", "group-sise"])
def test_a_misspelt_option_names_the_nearest(recipe, name):
    expected = f"there is no option '{name}'; the nearest is 'group_size'"
    with pytest.raises(ConfigError, match=f"command line: {expected}"):
        parse(["--config", str(recipe), f"--{name}", "4"])
    recipe.write_text(f"{name}: 4\n")
    with pytest.raises(ConfigError, match=f"{re.escape(str(recipe))}: {expected}$"):
        parse(["--config", str(recipe)])


def test_nothing_is_suggested_that_is_not_near(recipe):
    with pytest.raises(ConfigError, match=r"command line: there is no option 'quantum'; --help lists all$"):
        parse(["--config", str(recipe), "--quantum", "4"])
    recipe.write_text("quantum: 4\n")
    with pytest.raises(ConfigError, match=r"there is no option 'quantum'$"):
        parse(["--config", str(recipe)])


def test_the_command_line_takes_hyphens_for_underscores(recipe):
    config = parse(["--config", str(recipe), "--group-size", "4", "--system-prompt=a-b-c", "--eval-controls"])
    assert (config.group_size, config.system_prompt, config.eval_controls) == (4, "a-b-c", True)
    assert parse(["--config", str(recipe), "--system_prompt", "no --group-size here"]).group_size == 8
    recipe.write_text("group-size: 4\n")  # a recipe has one spelling
    with pytest.raises(ConfigError, match="there is no option 'group-size'; the nearest is 'group_size'"):
        parse(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "many"], "command line: steps takes a int, not 'many'"),
        (["--steps", "2.5"], "steps takes a int"),
        (["--steps", ""], "steps takes a int"),
        (["--steps"], "command line: argument --steps: expected one argument"),
        (["--lr", "fast"], "lr takes a float"),
        (["--resume", "runs/x"], "resume takes a bool, not 'runs/x'"),
        (["--kl", "k4"], "kl is one of exact, k1, k2, k3, none, not 'k4'"),
        (["steps", "3"], "'steps' belongs to no option"),
        (["-steps", "3"], "'-steps' belongs to no option"),
        (["--step", "3"], "there is no option 'step'; the nearest is 'steps'"),
        (["--lr", "nan"], "lr must be finite"),
        (["--temperature", "inf"], "temperature must be finite"),
        (["--steps", "0"], "steps must be positive, not 0"),
        (["--seed", "12345678901234"], "seed must be at most 4294967295, not 12345678901234"),
        (["--beta=-0.1"], "beta must not be negative"),
        (["--v_min", "40", "--v_max", "39"], "v_min = 40 must be at most v_max = 39"),
        (["--budget", "10", "--v_min", "16"], "v_min = 16 must be at most .* budget = 10"),
        (["--zoom_budget", "2"], "v_min = 16 must be at most zoom_budget = 2"),
        (["--zoom_v_max", "2"], "v_min = 16 must be at most zoom_v_max = 2"),
        (["--least_frames", "5"], "least_frames = 5 must be at most max_frames = 0"),
        (["--world_min_duration", "21"], "world_min_duration = 21 must be at most world_duration = 20"),
        (["--beta_time", "0", "--kl", "k3"], "needs kl = exact, not k3"),
        (["--kl_clamp", "10"], "kl_clamp = 10.0 clamps the k3 estimate, which needs kl = k3, not exact"),
        (["--kl_clamp=-1", "--kl", "k3"], "kl_clamp must not be negative"),
        (["--alpha", "1.2"], "alpha is a share, at most 1, not 1.2"),
        (["--updates_per_rollout", "7"], "updates_per_rollout = 7 must divide prompts_per_step = 64"),
        (
            ["--repeated_zoom", "0.5", "--max_redraws", "2"],
            "repeated_zoom = 0.5 needs .* max_redraws = 2 and",
        ),
        (
            ["--reference_device", "cpu", "--zoom_judge", "reference", "--zoom_answer", "decode"],
            "reference_device = cpu copies all layers for every token .* needs zoom_answer = letters",
        ),
    ],
)
def test_mistakes_on_the_command_line(recipe, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        parse(["--config", str(recipe), *arguments])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not NoneType"),
        ("- steps\n", "not list"),
        ("steps: [1]\n", r"steps takes a int, not \[1\]"),
        ("steps: 2.5\n", "steps takes a int, not 2.5"),
        ("steps: true\n", "steps takes a int, not True"),
        ("steps:\n", "steps takes a int, not None"),
        ("resume: 1\n", "resume takes a bool, not 1"),
        ("kl: no\n", "kl takes a str, not False"),  # YAML reads no as False: say so instead of guessing
        ("steps: 3: 4\n", "not YAML"),
        ("1: 2\n", "there is no option 1"),
    ],
)
def test_mistakes_in_a_recipe(recipe, content, expected):
    recipe.write_text(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(recipe))}: .*{expected}"):
        read_recipe(recipe)


# Lists that name the one before them nine times: 9 to the power of 8 words, were they written out.
LISTS = [", ".join([word] * 9) for word in ("x", "*a", "*b", "*c", "*d", "*e", "*f", "*g")]
BOMB = ", ".join(f"&{name} [{words}]" for name, words in zip("abcdefgh", LISTS, strict=True))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"steps: [{BOMB}]\n".encode(), "steps takes a int"),
        (f"[{BOMB}]\n".encode(), "not list"),
        (b"steps: 3 # caf\xe9\n", "not YAML: .*utf-8"),
        (b"steps: " + b"[" * 20000, "not YAML"),
        (b"steps: 2020-01-01\n", "steps takes a int, not datetime.date"),
        (b"lr: " + b"9" * 5000, "not YAML: .*digits"),
        (b"steps: !!python/object/apply:os.system [ls]\n", "not YAML"),
        (b"k" * 1000 + b": 3\n", "there is no option 'kkk"),
    ],
)
def test_a_hostile_recipe_is_one_short_line(recipe, content, expected):
    recipe.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as error:
        read_recipe(recipe)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"system_prompt": "Be brief.<|im_end|>"}, r"system_prompt has the special token <\|im_end\|>"),
        ({"system_prompt": "<|video_pad|>"}, r"system_prompt has the special token <\|video_pad\|>"),
        ({"system_prompt": "caf\udce9"}, r"system_prompt has half a character, \\udce9"),
        ({"out": ""}, "out is empty"),
        ({"train_data": "a\0b"}, "train_data has a NUL character"),
    ],
)
def test_texts_that_no_prompt_and_no_path_can_be(options, expected):
    with pytest.raises(ConfigError, match=expected):
        check(Config(**options))


def test_a_missing_recipe_names_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such recipe; there are .*cpu_world.yaml"):
        parse(["--config", str(tmp_path / "nowhere.yaml")])


def test_every_number_has_a_range():
    """A new number must be put into a range, or named here because any finite value works."""
    free = {"beta_time", "v_max"}
    for name, about in OPTIONS.items():
        if OPTION_TYPES[name] in (int, float):
            assert (about["above"] is not None) + (about["least"] is not None) + (name in free) == 1, name
            wrong = {limit: value for limit in ("above", "least") if (value := about[limit]) is not None}
            for value in wrong.values():
                with pytest.raises(ConfigError, match=f"{name} must"):
                    check(Config(**{name: value - 1}))
            if "above" in wrong:
                with pytest.raises(ConfigError, match=f"{name} must"):
                    check(Config(**{name: wrong["above"]}))


def source_of(module: str) -> Path | None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path if path.is_file() else None


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree; the first one is the module."""
    return list(ast.walk(ast.parse(path.read_text())))


def modules_of(program: str) -> dict[str, list[ast.AST]]:
    """The nodes of a program and of all files of ours that it imports."""
    found, todo = {}, [program]
    while todo:
        name = todo.pop()
        path = source_of(name)
        if path is None or name in found or name == "config":
            continue
        found[name] = nodes_of(path)
        for node in found[name]:
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@functools.cache
def options_within_reach(program: str) -> set[str]:
    """The options that are read by functions and classes whose names a program's `main` mentions, or these mention, and
    so on: no fewer than those it reads.
    """
    modules = modules_of(program)
    read_by_property = {
        node.name: {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
        for node in nodes_of(Path(configuration.__file__))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    named: dict[str, list[ast.AST]] = {}
    for nodes in modules.values():
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                named.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.alias) and node.asname:
                named.setdefault(node.asname, []).append(ast.Name(node.name.split(".")[-1]))
        for node in nodes[0].body:  # tables of functions
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                named.setdefault(ast.unparse(target), []).append(node)
    [main] = [node for node in modules[program][0].body if getattr(node, "name", None) == "main"]
    todo, seen, found = [main], set(), set()
    while todo:
        for node in ast.walk(todo.pop()):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(("config", "grounding")):
                found |= {node.attr, *read_by_property.get(node.attr, ())} & set(OPTIONS)
            if name and name not in seen:
                seen.add(name)
                todo += named.get(name, [])
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_program_offers_is_read_within_its_reach(program):
    """The other direction, that it offers what it reads, is checked by conftest.py whenever a test runs a program."""
    offered = {name for name, about in OPTIONS.items() if program in about["used_by"]}
    assert offered <= options_within_reach(program)


def test_reach_has_limits():
    assert not {"beta", "lr", "steps", "tokenadv"} & options_within_reach("evaluate")


def test_every_option_has_a_reader_and_a_sentence():
    for name, about in OPTIONS.items():
        assert about["used_by"] and set(about["used_by"]) <= set(PROGRAMS), name
        assert about["group"] and about["text"].endswith("."), name


def test_a_program_takes_only_the_options_that_it_reads(recipe):
    with pytest.raises(ConfigError, match=r"command line: epochs is read by sft\.py only$"):
        parse(["--config", str(recipe), "--epochs", "2"], program="train")
    with pytest.raises(ConfigError, match=r"lr is read by train\.py, sft\.py only$"):
        parse(["--config", str(recipe), "--lr=2"], program="evaluate")
    recipe.write_text("epochs: 2\n")  # a recipe is read by several programs
    assert parse(["--config", str(recipe)], program="train").epochs == 2


def test_the_options_that_decide_an_answer_keep_their_names():
    """Journals have them in "made_with": another name, or one more, and nothing can be resumed."""
    names = "template system_prompt question_first fps zoom_fps budget zoom_budget v_min v_max zoom_v_max "
    names += "paired_frames min_frames max_frames max_turns max_calls frames_per_call total_frames state_duration "
    names += "max_tokens zoom_sees_think zoom_answer mixed_precision outer_tags"
    assert set(decisive(Config())) == set(names.split())
    assert set(decisive(Config(), "curate", configuration.SEEN)) == {"fps", "budget", "v_min", "v_max", "paired_frames"}
    assert decisive(Config(fps=3))["fps"] == 3


def test_a_resumed_run_may_change_what_leaves_its_numbers_alone():
    names = "out resume overwrite tracker save_every n_episodes threads max_failed_videos "
    names += "log_every eval_every eval_before keep_best keep_checkpoints"
    assert {name for name, about in OPTIONS.items() if about["free"]} == set(names.split())


# ---------------------------------------------------------------- a script's own options


def own_options() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description="A script.", add_help=False)
    own.add_argument("--colour", choices=("red", "blue"))
    own.add_argument("--out", help="where this script writes")
    return own


def test_a_script_has_options_of_its_own_beside_these(recipe):
    given, config = parse_with(own_options(), ["--config", str(recipe), "--colour", "red", "--steps", "9"])
    assert (given.colour, given.out, given.lr, config.steps) == ("red", None, None, 9)
    given, config = parse_with(own_options(), ["--config", str(recipe), "--out", "there"])
    assert given.out == config.out == "there"


def test_the_recipe_can_depend_on_what_is_given(recipe, tmp_path):
    (tmp_path / "other.yaml").write_text("steps: 77\n")

    def choose(given):
        return tmp_path / "other.yaml" if given.colour == "blue" else recipe

    assert parse_with(own_options(), ["--colour", "blue"], choose)[1].steps == 77
    assert parse_with(own_options(), ["--colour", "blue", "--config", str(recipe)], choose)[1].steps != 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--color", "red"], "no option 'color'; the nearest is 'colour'"),
        (["--step", "3"], "no option 'step'; the nearest is 'steps'"),
        (["--colour", "green"], "argument --colour: invalid choice: 'green'"),
        (["--colour"], "argument --colour: expected one argument"),
        (["red"], "'red' belongs to no option"),
    ],
)
def test_mistakes_among_both_kinds_of_options(arguments, message):
    with pytest.raises(ConfigError, match=f"command line: .*{message}"):
        parse_with(own_options(), arguments)


def test_help_shows_both_kinds_of_options(capsys):
    with pytest.raises(SystemExit):
        parse_with(own_options(), ["--help"])
    printed = capsys.readouterr().out
    assert "A script." in printed and "--colour {red,blue}" in printed and "where this script writes" in printed
    assert "--budget" in printed and printed.count("--out ") == 1
    assert "[8192]" in printed and "[paper | code | time | off]" in printed  # defaults and choices


def test_a_model_is_shown_videos_as_it_is_used_to(tmp_path):
    assert suiting_recipe(None) == suiting_recipe(str(configuration.BUILT_IN)) == configuration.DEFAULT_RECIPE
    assert suiting_recipe("Qwen/Qwen2.5-VL-7B-Instruct").name == "long_video.yaml"
    (tmp_path / "config.yaml").write_text("fps: 3\n")
    assert suiting_recipe(str(tmp_path / "checkpoint")) == tmp_path / "config.yaml"
    assert suiting_recipe(str(tmp_path / "checkpoint"), "nextgqa") == tmp_path / "config.yaml"
    (tmp_path / "checkpoint").mkdir()
    save(Config(), tmp_path / "checkpoint" / "config.yaml")  # where a checkpoint is published, it has its own
    assert suiting_recipe(str(tmp_path / "checkpoint")) == tmp_path / "checkpoint" / "config.yaml"


@pytest.mark.parametrize(
    ("format", "budget", "v_min"), [("nextgqa", 8192, 16), ("rextime", 8192, 16), ("cgbench", 16384, 64)]
)
def test_short_benchmarks_are_shown_as_the_paper_does(format, budget, v_min):
    """Zoom-Zero, Appendix B: 1 fps, a context of 8,192 on NExT-GQA and ReXTime, of 16,384 on long videos."""
    config = parse_for_model(own_options(), ["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--data_format", format])[1]
    assert (config.fps, config.budget, config.v_min, config.v_max) == (1, budget, v_min, 768)


def test_the_model_that_is_asked(recipe, tmp_path):
    def model(*arguments):
        return parse_for_model(own_options(), list(arguments))[1].model

    assert model() == str(configuration.BUILT_IN)  # from any folder
    assert model("--config", str(ROOT / "recipes" / "long_video.yaml")) == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert model("--config", str(recipe), "--model", "mine") == "mine"
    (tmp_path / "config.yaml").write_text("model: where/it/started\n")  # a run's
    assert model("--model", str(tmp_path / "checkpoint")) == str(tmp_path / "checkpoint")


def test_a_recipe_that_sets_what_the_training_program_does_not_read_is_warned_of_by_name(tmp_path, caplog):
    path = tmp_path / "r.yaml"
    path.write_text("epochs: 2\nlr: 1.0e-3\ngroup_size: 3\nbeta: 0.01\nkl: k3\n")  # beta as it is anyway
    parse(["--config", str(path)], program="train")
    (record,) = caplog.records
    assert record.getMessage() == f"{path} sets what train.py does not read: epochs (sft.py only)"
    caplog.clear()
    parse(["--config", str(path)], program="sft")
    (record,) = caplog.records
    named = "group_size (train.py, filters.py, exemplars.py only), kl (train.py only)"
    assert record.getMessage() == f"{path} sets what sft.py does not read: {named}"
    caplog.clear()
    parse(["--config", str(path)], program="evaluate")  # asks the policy of that run
    save(parse(["--config", str(path), "--epochs", "0"]), path)  # every option, most as they are anyway
    parse(["--config", str(path)], program="train")
    assert not caplog.records


@pytest.mark.parametrize("recipe", [path for path in RECIPES if not path.stem.startswith("accelerate")], ids=str)
def test_our_own_recipes_set_what_their_training_program_reads(recipe, caplog):
    parse(["--config", str(recipe)], program="sft" if "sft" in recipe.stem else "train")
    assert [record.getMessage() for record in caplog.records if "group_size" not in record.getMessage()] == []

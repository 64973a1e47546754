"""Zoom-Zero's tables: what is kept of runs, what is run again, statistics over seeds."""

import json
import shutil
from types import SimpleNamespace

import pytest

from benchmarks import ledger as ledgers
from benchmarks import zoom_zero
from benchmarks.ledger import Ledger, blocks
from benchmarks.seeds import figure, flip_test, interval, paired_cells
from benchmarks.zoom_zero import ledger_of, options_of, reached, report, train
from config import parse
from report.curves import read_metrics

SCORES = dict.fromkeys((*zoom_zero.SCORES, *zoom_zero.COSTS), 0.5)


def ended(ledger: Ledger, name: str, seed: int, value: float) -> None:
    """A run that ended with this mIoU."""
    scores = {"all": {**SCORES, "mIoU": value}, "by_kind": {}}
    scores |= {f"by_{by}": {"2 to 5": {"mIoU": value}} for by in ("duration", "clue_length", "clue_portion")}
    curves = {"reward/iou_mean": [0.2, value], "reward/accuracy_mean": [0.3, 0.4]}
    ledger.add(name, seed, "started")
    ledger.add(name, seed, "ended", before=scores, after=scores, curves=curves, seconds=1)


@pytest.mark.parametrize("name", zoom_zero.VARIANTS)
def test_options_of_variants_are_those_of_training(name):
    config = parse(options_of(name), program="train")
    assert config.model == "checkpoints/tiny"  # the main job's recipe


def test_statistics_of_few_seeds_by_hand():
    # Deviation 1, five values: 2.776 / sqrt(5).
    mean, half = interval([4.0, 4.0, 5.0, 6.0, 6.0])
    assert mean == 5.0 and half == pytest.approx(2.776 / 5**0.5, abs=1e-9)
    assert interval([3.0]) == (3.0, 0.0) and figure([0.5, 0.5]) == "0.500 ± 0.000"
    assert flip_test([1.0, 2.0, 3.0]) == 2 / 8  # all signs alike are as far off, and no others
    assert paired_cells([]) == ["", "", ""] and paired_cells([0.5, 0.5, -0.1])[1:] == ["0.500", "2"]
    assert flip_test([1.0, -1.0]) == 1.0 and flip_test([2.0, 1.0, -1.0]) == 6 / 8
    assert blocks([1.0] * 10 + [2.0] * 10 + [9.0] * 3) == [1.0, 2.0]
    assert reached([0.2, 0.59, 0.6, 0.5], 0.6) == 30 and reached([0.1], 0.6) is None


def test_only_runs_from_this_start_with_these_options_count(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    ended(ledger_of(path, "other"), "grpo", 0, 0.9)
    ledger = ledger_of(path, "mine")
    ended(ledger, "grpo", 1, 0.5)
    ledger.add("zoom", 1, "started")
    assert list(ledger.ended()) == [("grpo", 1)] and len(ledger.lines()) == 3
    monkeypatch.setitem(zoom_zero.VARIANTS, "grpo", zoom_zero.variant("changed", "--beta 1"))
    assert ledger.ended() == {}


def test_tables_pair_seeds_and_say_how_many_runs_were_started(tmp_path):
    ledger = ledger_of(tmp_path / "rows.jsonl", "mine")
    for seed, (before, after) in enumerate([(0.5, 0.7), (0.6, 0.7)]):
        ended(ledger, "grpo", seed, before)
        ended(ledger, "both-code", seed, after)
    ended(ledger, "zoom", 0, 0.4)
    ledger.add("g2", 0, "started")
    ledger.add("g2", 0, "failed", code=1)
    ledger.add("one-stage", 0, "started")
    ledger.add("one-stage", 0, "ended", after={"all": SCORES, "by_kind": {}})
    text = report(ledger, "x")
    assert "Runs started 7, ended 6, failed 1;" in text
    lines = {line.split(" | ")[0]: line for line in text.split("## Responses")[0].splitlines()}
    both = lines["| + both, as released"].split(" | ")
    assert both[1] == "2" and both[2] == "0.700 ± 0.000" and both[-2:] == ["0.150 ± 0.635", "0.500 |"]
    assert both[-4:-2] == ["0.450 ± 0.000", "20 (2 of 2)"]  # area, and the steps to the level
    first = lines["| GRPO: format + IoU + accuracy, summed"].split(" | ")
    assert first[2] == "0.550 ± 0.635" and first[-3] == "20 (1 of 2)"
    assert lines["| + R_zoom"].split(" | ")[-3] == "never (of 1)"
    # Of mIoU 0.7 - 0.2 and 0.7 - 0.8; of the area, of curves that begin at 0.2, half. Deviation 0.42, two values.
    assert "| R_zoom | 0 |" in text and "| G = 8 instead of 4 | 0 |" in text
    ended(ledger, "g4", 0, 0.2)
    ended(ledger, "g4", 1, 0.8)
    [line] = [line for line in report(ledger, "x").splitlines() if line.startswith("| G = 8 instead of 4 |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[:4] == ["2", "0.200 ± 3.812", "1.000", "1"] and cells[-3:] == ["0.100 ± 1.906", "1.000", "1"]
    assert "| + both, times in think as glue | 0 |" in text and "| one-stage | 1 | 0.500 ± 0.000" in text
    zoom_zero.draw(ledger.ended(), ("grpo", "both-code", "both-time"), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_is_noted_when_it_starts_and_when_it_ends(code, tmp_path, monkeypatch):
    monkeypatch.setattr(zoom_zero, "RUNS", tmp_path)
    seen = []

    def run(command, **_):
        seen.append((command, ledger_of(tmp_path / "rows.jsonl", "mine").lines()))
        out = tmp_path / "grpo-3"
        out.mkdir()
        names = ("all", "by_kind", "by_duration", "by_clue_length", "by_clue_portion")
        parts = {name: {"mIoU": 0.5} for name in names}
        (out / "evaluation.json").write_text(json.dumps({"before": parts, "after": parts}))
        steps = [{"step": k, "reward/iou_mean": k / 10, "kl/text": 0.0} for k in range(20)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
        (out / "results-before.jsonl").write_text("rows")
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(ledgers.subprocess, "run", run)
    ledger = ledger_of(tmp_path / "rows.jsonl", "mine")
    train(ledger, "grpo", 3, ("--cache", "elsewhere"))
    [(command, before)] = seen
    assert "--eval_before" not in command
    assert [line["event"] for line in before] == ["started"] and "--cache elsewhere --tokenadv off" in " ".join(command)
    last = ledger.lines()[-1]
    assert last["event"] == ("failed" if code else "ended")
    if not code:
        assert last["curves"] == {"reward/iou_mean": [0.45, 1.45]} and last["after"]["all"] == {"mIoU": 0.5}
        assert [row["step"] for row in read_metrics(tmp_path / "grpo-3" / "metrics.jsonl")] == list(range(20))
        shutil.rmtree(tmp_path / "grpo-3")
        train(ledger, "grpo", 3, ())
        known = tmp_path / "before-mine.jsonl"  # the start is not asked again
        assert f"--eval_before {known} --overwrite" in " ".join(seen[1][0]) and known.read_text() == "rows"


def test_another_recipe_or_other_weights_are_another_beginning(tmp_path):
    weights, recipe = tmp_path / "model.safetensors", tmp_path / "recipe.yaml"
    weights.write_bytes(b"w")
    recipe.write_text("# a comment\nlr: 1\nsteps: 2\n")
    first = ledgers.beginning(tmp_path, recipe)
    recipe.write_text("steps: 2\nlr: 1\n")
    assert ledgers.beginning(tmp_path, recipe) == first
    recipe.write_text("steps: 2\nlr: 3\n")
    other = ledgers.beginning(tmp_path, recipe)
    weights.write_bytes(b"x")
    assert len({first, other, ledgers.beginning(tmp_path, recipe)}) == 3

"""report.py: curves and mIoU by evidence; the figures are caught before they are written."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import report
from report import ReportError

deterministic = settings(derandomize=True, deadline=None, max_examples=60)


def test_it_needs_none_of_our_files():
    tree = ast.parse(Path(report.__file__).read_text())
    imports = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.walk(tree)
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    ours = {path.stem for path in Path(report.__file__).parent.glob("*.py")}
    assert not {name.split(".")[0] for name in imports} & ours


def write_run(folder, rows, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def training(n, top=0.8):
    return [
        {"step": s, "reward/iou_mean": top * s / n, "reward/iou_std": 0.1, "kl/time": 0.01 * s, "lr": 1e-4, "note": "x"}
        for s in range(1, n + 1)
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been written."""
    caught = []
    monkeypatch.setattr(report, "save_figure", lambda figure, out: caught.append(figure))
    return caught


# Curves


def test_curves_write_a_png_with_a_panel_per_logged_key(tmp_path):
    keys = report.plot_curves([write_run(tmp_path / "run", training(40))], tmp_path / "new" / "curves.png")
    assert keys == ["reward/iou_mean", "kl/time", "lr"]  # no panel for what is not logged, nor for the band and text
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_panels_follow_the_keys_and_runs_differ_without_colour(tmp_path, figures):
    a = write_run(tmp_path / "a", training(40))
    b = write_run(tmp_path / "b", [{**row, "my/own": 1.0} for row in training(30, top=0.5)])
    keys = report.plot_curves({"TokenAdv": a / "metrics.jsonl", "GRPO": b}, "unused.png")
    panels = figures[0].axes
    assert keys == ["reward/iou_mean", "kl/time", "lr", "my/own"]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "IoU reward",
        "KL, time tokens",
        "Learning rate",
        "my/own",
    ]
    lines = [line for line in panels[0].lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["TokenAdv", "GRPO"]
    assert len({line.get_marker() for line in lines}) == len({line.get_linestyle() for line in lines}) == 2
    raw = [line for line in panels[0].lines if line.get_label().startswith("_")]
    np.testing.assert_allclose(raw[1].get_ydata(), [0.5 * s / 30 for s in range(1, 31)])
    assert all(line.get_alpha() < 0.5 for line in raw)
    assert [line.get_label() for line in panels[3].lines if not line.get_label().startswith("_")] == ["GRPO"]
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {"TokenAdv", "GRPO"}
    low, high = panels[0].get_ylim()
    assert -0.1 < low < 0 and 1 < high < 1.1  # rewards share one scale


def test_a_single_run_shows_its_spread_and_several_do_not(tmp_path, figures):
    runs = [write_run(tmp_path / name, training(40)) for name in "ab"]
    report.plot_curves(runs[:1], "unused.png")
    report.plot_curves(runs, "unused.png")
    assert len(figures[0].axes[0].collections) == 1
    assert len(figures[1].axes[0].collections) == 0
    band = figures[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.79 + 0.1)  # the last smoothed mean is that of steps 39 and 40


def test_chosen_keys_come_in_the_given_order_and_a_misspelt_one_is_refused(tmp_path, figures):
    run = write_run(tmp_path / "run", training(3))
    assert report.plot_curves([run], "unused.png", ["lr", "reward/iou_std"]) == ["lr", "reward/iou_std"]
    with pytest.raises(ReportError, match=r"'reward/iou_men'.*nearest.*'reward/iou_mean'"):
        report.plot_curves([run], "unused.png", ["reward/iou_men"])
    with pytest.raises(ReportError, match="no run has logged numbers as 'note'"):
        report.plot_curves([run], "unused.png", ["note"])


def test_smoothing_is_a_centred_mean_that_skips_gaps():
    np.testing.assert_allclose(report.smooth(np.array([1.0, 2.0, 6.0, 0.0]), 3), [1.5, 3.0, 8 / 3, 3.0])
    np.testing.assert_allclose(report.smooth(np.array([1.0, np.nan, 3.0]), 3), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(report.smooth(np.array([4.0, np.nan]), 1), [4.0, np.nan])


def test_steps_run_again_after_a_resume_count_once(tmp_path):
    rows = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": s, "loss": 2.0} for s in (2, 3, 4)]
    read = report.read_metrics(write_run(tmp_path, rows) / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in read] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_values_that_are_not_finite_leave_a_gap(tmp_path, figures):
    text = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n{"step": 3, "loss": Infinity}\n{"step": 4}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    report.plot_curves([tmp_path], "unused.png")
    line = figures[0].axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [np.nan, 3.0, np.nan])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": 0}\n')
    report.plot_curves([tmp_path], "unused.png")
    assert [len(axes.lines) for axes in figures[1].axes] == [0, 1]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "note": "\udce4'])
def test_a_broken_last_line_is_what_a_crash_leaves(tmp_path, tail):
    write_run(tmp_path, training(2))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    assert [row["step"] for row in report.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1}\n\n{"step": 2, "lo\n{"step": 3}\n', r"metrics\.jsonl, row 3: not JSON"),
        ('{"step": 1}\n[1, 2]\n', r"metrics\.jsonl, row 2: expected an object"),
        ('{"loss": 1}\n', r"metrics\.jsonl, row 1: .*'step'"),
        ('{"step": true}\n', r"metrics\.jsonl, row 1: .*'step'"),
        ('{"step": NaN}\n', r"metrics\.jsonl, row 1: .*'step'"),
        ("", r"metrics\.jsonl: no complete row"),
        ('{"st', r"metrics\.jsonl: no complete row"),
    ],
)
def test_any_other_broken_row_is_named(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ReportError, match=message):
        report.read_metrics(tmp_path / "metrics.jsonl")


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="no run"):
        report.plot_curves([], tmp_path / "x.png")
    with pytest.raises(ReportError, match="nothing but steps"):
        report.plot_curves([write_run(tmp_path / "run", [{"step": 1}])], tmp_path / "x.png")
    with pytest.raises(ReportError, match=r"elsewhere.*no such file"):
        report.plot_curves([tmp_path / "elsewhere"], tmp_path / "x.png")


def test_runs_are_named_by_as_many_folders_as_needed(tmp_path):
    folders = [write_run(tmp_path / seed / "run", training(2)) for seed in ("seed0", "seed1")]
    assert list(report.label_runs(folders[:1])) == ["run"]
    assert list(report.label_runs(folders)) == ["seed0/run", "seed1/run"]
    assert report.label_runs([folders[0] / "metrics.jsonl"]) == {"run": folders[0] / "metrics.jsonl"}
    with pytest.raises(ReportError, match="named twice"):
        report.label_runs([folders[0], folders[0]])


def test_command_line(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, training(5))) for name in "ab"]
    report.main([*runs, "--out", str(tmp_path / "c.png"), "--keys", "lr"])
    assert "1 panels" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "missing"), "--out", str(tmp_path / "d.png")])
    assert stop.value.code == 2 and "missing: no such file" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()


# mIoU by evidence


def result(i, glue, iou, duration=20.0, **fields):
    row = {"id": f"q{i}", "video": "v.mp4", "question": "What?", "kind": "fine", "answer": "A", "predicted_answer": "B"}
    return row | {"zoom_answer": "A", "glue": glue, "spans": glue, "iou": iou, "duration": duration} | fields


def test_bins_and_means_by_hand(figures):
    lengths = [1, 2, 3, 4, 5, 6]
    iou = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    ours = [result(i, [[2, 2 + n]], v) for i, (n, v) in enumerate(zip(lengths, iou, strict=True))]
    ours.append(result(9, [], None))  # not annotated: left out
    base = [{**row, "iou": row["iou"] and row["iou"] / 2} for row in reversed(ours)]
    counts = report.plot_by_clue({"GRPO": base, "Zoom-Zero": ours}, "unused.png", bins=2)
    # The median of 1..6 lies between the third and fourth; the nearest value is 3 (index 2.5 rounds down to even).
    assert counts == {"duration": [2, 4], "proportion": [2, 4]}
    for axes in figures[0].axes:
        means = {c.get_label(): c[0].get_ydata().astype(float) for c in axes.containers}
        np.testing.assert_allclose(means["Zoom-Zero"], [0.1, 0.7])
        np.testing.assert_allclose(means["GRPO (baseline)"], [0.05, 0.35])
        np.testing.assert_allclose(means["whole video as answer"], [1.5 / 20, 4.5 / 20])
        styles = {(c[0].get_linestyle(), c[0].get_marker()) for c in axes.containers}
        assert len(styles) == 3
        drawn = {c.get_label(): c[0] for c in axes.containers}
        assert list(drawn) == ["Zoom-Zero", "GRPO (baseline)", "whole video as answer"]
        assert drawn["GRPO (baseline)"].get_markerfacecolor() == "white"
        assert drawn["Zoom-Zero"].get_markerfacecolor() == drawn["Zoom-Zero"].get_color() == report.COLOURS[0]
    left, right = ([t.get_text() for t in axes.get_xticklabels()] for axes in figures[0].axes)
    assert left == ["1.0–3.0\nn = 2", "3.0–6.0\nn = 4"]
    assert right == ["5.0–15.0\nn = 2", "15.0–30.0\nn = 4"]


def test_evidence_is_measured_on_the_union_and_equal_lengths_share_a_bin(tmp_path, figures):
    rows = [result(i, [[0, 3], [2, 5], [7, 7]], 0.5) for i in range(3)]
    assert report.plot_by_clue({"a": rows}, "unused.png") == {"duration": [3], "proportion": [3]}
    assert [t.get_text() for t in figures[0].axes[0].get_xticklabels()] == ["5.0–5.0\nn = 3"]


def test_clue_picture_is_written(tmp_path):
    rng = np.random.default_rng(0)
    rows = [result(i, [[0, s]], u) for i, (s, u) in enumerate(rng.uniform(0, 1, (50, 2)).tolist())]
    counts = report.plot_by_clue({"a": rows, "b": rows}, tmp_path / "clue.png")
    assert counts["duration"] == counts["proportion"] and sum(counts["duration"]) == 50
    assert max(counts["duration"]) - min(counts["duration"]) <= 2
    with Image.open(tmp_path / "clue.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "no results"),
        ({"a": [result(1, [], None)]}, "a: no question has annotated evidence"),
        ({"a": [result(1, [[0, 1]], 1)], "b": [result(2, [[0, 1]], 1)]}, r"same questions.*\['q1', 'q2'\]"),
        ({"a": [result(1, [[0, 1]], 1, duration=None)]}, "a: a question without a duration"),
        ({"a": [result(1, [[0, 1]], None)]}, r"a: no IoU for \['q1'\]"),
        ({"a": [result(1, [[0, 1]], 1), result(1, [[0, 1]], 0)]}, "a: 2 rows with evidence but 1 different ids"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, results, message):
    with pytest.raises(ReportError, match=message):
        report.plot_by_clue(results, tmp_path / "clue.png")


@deterministic
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=6))
def test_union_length_counts_seconds(spans):
    covered = {second for start, length in spans for second in range(start, start + length)}
    assert report.union_length([(start, start + length) for start, length in spans]) == len(covered)


@deterministic
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 6))
def test_bins_are_never_empty(values, bins):
    edges = report.bin_edges(np.array(values, dtype=float), bins)
    counts = np.histogram(values, np.unique(edges) if len(np.unique(edges)) > 1 else 1)[0]
    assert counts.min() >= 1 and counts.sum() == len(values) and 2 <= len(edges) <= bins + 1


# Statistics of a data set


@deterministic
@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=9))
def test_round_edges_hold_all_values_and_no_end_is_empty(values):
    edges = report.round_edges(values)
    counts = np.histogram(values, edges)[0]
    assert counts.sum() == len(values) and counts[0] > 0 and counts[-1] > 0 and max(values) < edges[-1]
    assert {f"{edge:e}"[:8] for edge in edges} <= {"1.000000", "2.000000", "5.000000"}


def test_statistics_count_videos_and_questions(figures):
    report.plot_statistics([100, 150, 1200], [0.03, 0.04, 0.06, 0.5], "unused.png")
    left, right = figures[0].axes
    assert [bar.get_height() for bar in left.patches] == [2, 0, 0, 1]
    assert [t.get_text() for t in left.get_xticklabels()] == ["100–200", "200–500", "500–1000", "1000–2000"]
    assert [bar.get_height() for bar in right.patches] == [2, 1, 0, 0, 1]
    assert [t.get_text() for t in right.get_xticklabels()] == ["2–5", "5–10", "10–20", "20–50", "50–100"]
    assert left.get_title("left") == "videos: 3, median 150" and right.get_title("left") == "questions: 4, median 5"


@pytest.mark.parametrize("shares", [[], [0.0, 0.1], [float("nan")]])
def test_statistics_of_nothing_are_refused(shares):
    with pytest.raises(ReportError, match="shares must be positive"):
        report.plot_statistics([10.0], shares, "unused.png")

"""Pictures of results and data sets; the figures are caught before they are written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scored import result

from report import ReportError, plots
from report.drawing import LINE_COLOURS
from report.scores import bin_edges
from report.tables import clue_table
from rewards import union_length

deterministic = settings(derandomize=True, deadline=None, max_examples=60)


def test_bins_and_means_by_hand(figures):
    lengths = [1, 2, 3, 4, 5, 6]
    iou = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    ours = [result(i, [[2, 2 + n]], v) for i, (n, v) in enumerate(zip(lengths, iou, strict=True))]
    ours.append(result(9, [], None))  # not annotated: left out
    base = [{**row, "iou": row["iou"] and row["iou"] / 2} for row in reversed(ours)]
    counts = plots.plot_by_clue({"GRPO": base, "Zoom-Zero": ours}, "unused.png", bins=2)
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
        assert drawn["Zoom-Zero"].get_markerfacecolor() == drawn["Zoom-Zero"].get_color() == LINE_COLOURS[0]
    left, right = ([t.get_text() for t in axes.get_xticklabels()] for axes in figures[0].axes)
    assert left == ["1.0–3.0\nn = 2", "3.0–6.0\nn = 4"]
    assert right == ["5.0–15.0\nn = 2", "15.0–30.0\nn = 4"]


def test_evidence_is_measured_on_the_union_and_equal_lengths_share_a_bin(tmp_path, figures):
    rows = [result(i, [[0, 3], [2, 5], [7, 7]], 0.5) for i in range(3)]
    assert plots.plot_by_clue({"a": rows}, "unused.png") == {"duration": [3], "proportion": [3]}
    assert [t.get_text() for t in figures[0].axes[0].get_xticklabels()] == ["5.0–5.0\nn = 3"]


def test_the_table_of_evidence_and_its_picture_have_the_same_bins(figures):
    rng = np.random.default_rng(1)
    rows = [result(i, [[0, s]], u) for i, (s, u) in enumerate(rng.uniform(0.5, 9, (40, 2)).tolist())]
    counts = plots.plot_by_clue({"a": rows}, "unused.png")
    lines = [line.split("  ") for line in clue_table({"a": rows}).splitlines()[1:]]
    table = [
        (line[0], int(line[1] or line[2]))
        for line in ([cell.strip() for cell in line if cell.strip()] for line in lines)
    ]
    drawn = [t.get_text().split("\nn = ") for axes in figures[0].axes for t in axes.get_xticklabels()]
    units = [" s"] * len(counts["duration"]) + ["% of the video"] * len(counts["proportion"])
    assert table == [(name + unit, int(n)) for (name, n), unit in zip(drawn, units, strict=True)]
    assert [n for _, n in table] == counts["duration"] + counts["proportion"] and len(table) == 10


@pytest.mark.parametrize("label", [r"$\frac{$", "_hidden"])
def test_a_result_may_have_any_label(tmp_path, label):
    plots.plot_by_clue({label: [result(1, [[0, 1]], 1)]}, tmp_path / "clue.png")
    one = {"ECE": 0.1, "questions": 1, "bins": [{"questions": 1, "confidence": 0.5, "accuracy": 1.0}]}
    plots.plot_reliability({label: one}, tmp_path / "reliability.png")
    assert min((tmp_path / name).stat().st_size for name in ("clue.png", "reliability.png")) > 1000


def test_reliability_shows_each_bin_beside_the_diagonal(figures):
    parts = [{"questions": 1, "confidence": 0.3, "accuracy": 0.0}, {"questions": 3, "confidence": 0.9, "accuracy": 0.5}]
    plots.plot_reliability({"a": {"ECE": 0.375, "questions": 4, "bins": parts}}, "unused.png")
    diagonal, line = figures[0].axes[0].lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(line.get_xydata(), [[0.3, 0.0], [0.9, 0.5]])
    small, large = figures[0].axes[0].collections[0].get_sizes()
    assert large > 2 * small and line.get_label() == "a (ECE 0.375)"
    with pytest.raises(ReportError, match="no answer with a confidence"):
        plots.plot_reliability({}, "unused.png")


def test_clue_picture_is_written(tmp_path):
    rng = np.random.default_rng(0)
    rows = [result(i, [[0, s]], u) for i, (s, u) in enumerate(rng.uniform(0, 1, (50, 2)).tolist())]
    counts = plots.plot_by_clue({"a": rows, "b": rows}, tmp_path / "clue.png")
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
        plots.plot_by_clue(results, tmp_path / "clue.png")


@deterministic
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=6))
def test_union_length_counts_seconds(spans):
    covered = {second for start, length in spans for second in range(start, start + length)}
    assert union_length([(start, start + length) for start, length in spans]) == len(covered)


@deterministic
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 6))
def test_bins_are_never_empty(values, bins):
    edges = bin_edges(np.array(values, dtype=float), bins)
    counts = np.histogram(values, np.unique(edges) if len(np.unique(edges)) > 1 else 1)[0]
    assert counts.min() >= 1 and counts.sum() == len(values) and 2 <= len(edges) <= bins + 1


# Statistics of a data set


@deterministic
@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=9))
def test_round_edges_hold_all_values_and_no_end_is_empty(values):
    edges = plots.round_edges(values)
    counts = np.histogram(values, edges)[0]
    assert counts.sum() == len(values) and counts[0] > 0 and counts[-1] > 0 and max(values) < edges[-1]
    assert {f"{edge:e}"[:8] for edge in edges} <= {"1.000000", "2.000000", "5.000000"}


def test_statistics_count_videos_and_questions(figures):
    plots.plot_statistics([100, 150, 1200], [0.03, 0.04, 0.06, 0.5], "unused.png")
    left, right = figures[0].axes
    assert [bar.get_height() for bar in left.patches] == [2, 0, 0, 1]
    assert [t.get_text() for t in left.get_xticklabels()] == ["100–200", "200–500", "500–1000", "1000–2000"]
    assert [bar.get_height() for bar in right.patches] == [2, 1, 0, 0, 1]
    assert [t.get_text() for t in right.get_xticklabels()] == ["2–5", "5–10", "10–20", "20–50", "50–100"]
    assert left.get_title("left") == "videos: 3, median 150" and right.get_title("left") == "questions: 4, median 5"


@pytest.mark.parametrize("shares", [[], [0.0, 0.1], [float("nan")]])
def test_statistics_of_nothing_are_refused(shares):
    with pytest.raises(ReportError, match="shares must be positive"):
        plots.plot_statistics([10.0], shares, "unused.png")

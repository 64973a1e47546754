"""Training curves; the figures are caught before they are written."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from report import ReportError, curves, drawing


@pytest.mark.parametrize("module", [curves, drawing])
def test_it_needs_none_of_our_other_files(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imports = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.walk(tree)
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    ours = {path.stem for path in Path(module.__file__).parents[1].iterdir()} - {"report"}
    assert {"rewards", "annotations"} < ours
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


# Curves


def test_curves_write_a_png_with_a_panel_per_logged_key(tmp_path):
    run = write_run(tmp_path / "run", training(40))
    keys = curves.plot_curves([run], tmp_path / "new" / "curves.png", ["all"])
    assert keys == ["reward/iou_mean", "kl/time", "lr"]  # no panel for what is not logged, nor for the band and text
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_panels_follow_the_keys_and_runs_differ_without_colour(tmp_path, figures):
    a = write_run(tmp_path / "a", training(40))
    b = write_run(tmp_path / "b", [{**row, "my/own": 1.0} for row in training(30, top=0.5)])
    keys = curves.plot_curves({"TokenAdv": a / "metrics.jsonl", "GRPO": b}, "unused.png", ["all"])
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


def test_a_title_stands_above_the_power_of_ten_that_figures_are_written_with(tmp_path, figures):
    curves.plot_curves([write_run(tmp_path / "a", [{"step": s, "lr": 1e-6 * s} for s in range(40)])], "unused.png")
    figures[0].draw_without_rendering()
    (axes,) = figures[0].axes
    power = axes.yaxis.get_offset_text()
    assert power.get_text() == "1e\N{MINUS SIGN}5"
    assert axes._left_title.get_window_extent().y0 >= power.get_window_extent().y1


def test_a_single_run_shows_its_spread_and_several_do_not(tmp_path, figures):
    runs = [write_run(tmp_path / name, training(40)) for name in "ab"]
    curves.plot_curves(runs[:1], "unused.png")
    curves.plot_curves(runs, "unused.png")
    assert len(figures[0].axes[0].collections) == 1
    assert len(figures[1].axes[0].collections) == 0
    band = figures[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.79 + 0.1)  # the last smoothed mean is that of steps 39 and 40


def test_chosen_keys_come_in_the_given_order_and_a_misspelt_one_is_refused(tmp_path, figures):
    run = write_run(tmp_path / "run", training(3))
    assert curves.plot_curves([run], "unused.png", ["lr", "reward/iou_std"]) == ["lr", "reward/iou_std"]
    with pytest.raises(ReportError, match=r"'reward/iou_men'.*nearest.*'reward/iou_mean'"):
        curves.plot_curves([run], "unused.png", ["reward/iou_men"])
    with pytest.raises(ReportError, match="no run has logged numbers as 'note'"):
        curves.plot_curves([run], "unused.png", ["note"])


def test_without_keys_what_changes_is_drawn_and_at_most_twelve_panels(tmp_path, figures):
    rows = [
        {"step": s, "lr": 1e-4, "ratio": 1.0, "seconds/step": s / 7, "reward/iou_mean": s / 5}
        | {f"my/{k:02}": s + k for k in range(20)}
        for s in range(4)
    ]
    run = write_run(tmp_path / "run", rows)
    keys = curves.plot_curves([run], "unused.png")
    assert keys == ["reward/iou_mean", "seconds/step", *(f"my/{k:02}" for k in range(10))]
    assert len(figures[0].axes) == curves.PANELS == 12
    assert len(curves.plot_curves([run], "unused.png", ["all"])) == 24
    other = write_run(tmp_path / "other", [{**row, "lr": 2e-4} for row in rows])
    assert "lr" in curves.plot_curves([run, other], "unused.png")  # it differs between the runs
    one_step = write_run(tmp_path / "short", rows[:1])
    assert curves.plot_curves([one_step], "unused.png")[0] == "reward/iou_mean"  # nothing can have changed


def test_every_logged_figure_has_a_plain_title():
    for key in [*curves.TITLES, "applies/zoom", "zero_variance/iou"]:
        assert not re.search("[/_]", curves.title(key).replace("R_tg", "")) and curves.title(key)[0].isupper()
    assert curves.title("zero_variance/iou") == "Groups alike in iou" and curves.title("my/own") == "my/own"


@pytest.mark.parametrize("name", [r"$\frac{$", "a$b$c^^", "_hidden", "100%"])
def test_a_folder_may_have_any_name(tmp_path, name):
    """Matplotlib takes dollars for formulas and leaves out what begins with an underscore."""
    rows = [{**row, "my/$x_{$": row["step"]} for row in training(3)]
    curves.plot_curves([write_run(tmp_path / name, rows)], tmp_path / "c.png", ["all"])
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_smoothing_is_a_centred_mean_that_skips_gaps():
    np.testing.assert_allclose(curves.smooth(np.array([1.0, 2.0, 6.0, 0.0]), 3), [1.5, 3.0, 8 / 3, 3.0])
    np.testing.assert_allclose(curves.smooth(np.array([1.0, np.nan, 3.0]), 3), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(curves.smooth(np.array([4.0, np.nan]), 1), [4.0, np.nan])


def test_steps_run_again_after_a_resume_count_once(tmp_path):
    rows = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": s, "loss": 2.0} for s in (2, 3, 4)]
    read = curves.read_metrics(write_run(tmp_path, rows) / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in read] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_values_that_are_not_finite_leave_a_gap(tmp_path, figures):
    text = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n{"step": 3, "loss": Infinity}\n{"step": 4}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    curves.plot_curves([tmp_path], "unused.png")
    line = figures[0].axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [np.nan, 3.0, np.nan])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": 0}\n')
    curves.plot_curves([tmp_path], "unused.png")
    assert [len(axes.lines) for axes in figures[1].axes] == [0, 1]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "note": "\udce4'])
def test_a_broken_last_line_is_what_a_crash_leaves(tmp_path, tail):
    write_run(tmp_path, training(2))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    assert [row["step"] for row in curves.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


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
        curves.read_metrics(tmp_path / "metrics.jsonl")


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="no run"):
        curves.plot_curves([], tmp_path / "x.png")
    with pytest.raises(ReportError, match="nothing but steps"):
        curves.plot_curves([write_run(tmp_path / "run", [{"step": 1}])], tmp_path / "x.png")
    with pytest.raises(ReportError, match=r"elsewhere.*no such file"):
        curves.plot_curves([tmp_path / "elsewhere"], tmp_path / "x.png")


def test_runs_are_named_by_as_many_folders_as_needed(tmp_path):
    folders = [write_run(tmp_path / seed / "run", training(2)) for seed in ("seed0", "seed1")]
    assert list(curves.label_runs(folders[:1])) == ["run"]
    assert list(curves.label_runs(folders)) == ["seed0/run", "seed1/run"]
    assert curves.label_runs([folders[0] / "metrics.jsonl"]) == {"run": folders[0] / "metrics.jsonl"}
    with pytest.raises(ReportError, match="named twice"):
        curves.label_runs([folders[0], folders[0]])


def test_command_line(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, training(5))) for name in "ab"]
    curves.main([*runs, "--out", str(tmp_path / "c.png"), "--keys", "lr"])
    assert "1 panels" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as stop:
        curves.main([str(tmp_path / "missing"), "--out", str(tmp_path / "d.png")])
    assert stop.value.code == 2 and "missing: no such file" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()


def test_lines_look_different_also_where_colours_come_again():
    looks = [drawing.line_look(k) for k in range(3 * len(drawing.LINE_COLOURS))]
    assert len({(colour, str(style)) for colour, style, _ in looks}) == len({(c, m) for c, _, m in looks}) == len(looks)

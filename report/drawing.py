"""What the pictures share. They survive a black-and-white printer: line style and marker carry what colour carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only a program that draws needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, dark ones first, each with a line style and a marker of its own (`line_look`).
LINE_COLOURS = ["#0072b2", "#d55e00", "#222222", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LINES = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, MUTED, RULE = "#1c1c1c", "#6b6b6b", "#d8d8d4"


def line_look(k: int) -> tuple[str, object, str]:
    """Colour, line style and marker of a picture's line k; a colour that comes again has others."""
    again, place = divmod(k, len(LINE_COLOURS))
    return LINE_COLOURS[place], LINES[(place + again) % len(LINES)], MARKERS[(place + again) % len(MARKERS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty picture; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def add_legend(figure: Figure) -> None:
    """One legend above all panels: a panel may lack a run, so each panel's entries are collected."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    inches = 0.75 + 0.068 * max(map(len, entries))  # of one entry
    columns = max(1, min(len(entries), int(figure.get_figwidth() / inches)))
    legend = figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handlelength=4,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may have dollars


def named(label: str) -> str:
    """A label for the legend, from which Matplotlib leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=8, length=2)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.yaxis.get_major_formatter().set_powerlimits((-3, 4))
    axes.yaxis.get_offset_text().set(size=7, color=MUTED)


def save_figure(figure: Figure, out: str | Path) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white")

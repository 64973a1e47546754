"""The page of an evaluation: one row per question that can be sorted, filtered and opened, with all results in it."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from media.decode import probe
from media.source import VideoError
from report import ReportError
from report.html import bars, blame, clock, figure_text, film_strip, mark, page, save_page, span_text, text
from rewards import union_length
from video import decode

COLUMNS = [  # heading, type of the sort key, alignment
    ("Question", "text", ""),
    ("Kind", "text", ""),
    ("True", "text", ""),
    ("Answered", "number", ""),  # 1 for a right answer, 0 for a wrong one
    ("Zoomed", "number", ""),
    ("IoU", "number", "num"),
    ("Evidence (s)", "number", "num"),
    ("Length", "number", "num"),
]
ROW_FILTERS = {"all": "all", "right": "right", "wrong": "wrong", "no-span": "without a span"}
CHANGES = ("better", "worse")  # of the last of several results, than the first
N_FRAMES, N_VIDEOS, FRAME_WIDTH = 8, 48, 112  # frames of a video on the page, videos that have any, pixels


def evaluation_page(
    results: Mapping[str, Sequence[Mapping]],
    out: str | Path,
    title: str,
    summary: Mapping,
    videos: Mapping[str, Mapping] | None = None,
) -> None:
    """Write a page with the summary and one row per question, in which all results stand, each with its time line.

    results: {label: rows}, the questions in the last one's order. A row: {"id", "video", "question", "kind", "answer":
    letter, "predicted_answer": str | None, "zoom_answer": str | None (optional), "evidence": [[s, e]], "predicted":
    [[s, e]] | None, "iou": float | None, "duration": s | None}. summary: {metric: number or text}, or {line: {metric:
    number or text}} for several lines, such as before and after. videos: of `page_videos`, by the row's "video". A
    column that no row has anything for is left out. Raises ReportError naming the row and the field that is missing.
    """
    if not results:
        raise ReportError("no results to show; give at least one label")
    *earlier, last = results.values()
    rule = "right: by the last answer" + (f" of {list(results)[-1]}" if earlier else "")
    numbers = {video: k for k, video in enumerate(videos or {})}
    by_id = {label: {row.get("id"): row for row in rows} for label, rows in results.items()}
    table = []
    for number, row in enumerate(last, start=1):
        with blame(f"row {number} ({row.get('id', 'without id')})"):
            answers = {label: rows[row["id"]] for label, rows in by_id.items() if row["id"] in rows}
            table.append((result_cells(answers, numbers), words_of(answers)))
    used = [k for k in range(len(COLUMNS)) if k == 0 or any(cells[k][0] is not None for (cells, _), _ in table)]
    heads = "".join(
        f'<th scope="col" class="{align}" data-type="{kind}" aria-sort="none">'
        f'<button type="button">{name}</button></th>'
        for name, kind, align in (COLUMNS[k] for k in used)
    )
    body = "\n".join(result_html([(COLUMNS[k], cells[k]) for k in used], line, words) for (cells, line), words in table)
    save_page(
        page(
            title,
            f"<h1>{text(title)}</h1>\n{summary_html(summary)}\n"
            f"{filters_html([words for _, words in table], next(iter(results)))}"
            '<p class="muted legend"><span>click a heading to sort, again to reverse</span>'
            '<span><span class="span true"></span> true span</span>'
            '<span><span class="span pred"></span> predicted span</span>'
            f"<span>{text(rule)}; without options, an IoU of at least 0.5</span></p>\n"
            f'<table class="results"><thead><tr>{heads}<th scope="col" class="line">Time line</th></tr></thead>\n'
            f"<tbody>{body}</tbody></table>\n"
            + "".join(video_html(k, video) for k, video in enumerate((videos or {}).values())),
            ["evaluation.css"],
            ["sort.js", "look.js"],
            "'self' file:" if videos else "",
        ),
        out,
    )


def page_videos(videos: Sequence[str], out: str | Path) -> dict[str, dict]:
    """{path: {"source", "begin", "times", "frames"}} of the videos that are there: what a page at `out` plays, and some
    frames of the first `N_VIDEOS` that can be read.
    """
    found = {}
    for video in dict.fromkeys(videos):
        if not Path(video).is_file():
            continue
        source = urllib.parse.quote(os.path.relpath(Path(video).resolve(), Path(out).resolve().parent))
        found[video] = {"source": source, "begin": 0.0, "times": [], "frames": None}
        if len(found) <= N_VIDEOS:
            try:
                info = probe(video)
                times = [(k + 0.5) * info.duration / N_FRAMES for k in range(N_FRAMES)]
                size = (max(1, round(FRAME_WIDTH * info.height / info.width)), FRAME_WIDTH)
                frames, _ = decode(video, times, size)
            except VideoError:  # its questions say so
                continue
            found[video] |= {"begin": info.begin, "times": times, "frames": frames.numpy()}
    return found


def video_html(number: int, video: Mapping) -> str:
    """What a question's row shows when it is opened, once for all questions about a video."""
    strip = "" if video["frames"] is None else film_strip(video["frames"], video["times"], FRAME_WIDTH)
    place = f'data-source="{text(video["source"])}" data-begin="{float(video["begin"])}"'
    return f'<template id="video-{number}" {place}>{strip}</template>\n'


def summary_html(summary: Mapping) -> str:
    lines = summary if any(isinstance(v, Mapping) for v in summary.values()) else {"": summary}
    metrics = list(dict.fromkeys(metric for line in lines.values() for metric in line))
    head = "".join(f'<th class="num" scope="col">{text(metric).replace("_", "_<wbr>")}</th>' for metric in metrics)
    body = ""
    for label, line in lines.items():
        cells = "".join(
            f'<td class="num" data-label="{text(metric)}">{figure_text(line.get(metric))}</td>' for metric in metrics
        )
        body += f'<tr><th scope="row">{text(label)}</th>{cells}</tr>'
    return f'<table class="summary"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def filters_html(words: Sequence[Sequence[str]], first: str) -> str:
    """Buttons that show some of the questions, with their numbers; those that would show none are left out."""
    buttons = []
    for name, label in (ROW_FILTERS | {name: text(f"{name} than {first}") for name in CHANGES}).items():
        n = len(words) if name == "all" else sum(name in one for one in words)
        if n or name == "all":
            pressed = "true" if name == "all" else "false"
            buttons.append(f'<button type="button" data-filter="{name}" aria-pressed="{pressed}">{label} {n}</button>')
    return f'<p class="filters" role="group" aria-label="Questions shown">{"".join(buttons)}</p>\n'


def words_of(answers: Mapping[str, Mapping]) -> list[str]:
    """Which filters a question passes: by its last result and, of several, beside its first."""
    first, *_ = answers.values()
    *_, last = answers.values()
    words = []
    if success(last) is not None:
        words.append("right" if success(last) >= 1 else "wrong")
    if last["evidence"] and not last["predicted"]:
        words.append("no-span")
    before, after = ((success(row) or 0, row["iou"] or 0) for row in (first, last))
    if before != after:
        words.append("better" if after > before else "worse")
    return words


def success(row: Mapping) -> float | None:
    """1 for a right answer, the last that was given; without a known one, of spans with an IoU of at least 0.5."""
    if row["answer"] is not None:
        return float((row.get("zoom_answer") or row["predicted_answer"]) == row["answer"])
    return None if row["iou"] is None else float(row["iou"] >= 0.5)


def result_cells(answers: Mapping[str, Mapping], numbers: Mapping[str, int]) -> tuple[list[tuple[object, str]], str]:
    """Sort key, by the last result (None: nothing there), and content of each of COLUMNS, and the time line.

    numbers: those of the videos that can be shown.
    """
    *_, row = answers.values()
    duration, truth, right = row["duration"], row["evidence"], row["answer"]
    evidence = union_length(truth) if truth else None
    origin = f'<br><span class="muted">{text(row["id"])} · {text(Path(row["video"]).name)}</span>'

    def answered(key: str) -> tuple[object, str]:
        if not any(key in one for one in answers.values()):
            return None, text(None)
        letters = {label: one.get(key) for label, one in answers.items()}
        letter = letters[list(letters)[-1]]
        content = side_by_side({label: mark(letter, right) for label, letter in letters.items()})
        return (letter if right is None else int(letter == right)), content

    cells = [
        (row["question"], text(row["question"]) + origin),
        (row["kind"] or None, text(row["kind"] or None)),
        (right, text(right)),
        answered("predicted_answer"),
        answered("zoom_answer"),
        (row["iou"], side_by_side({label: figure_text(one["iou"]) for label, one in answers.items()})),
        (evidence, "–" if evidence is None else f"{evidence:.1f}"),
        (duration, "–" if duration is None else clock(duration)),
    ]
    lines = {label: one["predicted"] for label, one in answers.items()}
    tracks = ""
    if duration is not None:
        for spans, kind in ((truth, "true"), *((spans, "pred") for spans in lines.values())):
            tracks += f'<div class="track">{bars(spans, duration, kind)}</div>'
    times = [span_text(truth) if truth else "not annotated", *map(span_text, lines.values())]
    if len(lines) > 1:
        times = [f"{text(name)} {time}" for name, time in zip(("true", *lines), times, strict=True)]
    look = ""
    if row["video"] in numbers:
        look = f'<details data-video="{numbers[row["video"]]}"><summary>frames and player</summary></details>'
    return cells, f'{tracks}<div class="muted">{" | ".join(times)}</div>{look}'


def side_by_side(contents: Mapping[str, str]) -> str:
    """A result's content as it is; of several, one line each, named."""
    if len(contents) == 1:
        return next(iter(contents.values()))
    return "".join(
        f'<div class="one"><span class="muted">{text(label)}</span> {content}</div>'
        for label, content in contents.items()
    )


def result_html(
    cells: Sequence[tuple[tuple[str, str, str], tuple[object, str]]], line: str, words: Sequence[str]
) -> str:
    columns = "".join(
        f'<td class="{align}" data-label="{name}" data-sort="{"" if key is None else text(key)}">'
        f"<div>{content}</div></td>"
        for (name, _, align), (key, content) in cells
    )
    line = f'<td class="line" data-label="Time line"><div>{line}</div></td>'
    return f'<tr data-words="{" ".join(words)}">{columns}{line}</tr>'

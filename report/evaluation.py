"""The page of an evaluation: one sortable row per question."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from report.html import bars, blame, clock, figure_text, mark, page, save_page, span_text, text
from rewards import union_length

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


def evaluation_page(rows: Sequence[Mapping], out: str | Path, title: str, summary: Mapping) -> None:
    """Write a page with the summary and one sortable row per question, each with its time line.

    A row: {"id", "video", "question", "kind", "answer": letter, "predicted_answer": str | None, "zoom_answer": str |
    None (optional), "evidence": [[s, e]], "predicted": [[s, e]] | None, "iou": float | None, "duration": s | None}.
    summary: {metric: number or text}, or {line: {metric: number or text}} for several lines, such as before and after.
    A column that no row has anything for is left out. Raises ReportError naming the row and the field that is missing.
    """
    table = []
    for number, row in enumerate(rows, start=1):
        with blame(f"row {number} ({row.get('id', 'without id')})"):
            table.append(result_cells(row))
    used = [k for k in range(len(COLUMNS)) if k == 0 or any(cells[k][0] is not None for cells, _ in table)]
    heads = "".join(
        f'<th scope="col" class="{align}" data-type="{kind}" aria-sort="none">'
        f'<button type="button">{name}</button></th>'
        for name, kind, align in (COLUMNS[k] for k in used)
    )
    body = "\n".join(result_html([(COLUMNS[k], cells[k]) for k in used], line) for cells, line in table)
    save_page(
        page(
            title,
            f"<h1>{text(title)}</h1>\n{summary_html(summary)}\n"
            f'<p class="muted legend"><span>{len(rows)} questions; click a heading to sort, again to reverse</span>'
            '<span><span class="span true"></span> true span</span>'
            '<span><span class="span pred"></span> predicted span</span></p>\n'
            f'<table class="results"><thead><tr>{heads}<th scope="col" class="line">Time line</th></tr></thead>\n'
            f"<tbody>{body}</tbody></table>",
            ["evaluation.css"],
            ["sort.js"],
        ),
        out,
    )


def summary_html(summary: Mapping) -> str:
    lines = summary if any(isinstance(v, Mapping) for v in summary.values()) else {"": summary}
    metrics = list(dict.fromkeys(metric for line in lines.values() for metric in line))
    head = "".join(f'<th class="num" scope="col">{text(metric)}</th>' for metric in metrics)
    body = ""
    for label, line in lines.items():
        cells = "".join(f'<td class="num">{figure_text(line.get(metric))}</td>' for metric in metrics)
        body += f'<tr><th scope="row">{text(label)}</th>{cells}</tr>'
    table = f'<table class="summary"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def result_cells(row: Mapping) -> tuple[list[tuple[object, str]], str]:
    """Sort key (None: nothing there) and content of each of COLUMNS, and the time line."""
    duration, truth, right = row["duration"], row["evidence"], row["answer"]
    evidence = union_length(truth) if truth else None
    origin = f'<br><span class="muted">{text(row["id"])} · {text(row["video"])}</span>'

    def answered(letter: str | None) -> tuple[object, str]:
        return (letter if right is None else int(letter == right)), mark(letter, right)

    cells = [
        (row["question"], text(row["question"]) + origin),
        (row["kind"] or None, text(row["kind"] or None)),
        (right, text(right)),
        answered(row["predicted_answer"]),
        answered(row["zoom_answer"]) if "zoom_answer" in row else (None, text(None)),
        (row["iou"], figure_text(row["iou"])),
        (evidence, "–" if evidence is None else f"{evidence:.1f}"),
        (duration, "–" if duration is None else clock(duration)),
    ]
    tracks = ""
    if duration is not None:
        for spans, kind in ((truth, "true"), (row["predicted"], "pred")):
            tracks += f'<div class="track">{bars(spans, duration, kind)}</div>'
    times = f"{span_text(truth) if truth else 'not annotated'} | {span_text(row['predicted'])}"
    return cells, f'{tracks}<div class="muted">{times}</div>'


def result_html(cells: Sequence[tuple[tuple[str, str, str], tuple[object, str]]], line: str) -> str:
    columns = "".join(
        f'<td class="{align}" data-label="{name}" data-sort="{"" if key is None else text(key)}">'
        f"<div>{content}</div></td>"
        for (name, _, align), (key, content) in cells
    )
    return f'<tr>{columns}<td class="line" data-label="Time line"><div>{line}</div></td></tr>'

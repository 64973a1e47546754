"""Pages: time lines, film strips, tokens coloured by advantage, a player.

Files that stand alone (no network, no library) and that survive a black-and-white printer: hatching and underline carry
what colour carries.

- `episodes_page`: what the policy saw, wrote and was paid for, one group of responses after the other.
- `evaluation_page`: one sortable row per question.
- `answer_page`: one question about one video, with a player that jumps to the spans.
"""

import base64
import io
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from report import ReportError, Span, union_length

# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a page
# ---------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { --ink: #1c1c1c; --muted: #6b6b6b; --rule: #dededa; --paper: #ffffff; --track: #f1f1ee; --ghost: #d4d4ce; }
* { box-sizing: border-box; }
html { color-scheme: light; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 65rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; overflow-wrap: break-word; }
h1 { margin: 0 0 .5rem; font-size: 1.65rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: .1rem 0 .6rem; font-size: 1.2rem; line-height: 1.35; font-weight: 600; max-width: 46rem; }
h3 { margin: 0; font-size: 1rem; font-weight: 600; }
h4 { margin: 1.4rem 0 .5rem; font-size: .8rem; font-weight: 600; color: var(--muted); }
p { margin: 0 0 .5rem; max-width: 46rem; }
.muted { color: var(--muted); font-size: .85rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; font-weight: 400; }
th { color: var(--muted); font-size: .8rem; white-space: nowrap; }
th.num, td.num { text-align: right; white-space: nowrap; }
.timeline { display: grid; grid-template-columns: max-content minmax(0, 1fr) 8.5rem; gap: .3rem .8rem;
  align-items: center; font-size: .8rem; }
.timeline .times { color: var(--muted); }
.track { position: relative; height: 1.05rem; background: var(--track); border-radius: 2px; overflow: hidden; }
.span { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: 1px; }
.true { background: var(--ink); }
.ghost { background: var(--ghost); }
.pred { border: 1.5px solid var(--ink);
  background: repeating-linear-gradient(135deg, var(--ink) 0 1px, transparent 1px 5px); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; align-items: center; }
.legend .span { position: static; display: inline-block; width: 2.4rem; height: .8rem; vertical-align: -.05rem; }
.legend .ruled { display: inline-block; width: 2.4rem; border-top: 3px solid var(--ink); vertical-align: .25rem; }
.axis { position: relative; height: 1.1rem; grid-column: 2; color: var(--muted); font-size: .75rem; }
.axis i { position: absolute; top: 0; font-style: normal; transform: translateX(-50%); white-space: nowrap; }
.axis i:first-child { transform: none; }
.axis i:last-child { transform: translateX(-100%); }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0; padding: 0; list-style: none; }
.strip figure { margin: 0; }
.strip img { display: block; max-width: 100%; height: auto; background: var(--track); }
.strip .small { image-rendering: pixelated; }
.strip figcaption { font-size: .75rem; color: var(--muted); padding-top: .1rem; border-top: 3px solid transparent; }
.strip .evidence figcaption { border-top-color: var(--ink); color: var(--ink); }
@media print { .strip figure, tr, .timeline { break-inside: avoid; } h2, h3, h4 { break-after: avoid; } }
@media (max-width: 42rem) {
  body { padding: 1.25rem 1rem 3rem; }
  .timeline { grid-template-columns: max-content minmax(0, 1fr); }
  .timeline .who { grid-column: 1; }
  .timeline .times { grid-column: 1 / -1; margin-bottom: .4rem; }
  .timeline .track, .timeline .axis { grid-column: 1 / -1; }
  .strip figure { max-width: calc(50% - .25rem); }
}
"""


def page(title: str, body: str, style: str = "", script: str = "", media: str = "") -> str:
    """A complete HTML page that may not use the network; `title` is escaped here, `body` must already be HTML.

    `media`: where a player may take its video from, as sources of a content security policy.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy += f"; media-src {media}" if media else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f"{body}\n" + (f"<script>{script}</script>\n" if script else "") + "</body>\n</html>\n"
    )


def save_page(html: str, out: str | Path) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(html, encoding="utf-8", errors="xmlcharrefreplace")  # half of a surrogate pair stays visible


@contextmanager
def blame(item: str) -> Iterator[None]:
    """Name the item in the error when it cannot be drawn or lacks a field."""
    try:
        yield
    except KeyError as error:
        raise ReportError(f"{item}: no field {error}") from error
    except ReportError as error:
        raise ReportError(f"{item}: {error}") from error


def text(value: object) -> str:
    """Anything a user or a model wrote, as HTML; a dash where there is nothing."""
    return "–" if value is None else escape(str(value))


def clock(seconds: float) -> str:
    """Seconds as mm:ss.s, rounded to tenths (halves up, so that steps of 0.5 look even); minutes may exceed 99.

    >>> clock(59.96), clock(7384.25), clock(-1)
    ('01:00.0', '123:04.3', '-00:01.0')
    """
    if not math.isfinite(seconds):
        raise ReportError(f"{seconds} is not a time in seconds")
    tenths = math.floor(abs(seconds) * 10 + 0.5)
    return f"{'-' if seconds < 0 and tenths else ''}{tenths // 600:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def span_text(spans: Sequence[Span] | None) -> str:
    """Spans as words: `None` is a response without a span that can be read, an empty list a prediction of nothing."""
    if spans is None:
        return "no span"
    return ", ".join(f"{clock(start)}–{clock(end)}" for start, end in spans) or "empty"


def bars(spans: Sequence[Span] | None, duration: float, kind: str) -> str:
    """Spans as boxes at per cent of the duration, cut off at the video's ends; the title has the true numbers."""
    if not (math.isfinite(duration) and duration > 0):
        raise ReportError(f"a time line needs a positive duration in seconds, got {duration}")
    boxes = []
    for start, end in spans or []:
        left, right = (min(max(t, 0.0), duration) / duration * 100 for t in (start, end))
        boxes.append(
            f'<div class="span {kind}" style="left:{left:.3f}%;width:{max(0.0, right - left):.3f}%" '
            f'data-start="{float(start)}" data-end="{float(end)}" title="{clock(start)}–{clock(end)}"></div>'
        )
    return "".join(boxes)


def timeline(truth: Sequence[Span] | None, predictions: Mapping[str, Sequence[Span] | None], duration: float) -> str:
    """True spans (solid) above each prediction (hatched, over the truth in grey), drawn to scale, as HTML.

    predictions: {label: spans, or None if unparsable}. Seconds. Every box carries data-start and data-end. Without
    known truth (None) its row is left out.
    """
    rows = []
    if truth is not None:
        rows.append(("truth", bars(truth, duration, "true"), span_text(truth) if truth else "not annotated"))
    for label, spans in predictions.items():
        rows.append((label, bars(truth, duration, "ghost") + bars(spans, duration, "pred"), span_text(spans)))
    lines = [
        f'<div class="who">{text(label)}</div><div class="track">{boxes}</div><div class="times">{times}</div>'
        for label, boxes, times in rows
    ]
    ticks = "".join(
        f'<i style="left:{t / duration * 100:.3f}%">{clock(t)}</i>' for t in (*tick_times(duration), duration)
    )
    return f'<div class="timeline">{"".join(lines)}<div class="axis">{ticks}</div></div>'


def tick_times(duration: float) -> list[float]:
    """Round times from 0 on, at most seven; those too near the end, which has a label of its own, are left out."""
    steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200]
    step = next((step for step in steps if duration / step <= 6), duration / 4)
    return [k * step for k in range(math.floor(duration / step) + 1) if k * step <= 0.88 * duration]


MAX_FRAMES = 48  # per strip; more are thinned out evenly
MAX_SIDE = 320  # pixels; larger frames are shrunk before they are embedded


def film_strip(frames: np.ndarray, times: Sequence[float], width: int, evidence: Sequence[Span] = ()) -> str:
    """Frames with their times, as HTML with embedded images.

    frames: uint8 [N, 3, H, W]. times: N seconds. width: about how wide to show a frame, in CSS pixels; small frames
    grow by a whole factor so that the model's own pixels stay visible. evidence: frames inside these spans get a dark
    rule.
    """
    frames = checked(frames, times)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES)).round().astype(int))
    figures = []
    for i in shown:
        height_px, width_px = frames.shape[2:]
        small = width_px <= width
        factor = max(1, round(width / width_px)) if small else width / width_px
        in_evidence = any(start <= times[i] < end for start, end in evidence)
        figures.append(
            f'<figure class="{"evidence" if in_evidence else "context"}" data-time="{float(times[i])}">'
            f'<img class="{"small" if small else "large"}" width="{round(width_px * factor)}" '
            f'height="{round(height_px * factor)}" alt="frame at {clock(times[i])}" src="{data_uri(frames[i])}">'
            f"<figcaption>{clock(times[i])}</figcaption></figure>"
        )
    thinned = f'<p class="muted">{len(shown)} of {len(frames)} frames shown</p>' if len(shown) < len(frames) else ""
    return f'<div class="strip">{"".join(figures)}</div>{thinned}'


def checked(frames: np.ndarray, times: Sequence[float]) -> np.ndarray:
    """The frames as an array. Raises ReportError unless they are uint8 [N, 3, H, W] with N times."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != np.uint8 or len(frames) != len(times):
        raise ReportError(
            f"frames must be uint8 [N, 3, H, W] with N times, got {frames.dtype} {list(frames.shape)} "
            f"with {len(times)} times"
        )
    return frames


def data_uri(frame: np.ndarray) -> str:
    """One uint8 [3, H, W] frame as a data URI: PNG up to 64 pixels a side, JPEG at full chroma above."""
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    if max(image.size) <= 64:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def mark(answer: str | None, right: str | None) -> str:
    """An answer with a tick or a cross, as HTML; without either where the right one is not known."""
    if right is None:
        return text(answer)
    return f"{'none' if answer is None else text(answer)} {'✓' if answer == right else '✗'}"


# ---------------------------------------------------------------------------------------------------------------------
# Episodes
# ---------------------------------------------------------------------------------------------------------------------

EPISODE_STYLE = """
article { border-top: 1px solid var(--ink); margin-top: 3rem; padding-top: 1rem; }
.options { list-style: none; margin: 0 0 1rem; padding: 0; display: flex; flex-wrap: wrap; gap: .15rem 1.6rem; }
.options .right { font-weight: 650; }
section { border-top: 1px solid var(--rule); margin-top: 1.6rem; padding-top: .9rem; }
section > header { display: flex; flex-wrap: wrap; gap: 0 1.4rem; align-items: baseline; margin-bottom: .5rem; }
.tokens { font: 14px/1.95 ui-monospace, "SF Mono", "Liberation Mono", Menlo, monospace; max-width: none;
  white-space: pre-wrap; }
.tok { padding: .15em 0; margin-right: 1px; border-radius: 2px; }
.neg { text-decoration: underline 1.5px; text-underline-offset: .22em; }
.written { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: .4rem 2.5rem; align-items: start; }
table.small { margin-bottom: .5rem; }
table.small th, table.small td { padding: 0 .6rem 0 0; min-width: 4.4rem; }
table.small caption { text-align: left; font-size: .8rem; font-weight: 600; color: var(--muted); }
.legend .tok { color: var(--ink); }
@media (max-width: 42rem) {
  .written { grid-template-columns: minmax(0, 1fr); }
}
"""


def episodes_page(episodes: Sequence[Mapping], out: str | Path, title: str) -> None:
    """Write a page of training episodes: question, coarse frames, time line, then each response of the group.

    An episode: {"id", "video", "question", "options": [str], "answer": letter, "duration": s, "glue": [[s, e]],
    "coarse": {"times": [s], "frames": uint8 [N, 3, H, W]}, "responses": [{"tokens": [str], "advantages": [float],
    "segments": [str] (optional, one per token), "answer": str | None, "spans": [[s, e]] | None,
    "rewards": {facet: float}, "zoom": {"times", "frames", "answer": str | None} | None, "calls" (optional, of several
    turns): [{"part": [[s, e]], "times", "frames"} or {"refusal": str}]}]}.
    Tokens are blue where the advantage is positive and orange and underlined where it is negative, on one scale for the
    whole page. Raises ReportError naming the episode when lengths, times or frames do not fit.
    """
    scale = 0.0
    for episode in episodes:
        with blame(f"episode {episode.get('id', 'without id')}"):
            scale = max([scale, *(abs(a) for response in episode["responses"] for a in response["advantages"])])
    articles = []
    for episode in episodes:
        with blame(f"episode {episode['id']}"):
            articles.append(episode_html(episode, scale))
    legend = (
        '<p class="muted legend"><span><span class="span true"></span> true span</span>'
        '<span><span class="span pred"></span> predicted span</span>'
        '<span><span class="ruled"></span> frame within a true span</span>'
        f'<span>advantage: <span class="tokens">{token_html("negative", -scale, scale)} '
        f"{token_html('zero', 0.0, scale)} {token_html('positive', scale, scale)}</span> "
        f"full colour at ±{scale:.2f}</span></p>"
    )
    save_page(page(title, f"<h1>{text(title)}</h1>\n{legend}\n" + "\n".join(articles), EPISODE_STYLE), out)


def episode_html(episode: Mapping, scale: float) -> str:
    truth, right = episode["glue"], episode["answer"]
    options = []
    for letter, option in zip(string.ascii_uppercase, episode["options"], strict=False):
        is_right = letter == right
        item = '<li class="right">' if is_right else "<li>"
        options.append(f"{item}{letter}. {text(option)}{' ✓' if is_right else ''}</li>")
    if right is not None and right not in list(string.ascii_uppercase[: len(options)]):
        options.append(f'<li class="right">Answer: {text(right)}</li>')
    named = {f"response {n}": r["spans"] for n, r in enumerate(episode["responses"], start=1)}
    responses = [response_html(response, n, episode, scale) for n, response in enumerate(episode["responses"], start=1)]
    return (
        f'<article id="{text(episode["id"])}">\n'
        f'<p class="muted">{text(episode["id"])} · {text(episode["video"])} · '
        f"{clock(episode['duration'])}</p>\n"
        f"<h2>{text(episode['question'])}</h2>\n"
        f'<ul class="options">{"".join(options)}</ul>\n'
        f"{timeline(truth, named, episode['duration'])}\n"
        f"<h4>Coarse frames</h4>\n{film_strip(episode['coarse']['frames'], episode['coarse']['times'], 136, truth)}\n"
        + "\n".join(responses)
        + "\n</article>"
    )


def response_html(response: Mapping, number: int, episode: Mapping, scale: float) -> str:
    tokens, advantages = response["tokens"], response["advantages"]
    segments = response.get("segments", [""] * len(tokens))
    if not len(tokens) == len(advantages) == len(segments):
        raise ReportError(
            f"response {number}: {len(tokens)} tokens, {len(advantages)} advantages and {len(segments)} segments "
            "must be equally many"
        )
    if not all(math.isfinite(a) for a in advantages):
        raise ReportError(f"response {number}: an advantage is not finite: {list(advantages)}")
    written = "".join(token_html(t, a, scale, s) for t, a, s in zip(tokens, advantages, segments, strict=True))
    by_segment = {s: [a for a, other in zip(advantages, segments, strict=True) if other == s] for s in segments if s}
    means = {segment: f"{sum(values) / len(values):+.2f}" for segment, values in by_segment.items()}
    rewards = {name: f"{value:.2f}" for name, value in response["rewards"].items()}
    zoom = response["zoom"]
    zoomed = "<h4>No zoom pass</h4>"
    if zoom is not None:
        zoomed = (
            f"<h4>Zoom pass: answered {mark(zoom['answer'], episode['answer'])}</h4>"
            f"{film_strip(zoom['frames'], zoom['times'], 168, episode['glue'])}"
        )
    if response.get("calls") is not None:
        zoomed = "".join(call_html(call, episode["glue"]) for call in response["calls"]) or "<h4>No call</h4>"
    return (
        f"<section>\n<header><h3>Response {number}</h3>"
        f"<span>answered {mark(response['answer'], episode['answer'])}</span>"
        f'<span class="muted">{span_text(response["spans"])}</span></header>\n'
        f'<div class="written"><p class="tokens">{written}</p>\n'
        f"<div>{small_table('Reward', rewards)}{small_table('Mean advantage', means)}</div></div>\n"
        f"{zoomed}\n</section>"
    )


def call_html(call: Mapping, truth: Sequence[Span]) -> str:
    """What a call of an episode of several turns brought."""
    if "refusal" in call:
        return f'<h4>Call refused</h4><p class="muted">{text(call["refusal"])}</p>'
    return f"<h4>Call: {span_text(call['part'])}</h4>{film_strip(call['frames'], call['times'], 168, truth)}"


def small_table(caption: str, figures: Mapping[str, str]) -> str:
    """Two lines of a table, names above figures; nothing without figures."""
    if not figures:
        return ""
    names = "".join(f'<th scope="col">{text(name)}</th>' for name in figures)
    values = "".join(f"<td>{value}</td>" for value in figures.values())
    return (
        f'<table class="small"><caption>{caption}</caption><thead><tr>{names}</tr></thead>'
        f"<tbody><tr>{values}</tr></tbody></table>"
    )


POSITIVE, NEGATIVE = (33, 102, 172), (224, 112, 10)  # blue and orange


def token_html(token: str, advantage: float, scale: float, segment: str = "") -> str:
    """One token on white to blue (positive) or white to orange and underlined (negative); its title has the number."""
    sign = "pos" if advantage > 0 else "neg" if advantage < 0 else "zero"
    strength = 0.6 * abs(advantage) / scale if scale else 0.0
    hue = POSITIVE if advantage > 0 else NEGATIVE
    colour = ",".join(str(round(255 + strength * (channel - 255))) for channel in hue)
    written = text(token).replace("\n", "↵\n")
    title = f"{segment}: {advantage:+.3f}" if segment else f"{advantage:+.3f}"
    return f'<span class="tok {sign}" style="background:rgb({colour})" title="{text(title)}">{written}</span>'


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

EVALUATION_STYLE = """
body { max-width: 84rem; }
.scroll { overflow-x: auto; margin: 1rem 0 2rem; }
.summary td { font-size: 1rem; }
.results { width: 100%; margin-top: 1rem; font-size: .88rem; }
.results thead th { position: sticky; top: 0; background: var(--paper); padding: .5rem .9rem .35rem 0; z-index: 1;
  box-shadow: 0 1px var(--ink); }
.results td { border-bottom: 1px solid var(--rule); padding: .55rem .9rem .55rem 0; }
.results button { all: unset; cursor: pointer; color: var(--ink); }
.results button:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
.results button::after { content: "\\2195"; color: var(--muted); padding-left: .25rem; }
.results [aria-sort=ascending] button::after { content: "\\2191"; color: var(--ink); }
.results [aria-sort=descending] button::after { content: "\\2193"; color: var(--ink); }
.results td:first-child { min-width: 14rem; }
.results .line { min-width: 16rem; width: 34%; }
.results .track { height: .6rem; margin-bottom: 2px; }
@media (max-width: 60rem) {
  .scroll th.num { white-space: normal; vertical-align: bottom; }
  .results thead tr { display: flex; flex-wrap: wrap; gap: 0 1rem; }
  .results thead th { position: static; box-shadow: none; }
  .results, .results thead, .results tbody, .results tr, .results td { display: block; }
  .results tr { border-bottom: 1px solid var(--ink); padding: .6rem 0; }
  .results td { border: 0; padding: .1rem 0; width: auto !important; text-align: left; display: flex; gap: .8rem; }
  .results td::before { content: attr(data-label); color: var(--muted); flex: 0 0 6.5rem; }
  .results td > div { flex: 1; min-width: 0; }
  .results thead .line { display: none; }
}
"""

# Sort by a column's data-sort: as numbers where data-type says so; cells without a value always come last.
SORT_SCRIPT = """
for (const button of document.querySelectorAll("table.results th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending", numeric = head.dataset.type === "number";
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.sort;
    const compare = (a, b) => numeric ? a - b : a.localeCompare(b);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return up ? compare(x, y) : compare(y, x);
    });
    table.tBodies[0].append(...rows);
  });
}
"""

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
    None (optional), "glue": [[s, e]], "spans": [[s, e]] | None, "iou": float | None, "duration": s | None}. summary:
    {metric: number or text}, or {line: {metric: number or text}} for several lines, such as before and after. A column
    that no row has anything for is left out. Raises ReportError naming the row and the field that is missing.
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
            EVALUATION_STYLE,
            SORT_SCRIPT,
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


def figure_text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else text(value)


def result_cells(row: Mapping) -> tuple[list[tuple[object, str]], str]:
    """Sort key (None: nothing there) and content of each of COLUMNS, and the time line."""
    duration, truth, right = row["duration"], row["glue"], row["answer"]
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
        for spans, kind in ((truth, "true"), (row["spans"], "pred")):
            tracks += f'<div class="track">{bars(spans, duration, kind)}</div>'
    times = f"{span_text(truth) if truth else 'not annotated'} | {span_text(row['spans'])}"
    return cells, f'{tracks}<div class="muted">{times}</div>'


def result_html(cells: Sequence[tuple[tuple[str, str, str], tuple[object, str]]], line: str) -> str:
    columns = "".join(
        f'<td class="{align}" data-label="{name}" data-sort="{"" if key is None else text(key)}">'
        f"<div>{content}</div></td>"
        for (name, _, align), (key, content) in cells
    )
    return f'<tr>{columns}<td class="line" data-label="Time line"><div>{line}</div></td></tr>'


# ---------------------------------------------------------------------------------------------------------------------
# A question about one video
# ---------------------------------------------------------------------------------------------------------------------

ANSWER_STYLE = """
.answer { font-size: 1.35rem; font-weight: 600; margin: 0 0 .2rem; }
.letters { list-style: none; margin: .8rem 0 1.2rem; padding: 0; max-width: 34rem; }
.letters li { display: grid; grid-template-columns: 1fr 9rem 4rem; gap: .8rem; align-items: center; }
.letters .given { font-weight: 650; }
.letters .share { height: .6rem; background: var(--track); border-radius: 2px; }
.letters .share i { display: block; height: 100%; background: var(--ink); border-radius: 2px; }
.letters span { text-align: right; white-space: nowrap; }
video { display: block; width: 100%; max-height: 26rem; background: #000; border-radius: 3px; margin: 1rem 0 .8rem; }
.refused { border-left: 3px solid var(--ink); padding-left: .8rem; }
.jumps { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 1rem; }
.jumps button { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--ink);
  border-radius: 3px; padding: .2rem .7rem; cursor: pointer; }
.jumps button:hover, .jumps button:focus-visible, .jumps .playing { background: var(--ink); color: var(--paper); }
.track .span, .strip figure { cursor: pointer; }
.timeline + .muted { margin-top: .7rem; }
.head { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #d55e00; }
section { border-top: 1px solid var(--rule); margin-top: 1.8rem; padding-top: .9rem; }
summary { cursor: pointer; list-style-position: outside; }
summary h3 { display: inline; }
pre { white-space: pre-wrap; font: 13px/1.6 ui-monospace, "SF Mono", "Liberation Mono", Menlo, monospace;
  margin: .5rem 0; max-width: 60rem; }
"""

# A click on anything with a start plays from there to its end; a click on a frame shows its moment.
PLAY_SCRIPT = """
const video = document.querySelector("video"), length = Number(video.dataset.duration);
const tracks = [...document.querySelectorAll(".track")], buttons = [...document.querySelectorAll(".jumps button")];
const heads = tracks.map(track => {
  const head = document.createElement("div");
  head.className = "head";
  return track.appendChild(head);
});
let end = null;
const seek = (time, until) => {
  video.pause();
  video.currentTime = time;
  end = until;
  if (until !== null) video.play().catch(() => {});
};
const show = () => {
  for (const head of heads) head.style.left = 100 * Math.min(1, video.currentTime / length) + "%";
  for (const button of buttons) button.classList.toggle("playing",
    video.currentTime >= Number(button.dataset.start) && video.currentTime < Number(button.dataset.end));
};
document.addEventListener("click", event => {
  const span = event.target.closest("[data-start]"), frame = event.target.closest("[data-time]");
  const track = event.target.closest(".track");
  if (span) seek(Number(span.dataset.start), Number(span.dataset.end));
  else if (frame) seek(Number(frame.dataset.time), null);
  else if (track) {
    const box = track.getBoundingClientRect();
    seek(length * (event.clientX - box.left) / box.width, null);
  }
});
video.addEventListener("timeupdate", () => {
  if (end !== null && video.currentTime >= end) { video.pause(); end = null; }
  show();
});
video.addEventListener("seeked", show);
video.addEventListener("error", () => { document.querySelector(".refused").hidden = false; });
show();
"""

LOOKS = {
    "coarse": "The whole video, coarsely",
    "window": "A window",
    "closer": "Looking again, closer",
    "zoom": "Zoomed",
    "glance": "The whole video, at a glance",
    "call": "Asked for",
}


def answer_page(record: Mapping, out: str | Path, source: str) -> None:
    """Write a page about one answered question: answer, player, time line, and the frames of every look at the video.

    record: {"video", "question", "options": [str], "letters": {letter: probability}, "answer": letter | None,
    "confidence": float, "duration": s, "spans": [[s, e]] | None, "strategy", "cost": {name: figure}, "looks": [{"kind":
    one of LOOKS, "part": [[s, e]] | None, "times": [s], "frames": uint8 [N, 3, H, W], "answer", "confidence", "spans",
    "text", "refusal" (of an agent)}]}. source: the player's video, a relative file or a data URI. The time line has the
    spans or, turn by turn, what an agent asked for. A click on a span plays it. Raises ReportError naming the look
    whose frames do not fit.
    """
    spans, duration = record["spans"], record["duration"]
    sections = []
    for number, look in enumerate(record["looks"], start=1):
        with blame(f"look {number} ({look['kind']})"):
            sections.append(look_html(look, spans or [], bool(record["options"])))
    lines = {"spans": spans}
    if record["looks"][0]["kind"] == "glance":
        asked = {f"turn {n}": look["part"] for n, look in enumerate(record["looks"]) if n}
        lines = {turn: part for turn, part in asked.items() if part is not None}
    jumps = "".join(
        f'<button type="button" data-start="{float(start)}" data-end="{float(end)}">'
        f"▸ {clock(start)}–{clock(end)}</button>"
        for start, end in spans or []
    )
    figures = {**record["cost"], "looks": len(record["looks"])}
    marked = "spans asked for" if record["looks"][0]["kind"] == "glance" else "claimed spans"
    underlined = f"; those of the {marked} are underlined" if spans else ""
    claimed = f'<p class="muted">A click on a frame shows it in the player{underlined}.</p>\n'
    body = (
        f'<p class="muted">{text(record["video"])} · {clock(duration)} · {text(record["strategy"])}</p>\n'
        f"<h1>{text(record['question'])}</h1>\n{answer_html(record)}\n"
        f'<video controls preload="auto" muted playsinline data-duration="{duration}" src="{text(source)}"></video>\n'
        '<p class="refused" hidden>This browser cannot play the file: it was moved, or it has an unknown codec.</p>\n'
        + (f'<div class="jumps">{jumps}</div>\n' if jumps else "")
        + timeline(None, lines, duration)
        + claimed
        + "\n".join(sections)
        + f"\n<section><h3>Cost</h3>{small_table('', {k: text(v) for k, v in figures.items()})}</section>"
    )
    media = "data:" if source.startswith("data:") else "'self' file:"
    save_page(page(record["question"], body, ANSWER_STYLE, PLAY_SCRIPT, media), out)


def answer_html(record: Mapping) -> str:
    """The answer in large letters, and what the model gave each option."""
    confidence = f'<p class="muted">confidence {100 * record["confidence"]:.1f}%</p>'
    if not record["options"]:
        return f'<p class="answer">{span_text(record["spans"])}</p>{confidence if record["spans"] else ""}'
    letters, items, answer = dict(zip(string.ascii_uppercase, record["options"], strict=False)), [], record["answer"]
    words = "No answer that can be read" if answer is None else f"{answer}. {letters.get(answer, '(not an option)')}"
    for letter, option in letters.items():
        given = ' class="given"' if letter == answer else ""
        items.append(f"<li{given}><div>{letter}. {text(option)}</div>")
        if letter in record["letters"]:
            share = f"{100 * record['letters'][letter]:.1f}%"
            items.append(f'<div class="share"><i style="width:{share}"></i></div><span>{share}</span>')
        items.append("</li>")
    return f'<p class="answer">{text(words)}</p>{confidence if answer else ""}<ul class="letters">{"".join(items)}</ul>'


def look_html(look: Mapping, spans: Sequence[Span], with_answer: bool) -> str:
    """One look: what was shown, frame by frame, and what came back; a zoom has a strip for each of its spans, a refused
    call of an agent has the reason.

    Windows and looks on the way are folded up.
    """
    kind, part, times = look["kind"], look["part"], look["times"]
    frames = checked(look["frames"], times)
    heading = LOOKS[kind] + (f": {span_text(part)}" if part is not None else "")
    height, width = frames.shape[-2:]
    in_turn = kind in ("glance", "call")
    facts = [f"{len(frames)} frames of {width}×{height} pixels" if len(frames) else "nothing was shown"]
    if with_answer and (look["answer"] or not in_turn):
        facts.append(f"answered {text(look['answer'])}, confidence {100 * look['confidence']:.1f}%")
    written = ""
    if not in_turn and kind != "zoom":
        facts.append(f"claimed {span_text(look['spans'])}")
        origin = "" if part is None else '<p class="muted">As written, with times from the start of what was shown:</p>'
        written = f"{origin}<pre>{text(look['text'])}</pre>"
    strips, parts = "", part or [(0.0, math.inf)]
    borders = [-math.inf, *(end for _, end in parts[:-1]), math.inf]  # the frame shown at a start may be older than it
    for (start, end), (low, high) in zip(parts, pairwise(borders), strict=True):
        shown = [k for k, t in enumerate(times) if low <= t < high]
        title = f"<h4>{clock(start)}–{clock(end)}</h4>" if len(parts) > 1 and shown else ""
        width, marked = (168, ()) if kind == "zoom" else (112, spans)
        strips += title + film_strip(frames[shown], [times[k] for k in shown], width, marked)
    head = f'<h3>{heading}</h3><p class="muted">{" · ".join(facts)}</p>'
    if kind in ("window", "closer"):
        return f"<section><details><summary>{head}</summary>{written}{strips}</details></section>"
    if in_turn:  # what was written answers what was shown
        refusal = f'<p class="muted">{text(look["refusal"])}</p>' if look["refusal"] else ""
        return f"<section>{head}{refusal}{strips}<pre>{text(look['text'])}</pre></section>"
    return f"<section>{head}{written}{strips}</section>"

"""Pieces of a page: time lines, film strips, tables.

Pages are files that stand alone (no network, no library) and that survive a black-and-white printer: hatching and
underline carry what colour carries.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from prompts import Span
from report import ReportError


def page(title: str, body: str, styles: Sequence[str] = (), scripts: Sequence[str] = (), media: str = "") -> str:
    """A complete HTML page that may not use the network; `title` is escaped here, `body` must already be HTML.

    `styles`, `scripts`: files beside this one that become parts of the page. `media`: where a player may take its
    video from, as sources of a content security policy.
    """
    style, script = "".join(map(beside, ("style.css", *styles))), "".join(map(beside, scripts))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy += f"; media-src {media}" if media else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{body}\n" + (f"<script>{script}</script>\n" if script else "") + "</body>\n</html>\n"
    )


def beside(name: str) -> str:
    """The text of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


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


def figure_text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else text(value)

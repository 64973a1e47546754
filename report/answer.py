"""The page of one question about one video, with a player that jumps to the spans."""

from __future__ import annotations

import base64
import math
import mimetypes
import os
import string
import urllib.parse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from annotations.rows import Sample
from prompts import Span
from report import ReportError
from report.html import blame, checked, clock, film_strip, page, save_page, small_table, span_text, text, timeline

if TYPE_CHECKING:
    from infer import Result

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
    "confidence": float, "duration": s, "begin": the first frame's time by the player's clock, "spans": [[s, e]] | None,
    "strategy", "cost": {name: figure}, "looks": [{"kind":
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
    origin = "spans asked for" if record["looks"][0]["kind"] == "glance" else "claimed spans"
    note = f"; the times of those within the {origin} are framed" if spans else ""
    claimed = f'<p class="muted">A click on a frame shows it in the player{note}.</p>\n'
    body = (
        f'<p class="muted">{text(record["video"])} · {clock(duration)} · {text(record["strategy"])}</p>\n'
        f"<h1>{text(record['question'])}</h1>\n{answer_html(record)}\n"
        f'<video controls preload="auto" muted playsinline data-duration="{duration}" '
        f'data-begin="{float(record["begin"])}" src="{text(source)}"></video>\n'
        '<p class="refused" hidden>This browser cannot play the file: it was moved, or it has an unknown codec.</p>\n'
        + (f'<div class="jumps">{jumps}</div>\n' if jumps else "")
        + timeline(None, lines, duration)
        + claimed
        + "\n".join(sections)
        + f"\n<section><h3>Cost</h3>{small_table('', {k: text(v) for k, v in figures.items()})}</section>"
    )
    media = "data:" if source.startswith("data:") else "'self' file:"
    save_page(page(record["question"], body, ["answer.css"], ["play.js"], media), out)


def answer_html(record: Mapping) -> str:
    """The answer in large letters, and what the model gave each option."""
    sure = f"confidence {100 * record['confidence']:.1f}%"
    confidence = f'<p class="muted">{sure}: the model\'s own probability, uncalibrated</p>'
    if not record["options"]:
        return f'<p class="answer">{span_text(record["spans"])}</p>{confidence if record["spans"] else ""}'
    letters, items, answer = dict(zip(string.ascii_uppercase, record["options"], strict=False)), [], record["answer"]
    words = "No answer that can be read" if answer is None else f"{answer}. {letters.get(answer, '(not an option)')}"
    for letter, option in letters.items():
        css = ' class="given"' if letter == answer else ""
        items.append(f"<li{css}><div>{letter}. {text(option)}</div>")
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
        inside = [k for k, t in enumerate(times) if low <= t < high]
        title = f"<h4>{clock(start)}–{clock(end)}</h4>" if len(parts) > 1 and inside else ""
        width, marked = (168, ()) if kind == "zoom" else (112, spans)
        strips += title + film_strip(frames[inside], [times[k] for k in inside], width, marked)
    head = f'<h3>{heading}</h3><p class="muted">{" · ".join(facts)}</p>'
    if kind in ("window", "closer"):
        return f"<section><details><summary>{head}</summary>{written}{strips}</details></section>"
    if in_turn:  # what was written answers what was shown
        refusal = f'<p class="muted">{text(look["refusal"])}</p>' if look["refusal"] else ""
        return f"<section>{head}{refusal}{strips}<pre>{text(look['text'])}</pre></section>"
    return f"<section>{head}{written}{strips}</section>"


# ---------------------------------------------------------------- from a strategy's result


def answer_text(result: Result, answer: str | None, options: Sequence[str]) -> str:
    """Answer, confidence, spans and cost as text, times as mm:ss.s."""
    lines = []
    if options:
        named = dict(zip(string.ascii_uppercase, options, strict=False))
        named_answer = "none that can be read" if answer is None else f"{answer} {named.get(answer, '(not an option)')}"
        lines.append(f"answer      {named_answer}")
    lines.append(f"confidence  {result.confidence:.1%}" + ("" if options else " (of the spans)"))
    if result.letters:
        lines.append("letters     " + ", ".join(f"{letter} {p:.1%}" for letter, p in result.letters.items()))
    lines.append(f"spans       {span_text(result.spans)}")
    seen = ", ".join(look.kind for look in result.looks)
    spent = f"{result.frames} frames, {result.visual_tokens} visual tokens, {result.flops / 1e9:.2f} GFLOP"
    lines.append(f"looked      {seen}: {spent}")
    return "\n".join(lines)


def answer_record(result: Result, answer: str | None, sample: Sample, strategy: str, begin: float = 0.0) -> dict:
    """What the page shows; `begin`: what the player's clock shows at the first frame, in seconds."""
    looks = [
        {
            **{
                name: getattr(look, name)
                for name in ("kind", "part", "answer", "confidence", "spans", "text", "refusal")
            },
            "times": look.clip.times,
            "frames": look.clip.frames.numpy(),
        }
        for look in result.looks
    ]
    return {
        "video": Path(sample.video).name,
        "question": sample.question,
        "options": list(sample.options),
        "letters": result.letters,
        "answer": answer,
        "confidence": result.confidence,
        "duration": sample.duration,
        "begin": begin,
        "spans": result.spans,
        "strategy": strategy,
        "looks": looks,
        "cost": {"frames": result.frames, "visual tokens": result.visual_tokens, "GFLOP": f"{result.flops / 1e9:.2f}"},
    }


MAX_EMBEDDED = 64 * 2**20  # bytes of a video inside a page


def play_source(video: str | Path, page: str | Path, embed: bool) -> str:
    """The player's source: the file, relative to the page, or the whole file in it. Raises ReportError if too large."""
    video, page = Path(video), Path(page)
    if not embed:
        return urllib.parse.quote(os.path.relpath(video.resolve(), page.resolve().parent))
    if video.stat().st_size > MAX_EMBEDDED:
        size, most = (n / 2**20 for n in (video.stat().st_size, MAX_EMBEDDED))
        raise ReportError(f"{video}: {size:.0f} MiB are too many to embed (at most {most:.0f}); leave out --embed")
    kind = mimetypes.guess_type(video)[0] or "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(video.read_bytes()).decode('ascii')}"

"""What is said to the model, and how its replies are read.

Templates of the three systems (Zoom-Zero section 4.2; LongVTG-R1 Appendix C; VideoZoomer's tool turns) and of the
built-in world; one tolerant parser per tag; a strict format check apart from them. The parsers never raise on any text
and take linear time: tags are found with str.find, numbers with regular expressions whose repetitions are possessive
(nothing to backtrack into).

Rules that the papers leave open:

* A tag's range runs from its first opening to the first closing after it; an opening inside an open range is content.
  An unclosed range runs to the end of the text: it counts for credit (the tokens were written as spans) but the parsers
  skip it, because its last number may be cut in half.
* Answer and spans are the first ones after the last `</think>`: what is considered while thinking is not what is
  claimed.
* Times are unsigned ASCII numbers in seconds, or clock times as 1:05 or 1:02:05.5. One pair that is reversed, negative,
  infinite or not a number makes the whole prediction unreadable (None), so a policy cannot be paid for the readable
  half of a broken list.
* The strict check of "zoom_zero" wants at least one `<time>` in think, as the released code does, but no newlines
  between the blocks, which the paper's own example does not have.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Span = tuple[float, float]  # (start, end) in seconds, start <= end
Spans = list[Span]


class ToolCall(NamedTuple):
    """A readable request for frames: span in seconds, frames per second."""

    span: Span
    fps: float


class Limits(NamedTuple):
    """Of one of VideoZoomer's episodes: turns, calls that return frames, frames of a call, frames in all."""

    turns: int = 5
    calls: int = 4
    frames_per_call: int = 16
    frames: int = 128


LIMITS = Limits()


# --- the templates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """One kind of prompt: its wordings, and what a reply must look like. Adding one is an entry in TEMPLATES."""

    question: str  # wording with {question} and {options}; those of several turns also state the fields of Limits
    blocks: tuple[str, ...]  # the tags of a well-formed reply, in order
    event: str = ""  # wording without options: an event {question} to be found; empty if the template has none
    options_only: bool = False  # LongVTG-R1's wording cannot stand in for a missing `event`
    option: str = "({}) {}"  # one of the options: letter, text
    # The same question about zoomed frames; {think} is the coarse analysis, or nothing.
    zoom: str = "{think}{question}\n{options}\nRespond with only the letter of the option."
    multi_turn: bool = False  # a reply may be a call instead; a response is then an episode of several turns
    remaining: str = "\nYou may make {calls} more calls for {frames} frames in all."  # said after a call
    last: str = "\nThere are no more calls: give your answer now, within <answer> </answer> tags."  # if it was the last


CALL_END = "</video_zoom>"  # where the writing of a turn stops
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"  # where a clip or a frame stands in Qwen's chat format
TEMPLATES = {
    "zoom_zero": Template(  # Zoom-Zero, section 4.2
        question=(
            "Answer the question: {question} according to the content of the video. Select the answer from: {options}. "
            "Output key information relevant to the question and options, marking precise timestamps or time ranges in "
            "seconds within <time> </time> tags, and present them in an interleaved analysis format. Enclose the full "
            "analysis in <think> </think> tags. Then, provide your answer within the <answer> </answer> tags, output "
            "the corresponding letter of the option. At the same time, in the <glue> </glue> tags, include only the "
            "precise video segments (in seconds) that strongly support your answer, in the format of [(s1, e1), "
            "(s2, e2), ...]. For example: <answer>A</answer><glue> [(20.3, 30.8)]</glue>."
        ),
        blocks=("think", "answer", "glue"),
    ),
    "longvtg_r1": Template(  # LongVTG-R1, Appendix C: the second prompt with options, the first for events
        question=(
            'Locate the video clip that is relevant to the question: "{question} {options}"\n'
            "Output your thought process within the <think> </think> tags and a capital letter indicating the best "
            "option within the <answer> </answer> tags.\n"
            'Then, provide the timestamp of video clip that support your answer in the format "start time to end time" '
            "(in seconds, precise to one decimal places) within the <timestamp> </timestamp> tags."
        ),
        event=(
            'To accurately pinpoint the event "{question}" in the video, determine the precise time period of the '
            "event.\nOutput your thought process within the <think> </think> tags.\n"
            "Then, provide the start and end times (in seconds, precise to one decimal places) in the format "
            '"start time to end time" within the <timestamp> </timestamp> tags.'
        ),
        blocks=("think", "answer", "timestamp"),
    ),
    "videozoomer": Template(  # our wording of VideoZoomer's protocol (section 3.1)
        question=(
            "You see a coarse overview of a video. Question: {question}\nOptions: {options}\n"
            "Think first, within <think> </think> tags. If the overview is not enough, ask for a closer look with one "
            'call such as <video_zoom>{{"segment": {segment}, "fps": 2}}</video_zoom>, the segment in seconds and '
            "within the video, the fps at most the video's own; (end - start) * fps may be at most {frames_per_call}. "
            "You have at most {turns} turns, {calls} calls, one per turn, and {frames} frames with those of the "
            "overview. As soon as you know, give the letter of the option within <answer> </answer> tags instead of a "
            "call."
        ),
        blocks=("think", "answer"),
        multi_turn=True,
    ),
    "world": Template(
        question="{question} {options}",
        option="{} {}",
        zoom="{question} {options} zoom",
        blocks=("think", "answer", "glue"),
        options_only=True,
    ),
    "world_zoomer": Template(
        question="{question} {options} turns {turns} calls {calls} frames {frames_per_call} of {frames}",
        option="{} {}",
        zoom="{question} {options} zoom",
        blocks=("think", "answer"),
        multi_turn=True,
        remaining="",
        last=" answer",
    ),
}


def multi_turn_templates() -> list[str]:
    """Names of the templates whose responses are episodes of several turns."""
    return [name for name, words in TEMPLATES.items() if words.multi_turn]


def template(name: str) -> Template:
    """The template of this name. Raises ValueError naming those that there are."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# --- what cannot be said ---------------------------------------------------------------------------------------------

# What a tokenizer would take for an instruction, and half of a surrogate pair, which it cannot encode.
_SPECIAL = re.compile(r"<\|[^\s<>|]+\|>")
_HALF = re.compile(r"[\ud800-\udfff]")


def control(text: str) -> str | None:
    """What makes a text unfit for a prompt: a special token, or half a character."""
    if "<|" in text and (found := _SPECIAL.search(text)):
        return f"has the special token {found[0]}"
    return None if text.isascii() else half_character(text)


def half_character(text: str) -> str | None:
    """What makes a text unfit for a file: half of a surrogate pair."""
    found = _HALF.search(text)
    return f"has half a character, \\u{ord(found[0]):04x}" if found else None


# --- what is said to the model ---------------------------------------------------------------------------------------


def _options(pattern: str, options: list[str]) -> str:
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, but only {len(LETTERS)} letters: shorten the list of options")
    return " ".join(pattern.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))


def coarse_text(
    name: str,
    question: str,
    options: list[str],
    duration: float | None = None,
    limits: Limits = LIMITS,
    event: bool = True,
) -> str:
    """The user's text for the pass over the whole video.

    name: of the template. options: texts without letters; empty only for templates that ask for events too. duration:
    seconds; when given, the released Zoom-Zero code's sentence about it comes first. limits: what templates of several
    turns state. event: without options, it is an event to be found, not a question (of Ego4D-NLQ). Raises ValueError
    for an unknown template, missing options or more options than letters.
    """
    words = template(name)
    if not options and not words.event:
        raise ValueError(f"template {name!r} needs options, question {question!r} has none")
    if options or event:
        pattern = words.question if options else words.event
    else:
        pattern = words.question.replace("{question} {options}", "{question}")
    segment = [12.0, 12.0 + limits.frames_per_call / 2]  # at 2 frames per second, as many as a call may ask for
    named = {"question": question, "options": _options(words.option, options), "segment": segment}
    text = pattern.format(**named, **limits._asdict())
    return text if duration is None else f"This video in total has {duration:.1f} seconds. {text}"


def zoom_text(name: str, question: str, options: list[str], think: str | None = None) -> str:
    """The user's text for the zoom pass: the same question about the zoomed frames, to be answered by a letter.

    think: the coarse pass' analysis, shown without its times (released Zoom-Zero code; the answer can leak through it).
    Raises ValueError for an unknown template or missing options.
    """
    words = template(name)
    if not options:
        raise ValueError(f"the zoom pass needs options, question {question!r} has none")
    analysis = "" if think is None else f"{strip_times(think)}\n"
    return words.zoom.format(question=question, options=_options(words.option, options), think=analysis)


def chat_text(
    text: str, n_videos: int = 1, system: str | None = "You are a helpful assistant.", text_first: bool = False
) -> str:
    """One user turn in Qwen's chat format, videos before the text (or after it), up to where the reply begins."""
    videos = VIDEO * n_videos
    turn = f"{text}{videos}" if text_first else f"{videos}{text}"
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{head}<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"


def observation_text(name: str, times: Sequence[float], refusal: str, calls: int, frames: int) -> str:
    """The user's text after a turn with a call: frames, each after its time, or why there are none.

    name: of the template. times: seconds, rounded to hundredths here, one per frame; the frames come where VIDEO is.
    refusal: a sentence, empty when there are frames. calls, frames: how many are left after this; with 0 of either the
    model is told to answer. Source: our wording of VideoZoomer's protocol (section 3.1).
    """
    words = template(name)
    observed = "".join(f"{time_text(time)}s{VIDEO}" for time in times) or refusal
    return observed + (words.remaining.format(calls=calls, frames=frames) if calls and frames else words.last)


def time_text(time: float) -> str:
    """Seconds, rounded to hundredths, as short as can be: 3, 3.5, 10800.12."""
    return f"{time:.2f}".rstrip("0").rstrip(".")


def next_turn(text: str, ended: bool) -> str:
    """From the end of a reply over another turn of the user to where the next reply begins, in Qwen's chat format.

    ended: the reply wrote its <|im_end|> itself.
    """
    return ("" if ended else "<|im_end|>") + f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# --- how its replies are read ----------------------------------------------------------------------------------------


def tag_ranges(text: str, tag: str) -> list[tuple[int, int]]:
    """Character ranges [start, end) of `<tag>...</tag>`, tags included; an unclosed one runs to the end of the text."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    ranges = []
    start = text.find(opening)
    while start >= 0:
        close = text.find(closing, start)
        end = len(text) if close < 0 else close + len(closing)
        ranges.append((start, end))
        start = text.find(opening, end)
    return ranges


def _contents(text: str, tag: str) -> list[str]:
    """What stands inside the closed ranges of a tag."""
    closing = f"</{tag}>"
    pieces = [text[start:end] for start, end in tag_ranges(text, tag)]
    return [piece[len(tag) + 2 : -len(closing)] for piece in pieces if piece.endswith(closing)]


def _after_think(text: str) -> str:
    return text.rpartition("</think>")[2]


# 12, 12.5, 1e3, 1:05, 1:02:05.5
_TIME = r"([0-9]++(?::[0-5][0-9]){0,2}+(?:\.[0-9]*+)?+(?:e[+-]?+[0-9]++)?+)"
_UNIT = r"\s*+(?:seconds?+|secs?+|s)?+\s*+"
_BETWEEN = r"[\s\[\](){},;.]*+"
_PAIR = re.compile(
    rf"{_BETWEEN}(?:from\s++|and\s++)?+{_BETWEEN}{_TIME}{_UNIT}(?:,|-|–|—|to|until)\s*+{_TIME}{_UNIT}{_BETWEEN}",
    re.IGNORECASE,
)
_SINGLE = re.compile(rf"{_BETWEEN}{_TIME}{_UNIT}{_BETWEEN}", re.IGNORECASE)


def _seconds(time: str) -> float:
    """'12.5' -> 12.5, '1:02:05.5' -> 3725.5; may be infinite."""
    total = 0.0
    for part in time.split(":"):
        total = total * 60 + float(part)
    return total


def _read_spans(content: str) -> list[Span] | None:
    """All of the content as pairs of times, or None; '[]' is the empty list."""
    if "".join(content.split()) == "[]":
        return []
    spans, position = [], 0
    while position < len(content):
        pair = _PAIR.match(content, position)
        if pair is None:
            return None
        start, end = _seconds(pair[1]), _seconds(pair[2])
        if not (start <= end < math.inf):
            return None
        spans.append((start, end))
        position = pair.end()
    return spans or None


def parse_spans(text: str) -> list[Span] | None:
    """The claimed spans, from the first closed `<glue>` (or else `<timestamp>`) after thinking; None if unreadable.

    Reads [(3.0,8.0), (9.5, 12)], [[3, 8]], 12.5 to 30.0, 12.5s - 30s, 8-11, 00:12 - 00:30. The list [] is a valid,
    empty prediction.
    """
    reply = _after_think(text)
    contents = _contents(reply, "glue") or _contents(reply, "timestamp")
    return _read_spans(contents[0]) if contents else None


def parse_time_mentions(text: str) -> list[Span]:
    """Spans of all readable `<time>` tags, in order; a single time is a span of length zero."""
    mentions = []
    for content in _contents(text, "time"):
        single = _SINGLE.fullmatch(content)
        if single and _seconds(single[1]) < math.inf:
            mentions.append((_seconds(single[1]), _seconds(single[1])))
        else:
            mentions.extend(_read_spans(content) or [])
    return mentions


def parse_think(text: str) -> str | None:
    """The content of the first closed `<think>`; None when there is none."""
    contents = _contents(text, "think")
    return contents[0] if contents else None


def strip_times(text: str) -> str:
    """The text without its `<time>` tags, their content and the spaces before them."""
    pieces, position = [], 0
    for start, end in tag_ranges(text, "time"):
        pieces.append(text[position:start].rstrip(" "))
        position = end
    return "".join(pieces) + text[position:]


# B, (B), [B], B., (B): text, "B) text"; but not "A dog", where A is an article
_ANSWER = re.compile(r"\s*+[(\[]?+\s*+([A-Za-z])\s*+(?:[)\].:].*+)?+", re.DOTALL)


def parse_answer(text: str, bare: bool = False) -> str | None:
    """The letter in the first closed `<answer>` after thinking, upper case; None if unreadable.

    bare: a text without any answer tag is read as the answer itself (replies to "only the letter of the option").
    """
    reply = _after_think(text)
    contents = _contents(reply, "answer")
    if bare and "<answer>" not in reply:
        contents = [reply]
    match = _ANSWER.fullmatch(contents[0]) if contents else None
    return match[1].upper() if match else None


_MAX_CALL = 200  # characters; a call needs about 40, and the JSON parser recurses


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # also refuses NaN, inf


def parse_tool_call(text: str) -> ToolCall | str | None:
    """VideoZoomer's request in a turn: None without a call, a ToolCall, or a sentence that says what is wrong with it.

    Only the call's own form is judged here; whether the video has those seconds and frames, the caller knows.
    """
    reply = _after_think(text)
    if "<video_zoom>" not in reply and not text.rstrip().endswith("</video_zoom>"):
        return None
    contents = _contents(reply, "video_zoom")
    if len(contents) != 1 or len(tag_ranges(reply, "video_zoom")) != 1:
        return "Make exactly one call per turn, after thinking, closed by </video_zoom>."
    if "<answer>" in reply:
        return "Give either a call or an answer in one turn, not both."
    if len(contents[0]) > _MAX_CALL:
        return f"The call is longer than {_MAX_CALL} characters."
    try:
        request = json.loads(contents[0])
    except ValueError:
        return 'The call is not one JSON object such as {"segment": [12.0, 13.0], "fps": 1}.'
    if not isinstance(request, dict) or set(request) != {"segment", "fps"}:
        return 'The call needs exactly the keys "segment" and "fps".'
    segment, fps = request["segment"], request["fps"]
    if not isinstance(segment, list) or len(segment) != 2 or not all(map(_is_number, segment)):
        return "The segment is not a pair of numbers in seconds."
    if not 0 <= segment[0] < segment[1]:
        return "The segment needs 0 <= start < end."
    if not _is_number(fps) or fps <= 0:
        return "The fps is not a number above 0."
    return ToolCall((float(segment[0]), float(segment[1])), float(fps))


# --- the strict check ------------------------------------------------------------------------------------------------

_LETTER = re.compile(r"\s*+(?:[A-Z]|\([A-Z]\))\s*+")
_NUMBER = r"[0-9]++(?:\.[0-9]++)?+"
_LIST_PAIR = rf"\(\s*+{_NUMBER}\s*+,\s*+{_NUMBER}\s*+\)"
_LIST = re.compile(rf"\s*+\[\s*+{_LIST_PAIR}(?:\s*+,\s*+{_LIST_PAIR})*+\s*+\]\s*+")
_TO = re.compile(rf"\s*+{_NUMBER}\s++to\s++{_NUMBER}\s*+")


def _blocks(text: str, tags: tuple[str, ...]) -> list[str] | None:
    """Contents of the blocks, if the text is these tags, once each, in this order, and white space; else None."""
    contents = []
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        text = text.lstrip()
        end = text.find(closing)
        if not text.startswith(opening) or end < 0:
            return None
        contents.append(text[len(opening) : end])
        text = text[end + len(closing) :]
    nested = any(f"<{tag}>" in content or f"</{tag}>" in content for content in contents for tag in tags)
    return None if nested or text.strip() else contents


# What must be true of the content of a block.
_WELL_FORMED: dict[str, Callable[[str], bool]] = {
    "think": lambda content: bool(content.strip()),
    "answer": lambda content: _LETTER.fullmatch(content) is not None,
    "glue": lambda content: _strict_spans(_LIST, content),
    "timestamp": lambda content: _strict_spans(_TO, content),
}


def format_ok(text: str, name: str, has_options: bool = True) -> bool:
    """Whether a response follows a template to the letter (special tokens already removed).

    has_options: False for samples without options, whose responses have no answer block.
    Of a template of several turns, one turn is judged: think and then either one readable call or an answer.
    """
    words = template(name)
    if words.multi_turn and (contents := _blocks(text, ("think", "video_zoom"))) is not None:
        return bool(contents[0].strip()) and isinstance(parse_tool_call(text), ToolCall)
    tags = tuple(tag for tag in words.blocks if has_options or tag != "answer")
    contents = _blocks(text, tags)
    if contents is None or not all(_WELL_FORMED[tag](content) for tag, content in zip(tags, contents, strict=True)):
        return False
    return "glue" not in tags or _time_in_think(contents[tags.index("think")])


def _time_in_think(think: str) -> bool:
    """Every `<time>` is closed, and at least one of them readable."""
    return len(tag_ranges(think, "time")) == len(_contents(think, "time")) and bool(parse_time_mentions(think))


def _strict_spans(pattern: re.Pattern[str], content: str) -> bool:
    """The content has the template's own notation, and every pair is in order."""
    return pattern.fullmatch(content) is not None and _read_spans(content) is not None

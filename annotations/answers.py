"""Answers: which option a text means.

What is unambiguous is read, whoever wrote it; anything else is no answer, and the row is reported with its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from prompts import LETTERS

# "<answer>B</answer>" and "\boxed{B}" mean "B".
WRAPPED = re.compile(r"\s*(?:<answer>(.*?)</answer>|\$?\\boxed\{(.*?)\}\$?)\s*", re.DOTALL)
BARE = re.compile(r"\s*(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])[.):]?)\s*")
LETTER_AND_TEXT = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*)", re.DOTALL)
OPTION_LETTERS = [re.compile(rf"(\({letter}\)|{letter}[.):])\s*") for letter in LETTERS]


def strip_letters(options: Iterable[str]) -> tuple[str, ...]:
    """Options without "A. ", "(A) ", "A) " or "A: ", removed only when every option starts with its own letter."""
    options = tuple([option.strip() for option in options])
    if not options or len(options) > len(LETTERS) or not OPTION_LETTERS[0].match(options[0]):
        return options
    matches = [pattern.match(option) for pattern, option in zip(OPTION_LETTERS, options, strict=False)]
    if not all(matches):
        return options
    return tuple(option[match.end() :] for option, match in zip(options, matches, strict=True))


def letter_of_text(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of the first option equal to the text (surrounding space ignored), or None."""
    text = text.strip()
    return LETTERS[options.index(text)] if text in options else None


def letter_of_answer(text: str, options: tuple[str, ...]) -> str | None:
    """The letter meant by a text, or None if it means none of the options or could mean two.

    In this order: a capital letter alone ("C", "(C)", "[C]", "C." and the like), an option's text, a small letter
    alone, a letter with its option's text ("C. grid"; after "(C)" also with another text, unless that is another
    option's). Any of them may stand in `<answer>` or `\\boxed{}`. So a letter wins over an option whose text is that
    letter. Without options, every letter is one.
    """
    if match := WRAPPED.fullmatch(text):
        text = match[1] if match[1] is not None else match[2]
    allowed = LETTERS[: len(options)] if options else LETTERS
    if (match := BARE.fullmatch(text)) and (letter := match[match.lastindex]) in allowed:
        return letter
    if letter := letter_of_text(text, options):
        return letter
    if (match := BARE.fullmatch(text.upper())) and (letter := match[match.lastindex]) in allowed:
        return letter
    if not (match := LETTER_AND_TEXT.fullmatch(text)) or (letter := match[1] or match[2]) not in allowed:
        return None
    words = plain(match[3])
    same = [option for option in options if plain(option) == words]
    if not options or plain(options[LETTERS.index(letter)]) == words:
        return letter
    return letter if match[1] and not same else None


def plain(text: str) -> str:
    """A text without what copies of it differ in: capitals, spaces, a full stop."""
    return " ".join(text.casefold().split()).removesuffix(".")

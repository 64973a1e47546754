"""Answers: which option a text means, and which mean none."""

import pytest

from annotations.answers import letter_of_answer, letter_of_text, strip_letters


@pytest.mark.parametrize(
    "options, stripped",
    [
        (["A. 1.", "B. 2.", "C. None of the above."], ("1.", "2.", "None of the above.")),
        (["(A) x", "(B)y"], ("x", "y")),
        (["A) x", "B: y"], ("x", "y")),
        (["A. (b)(a)(c).", "B. B is the answer."], ("(b)(a)(c).", "B is the answer.")),
        (["A cat", "B. y"], ("A cat", "B. y")),  # not all of them
        (["B. x", "A. y"], ("B. x", "A. y")),  # not their own letter
        (["A.M.", "noon"], ("A.M.", "noon")),
        ([" x ", "y"], ("x", "y")),
        ([], ()),
    ],
)
def test_letters_are_stripped_when_every_option_carries_its_own(options, stripped):
    assert strip_letters(options) == stripped


@pytest.mark.parametrize(
    "text, letter",
    [
        ("(C)", "C"),
        ("C", "C"),
        ("C.", "C"),
        ("(C) grid", "C"),
        ("grid", "C"),
        (" dots", "A"),
        ("(D)", None),
        ("stripes", None),
        ("c", "C"),
        ("C\n", "C"),
        ("[C]", "C"),
        ("C) grid", "C"),
        ("C. grid", "C"),
        ("C: Grid.", "C"),
        ("<answer>C</answer>", "C"),
        ("<answer> (C) grid\n</answer>\n", "C"),
        ("\\boxed{C}", "C"),
        ("$\\boxed{C}$", "C"),
        ("(C) something else", "C"),
        ("C. something else", None),  # of which letter?
        ("(C) dots", None),  # says two things
        ("2", None),  # from 0 or from 1?
        ("[D]", None),
        ("d", None),
        ("", None),
    ],
)
def test_letter_of_an_answer(text, letter):
    assert letter_of_answer(text, ("dots", "lines", "grid")) == letter


def test_the_first_of_equal_options_is_the_answer():
    assert letter_of_text("happy", ("sad", "happy", "happy")) == "B"


def test_an_option_whose_text_is_a_letter_loses_to_the_letter_but_wins_over_a_small_one():
    assert letter_of_answer("B", ("B", "a")) == "B"
    assert letter_of_answer("a", ("x", "a")) == "B"
    assert letter_of_answer("A. Lincoln", ("G. Washington", "A. Lincoln")) == "B"


def test_as_many_options_as_letters():
    options = tuple(f"{letter}. {k}" for k, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    assert strip_letters(options) == tuple(map(str, range(26)))
    assert letter_of_answer("(Z)", strip_letters(options)) == "Z" and letter_of_answer("J", options[:9]) is None

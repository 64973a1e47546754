"""Packed: many samples in little memory, unchanged."""

import random
from dataclasses import replace

import pytest

from annotations.packed import BLOCK, Packed
from annotations.records import usual_record
from annotations.rows import Sample


def make(k: int) -> Sample:
    evidence = tuple((k + n / 7, k + n) for n in range(k % 3))
    meta = {"reference": "é\u2028", "n": [k]} if k % 5 == 0 else {}
    return Sample(f"id {k}", f"{k % 7}.mp4", "Which? " * (k % 4), ("x", "ü")[: k % 3], None, evidence, None, "", meta)


@pytest.mark.parametrize("n", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_what_is_packed_comes_out_unchanged(n):
    samples = [make(k) for k in range(n)]
    packed = Packed(iter(samples))
    assert len(packed) == n and list(packed) == samples
    for k in random.Random(0).choices(range(-n, n), k=200) if n else []:
        assert packed[k] == samples[k]
    for k in (n, -n - 1):
        with pytest.raises(IndexError, match=f"sample {k} of {n}"):
            packed[k]


def test_a_usual_record_comes_out_as_its_sample():
    record = {"id": "q", "video": "a.mp4", "question": "Q?", "options": ["(A) x", "(B)y "], "answer": "(B)"}
    record |= {"glue": [[3, 8.5], [9, 10]], "duration": 16, "kind": "fine"}
    sample = Sample("q", "a.mp4", "Q?", ("x", "y"), "B", ((3.0, 8.5), (9.0, 10.0)), 16.0, "fine")
    assert list(map(repr, Packed([make(1), usual_record(record), make(2)]))) == [*map(repr, (make(1), sample, make(2)))]


def test_what_is_put_behind_others_comes_after_them():
    samples, packed = [make(k) for k in range(3 * BLOCK)], Packed([])
    for start, end in [(0, 3), (3, 3), (3, BLOCK + 3), (BLOCK + 3, 3 * BLOCK - 1), (3 * BLOCK - 1, 3 * BLOCK)]:
        packed.extend(Packed(samples[start:end]))
    assert len(packed) == len(samples) and list(packed) == samples
    assert [packed[k] for k in range(-len(samples), 0, 7)] == samples[::7]


def test_changing_a_sample_that_came_out_changes_nothing_inside():
    packed = Packed([make(1), make(2)])
    assert replace(packed[0], id="other") != packed[0] == make(1)


def test_ten_thousand_usual_samples_take_a_megabyte_and_a_half():
    draw, words = random.Random(0), ["a", "red", "cup", "falls", "from", "the", "table", "while", "someone", "looks"]
    text = [" ".join(draw.choices(words, k=8)) for _ in range(4)]
    samples = [
        Sample(f"q{k}", f"{k % 99:05d}.mp4", f"Why {k}? {text[k % 4]}", tuple(text), "B", ((k / 9, k / 9 + 4),), 150.0)
        for k in range(10_000)
    ]
    assert sum(map(len, Packed(samples).blocks)) < 1.5e6

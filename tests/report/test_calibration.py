"""Calibration, by hand and against a simulated answerer that is as sure as it is right."""

import json

import numpy as np
import pytest
from scored import row

from annotations.rows import DataError, Sample
from report.calibration import calibration, calibration_text
from report.results import read_results


def answered(confidence, letter="A", **more):
    return {**row(letter=letter), "confidence": confidence, **more}


def test_calibration_by_hand():
    rows = [answered(0.95), answered(0.91, "B"), answered(1.0), answered(0.31), answered(0.39, "B")]
    found = calibration(rows)["answer"]
    # Bin 0.9 to 1: three answers, two right, mean confidence 2.86 / 3. Bin 0.3 to 0.4: two, one right, 0.35.
    assert found["ECE"] == pytest.approx(3 / 5 * (2.86 / 3 - 2 / 3) + 2 / 5 * (0.5 - 0.35))
    assert [(one["from"], one["to"], one["questions"]) for one in found["bins"]] == [(0.3, 0.4, 2), (0.9, 1.0, 3)]
    assert found["confidence"] == pytest.approx(3.56 / 5) and found["accuracy"] == pytest.approx(3 / 5)
    text = calibration_text("a", calibration(rows))
    assert text == "calibration of a, answer: ECE 0.232 over 5 answers, mean confidence 0.712, accuracy 0.600"


def test_who_is_as_sure_as_right_has_almost_no_error_and_who_is_too_sure_has_the_difference():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.2, 1, 20_000)
    right = rng.random(20_000) < sure
    rows = [answered(float(s), "A" if r else "B") for s, r in zip(sure, right, strict=True)]
    assert calibration(rows)["answer"]["ECE"] < 0.02
    boast = [{**r, "confidence": min(1.0, r["confidence"] + 0.15)} for r in rows if r["confidence"] < 0.85]
    assert calibration(boast)["answer"]["ECE"] == pytest.approx(0.15, abs=0.02)


def test_what_has_no_answer_no_truth_or_no_confidence_takes_no_part():
    silent = [answered(0.0, None), {**answered(0.5), "answer": None}, row()]
    assert calibration(silent) == {}
    zoomed = answered(0.5, zoom_answer="B", zoom_confidence=0.9)
    found = calibration([*silent, zoomed, answered(0.5, zoom_answer=None, zoom_confidence=None)])
    assert {name: one["questions"] for name, one in found.items()} == {"answer": 2, "answer from the zoomed frames": 1}
    assert found["answer from the zoomed frames"]["ECE"] == pytest.approx(0.9)


def test_a_result_file_brings_its_confidences(tmp_path):
    sample = Sample("1", "a.mp4", "?", ("x", "y"), "A", ((2.0, 6.0),), 20.0)
    line = {"id": "1", "predicted_answer": "B", "spans": None, "confidence": 0.75}
    (tmp_path / "r.jsonl").write_text(json.dumps(line))
    assert calibration(read_results(tmp_path / "r.jsonl", [sample]))["answer"]["ECE"] == 0.75
    for wrong in (1.5, -0.1, "0.5", True):
        (tmp_path / "r.jsonl").write_text(json.dumps({**line, "confidence": wrong}))
        with pytest.raises(DataError, match="row 1, field 'confidence': expected a probability"):
            read_results(tmp_path / "r.jsonl", [sample])

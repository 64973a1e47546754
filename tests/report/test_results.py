"""Result files: what is read again, and what is refused."""

import json

import pytest

from annotations.rows import DataError, Sample
from report.results import read_results, row_of, stored_rows, write_results
from report.scores import summarise

SAMPLES = [
    Sample("1", "videos/a.mp4", "?", ("x", "y"), "A", ((2.0, 6.0),), 20.0, "fine"),
    Sample("2", "videos/b.mp4", "?", ("x", "y"), "B", ((3.0, 4.0),), 20.0, "blink"),
]


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_results_survive_a_file(tmp_path):
    rows = [row_of(SAMPLES[0], "A", [[2.5, 6.0]]), row_of(SAMPLES[1], None, None)]
    write_results(tmp_path / "r.jsonl", rows)
    assert read_results(tmp_path / "r.jsonl", SAMPLES) == rows


def test_questions_without_a_line_are_unanswered(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"id": "2", "predicted_answer": "B", "spans": [[3, 4]]}])
    rows = read_results(path, SAMPLES)
    assert [r["predicted_answer"] for r in rows] == [None, "B"]
    assert summarise(rows)["accuracy"] == 0.5


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"id": f"x{i}", "predicted_answer": "A", "spans": []} for i in range(9)], r"9 of 9 .*\['x0', 'x1', 'x2'\]"),
        ([{"id": "1", "predicted_answer": "A", "spans": []}] * 2, "row 2, field 'id': '1' comes twice"),
        ([{"id": "1", "predicted_answer": "A"}], "row 1, field 'spans': is missing"),
        ([{"id": "1", "predicted_answer": 3, "spans": []}], "row 1, field 'predicted_answer': expected str or null"),
        ([{"id": "1", "predicted_answer": "A", "spans": [[6, 2]]}], "row 1, field 'spans': expected .*start <= end"),
        ([{"id": "1", "predicted_answer": "A", "spans": [], "video": "c.mp4"}], "field 'video': .*another data set"),
        ([{"id": "1", "predicted_answer": "A", "spans": [], "video": 5}], "field 'video': .*has 'a', not 5: results"),
        ([{"id": "1", "predicted_answer": "A", "spans": [[1, 10**400]]}], "row 1, field 'spans': expected .*, got"),
        ([{"id": "1", "predicted_answer": "A", "spans": [], "answer": "B"}], "field 'answer': .*another data set"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_results(write_lines(tmp_path / "r.jsonl", lines), SAMPLES)


def test_results_may_name_the_video_in_another_folder(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"id": "1", "predicted_answer": "A", "spans": [], "video": "/x/a.mkv"}])
    assert read_results(path, SAMPLES)[0]["video"] == "videos/a.mp4"


def test_a_row_has_other_names_in_a_file_and_all_its_fields_come_back(tmp_path):
    """A file says "glue" and "spans", as earlier ones did; a line separator inside a text ends no line."""
    row = row_of(SAMPLES[0], "A", [[2.5, 6.0]]) | {"response": "one\u2028two", "error": None}
    assert row["evidence"] == [[2.0, 6.0]] and row["predicted"] == [[2.5, 6.0]]
    write_results(tmp_path / "r.jsonl", [row, row])
    line = json.loads((tmp_path / "r.jsonl").read_text().split("\n")[0])
    assert line["glue"] == [[2.0, 6.0]] and line["spans"] == [[2.5, 6.0]] and not {"evidence", "predicted"} & set(line)
    assert stored_rows(tmp_path / "r.jsonl") == [row, row]

"""Rows of questions that are scored or drawn."""


def row(answer="A", predicted="A", glue=((2, 6),), spans=((2, 6),), id="q", video="v", kind="", duration=20.0):
    return {
        "id": id,
        "video": video,
        "kind": kind,
        "duration": duration,
        "answer": answer,
        "predicted_answer": predicted,
        "glue": [list(s) for s in glue],
        "spans": None if spans is None else [list(s) for s in spans],
    }


def result(i, glue, iou, duration=20.0, **fields):
    row = {"id": f"q{i}", "video": "v.mp4", "question": "What?", "kind": "fine", "answer": "A", "predicted_answer": "B"}
    return row | {"zoom_answer": "A", "glue": glue, "spans": glue, "iou": iou, "duration": duration} | fields

"""Rows of questions that are scored or drawn."""


def row(answer="A", letter="A", evidence=((2, 6),), predicted=((2, 6),), id="q", video="v", kind="", duration=20.0):
    return {
        "id": id,
        "video": video,
        "kind": kind,
        "duration": duration,
        "answer": answer,
        "predicted_answer": letter,
        "evidence": [list(s) for s in evidence],
        "predicted": None if predicted is None else [list(s) for s in predicted],
    }


def result(i, evidence, iou, duration=20.0, **fields):
    row = {"id": f"q{i}", "video": "v.mp4", "question": "What?", "kind": "fine", "answer": "A", "predicted_answer": "B"}
    return (
        row
        | {"zoom_answer": "A", "evidence": evidence, "predicted": evidence, "iou": iou, "duration": duration}
        | fields
    )

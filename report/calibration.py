"""Whether an answer given with confidence 0.8 is right in 0.8 of the cases.

The expected calibration error (ECE) is the mean distance between confidence and accuracy over bins of confidence,
weighted by their answers (Guo et al. 2017, Eq. 3).
"""

from collections.abc import Sequence

import numpy as np

ANSWERS = {  # what is answered: its key in a row, and that of its confidence
    "answer": ("predicted_answer", "confidence"),
    "answer from the zoomed frames": ("zoom_answer", "zoom_confidence"),
}


def calibration(rows: Sequence[dict], bins: int = 10) -> dict[str, dict]:
    """{what is answered: {"ECE", "questions", "confidence", "accuracy", "bins": [{"from", "to", "questions",
    "confidence", "accuracy"}]}}, of those of `ANSWERS` that the rows have, with the right answer known.

    Bins have equal widths, and empty ones are left out. Without an answer there is no confidence in it.
    """
    found = {}
    for name, (answer, confidence) in ANSWERS.items():
        pairs = [
            (row[confidence], row[answer] == row["answer"])
            for row in rows
            if row["answer"] is not None and row.get(answer) is not None and row.get(confidence) is not None
        ]
        if pairs:
            found[name] = of_pairs(np.array(pairs, dtype=float), bins)
    return found


def of_pairs(pairs: np.ndarray, bins: int) -> dict:
    """pairs: [N, 2], confidence in [0, 1] and 1 for a right answer, else 0."""
    sure, right = pairs.T
    number = np.minimum((sure * bins).astype(int), bins - 1)  # a confidence of 1 belongs to the last bin
    members = {k: number == k for k in range(bins) if (number == k).any()}
    found = [
        {
            "from": k / bins,
            "to": (k + 1) / bins,
            "questions": int(inside.sum()),
            "confidence": float(sure[inside].mean()),
            "accuracy": float(right[inside].mean()),
        }
        for k, inside in members.items()
    ]
    # ECE = sum over bins of n_bin / N |accuracy - confidence|
    error = sum(one["questions"] * abs(one["accuracy"] - one["confidence"]) for one in found) / len(pairs)
    means = {"confidence": float(sure.mean()), "accuracy": float(right.mean())}
    return {"ECE": float(error), "questions": len(pairs), **means, "bins": found}


def calibration_text(label: str, found: dict[str, dict]) -> str:
    """A line for each kind of answer of a result."""
    return "\n".join(
        f"calibration of {label}, {name}: ECE {one['ECE']:.3f} over {one['questions']} answers, "
        f"mean confidence {one['confidence']:.3f}, accuracy {one['accuracy']:.3f}"
        for name, one in found.items()
    )

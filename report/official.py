"""Each benchmark's own scores, as its released evaluator computes them, from rows as scores.py has them.

The official scores differ from ours and from each other. What their released evaluators do:

| variant      | prediction                | evidence           | IoU over | threshold   | no prediction   | unit     |
|--------------|---------------------------|--------------------|----------|-------------|-----------------|----------|
| nextgqa      | first span                | best span          | hull     | >=          | row left out    | per cent |
| cgbench      | union                     | union              | union    | >=          | 0               | fraction |
| rextime      | first span                | best span          | hull     | >=          | 0 (*)           | mixed    |
| qvhighlights | R1: first, mAP: first ten | best span / each   | hull / union | >=      | 0 (*)           | per cent |
| charades_sta | first 1 or 5 spans        | the span           | hull     | both        | 0               | per cent |
| ego4d_nlq    | first 1 or 5 spans        | the span           | hull     | >           | row left out    | fraction |

(*) the released evaluator stops with an error. "Hull" is from the first start to the last end, so the IoU of two
disjoint spans is divided by more than their union; it is 0 all the same.
"""

import numpy as np

from annotations.rows import DataError
from report.scores import CGBENCH_THRESHOLDS
from rewards import merge, union_length


def hull_iou(a: list[float], b: list[float]) -> float:
    """Intersection over hull of two spans; 0 where the hull has no length."""
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / hull if hull != 0 else 0.0


def best_iou(row: dict) -> float:
    """The first predicted span's IoU with the span of the evidence that it fits best; 0 without a prediction."""
    return max(hull_iou(row["predicted"][0], span) for span in row["evidence"]) if row["predicted"] else 0.0


def rounded(fraction: float) -> float:
    """Per cent with two decimals, as QVHighlights' and ReXTime's evaluators write it."""
    return float(f"{100 * fraction:.2f}")


def nextgqa(rows: list[dict]) -> dict[str, float]:
    """NExT-GQA: IoU and IoP of the first predicted span with its best span of the evidence (each on its own).

    A point inside the evidence has IoP 1 and IoU 0; a reversed span has 0. Per cent, over questions with a
    prediction. "Acc" is over all questions.
    """
    grounded = [row for row in rows if row["predicted"]]
    pairs = np.array([nextgqa_iou_iop(row["predicted"][0], row["evidence"]) for row in grounded]).reshape(-1, 2)
    right = np.array([row["predicted_answer"] == row["answer"] for row in grounded], dtype=bool)
    if not grounded:
        raise DataError("NExT-GQA: no question has a predicted span")
    iou, iop = pairs.T
    return {
        "count": len(grounded),
        "Acc@GQA": 100 * float(np.mean(right & (iop >= 0.5))),
        "mIoP": 100 * float(iop.mean()),
        "TIoP@0.3": 100 * float(np.mean(iop >= 0.3)),
        "TIoP@0.5": 100 * float(np.mean(iop >= 0.5)),
        "mIoU": 100 * float(iou.mean()),
        "TIoU@0.3": 100 * float(np.mean(iou >= 0.3)),
        "TIoU@0.5": 100 * float(np.mean(iou >= 0.5)),
        "Acc": 100 * float(np.mean([row["predicted_answer"] == row["answer"] for row in rows])),
    }


def nextgqa_iou_iop(pred: list[float], gt: list[list[float]]) -> tuple[float, float]:
    """The best IoU and the best IoP, possibly with different spans of the evidence."""
    start, end = pred
    if start == end:
        return 0.0, float(any(s <= start <= e for s, e in gt))
    if start > end:
        return 0.0, 0.0
    return max(hull_iou(pred, span) for span in gt), max(max(0.0, min(end, e) - max(start, s)) for s, e in gt) / (
        end - start
    )


def cgbench(rows: list[dict]) -> dict[str, float]:
    """CG-Bench: unions of all spans; fractions. rec@IoU and acc@IoU are means over the thresholds 0.1 to 0.5."""
    iou = np.array([cgbench_iou(row["predicted"] or [], row["evidence"]) for row in rows])  # [N]
    right = np.array([row["predicted_answer"] == row["answer"] for row in rows], dtype=bool)
    recalls = {m: iou >= m for m in CGBENCH_THRESHOLDS}
    return {
        "count": len(rows),
        "mIoU": float(iou.mean()),
        "accuracy": float(right.mean()),
        **{f"rec@{m}": float(hits.mean()) for m, hits in recalls.items()},
        **{f"acc@{m}": float((hits & right).mean()) for m, hits in recalls.items()},
        "rec@IoU": float(np.mean(list(recalls.values()))),
        "acc@IoU": float(np.mean([hits & right for hits in recalls.values()])),
    }


def cgbench_iou(pred: list, gt: list) -> float:
    """IoU of two unions, |A| + |B| - |A ∩ B| below the line."""
    a, b = merge(pred), merge(gt)
    overlap = sum(max(0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)
    whole = union_length(a) + union_length(b) - overlap
    return overlap / whole if whole > 0 else 0.0


def rextime(rows: list[dict]) -> dict:
    """ReXTime: recall of the first span at 0.3 to 0.95 and mIoU in per cent; answers as fractions, also with IoU."""
    iou = np.array([best_iou(row) for row in rows])
    right = np.array([row["predicted_answer"] == row["answer"] for row in rows], dtype=bool)
    thresholds = [round(0.3 + 0.05 * k, 2) for k in range(14)]
    recalls = {str(m): rounded(np.mean(iou >= m)) for m in thresholds}
    grounded = {f"VQA,mIoU@{m}": float(np.mean(right & (iou >= m))) for m in (0.3, 0.5, 0.7)}
    accuracy, miou = float(right.mean()), rounded(iou.mean())
    return {
        "brief": {
            "VQA": accuracy,
            "MR-full-R1@0.3": recalls["0.3"],
            "MR-full-R1@0.5": recalls["0.5"],
            "MR-full-mIoU": miou,
            "VQA,mIoU@0.5": grounded["VQA,mIoU@0.5"],
        },
        "VQA": accuracy,
        "full": {"MR-mIoU": miou, "MR-R1": recalls, "VQA,mIoU": grounded},
    }


def ranked_recall(
    rows: list[dict], ranks: tuple[int, ...], thresholds: tuple[float, ...], strict: bool
) -> dict[str, float]:
    """The share of questions with a hit among the first k spans: IoU > threshold if strict, else >=.

    Keys like "R@1,IoU>0.3". The evidence is one span.
    """
    recalls = {}
    for k in ranks:
        best = np.array(
            [max((hull_iou(s, row["evidence"][0]) for s in (row["predicted"] or [])[:k]), default=-1) for row in rows]
        )
        for m in thresholds:
            hits = best > m if strict else best >= m
            recalls[f"R@{k},IoU{'>' if strict else '>='}{m}"] = float(hits.mean())
    return recalls


def charades_sta(rows: list[dict]) -> dict[str, float]:
    """Charades-STA in both conventions, > (TALL, 2D-TAN) and >= (language models); mIoU of the first span; per cent."""
    recalls = {
        name: 100 * value
        for strict in (True, False)
        for name, value in ranked_recall(rows, (1, 5), (0.3, 0.5, 0.7), strict).items()
    }
    return {**recalls, "mIoU": 100 * float(np.mean([best_iou(row) for row in rows]))}


def ego4d_nlq(rows: list[dict]) -> dict[str, float]:
    """Ego4D-NLQ: fractions over the questions with a prediction; mIoU of the first span."""
    predicted = [row for row in rows if row["predicted"]]
    if not predicted:
        raise DataError("Ego4D-NLQ: no question has a predicted span")
    return {
        "count": len(predicted),
        **ranked_recall(predicted, (1, 5), (0.3, 0.5), strict=True),
        "mIoU": float(np.mean([best_iou(row) for row in predicted])),
    }


# ---------------------------------------------------------------- QVHighlights

QVHIGHLIGHTS_LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": (0, np.inf)}  # (low, high] s
QVHIGHLIGHTS_IOUS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))


def qvhighlights(rows: list[dict]) -> dict[str, dict]:
    """QVHighlights' moment retrieval by length of the evidence: {"full": {"MR-mAP": {...}, "MR-R1": {...}}, ...}.

    For a length, only spans of the evidence in it count, and only questions that have one. The order of `spans` ranks
    them, unless the row has "span_scores", one number per span, which rank them for mAP.
    """
    results = {}
    for name, (low, high) in QVHIGHLIGHTS_LENGTHS.items():
        kept = [{**row, "evidence": [s for s in row["evidence"] if low < s[1] - s[0] <= high]} for row in rows]
        kept = [row for row in kept if row["evidence"]]
        if not kept:
            continue
        precisions = np.mean([moment_precisions(row) for row in kept], axis=0)  # [thresholds]
        first = np.array([best_iou(row) for row in kept])
        results[name] = {
            "MR-mAP": {
                **{str(m): rounded(p) for m, p in zip(QVHIGHLIGHTS_IOUS, precisions, strict=True)},
                "average": rounded(precisions.mean()),
            },
            "MR-R1": {str(m): rounded(np.mean(first >= m)) for m in QVHIGHLIGHTS_IOUS},
        }
    return results


def moment_precisions(row: dict) -> np.ndarray:
    """One question's average precision at each IoU threshold: [thresholds].

    The ten first spans by falling score; each takes the best-fitting span of the evidence that is still free.
    """
    spans = np.array((row["predicted"] or [])[:10], dtype=float).reshape(-1, 2)  # [P, 2]
    scores = np.array(row.get("span_scores", -np.arange(len(row["predicted"] or [])))[:10])
    spans = spans[np.argsort(-scores, kind="stable")]
    gt = np.array(row["evidence"], dtype=float)  # [G, 2]
    overlap = np.minimum(spans[:, None, 1], gt[:, 1]) - np.maximum(spans[:, None, 0], gt[:, 0])  # [P, G]
    overlap = overlap.clip(min=0)
    union = (spans[:, 1] - spans[:, 0])[:, None] + (gt[:, 1] - gt[:, 0]) - overlap
    iou = np.divide(overlap, union, out=np.zeros_like(overlap), where=union != 0)
    precisions = []
    for threshold in QVHIGHLIGHTS_IOUS:
        hits, free = [], set(range(len(gt)))
        for fits in iou:
            # Among equally good ones, the last.
            match = next((g for g in np.argsort(fits)[::-1] if fits[g] >= threshold and g in free), None)
            hits.append(match is not None)
            free.discard(match)
        precisions.append(interpolated_precision(np.array(hits, dtype=bool), len(gt)))
    return np.array(precisions)


def interpolated_precision(hits: np.ndarray, positives: int) -> float:
    """Area under the interpolated precision-recall curve; hits [P] by falling score, of `positives` to be found."""
    if not hits.any():
        return 0.0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    return float(precision[hits].sum() / positives)


OFFICIAL = {
    "nextgqa": nextgqa,
    "cgbench": cgbench,
    "rextime": rextime,
    "qvhighlights": qvhighlights,
    "charades_sta": charades_sta,
    "ego4d_nlq": ego4d_nlq,
}


def scores(benchmark: str, rows: list[dict]) -> dict:
    """The benchmark's own scores; `benchmark` is a key of OFFICIAL. DataError if there is nothing to compare with."""
    if benchmark not in OFFICIAL:
        raise DataError(f"no official scores for '{benchmark}'; known: {', '.join(OFFICIAL)}")
    without = [row["id"] for row in rows if not row["evidence"]]
    if without or not rows:
        raise DataError(f"{benchmark}: {len(without)} of {len(rows)} questions have no evidence, first {without[:3]}")
    return OFFICIAL[benchmark](rows)

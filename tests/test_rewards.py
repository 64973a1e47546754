"""Every reward against hand-computed values, a brute-force measure on a grid, and the properties that define it."""

import math
from itertools import pairwise, permutations

import pytest
from hypothesis import strategies as st
from properties import for_all

import rewards
from rewards import center_distance, giou, hull, interval_iog, interval_iop, interval_iou, merge


def spans(times, min_size=0):
    """Lists of spans between two of these times; each is one number, which is drawn faster than two."""

    def read(pairs):
        return [tuple(sorted((times[first], times[second]))) for first, second in pairs]

    pair = st.integers(0, len(times) ** 2 - 1)
    return st.lists(pair, min_size=min_size, max_size=5).map(lambda drawn: read(divmod(k, len(times)) for k in drawn))


GRID = 8  # grid points lie at multiples of 1/8 s, exact in binary
ON_GRID = spans([k / GRID for k in range(161)])
# Most of them are whole tens, so that spans often touch, end together, are equal, or have no length.
SECONDS = [k / 10 for k in range(1000)] + [10.0 * (k % 11) for k in range(3000)]
ANY = spans(SECONDS)
SOME = spans(SECONDS, min_size=1)
RATIOS = (interval_iou, interval_iop, interval_iog)


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


# --- letters and format


def test_format_reward_is_the_strict_check():
    text = "<think>red<time>(3.0,8.0)</time></think><answer>B</answer><glue>[(3.0,8.0)]</glue>"
    assert rewards.format_reward([text], "world") == 1.0
    assert rewards.format_reward([text], "longvtg_r1") == 0.0
    assert type(rewards.format_reward([text], "world")) is float
    event = "<think>x</think><timestamp>1 to 2</timestamp>"
    assert rewards.format_reward([event], "longvtg_r1") == 0.0
    assert rewards.format_reward([event], "longvtg_r1", has_options=False) == 1.0


@pytest.mark.parametrize("reward", [rewards.accuracy_reward, rewards.zoom_reward])
def test_accuracy_and_zoom(reward):
    assert reward("C", "C") == 1.0
    assert reward("B", "C") == 0.0
    assert reward(None, "C") == 0.0
    assert reward("", "C") == 0.0
    assert isinstance(reward("C", "C"), float)
    for gold in ("", "c", "(C)", "CD", "1"):
        with pytest.raises(ValueError, match="not a capital letter"):
            reward("C", gold)


def test_tool_reward_is_paid_for_clips_that_led_to_the_right_answer():
    assert rewards.tool_reward("C", "C", clips=1) == 1.0
    assert rewards.tool_reward("C", "C", clips=4) == 1.0
    assert rewards.tool_reward("C", "C", clips=0) == 0.0
    assert rewards.tool_reward("B", "C", clips=1) == 0.0
    assert rewards.tool_reward(None, "C", clips=1) == 0.0
    assert type(rewards.tool_reward("C", "C", clips=0)) is type(rewards.tool_reward("C", "C", clips=1)) is float
    with pytest.raises(ValueError, match="not a capital letter"):
        rewards.tool_reward("C", "(C)", clips=0)


# --- unions


def test_merge_by_hand():
    assert merge([]) == []
    assert merge([(3, 5), (0, 1)]) == [(0, 1), (3, 5)]
    assert merge([(0, 2), (1, 3)]) == [(0, 3)]
    assert merge([(0, 2), (2, 3)]) == [(0, 3)]  # touching
    assert merge([(0, 9), (2, 3)]) == [(0, 9)]  # inside
    assert merge([(4, 4)]) == [(4, 4)]


@pytest.mark.parametrize(
    "bad", [(5.0, 3.0), (math.nan, 3.0), (3.0, math.nan), (3.0, math.inf), (math.inf, math.inf), (-math.inf, 3.0)]
)
def test_a_span_that_is_none_raises(bad):
    with pytest.raises(ValueError, match="start must not be after the end"):
        merge([(0.0, 1.0), bad])


@for_all(ANY)
def test_merged_spans_are_disjoint_sorted_and_cover_the_same_points(a):
    merged = merge(a)
    assert all(first[1] < second[0] for first, second in pairwise(merged))
    for point in [t for span in a for t in span] + [(s + e) / 2 for s, e in a]:
        assert any(s <= point <= e for s, e in merged)
    for start, end in merged:
        assert start in [s for s, _ in a] and end in [e for _, e in a]


# --- ratios of lengths


@pytest.mark.parametrize(
    ("pred", "gt", "iou", "iop", "iog"),
    [
        ([(3, 8)], [(3, 8)], 1, 1, 1),
        ([(0, 4)], [(2, 10)], 0.2, 0.5, 0.25),
        ([(0, 1)], [(2, 3)], 0, 0, 0),
        ([(0, 1)], [(1, 3)], 0, 0, 0),
        ([(0, 1), (3, 4)], [(0, 4)], 0.5, 1, 0.5),
        ([(0, 4)], [(0, 1), (3, 4)], 0.5, 0.5, 1),
        ([(0, 2), (1, 4), (1, 4)], [(0, 4)], 1, 1, 1),
        ([(0, 1), (2, 3), (4, 5)], [(0.5, 4.5)], 2 / 5, 2 / 3, 0.5),
        ([], [(0, 1)], 0, 0, 0),
        ([(0, 1)], [], 0, 0, 0),
        ([], [], 0, 0, 0),
        ([(1, 1)], [(0, 2)], 0, 0, 0),
        ([(1, 1)], [(1, 1)], 0, 0, 0),
    ],
)
def test_ratios_by_hand(pred, gt, iou, iop, iog):
    assert (interval_iou(pred, gt), interval_iop(pred, gt), interval_iog(pred, gt)) == pytest.approx((iou, iop, iog))


def brute_force(pred, gt):
    """Lengths by counting the grid's cells."""

    def covers(a, cell):
        return any(start <= cell / GRID and (cell + 1) / GRID <= end for start, end in a)

    cells = range(160)
    p, g = ([covers(a, cell) for cell in cells] for a in (pred, gt))
    both, either = sum(map(all, zip(p, g, strict=True))), sum(map(any, zip(p, g, strict=True)))
    return [part / whole if whole else 0.0 for part, whole in ((both, either), (both, sum(p)), (both, sum(g)))]


@for_all(ON_GRID, ON_GRID)
def test_ratios_equal_a_brute_force_measure(pred, gt):
    assert [ratio(pred, gt) for ratio in RATIOS] == pytest.approx(brute_force(pred, gt))


@for_all(ANY, ANY)
def test_bounds_and_symmetry(pred, gt):
    iou, iop, iog = (ratio(pred, gt) for ratio in RATIOS)
    assert 0 <= iou <= min(iop, iog) + 1e-12
    assert max(iop, iog) <= 1 + 1e-12
    assert iou == interval_iou(gt, pred)
    assert iop == interval_iog(gt, pred)


@for_all(SOME)
def test_a_prediction_that_is_the_evidence_scores_one(a):
    if any(start < end for start, end in a):
        assert [ratio(a, a) for ratio in RATIOS] == [1, 1, 1]
        assert giou(a, [hull(a)]) == pytest.approx(2 * interval_iou(a, [hull(a)]) - interval_iog(a, [hull(a)]))


@for_all(ANY, ANY, st.integers(0, 119), st.integers(0, 4))
def test_order_splitting_duplication_and_overlap_change_nothing(pred, gt, order, split):
    orders = list(permutations(pred))
    changed = list(orders[order % len(orders)])
    if pred:
        start, end = pred[split % len(pred)]
        middle = (start + end) / 2
        changed += [(start, middle), (middle, end), (start, end), (start, middle)]
    for ratio in (*RATIOS, giou, lambda p, g: center_distance(p, g, 100.0)):
        assert close(ratio(changed, gt), ratio(pred, gt))
        assert close(ratio(gt, changed), ratio(gt, pred))


@for_all(SOME, SOME, st.floats(-50, 50), st.floats(0.1, 10))
def test_shift_and_scale_change_nothing(pred, gt, shift, scale):
    def move(a):
        return [(start * scale + shift, end * scale + shift) for start, end in a]

    for ratio in (*RATIOS, giou):
        assert math.isclose(ratio(move(pred), move(gt)), ratio(pred, gt), abs_tol=1e-9)
    here, there = center_distance(pred, gt, 100.0), center_distance(move(pred), move(gt), 100.0 * scale)
    assert math.isclose(here, there, abs_tol=1e-9)


@for_all(SOME, SOME, st.floats(0, 1e-3), st.integers(0, 4))
def test_small_changes_have_small_effects(pred, gt, delta, moves):
    """Moving one end by delta changes each length by at most delta."""
    k = moves % len(pred)
    moved = [*pred[:k], (pred[k][0], pred[k][1] + delta), *pred[k + 1 :]]
    longest = max(end - start for start, end in pred + gt)
    if longest >= 1:
        assert abs(interval_iou(moved, gt) - interval_iou(pred, gt)) <= 2 * delta / longest + 1e-9
        assert abs(giou(moved, gt) - giou(pred, gt)) <= 4 * delta / longest + 1e-9
    assert abs(center_distance(moved, gt, 100.0) - center_distance(pred, gt, 100.0)) <= delta / 100 + 1e-9


# --- GIoU and CenDist


@pytest.mark.parametrize(
    ("pred", "gt", "value"),
    [
        ([(3, 8)], [(3, 8)], 1),
        ([(0, 4)], [(2, 10)], 0.2),  # hull = union
        ([(0, 1)], [(3, 4)], -0.5),  # half of the hull is between them
        ([(0, 1)], [(9, 10)], -0.8),
        ([(9, 10)], [(0, 1)], -0.8),
        ([(0, 1), (3, 4)], [(0, 1)], 0.5 - 0.5),
        ([(1, 1)], [(1, 1)], 0),
        ([(1, 1)], [(3, 3)], -1),
        ([], [(0, 1)], -1),
        ([(0, 1)], [], -1),
        ([], [], -1),
    ],
)
def test_giou_by_hand(pred, gt, value):
    assert giou(pred, gt) == pytest.approx(value)
    assert rewards.giou_reward(pred, gt) == giou(pred, gt)


@for_all(ANY, ANY)
def test_giou_bounds(pred, gt):
    assert -1 <= giou(pred, gt) <= interval_iou(pred, gt)
    assert close(giou(pred, gt), giou(gt, pred))


@for_all(SOME, st.floats(0.5, 40), st.floats(1, 20))
def test_giou_and_center_distance_see_how_far_a_miss_is_where_iou_does_not(gt, gap, step):
    gt = gt[:1]
    near, far = [(gt[0][1] + gap, gt[0][1] + gap + 2)], [(gt[0][1] + gap + step, gt[0][1] + gap + step + 2)]
    assert interval_iou(near, gt) == interval_iou(far, gt) == 0
    assert giou(near, gt) > giou(far, gt)
    assert center_distance(near, gt, 300.0) > center_distance(far, gt, 300.0)


@pytest.mark.parametrize(
    ("pred", "gt", "duration", "value"),
    [
        ([(3, 8)], [(3, 8)], 20, 1),
        ([(0, 4)], [(5, 7)], 20, 0.8),  # centres 2 and 6
        ([(5, 7)], [(0, 4)], 20, 0.8),
        ([(0, 1), (3, 4)], [(5, 7)], 20, 0.8),  # hull (0, 4)
        ([(5, 7)], [(3, 4), (0, 1)], 20, 0.8),
        ([(2, 2)], [(5, 7)], 20, 0.8),
        ([(100, 200)], [(0, 1)], 20, 0),  # outside the video
        ([], [(0, 1)], 20, 0),
        ([(0, 1)], [], 20, 0),
    ],
)
def test_center_distance_by_hand(pred, gt, duration, value):
    assert center_distance(pred, gt, duration) == pytest.approx(value)


@for_all(SOME, SOME, st.floats(1, 1000))
def test_center_distance_is_one_only_where_centres_agree(pred, gt, duration):
    value = center_distance(pred, gt, duration)
    assert 0 <= value <= 1
    apart = abs(sum(hull(pred)) - sum(hull(gt))) / 2
    assert (value == 1) == (apart == 0)
    assert value == center_distance(gt, pred, duration)


@pytest.mark.parametrize("duration", [0, -1.0, math.nan])
def test_center_distance_needs_a_duration(duration):
    with pytest.raises(ValueError, match="positive duration in seconds"):
        center_distance([(0, 1)], [(0, 1)], duration)


def test_hull_by_hand():
    assert hull([(3, 4), (0, 1), (2, 9)]) == (0, 9)


# --- R_tg and unreadable predictions


@for_all(ANY, SOME, st.floats(0, 1))
def test_temporal_reward_is_eq_7(pred, gt, alpha):
    expected = alpha * interval_iou(pred, gt) + (1 - alpha) * center_distance(pred, gt, 100.0)
    assert rewards.temporal_reward(pred, gt, 100.0, alpha) == pytest.approx(expected)
    assert 0 <= rewards.temporal_reward(pred, gt, 100.0, alpha) <= 1 + 1e-12
    assert rewards.temporal_reward(pred, gt, 100.0, 1.0) == interval_iou(pred, gt)


def test_temporal_reward_by_hand():
    # IoU 0.2, centres 2 and 6 in 20 s: 0.8 * 0.2 + 0.2 * 0.8
    assert rewards.temporal_reward([(0, 4)], [(2, 10)], 20, alpha=0.8) == pytest.approx(0.32)


def test_unreadable_predictions_score_the_worst_value():
    assert rewards.iou_reward(None, [(0, 1)]) == 0.0
    assert rewards.temporal_reward(None, [(0, 1)], 20, 0.8) == 0.0
    assert rewards.giou_reward(None, [(0, 1)]) == -1.0
    assert rewards.iou_reward([], [(0, 1)]) == 0.0
    assert rewards.iou_reward([(0, 1)], [(0, 2)]) == 0.5


def test_all_rewards_are_floats():
    pred, gt = [(0, 4)], [(2, 10)]
    values = [
        *(ratio(pred, gt) for ratio in RATIOS),
        giou(pred, gt),
        center_distance(pred, gt, 20),
        rewards.iou_reward(pred, gt),
        rewards.temporal_reward(pred, gt, 20, 0.8),
    ]
    assert all(type(value) is float for value in values)


def test_readable_but_enormous_times_stay_finite():
    far = [(1e300, 1.7e308), (1e308, 1.2e308)]
    for value in (*(ratio(far, [(0, 1)]) for ratio in RATIOS), giou(far, [(0, 1)]), center_distance(far, [(0, 1)], 20)):
        assert math.isfinite(value)

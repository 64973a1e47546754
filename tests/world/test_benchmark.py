"""The built-in benchmark: videos show what the questions say; fine patterns cannot be seen in the coarse pass."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import video
from annotations.samples import read_samples
from world import benchmark, films
from world.benchmark import Event

DURATION = 20


def decoded(events, tmp_path, times, size):
    """Frames of a video with these events, as the model would be given them: float [N, 3, size, size]."""
    path = tmp_path / "clip.mp4"
    benchmark.write_video(events, path, DURATION)
    frames, _ = video.decode(path, times, size=(size, size))
    return frames.float()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    paths = {split: benchmark.build(root, split, 12, workers=1) for split in benchmark.SPLITS}
    return {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in paths.items()}, paths


def test_rows_have_the_public_format_and_load_as_samples(built):
    rows, paths = built
    for split in benchmark.SPLITS:
        samples = read_samples(paths[split], video_root=paths[split].parent)
        assert [sample.kind for sample in samples] == [row["kind"] for row in rows[split]]
        for sample, row in zip(samples, rows[split], strict=True):
            assert sample.answer == row["answer"].strip("()")
            assert [list(span) for span in sample.evidence] == row["glue"]
            assert video.probe(sample.video).duration == pytest.approx(DURATION)


def test_no_video_is_in_two_splits_and_a_larger_build_begins_with_the_smaller(tmp_path):
    shown = {}
    for split in benchmark.SPLITS:
        for _, events in itertools.islice(benchmark.layouts(split, 0, DURATION, 3), 300):
            assert shown.setdefault(repr(events), split) == split
    small = benchmark.build(tmp_path, "val", 2, workers=1).read_text()
    assert benchmark.build(tmp_path, "val", 3, workers=1).read_text().startswith(small)


def test_same_seed_same_bytes_other_seed_other_videos(tmp_path):
    first, second, other = (
        benchmark.build(tmp_path / str(k), "test", 3, seed=s, workers=1) for k, s in enumerate((0, 0, 1))
    )
    assert first.read_text() == second.read_text() != other.read_text()
    for row in map(json.loads, first.read_text().splitlines()):
        assert (first.parent / row["video"]).read_bytes() == (second.parent / row["video"]).read_bytes()


def test_the_world_is_the_same_in_every_process():
    """Python's hashes of strings differ from process to process; nothing may depend on them."""
    script = "from itertools import islice; from world import benchmark; "
    script += "print(list(islice(benchmark.layouts('train', 0, 20, 3), 20)))"
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and "Event(" in printed[0]


def test_layouts_are_what_the_module_promises():
    kinds = set()
    for _, events in itertools.islice(benchmark.layouts("train", 3, DURATION, 3), 500):
        for before, after in itertools.pairwise(events):
            assert after.start - before.end >= 1
        assert events[0].start >= 0 and events[-1].end <= DURATION
        for event in events:
            assert 2 <= event.end - event.start <= 4
            assert set(event.blinks) <= set(range(event.start, event.end))
        rows = benchmark.questions(events)
        kinds |= {row["kind"] for row in rows}
        assert [row["glue"] for row in rows] == [
            [[e.start, e.end] for e in events if e.colour == colour]
            for colour in dict.fromkeys(e.colour for e in events)
        ]
        for row in rows:
            if row["kind"] in ("blink", "pair"):
                spans = row["glue"]
                blinks = sum(len(e.blinks) for e in events if [e.start, e.end] in spans)
                assert row["options"]["ABCD".index(row["answer"][1])] == benchmark.COUNTS[blinks]
    assert kinds == set(benchmark.KINDS)


def test_lengths_vary_within_a_data_set_and_the_split_and_the_events_fit(tmp_path):
    drawn = list(itertools.islice(benchmark.layouts("train", 0, 60, 3, 15), 1000))
    lengths = [seconds for seconds, _ in drawn]
    assert (min(lengths), max(lengths)) == (15, 60)
    assert sum(length < 30 for length in lengths) == pytest.approx(500, abs=40)  # 30 is the middle of 15 and 60
    assert all(benchmark.split_of(events) == "train" and events[-1].end <= seconds for seconds, events in drawn)
    path = benchmark.build(tmp_path, "train", 3, duration=18, min_duration=15, workers=1)
    rows = {row["video"]: row for row in map(json.loads, path.read_text().splitlines())}
    expected = [seconds for seconds, _ in itertools.islice(benchmark.layouts("train", 0, 18, 3, 15), 3)]
    assert [row["duration"] for row in rows.values()] == expected
    assert [video.probe(path.parent / name).duration for name in rows] == pytest.approx(expected)


def test_answers_are_balanced():
    counts = dict.fromkeys(itertools.product(("coarse", "fine"), "ABCD"), 0)
    for _, events in itertools.islice(benchmark.layouts("train", 0, DURATION, 3), 1000):
        for row in benchmark.questions(events):
            if row["kind"] in ("coarse", "fine"):
                counts[row["kind"], row["answer"][1]] += 1
    for kind in ("coarse", "fine"):
        values = [counts[kind, letter] for letter in "ABCD"]
        assert min(values) > 0.85 * sum(values) / 4


@pytest.mark.parametrize("a, b", list(itertools.combinations(benchmark.PATTERNS, 2)))
def test_fine_patterns_are_equal_in_the_coarse_pass_and_differ_in_the_zoom(a, b, tmp_path):
    """At half the resolution they differ by at most the rounding to whole grey levels."""
    times = [5.0, 6.0]
    frames = {
        (name, size): decoded([Event(5, 8, "red", "fine", name)], tmp_path, times, size)
        for name in (a, b)
        for size in (56, 112)
    }
    assert (frames[a, 56] - frames[b, 56]).abs().max() <= 2
    assert (frames[a, 56] - frames[b, 56]).abs().mean() < 0.1
    assert (frames[a, 112] - frames[b, 112]).abs().max() > 50


@pytest.mark.parametrize("a, b", list(itertools.combinations(benchmark.PATTERNS, 2)))
def test_coarse_patterns_differ_in_the_coarse_pass(a, b, tmp_path):
    first, second = (decoded([Event(5, 8, "red", "coarse", n)], tmp_path, [5.0], 56) for n in (a, b))
    assert (first - second).abs().max() > 50


def test_blinks_are_never_seen_at_whole_seconds_and_once_each_at_2_fps(tmp_path):
    event = Event(4, 8, "green", "blink", blinks=(4, 6, 7))
    whole = decoded([event], tmp_path, [4.0, 5.0, 6.0, 7.0], 112)
    assert whole[:, :, 50:60, 50:60].min() > 150
    for offset in np.arange(0, 0.5, 0.125):
        times = [4 + offset + 0.5 * k for k in range(8)]
        frames = decoded([event], tmp_path, [t for t in times if t < 8], 112)
        assert (frames[:, :, 50:60, 50:60].amax((1, 2, 3)) < 100).sum() == 3


def test_events_start_and_end_on_their_frames(tmp_path):
    colours = decoded([Event(5, 8, "blue", "fine", "rows")], tmp_path, [4.9, 5.0, 7.9, 8.0], 112)[:, :, 10, 10]
    is_blue = colours[:, 2] - colours[:, 0] > 50
    assert is_blue.tolist() == [False, True, True, False]


def test_a_folder_may_be_named_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    benchmark.write_video([Event(1, 3, "red", "coarse", "rows")], Path("http:/a.mp4"), 4)
    assert video.probe("http:/a.mp4").duration == 4


def test_worlds_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        benchmark.build(tmp_path, "train", 20, duration=8, n_events=3)
    with pytest.raises(ValueError, match="at most 6 events"):
        benchmark.build(tmp_path, "train", 1, duration=60, n_events=7)
    with pytest.raises(ValueError, match="no split 'dev'"):
        benchmark.build(tmp_path, "dev", 1)


# ---------------------------------------------------------------- long videos


@pytest.fixture(scope="module")
def long_world(tmp_path_factory):
    path = films.build_long(tmp_path_factory.mktemp("long"), "test", 2, n_scenes=4, workers=1)
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def test_films_are_what_the_module_promises():
    drawn = list(itertools.islice(films.films("train", 1, 12), 40))
    boundaries = shots = 0
    for film in drawn:
        assert len(film) == 12
        for scene in film:
            # Events are at least two seconds away from the scene's ends.
            assert all(scene.start + 2 <= event.start and event.end + 2 <= scene.end for event in scene.events)
            assert len({wall.angle for wall in scene.walls}) == 1 and len({wall.tint for wall in scene.walls}) <= 2
        for before, after in itertools.pairwise(film):
            assert before.walls[0].angle != after.walls[0].angle
        walls = [wall for scene in film for wall in scene.walls]
        assert all(a.tint != b.tint for a, b in itertools.pairwise(walls) if a.end == b.start)
        assert len({wall.angle for wall in walls}) <= 4  # settings come back
        boundaries += len(film) - 1
        shots += sum(len(scene.walls) + len(scene.events) for scene in film) - 1
    assert boundaries / shots < 0.3
    assert {len(scene.events) for film in drawn for scene in film} == {0, 1, 2}


def test_shots_and_scenes_of_a_long_video_cover_it(long_world):
    path, rows = long_world
    assert len(rows) == 2
    for row in rows:
        assert video.probe(path.parent / row["video"]).duration == pytest.approx(row["duration"])
        for parts in (row["shots"], row["scenes"]):
            assert parts[0][0] == 0 and parts[-1][1] == row["duration"]
            assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
        assert {start for start, _ in row["scenes"]} < {start for start, _ in row["shots"]}


def test_a_long_video_shows_what_it_says(long_world):
    """A frame stays the same up to the cut (but for lights and the bar) and changes there."""
    path, rows = long_world
    row = rows[0]
    first = [start for start, _ in row["shots"]]
    last = [end - 1 / benchmark.FPS for _, end in row["shots"]]
    frames, _ = video.decode(path.parent / row["video"], [*first, *last])
    walls = frames[:, :, :20].float()  # without the middle, where lights blink
    starts, ends = walls[: len(first)], walls[len(first) :]
    assert (starts - ends).abs().mean((1, 2, 3)).max() < 2
    assert (ends[:-1] - starts[1:]).abs().mean((1, 2, 3)).min() > 12


def test_questions_about_the_parts_are_questions_about_the_long_video(long_world):
    path, rows = long_world
    asked = [question for row in rows for question in row["questions"]]
    assert asked and len({question["id"] for question in asked}) == len(asked)
    for row in rows:
        for question in row["questions"]:
            start, end = row["scenes"][question["scene"]]
            assert all(start < span[0] < span[1] < end and span in row["shots"] for span in question["glue"])
            if question["kind"] in ("blink", "pair"):
                frames = [
                    range(int(start) * benchmark.FPS, int(end) * benchmark.FPS) for start, end in question["glue"]
                ]
                times = [k / benchmark.FPS for k in itertools.chain(*frames)]
                light = video.decode(path.parent / row["video"], times)[0][:, :, 50:60, 50:60].amax((1, 2, 3)) < 100
                dark = int(light.sum()) // 4  # a light is out for half a second, four frames
                assert question["options"]["ABCD".index(question["answer"][1])] == benchmark.COUNTS[dark]


def test_long_videos_are_the_same_again_and_differ_between_seeds_and_splits(long_world, tmp_path):
    path, _ = long_world
    folder = path.parent / "test"
    (folder / "00001.mp4").unlink()
    kept = (folder / "00000.mp4").stat().st_mtime_ns
    before = path.read_text()
    path.unlink()
    # An interrupted build goes on.
    assert films.build_long(path.parents[1], "test", 2, n_scenes=4, workers=1).read_text() == before
    assert (folder / "00001.mp4").exists() and (folder / "00000.mp4").stat().st_mtime_ns == kept
    shown = {}
    for split in benchmark.SPLITS:
        for seed in (0, 1):
            for film in itertools.islice(films.films(split, seed, 4), 20):
                assert shown.setdefault(repr(film), (split, seed)) == (split, seed)
    with pytest.raises(ValueError, match="at least one scene"):
        films.build_long(tmp_path, "train", 1, n_scenes=0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        films.build_long(tmp_path, "dev", 1)


def test_the_short_world_keeps_its_pixels():
    """The videos that shipped policies were trained on must not change."""
    _, events = next(benchmark.layouts("train", 0, DURATION, 3))
    frames = b"".join(benchmark.draw_frame(events, k / benchmark.FPS, DURATION).tobytes() for k in range(0, 160, 8))
    assert hashlib.sha256(frames).hexdigest()[:16] == "c922f9d07a8eed0d"


def test_every_frame_of_a_video_with_blinks_and_of_a_film_keeps_its_pixels():
    def digest(events, duration, walls=()):
        times = (k / benchmark.FPS for k in range(duration * benchmark.FPS))
        frames = b"".join(benchmark.draw_frame(events, time, duration, walls).tobytes() for time in times)
        return hashlib.sha256(frames).hexdigest()[:16]

    drawn = (events for _, events in benchmark.layouts("train", 0, DURATION, 3))
    events = next(events for events in drawn if any(event.blinks for event in events))
    assert digest(events, DURATION) == "828851b8480f72aa"
    film = next(films.films("train", 0, 2))
    events, walls = ([one for scene in film for one in getattr(scene, name)] for name in ("events", "walls"))
    assert digest(events, film[-1].end, walls) == "0874273181a4ecf0"

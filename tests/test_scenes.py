"""Shots, scenes and their detector: formulas against plain loops, what cannot be used, and a tiny training."""

import errno
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import scenes
from annotations.rows import DataError
from benchmarks import scenes as baseline
from media.file import VideoError
from policy import Video, encode_videos
from scenes import Detector, Labelled, SceneError, merge_shots
from video import decode
from world import benchmark, films

SHOTS = [(0.0, 2.0), (2.0, 5.0), (5.0, 6.0), (6.0, 10.0)]


@pytest.fixture(scope="module")
def long_world(tmp_path_factory):
    """The annotation file of two long videos of five scenes."""
    return films.build_long(tmp_path_factory.mktemp("long"), "train", 2, n_scenes=5, workers=1)


@pytest.fixture(scope="module")
def tower():
    return scenes.load_tower(str(scenes.configuration.TOWER))


@pytest.fixture(scope="module")
def trained():
    """The features of a few videos, and a detector trained on them."""
    videos, features = invented(0, n_videos=4)
    return features, scenes.train_detector(videos, features, "tower", 16)


def invented(seed: int, n_videos: int = 12, n_settings: int = 8) -> tuple[list[Labelled], list[torch.Tensor]]:
    """Videos whose shots are noisy copies of their setting's features, beside numbers that mean nothing."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_settings, 6))
    videos, features = [], []
    for k in range(n_videos):
        settings = [int(rng.integers(n_settings))]
        for _ in range(5):
            settings.append(int((settings[-1] + rng.integers(1, n_settings)) % n_settings))
        of_shot = np.repeat(settings, rng.integers(2, 6, len(settings)))
        shots = [(5.0 * n, 5.0 * (n + 1)) for n in range(len(of_shot))]
        videos.append(Labelled(f"{k}.mp4", shots, (of_shot[1:] != of_shot[:-1]).tolist()))
        looks = centres[of_shot] + 0.3 * rng.normal(size=(len(of_shot), 6))
        nothing = rng.normal(size=(len(of_shot), 6))
        features.append(torch.tensor(np.hstack([looks, nothing]), dtype=torch.float))
    return videos, features


def first_video(path) -> tuple[str, list[scenes.Shot]]:
    video = scenes.read_labelled(path)[0]
    return video.video, video.shots


# ---------------------------------------------------------------- shots


def test_shots_between_boundaries_above_the_threshold_are_merged():
    assert merge_shots(SHOTS, [0.1, 0.9, 0.2]) == [(0.0, 5.0), (5.0, 10.0)]
    assert merge_shots(SHOTS, [0.3, 0.31, 0.0]) == [(0.0, 5.0), (5.0, 10.0)]  # above, not at, 0.3
    assert merge_shots(SHOTS, [0.0] * 3) == [(0.0, 10.0)]
    assert merge_shots(SHOTS, [1.0] * 3) == SHOTS
    assert merge_shots(SHOTS, [0.5, 0.7, 0.6], threshold=0.65) == [(0.0, 5.0), (5.0, 10.0)]


def test_one_shot_is_one_scene_and_no_shot_is_none():
    assert merge_shots([(0.0, 4.0)], []) == [(0.0, 4.0)]
    assert merge_shots([], []) == []
    with pytest.raises(ValueError, match="4 shots have 3 boundaries, not 4"):
        merge_shots(SHOTS, [0.5] * 4)


def test_videos_with_known_shots_and_scenes_are_read(long_world):
    rows = [json.loads(line) for line in long_world.read_text().splitlines()]
    for video, row in zip(scenes.read_labelled(long_world), rows, strict=True):
        assert video.video == str(long_world.parent / row["video"])
        assert video.shots == [tuple(shot) for shot in row["shots"]]
        true = [cut for cut, begins in zip(video.cuts, video.truth, strict=True) if begins]
        assert true == [start for start, _ in row["scenes"][1:]]


@pytest.mark.parametrize(
    "shots, message",
    [
        ([[0, 2], [1, 3]], "begins before"),
        ([[2, 2]], "does not last"),
        ([[-1, 2]], "does not last"),
        ([[0, "2"]], "expected"),
        (None, "is missing|expected list"),
    ],
)
def test_shots_that_cannot_be_are_refused(shots, message, tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text(
        '{"video": "a.mp4", "shots": [[0, 1]], "scenes": [[0, 1]]}\n' + json.dumps({"video": "b.mp4", "shots": shots})
    )
    with pytest.raises(DataError, match=rf"shots.jsonl: row 2, field 'shots': .*({message})"):
        scenes.read_labelled(path)


def test_without_pyscenedetect_the_error_says_what_to_install(monkeypatch, plain):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(SceneError, match="pip install scenedetect-headless"):
        scenes.find_shots(plain)


needs_scenedetect = pytest.mark.skipif(
    importlib.util.find_spec("scenedetect") is None, reason="PySceneDetect is not installed (scenedetect-headless)"
)


@needs_scenedetect
def test_pyscenedetect_finds_the_shots_of_a_long_video(long_world):
    """All but those between two walls that differ in little but their tint."""
    video = scenes.read_labelled(long_world)[0]
    found = scenes.find_shots(video.video)
    assert (found[0][0], found[-1][1]) == (0.0, pytest.approx(video.shots[-1][1]))
    cuts = {start for start, _ in found[1:]}
    assert cuts <= set(video.cuts) and len(cuts) >= 0.9 * len(video.cuts)


@needs_scenedetect
def test_a_video_without_cuts_is_one_shot_and_a_file_without_frames_is_refused(tmp_path):
    path = tmp_path / "grey.mp4"
    benchmark.write_video([], path, 2)
    assert scenes.find_shots(path) == [(0.0, 2.0)]
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(VideoError, match="the file is empty"):
        scenes.find_shots(empty)


# ---------------------------------------------------------------- features


def test_features_are_mean_and_deviation_of_the_shots_tokens(long_world, tower):
    video, shots = first_video(long_world)
    features = scenes.shot_features(tower, video, shots[:3], 16)
    start, end = shots[1]
    times = [start + part * (end - start) for part in (0.125, 0.375, 0.625, 0.875)]
    frames, _ = decode(video, times, size=(112, 112))
    tokens = encode_videos(tower, [Video.from_frames(frames, 1.0)])[0].numpy()
    np.testing.assert_allclose(features[1], np.concatenate([tokens.mean(0), tokens.std(0)]), rtol=1e-4, atol=1e-5)


def test_features_are_kept_until_the_video_the_shots_or_the_tower_change(long_world, tower, tmp_path, monkeypatch):
    source, shots = first_video(long_world)
    video = tmp_path / "video.mp4"
    shutil.copy(source, video)
    looked = []
    frames = scenes.shot_frames
    monkeypatch.setattr(scenes, "shot_frames", lambda *given: looked.append(given) or frames(*given))

    def features(given=shots[:2]):
        return scenes.shot_features(tower, video, given, 16, tmp_path / "kept")

    first = features()
    assert torch.equal(features(), first) and len(looked) == 1
    features([*shots[:1], (shots[1][0], shots[1][1] - 0.5)])
    assert len(looked) == 2
    video.write_bytes(video.read_bytes() + b"\0" * 8)
    features()
    assert len(looked) == 3
    monkeypatch.setattr(scenes, "tower_name", lambda _: "another")
    features()
    assert len(looked) == 4


def test_a_shot_shorter_than_a_frame_has_features_and_one_after_the_end_has_none(long_world, tower):
    video, _ = first_video(long_world)
    assert torch.isfinite(scenes.shot_features(tower, video, [(0.0, 1.01), (1.01, 1.02)], 16)).all()
    assert scenes.shot_features(tower, video, [], 16).shape == (0, 256)
    with pytest.raises(VideoError, match=r"a shot begins at 9999\.000 s"):
        scenes.shot_features(tower, video, [(0.0, 1.0), (9999.0, 10000.0)], 16)
    with pytest.raises(VideoError, match=r"gone\.mp4: No such file"):
        scenes.shot_features(tower, "gone.mp4", [(0.0, 1.0)], 16, long_world.parent)


def test_a_full_disk_is_named_and_leaves_nothing_behind(long_world, tower, trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    video, shots = first_video(long_world)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SceneError, match=r"\.npy: No space left on device"):
        scenes.shot_features(tower, video, shots[:1], 16, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SceneError, match=r"detector\.safetensors: "):
        trained[1].save(tmp_path / "file" / "detector.safetensors")


# ---------------------------------------------------------------- ShotCoL


def test_the_positive_is_the_most_similar_neighbour():
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(9, 5, generator=generator), dim=-1)
    for reach in (1, 2, 20):
        found = scenes.most_similar_neighbours(keys, reach).tolist()
        for n in range(9):
            near = [k for k in range(9) if k != n and abs(k - n) <= reach]
            assert found[n] == max(near, key=lambda k: float(keys[n] @ keys[k]))
    with pytest.raises(ValueError, match="no neighbours"):
        scenes.most_similar_neighbours(keys[:1], 4)


def test_info_nce_is_the_plain_loop():
    generator = torch.Generator().manual_seed(1)
    queries, positives, negatives = (
        F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.double), dim=-1) for n in (5, 5, 7)
    )
    allowed = torch.rand(5, 7, generator=generator) < 0.6
    total = 0.0
    for n in range(5):
        right = math.exp(sum(a * b for a, b in zip(queries[n].tolist(), positives[n].tolist(), strict=True)) / 0.2)
        wrong = 0.0
        for m in range(7):
            if allowed[n, m]:
                wrong += math.exp(float(queries[n] @ negatives[m]) / 0.2)
        total -= math.log(right / (right + wrong)) / 5
    assert scenes.info_nce(queries, positives, negatives, allowed, 0.2).item() == pytest.approx(total)
    # Without negatives there is nothing to tell apart.
    assert scenes.info_nce(queries, positives, negatives, torch.zeros(5, 7, dtype=torch.bool), 0.2).item() == 0


def test_windows_hold_the_similarities_around_each_boundary():
    generator = torch.Generator().manual_seed(2)
    embeddings = F.normalize(torch.randn(5, 3, generator=generator), dim=-1)
    for window in (1, 2, 3):
        found = scenes.window_similarities(embeddings, window)
        assert found.shape == (4, window * (2 * window - 1) + 2 * window)
        for n in range(4):
            around = range(n - window + 1, n + window + 1)
            there = [0 <= k < 5 for k in around]
            pairs = [
                float(embeddings[a] @ embeddings[b]) if 0 <= a < 5 and 0 <= b < 5 else 0.0
                for a, b in itertools.combinations(around, 2)
            ]
            assert found[n].tolist() == pytest.approx([*pairs, *map(float, there)], abs=1e-6)
    assert scenes.window_similarities(embeddings[:1], 3).shape == (0, 21)
    assert scenes.window_similarities(embeddings[:0], 3).shape == (0, 21)


def test_training_beats_chance_on_new_videos():
    (videos, features), (new, new_features) = invented(0), invented(1)
    detector = scenes.train_detector(videos, features, "tower", 16)
    found = scenes.boundary_scores(new, [detector(one) for one in new_features])
    chance = np.mean([np.mean(video.truth) for video in new])
    assert found["AP"] > chance + 0.3 and min(found["recall"], found["precision"]) > 0.6


def test_training_on_neighbours_brings_the_shots_of_new_scenes_together():
    """Without labels: the similarity of shots in a scene grows over that across its end."""
    (_, features), (new, new_features) = invented(0), invented(1)
    gaps = []
    for steps in (0, 100):
        encoder = scenes.train_encoder(features, steps=steps)
        similar = torch.cat([(e[:-1] * e[1:]).sum(-1) for e in map(encoder, new_features)])
        begins = torch.cat([torch.tensor(video.truth) for video in new])
        gaps.append(float(similar[~begins].mean() - similar[begins].mean()))
    assert gaps[1] > gaps[0] + 0.1


def test_training_is_the_same_again(trained):
    features, detector = trained
    again, other = (scenes.train_detector(*invented(0, n_videos=4), "tower", 16, seed) for seed in (0, 1))
    assert detector(features[0]) == again(features[0]) != other(features[0])


def test_an_encoder_needs_two_videos_with_neighbours():
    one_shot = torch.zeros(1, 4)
    with pytest.raises(SceneError, match="at least 2 videos of more than one shot, there are 1"):
        scenes.train_encoder([torch.randn(5, 4), one_shot])


def test_a_video_of_one_shot_or_none_has_no_boundaries(trained):
    features, detector = trained
    assert detector(features[0][:1]) == detector(features[0][:0]) == []
    assert len(detector(features[0][:2])) == 1


def test_a_saved_detector_is_the_same_and_refuses_other_towers(trained, tower, tmp_path):
    features, detector = trained
    path = tmp_path / "new" / "detector.safetensors"
    detector.save(path)
    loaded = Detector.load(path)
    assert loaded(features[0]) == detector(features[0]) and loaded.tokens == 16 and loaded.tower == "tower"
    with pytest.raises(SceneError, match=r"detector\.safetensors: made for another vision tower"):
        Detector.load(path, tower)
    path.write_bytes(b"no tensors")
    for wrong in (path, tmp_path / "gone.safetensors"):
        with pytest.raises(SceneError, match=rf"{wrong.name}: not a scene detector"):
            Detector.load(wrong)


# ---------------------------------------------------------------- evaluation


def reference_precision(scores, truth):
    """AP from its definition: every threshold once, precision and recall of what lies at or above it."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        recall = sum(chosen) / sum(truth)
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


def test_average_precision_by_hand():
    assert scenes.average_precision([0.9, 0.8, 0.1], [True, True, False]) == 1
    assert scenes.average_precision([0.9, 0.8, 0.7], [False, True, True]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scenes.average_precision([0.5] * 4, [True, False, False, False]) == 0.25  # equal scores: one point
    with pytest.raises(ValueError, match="no precision-recall curve"):
        scenes.average_precision([0.5], [False])


def test_average_precision_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.integers(0, 8, 20) / 8  # with ties
        truth = rng.random(20) < 0.3
        if truth.any():
            expected = reference_precision(scores.tolist(), truth.tolist())
            assert scenes.average_precision(scores, truth) == pytest.approx(expected)


def test_recall_counts_true_times_with_a_found_one_nearby():
    assert scenes.recall_at([10.0, 50.0], [13.0, 13.1, 50.0, 90.0]) == 0.5
    assert scenes.recall_at([], [1.0]) == 0
    assert scenes.recall_at([1.5], [1.0, 2.0], tolerance=0.5) == 1
    with pytest.raises(ValueError, match="no recall"):
        scenes.recall_at([1.0], [])


def test_scores_are_means_over_videos_with_boundaries():
    videos = [
        Labelled("a", SHOTS, [False, True, False]),
        Labelled("b", SHOTS, [False, False, False]),  # one scene: there is nothing to find
        Labelled("c", SHOTS, [True, False, False]),
    ]
    found = scenes.boundary_scores(videos, [[0.1, 0.9, 0.2], [0.9, 0.9, 0.9], [0.1, 0.1, 0.2]])
    # In c nothing is above the threshold, and the true boundary comes after one and level with another.
    assert found == pytest.approx({"AP": (1 + 1 / 3) / 2, "recall": 0.5, "precision": 0.5})
    with pytest.raises(SceneError, match="none of the videos has two scenes"):
        scenes.boundary_scores(videos[1:2], [[0.9, 0.9, 0.9]])


def test_scenes_must_begin_with_a_shot(tmp_path):
    path = tmp_path / "films.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "shots": SHOTS, "scenes": [[0, 5], [5, 10]]}))
    [video] = scenes.read_labelled(path)
    assert video.truth == [False, True, False] and video.cuts == [2.0, 5.0, 6.0]
    path.write_text(json.dumps({"video": "a.mp4", "shots": SHOTS, "scenes": [[0, 4], [4, 10]]}))
    with pytest.raises(DataError, match=r"row 1, field 'scenes': a scene begins at 4\.0 s, where no shot begins"):
        scenes.read_labelled(path)


def test_the_baseline_s_histograms_count_colours(long_world):
    video = scenes.read_labelled(long_world)[0]
    found = baseline.histograms(video, 16)
    frames = scenes.shot_frames(video.video, video.shots[:1], 16)[0]
    pixels = frames.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    expected, _ = np.histogramdd(pixels, bins=8, range=[(0, 256)] * 3)
    np.testing.assert_allclose(found[0] ** 2, expected.ravel() / len(pixels), atol=1e-6)


# ---------------------------------------------------------------- the program


def test_the_program_trains_and_evaluates(tmp_path, capsys):
    data = films.build_long(tmp_path / "cache", "train", 3, n_scenes=3, workers=1)
    arguments = ["--train_data", str(data), "--test_data", str(data), "--cache", str(tmp_path / "cache")]
    scenes.main(["--train", *arguments, "--out", str(tmp_path / "out")])
    trained = capsys.readouterr().out.splitlines()
    path = tmp_path / "out" / "detector.safetensors"
    assert path.exists() and trained[-1].startswith("3 videos: AP ")
    scenes.main(["--evaluate", *arguments, "--detector", str(path)])
    assert capsys.readouterr().out.splitlines()[-1] == trained[-1]


def test_the_shipped_detector_belongs_to_the_shipped_policy_and_finds_scenes(long_world, tower):
    detector = Detector.load(scenes.configuration.TOWER.parent / "scenes.safetensors", tower)
    videos = scenes.read_labelled(long_world)
    features = [scenes.shot_features(tower, video.video, video.shots, detector.tokens) for video in videos]
    found = scenes.boundary_scores(videos, list(map(detector, features)))
    assert found["AP"] > 2 * np.mean([np.mean(video.truth) for video in videos])


def test_the_program_needs_a_detector_and_two_videos(tmp_path):
    with pytest.raises(SceneError, match=r"gone\.safetensors: not a scene detector"):
        scenes.main(["--evaluate", "--detector", str(tmp_path / "gone.safetensors")])
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"video": "a.mp4", "shots": [], "scenes": []}))
    with pytest.raises(DataError, match=r"one\.jsonl: row 1, field 'shots': there is none"):
        scenes.main(["--train", "--train_data", str(data), "--out", str(tmp_path)])

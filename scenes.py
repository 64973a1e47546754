"""Shots and scenes: where a video cuts, and at which cuts a new scene begins (LongVTG-R1, section 3.4).

- `find_shots`: the shots, by PySceneDetect, an optional package.
- `shot_features`: what the policy's vision tower makes of a few frames of each shot, pooled, kept on disk.
- `Detector`: an encoder that is trained without labels to find each shot's most similar neighbour (`info_nce`), and a
  head that is trained with labels to give each cut the probability that a scene begins there, from a window of shots
  around it. ShotCoL, Chen et al. 2021.
- `merge_shots`: the scenes, between cuts more probable than 0.3.

Differences from ShotCoL: the tower is frozen and a small encoder is trained on top of it; negatives are the shots of
the batch's other videos, without a queue; the head sees how similar the window's shots are to each other, not what they
show, so that few labelled videos are enough.

    python scenes.py --train --out runs/scenes
    python scenes.py --evaluate --detector runs/scenes/detector.safetensors

Both are about the built-in long videos, or about `--train_data` and `--test_data`: JSON lines with "video", "shots" and
"scenes", lists of [start, end]. A shot or scene is [start, end) in seconds from the first displayed frame.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("scenes", __doc__)  # the imports below take seconds

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import config as configuration
from annotations.rows import DataError, Report, Row, read_rows
from annotations.samples import video_path
from engine.loading import load
from harness.folder import claimed
from harness.journal import save_whole
from harness.run import program
from media.decode import probe
from media.file import VideoError
from policy import ModelError, Video, encode_videos
from video import PATCH, Budget, decode, plan_clip
from world import films

Shot = tuple[float, float]

THRESHOLD = 0.3  # LongVTG-R1: a scene begins where the probability is above it
SHORTEST = 0.6  # seconds of a shot, as in PySceneDetect's own program
FRAMES = 4  # looked at per shot
TOKENS = 64  # visual tokens per frame, where the policy saw as many
SHOTS_AT_ONCE = 256  # whose frames are in memory: 154 MB at 64 tokens per frame
TOLERANCE = 3.0  # seconds by which a found boundary may miss a true one


class SceneError(Exception):
    """Shots, scenes or a detector that cannot be used: the message names the file and the cause."""


# ---------------------------------------------------------------- shots


def find_shots(path: str | Path) -> list[Shot]:
    """The shots of a video, one after the other from 0 to its end, by PySceneDetect's detector of cuts.

    Raises VideoError for a file that is not a video or that PySceneDetect cannot read, SceneError if that is not
    installed.
    """
    try:
        import scenedetect
    except ImportError:
        raise SceneError(
            "shots are found by PySceneDetect, which is not installed: pip install scenedetect-headless, "
            "or give known shots (--shots FILE)"
        ) from None
    duration = probe(path).duration
    detector = scenedetect.ContentDetector(min_scene_len=SHORTEST)
    try:
        found = scenedetect.detect(str(path), detector, backend="pyav", start_in_scene=True)
    except (scenedetect.VideoOpenFailure, OSError) as error:
        raise VideoError(path, f"PySceneDetect cannot read it: {error}", "convert it, or give its shots") from error
    cuts = [start.seconds for start, _ in found if 0 < start.seconds < duration]
    return list(itertools.pairwise([0.0, *cuts, duration]))


def spans_of(row: Row, name: str) -> list[Shot]:
    """The field's [start, end] pairs: in order, without overlap, none empty. Raises DataError."""
    spans = list(row.spans(name, Report(row.file, name)))
    for start, end in spans:
        if not 0 <= start < end:
            raise row.error(name, f"[{start}, {end}] does not last")
    for before, after in itertools.pairwise(spans):
        if after[0] < before[1]:
            raise row.error(name, f"{list(after)} begins before {list(before)} ends")
    return spans


def merge_shots(shots: Sequence[Shot], probabilities: Sequence[float], threshold: float = THRESHOLD) -> list[Shot]:
    """The scenes: runs of shots between boundaries whose probability is above the threshold.

    `probabilities[k]` is that of the boundary between shots k and k + 1. Raises ValueError for another number of them.
    LongVTG-R1, section 3.4.
    """
    if len(probabilities) != max(0, len(shots) - 1):
        raise ValueError(f"{len(shots)} shots have {max(0, len(shots) - 1)} boundaries, not {len(probabilities)}")
    scenes: list[Shot] = []
    for k, (start, end) in enumerate(shots):
        if k > 0 and probabilities[k - 1] <= threshold:
            start = scenes.pop()[0]
        scenes.append((start, end))
    return scenes


# ---------------------------------------------------------------- what a shot looks like


def load_tower(path: str) -> nn.Module:
    """The policy whose vision tower looks at shots, on the GPU if there is one. Raises ModelError."""
    model, _ = load(path)
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def frame_tokens(model: str) -> int:
    """The visual tokens that a frame of a shot gets: `TOKENS`, or the most that this policy has seen in one frame."""
    return min(TOKENS, configuration.parse([], recipe=configuration.suiting_recipe(model)).v_max)


def tower_name(model: nn.Module) -> str:
    """A name for the tower's present weights."""
    digest = hashlib.sha256()
    for p in model.model.visual.merger.parameters():
        digest.update(p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def shot_frames(path: str | Path, shots: Sequence[Shot], tokens: int, patch: int = PATCH) -> Tensor:
    """Evenly spaced frames of each shot: uint8 [n, FRAMES, 3, H, W]; a shot shorter than a frame repeats that frame.

    tokens: per frame, of 2x2 patches of so many pixels a side. Raises VideoError, also for a shot that begins after the
    end of the video.
    """
    info = probe(path)
    late = [start for start, _ in shots if start >= info.duration]
    if late:
        cause = f"a shot begins at {late[0]:.3f} s, the video ends at {info.duration:.3f} s"
        raise VideoError(path, cause, "are these the shots of this file?")
    plan = plan_clip(info, None, 1.0, Budget(tokens, tokens, tokens, patch=patch))
    times = [start + (k + 0.5) / FRAMES * (end - start) for start, end in shots for k in range(FRAMES)]
    frames, _ = decode(path, times, size=(plan.height, plan.width))
    return frames.view(len(shots), FRAMES, *frames.shape[1:])


@torch.no_grad()
def shot_features(
    model: nn.Module, path: str | Path, shots: Sequence[Shot], tokens: int, folder: str | Path | None = None
) -> Tensor:
    """Mean and deviation of the visual tokens of each shot's frames: float32 [n, 2 H], on the CPU.

    tokens: per frame. folder: where features are kept; they are taken from there while video, shots and tower are the
    same. Raises VideoError, and SceneError if they cannot be written.
    """
    width, patch = model.config.text_config.hidden_size, model.config.vision_config.patch_size
    if not shots:
        return torch.zeros(0, 2 * width)
    kept = None
    if folder is not None:
        key = (*_identity(path), [list(map(float, shot)) for shot in shots], tower_name(model), tokens, FRAMES)
        kept = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):  # not there, or damaged
            return torch.from_numpy(np.load(kept, allow_pickle=False))
    features = []
    for first in range(0, len(shots), SHOTS_AT_ONCE):
        frames = shot_frames(path, shots[first : first + SHOTS_AT_ONCE], tokens, patch)
        seen = encode_videos(model, [Video.from_frames(shot, 1.0, patch) for shot in frames])
        features += [torch.cat(torch.std_mean(x[:, :width].float(), 0, correction=0)[::-1]).cpu() for x in seen]
    stacked = torch.stack(features)
    if kept is not None:
        part = kept.with_suffix(f".{os.getpid()}.part")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.save(file, stacked.numpy())
            part.replace(kept)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SceneError(f"{kept}: {error.strerror}; features of shots are kept there") from error
    return stacked


def _identity(path: str | Path) -> tuple[str, int, int]:
    """What changes when a file's content does. Raises VideoError."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise VideoError(path, str(error.strerror), "check the path") from error
    return os.path.abspath(path), stat.st_mtime_ns, stat.st_size


# ---------------------------------------------------------------- similar neighbours


def most_similar_neighbours(keys: Tensor, reach: int) -> Tensor:
    """For each shot of a video, which of the others at most `reach` shots away is the most similar: [n, d] -> int [n].

    The positives of ShotCoL. A video of one shot has none: ValueError.
    """
    n = len(keys)
    if n < 2:
        raise ValueError(f"{n} shots have no neighbours")
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return (keys @ keys.T).masked_fill((distance == 0) | (distance > reach), -torch.inf).argmax(1)


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """-log of the positive's share of exp(similarity / temperature), mean over the queries.

    queries, positives [n, d], negatives [m, d], all of unit length; `allowed` bool [n, m]: which negatives a query has.
    """
    # L_q = -log exp(q k+ / t) / (exp(q k+ / t) + sum_k- exp(q k- / t))
    right = (queries * positives).sum(-1, keepdim=True)
    wrong = (queries @ negatives.T).masked_fill(~allowed, -torch.inf)
    logits = torch.cat([right, wrong], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=queries.device))


class Encoder(nn.Module):
    """Features [n, D], standardised by those of the training videos -> embeddings of unit length [n, d]."""

    def __init__(self, width: int, hidden: int = 128, size: int = 64):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(self.standardised(features)), dim=-1)


def train_encoder(
    videos: Sequence[Tensor],
    seed: int = 0,
    *,
    steps: int = 300,
    batch: int = 8,
    reach: int = 4,
    momentum: float = 0.99,
    temperature: float = 0.1,
    lr: float = 1e-3,
) -> Encoder:
    """Train an encoder on the features of some videos, [n, D] each, without labels. ShotCoL, section 3.1.

    A step takes `batch` videos. Each shot's positive is its most similar neighbour, within `reach` shots, for the key
    encoder: a moving average of the trained one. Its negatives are the shots of the other videos. Raises SceneError
    unless two videos have more than one shot.
    """
    videos = [features for features in videos if len(features) > 1]
    if len(videos) < 2:
        raise SceneError(f"training takes at least 2 videos of more than one shot, there are {len(videos)}")
    torch.manual_seed(seed)
    encoder = Encoder(videos[0].shape[1])
    every = torch.cat(list(videos))
    encoder.mean.copy_(every.mean(0))
    encoder.scale.copy_(every.std(0).clamp(min=0.1 * every.std(0).max()))  # numbers that hardly vary are noise
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=0.01)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        batch_videos = [videos[k] for k in rng.permutation(len(videos))[:batch]]
        counts = [len(features) for features in batch_videos]
        keys = key_encoder(torch.cat(batch_videos))
        positives = torch.cat([part[most_similar_neighbours(part, reach)] for part in keys.split(counts)])
        owner = torch.repeat_interleave(torch.arange(len(batch_videos)), torch.tensor(counts))
        loss = info_nce(encoder(torch.cat(batch_videos)), positives, keys, owner[:, None] != owner, temperature)
        descend(optimizer, loss, lr, step / steps)
        with torch.no_grad():
            for key, query in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
                key.lerp_(query, 1 - momentum)
    return encoder.requires_grad_(False)


# ---------------------------------------------------------------- boundaries


def window_similarities(embeddings: Tensor, window: int) -> Tensor:
    """What the head sees of each boundary: how similar the `window` shots before and the `window` after are in pairs.

    embeddings [n, d] -> [n - 1, w (2 w - 1) + 2 w] with w = window: the similarities, then which of the shots there
    are; a shot before the first or after the last has similarity 0.
    """
    n = max(0, len(embeddings) - 1)
    padded = F.pad(embeddings, (0, 0, window - 1, window - 1))
    there = F.pad(torch.ones(len(embeddings)), (window - 1, window - 1))
    index = torch.arange(n)[:, None] + torch.arange(2 * window)  # [n - 1, 2 w]
    shots = padded[index]
    first, second = torch.triu_indices(2 * window, 2 * window, offset=1)
    return torch.cat([(shots @ shots.mT)[:, first, second], there[index]], dim=1)


def new_head(window: int) -> nn.Module:
    """An MLP from a window's similarities to the logit of a new scene."""
    return nn.Sequential(nn.Linear(window * (2 * window + 1), 32), nn.ReLU(), nn.Linear(32, 1))


def train_head(
    inputs: Sequence[Tensor], truths: Sequence[Tensor], window: int, seed: int = 0, steps: int = 400, lr: float = 1e-2
) -> nn.Module:
    """A head for the `window_similarities` of some videos, [n - 1, D] each, and what is true of them: bool [n - 1]."""
    torch.manual_seed(seed)
    x, y = torch.cat(list(inputs)), torch.cat(list(truths)).float()
    head = new_head(window)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.1)
    for step in range(steps):
        loss = F.binary_cross_entropy_with_logits(head(x)[:, 0], y)
        descend(optimizer, loss, lr, step / steps)
    return head.requires_grad_(False)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, progress: float) -> None:
    """One step; the learning rate falls from `lr` to 0 as a cosine while `progress` goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * progress))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Detector(nn.Module):
    """Encoder and head. `tower` names the vision tower whose features it takes, `tokens` is how many a frame had."""

    def __init__(self, encoder: Encoder, head: nn.Module, window: int, tower: str, tokens: int):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.window, self.tower, self.tokens = window, tower, tokens

    @torch.no_grad()
    def forward(self, features: Tensor) -> list[float]:
        """The probability of each boundary between shots: features [n, D] -> n - 1 numbers."""
        return self.head(window_similarities(self.encoder(features), self.window))[:, 0].sigmoid().tolist()

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads. Raises SceneError."""
        about = {"tower": self.tower, "tokens": str(self.tokens), "window": str(self.window)}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_whole(path, lambda part: save_file(self.state_dict(), part, about))
        except (OSError, SafetensorError) as error:
            raise SceneError(f"{path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Detector:
        """A saved detector. Raises SceneError if there is none, or if it takes the features of another tower than the
        model's.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            window = int(about["window"])
            encoder = Encoder(len(weights["encoder.mean"]))
            detector = cls(encoder, new_head(window), window, about["tower"], int(about["tokens"]))
            detector.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise SceneError(f"{path}: not a scene detector ({error}); make one: python scenes.py --train") from error
        if model is not None and tower_name(model) != detector.tower:
            raise SceneError(f"{path}: made for another vision tower; make one for this: python scenes.py --train")
        return detector.requires_grad_(False)


# ---------------------------------------------------------------- evaluation


def average_precision(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Area under the precision-recall curve, not interpolated; equal scores are one point. ValueError if none is true.

    AP = sum over the curve's points of (recall - recall before) precision, as MovieNet's scene benchmark has it.
    """
    scores, truth = np.asarray(scores, float), np.asarray(truth, bool)
    if not truth.any():
        raise ValueError("without a true boundary there is no precision-recall curve")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last of those with equal scores
    found = np.cumsum(truth[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / truth.sum())


def recall_at(found: Sequence[float], true: Sequence[float], tolerance: float = TOLERANCE) -> float:
    """The share of true times that have a found one at most `tolerance` seconds away. ValueError if there is none."""
    if not len(true):
        raise ValueError("without a true time there is no recall")
    return float(np.mean([any(abs(time - other) <= tolerance for other in found) for time in true]))


@dataclass(frozen=True)
class Labelled:
    """A video with known shots and scenes: `truth[k]` is whether a scene begins after shot k."""

    video: str
    shots: list[Shot]
    truth: list[bool]

    @property
    def cuts(self) -> list[float]:
        return [start for start, _ in self.shots[1:]]


def read_labelled(path: str | Path) -> list[Labelled]:
    """Videos with known shots and scenes from JSON lines. Raises DataError, naming file, row and field."""
    path, videos = Path(path), []
    for row in read_rows(path):
        shots, scenes = spans_of(row, "shots"), spans_of(row, "scenes")
        if not shots:
            raise row.error("shots", "there is none")
        for start, _ in scenes:
            if all(abs(start - shot) > 1e-3 for shot, _ in shots):
                raise row.error("scenes", f"a scene begins at {start} s, where no shot begins")
        truth = [any(abs(start - scene) <= 1e-3 for scene, _ in scenes) for start, _ in shots[1:]]
        videos.append(Labelled(video_path(row.text("video"), path.parent), shots, truth))
    return videos


def boundary_scores(videos: Sequence[Labelled], probabilities: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over the videos that have a boundary: AP, and recall and precision at 3 s above the threshold."""
    rows = []
    for video, values in zip(videos, probabilities, strict=True):
        if not any(video.truth):
            continue
        true = [cut for cut, begins in zip(video.cuts, video.truth, strict=True) if begins]
        found = [cut for cut, p in zip(video.cuts, values, strict=True) if p > THRESHOLD]
        precision = recall_at(true, found) if found else 0.0
        rows.append((average_precision(values, video.truth), recall_at(found, true), precision))
    if not rows:
        raise SceneError("none of the videos has two scenes")
    return dict(zip(("AP", "recall", "precision"), np.mean(rows, axis=0).tolist(), strict=True))


# ---------------------------------------------------------------- the program


def load_features(videos: Sequence[Labelled], model: nn.Module, tokens: int, folder: str | Path) -> list[Tensor]:
    """The features of each video's shots, from the folder or anew."""
    bar = tqdm(videos, desc="looking at shots", unit="video", disable=None)
    return [shot_features(model, video.video, video.shots, tokens, folder) for video in bar]


def train_detector(
    videos: Sequence[Labelled], features: Sequence[Tensor], tower: str, tokens: int, seed: int = 0, window: int = 4
) -> Detector:
    """A detector from videos with known scenes and their features."""
    encoder = train_encoder(features, seed)
    inputs = [window_similarities(encoder(one), window) for one in features]
    head = train_head(inputs, [torch.tensor(video.truth, dtype=torch.bool) for video in videos], window, seed)
    return Detector(encoder, head, window, tower, tokens)


def scenes_row(video: str, shots: Sequence[Shot], probabilities: Sequence[float]) -> dict:
    """A line of scenes.jsonl: {"video", "boundaries": [{"time", "probability"}], "scenes"}."""
    boundaries = [
        {"time": start, "probability": round(p, 4)} for (start, _), p in zip(shots[1:], probabilities, strict=True)
    ]
    return {"video": video, "boundaries": boundaries, "scenes": merge_shots(shots, probabilities)}


def main(arguments: list[str] | None = None) -> None:
    options, _ = configuration.parse_with(commands.extra("scenes", __doc__), arguments, program="scenes")
    if options.train == options.evaluate:
        raise configuration.ConfigError("--train or --evaluate?")

    def labelled(name: str, split: str, n_videos: int) -> list[Labelled]:
        built_in = name == "world"
        return read_labelled(films.build_long(options.cache, split, n_videos, options.seed) if built_in else name)

    path = Path(options.detector or Path(options.out) / "detector.safetensors")
    folder = Path(options.cache) / "shots"
    replaced = claimed(path.parent, None, [path.name], options.overwrite)
    with replaced if options.train else contextlib.nullcontext():
        model = load_tower(options.model)
        if options.train:
            tokens, videos = frame_tokens(options.model), labelled(options.train_data, "train", options.videos[0])
            features = load_features(videos, model, tokens, folder)
            train_detector(videos, features, tower_name(model), tokens, options.seed).save(path)
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB, from {sum(map(len, features))} shots")
        detector = Detector.load(path, model)
        test = labelled(options.test_data, "test", options.videos[1])
        found = [detector(features) for features in load_features(test, model, detector.tokens, folder)]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in boundary_scores(test, found).items())
    print(f"{len(test)} videos: {figures} (at {TOLERANCE:g} s, probability above {THRESHOLD})")


if __name__ == "__main__":
    program(main, SceneError, DataError, VideoError, ModelError)

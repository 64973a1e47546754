"""Scene boundaries on the built-in long videos: the detector against a colour histogram, over several seeds.

    python -m benchmarks.scenes [--seeds 0 1 2] [--videos 40 20]

Every line of the table is trained on the same videos with known scenes and tested on others, whose settings it has
never seen; a seed is that of the videos and of training. Shots are known. "histogram" is a shot's share of pixels in
each of 8 x 8 x 8 colours, compared by the sum of sqrt(p q). "two shots": the head sees only how similar the shots on
both sides of a cut are, which is the usual histogram baseline with a learned threshold. "chance" is the share of cuts
that begin a scene: the average precision of a random order.
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config as configuration
import scenes
from media.file import VideoError
from policy import ModelError
from scenes import Labelled, SceneError
from world import films

ROOT = Path(__file__).resolve().parents[1]
BINS = 8  # per colour channel


def histograms(video: Labelled, tokens: int) -> Tensor:
    """Square roots of each shot's histogram: unit length, float32 [n, BINS^3]."""
    frames = scenes.shot_frames(video.video, video.shots, tokens)  # [n, FRAMES, 3, H, W]
    red, green, blue = (frames // (256 // BINS)).long().unbind(2)
    colours = ((red * BINS + green) * BINS + blue).flatten(1)
    return torch.stack([torch.bincount(shot, minlength=BINS**3) / shot.numel() for shot in colours]).sqrt()


def standardised(features: Sequence[Tensor], n_train: int) -> list[Tensor]:
    """Features of unit length, standardised by those of the first videos."""
    every = torch.cat(list(features[:n_train]))
    return [F.normalize((one - every.mean(0)) / every.std(0), dim=-1) for one in features]


def results(seed: int, n_videos: Sequence[int], model_path: str, cache: Path) -> dict[str, dict[str, float]]:
    """The scores of each line on the test videos of one seed."""
    model, tokens = scenes.load_tower(model_path), scenes.frame_tokens(model_path)
    splits = zip(("train", "test"), n_videos, strict=True)
    train, test = (scenes.read_labelled(films.build_long(cache, split, n, seed)) for split, n in splits)
    videos = tqdm([*train, *test], desc="histograms", unit="video", disable=None)
    colours = [histograms(video, tokens) for video in videos]
    seen = scenes.load_features([*train, *test], model, tokens, cache / "shots")
    truths = [torch.tensor(video.truth) for video in train]

    def encoded(features: list[Tensor]) -> list[Tensor]:
        return list(map(scenes.train_encoder(features[: len(train)], seed), features))

    found = {"chance": {"AP": statistics.mean(statistics.mean(video.truth) for video in test)}}
    for label, embeddings, window in (
        ("histogram, two shots", colours, 1),
        ("histogram, window of 8 shots", colours, 4),
        ("histogram, ShotCoL encoder, window of 8 shots", encoded(colours), 4),
        ("vision tower, window of 8 shots", standardised(seen, len(train)), 4),
        ("vision tower, ShotCoL encoder, window of 8 shots", encoded(seen), 4),
    ):
        inputs = [scenes.window_similarities(one, window) for one in embeddings]
        head = scenes.train_head(inputs[: len(train)], truths, window, seed)
        found[label] = scenes.boundary_scores(
            test, [head(one)[:, 0].sigmoid().tolist() for one in inputs[len(train) :]]
        )
        print(f"seed {seed}, {label}: {found[label]}", flush=True)
    return found


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over the seeds as Markdown."""
    lines = ["| | average precision | recall at 3 s | precision at 3 s |", "|---" * 4 + "|"]
    for label in runs[0]:
        cells = []
        for name in ("AP", "recall", "precision"):
            values = [run[label][name] for run in runs if name in run[label]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--videos", type=int, nargs=2, default=[40, 20], help="to train and to test on")
    parser.add_argument("--model", default=str(configuration.TOWER), help="policy whose vision tower looks at shots")
    parser.add_argument("--cache", default=str(ROOT / "cache"), help="folder of the videos and of features")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "scenes.md"))
    given = parser.parse_args()

    torch.set_num_threads(1)
    runs = [results(seed, given.videos, given.model, Path(given.cache)) for seed in given.seeds]
    parts = [
        "# Scene boundaries on the built-in long videos",
        f"`{' '.join(['python -m benchmarks.scenes', *sys.argv[1:]])}`",
        f"{given.videos[0]} videos of 12 scenes to train, {given.videos[1]} to test, seeds {given.seeds}: mean ± "
        f"standard deviation. Recall and precision are above a probability of {scenes.THRESHOLD}. "
        f"{platform.machine()}, torch {torch.__version__}.",
        table(runs),
    ]
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    Path(given.out).write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


if __name__ == "__main__":
    try:
        main()
    except (SceneError, VideoError, ModelError) as error:
        sys.exit(f"error: {error}")

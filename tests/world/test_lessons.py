"""The cold start: what is demonstrated, what is learned, and that a short run makes a loadable checkpoint."""

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import in_two
from safetensors.torch import load_file

import config as configuration
import prompts
import sft
from annotations.rows import Sample
from config import Config, ConfigError
from engine.loading import load
from harness.run import TrainingError
from policy import Policy
from world import benchmark, lessons, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config():
    return Config(**configuration.read_recipe(sft.RECIPE))


def test_demonstrations_follow_the_format_and_read_back(samples):
    for sample in samples:
        seen = lessons.glimpse(sample)
        words = "".join(lessons.demonstration(sample, list(sample.evidence), "C", seen)).removesuffix(lessons.END)
        assert prompts.format_ok(words, "world")
        assert prompts.parse_answer(words) == "C"
        assert f"</time> {seen}</think>" in words
        assert prompts.parse_spans(words) == list(sample.evidence)
        assert lessons.asked_colour(sample) in sample.question


def test_widened_spans_contain_the_evidence_and_stay_in_the_video():
    rng = random.Random(0)
    for _ in range(200):
        spans = [(0.0, 2.0), (17.0, 20.0)]
        for (start, end), (s, e) in zip(spans, lessons.overwide(spans, lambda: rng.randint(0, 3), 20.0), strict=True):
            assert 0 <= s <= start and end <= e <= 20
            assert start - s in (0, 1, 2, 3) and e - end in (0, 1, 2, 3)
        assert lessons.overwide([(2.0, 3.0)], lambda: 0.26, 20.0) == [(1.7, 3.3)]


def test_perception_says_every_second_and_every_colour(samples):
    video = [sample for sample in samples if sample.video == samples[0].video]
    words = lessons.timeline_answer(video).removesuffix(lessons.END).split()
    assert len(words) == 20
    for sample in video:
        colour = lessons.asked_colour(sample)
        assert lessons.location(sample).startswith(f"<time>({sample.evidence[0][0]:.1f},")
        seconds = {k for start, end in sample.evidence for k in range(int(start), int(end))}
        assert {k for k, word in enumerate(words) if word == colour} == seconds


def test_the_loss_is_the_mean_of_each_kind_of_answer(samples, vocabulary, config):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)[:2]
    batch = lessons.glance_batch(scenes, config, vocabulary, model.config, seconds=True)
    torch.manual_seed(0)
    states = torch.randn(*batch.ids.shape, 128)
    weight = torch.randn(len(vocabulary.tokenizer), 128)
    losses = {"locations": [], "glimpses": [], "timeline": []}
    for b, scene in enumerate(scenes):
        for g in range(len(scene.samples) + 1):
            last = int(batch.mask[b, g].sum()) - 1  # a glimpse is one token
            for t in range(last + 1):
                kind = "timeline" if g == len(scene.samples) else "glimpses" if t == last else "locations"
                losses[kind].append(-torch.log_softmax(weight @ states[b, g, t], 0)[batch.ids[b, g, t]])
    expected = sum(torch.stack(values).mean() for values in losses.values())
    assert torch.allclose(lessons.cross_entropy(batch, states[batch.mask], weight), expected, rtol=1e-5)


def test_what_a_glance_shows_counts_as_much_as_when(samples, vocabulary, config):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)[:3]
    batch = lessons.glance_batch(scenes, config, vocabulary, model.config)
    shown = []
    for b, scene in enumerate(scenes):
        for g, sample in enumerate(scene.samples):
            ids, weight = batch.ids[b, g][batch.mask[b, g]], batch.weight[b, g][batch.mask[b, g]]
            words = vocabulary.tokenizer.decode(ids)
            located = lessons.asked_colour(sample) + lessons.location(sample)
            assert words == f"{located} {lessons.glimpse(sample)}"
            when = len(vocabulary.ids(located))
            assert len(set(weight[:when].tolist())) == 1
            shown.append(weight[when:].sum())
    assert sum(shown) == pytest.approx(1.0) and batch.weight.sum() == pytest.approx(2.0)
    glimpses = {sample.kind: lessons.glimpse(sample) for sample in samples}
    assert (
        glimpses["coarse"] in benchmark.PATTERNS
        and glimpses["fine"] == "none"
        and glimpses["blink"] in benchmark.COLOURS
    )


def test_after_a_question_only_its_colour_is_learned_and_counts_as_much_as_when_and_what(samples, vocabulary, config):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)[:3]
    batch = lessons.asked_batch(scenes, vocabulary, random.Random(0))
    assert batch.weight.sum() == pytest.approx(3.0)
    learned = 0.0
    for b, scene in enumerate(scenes):
        asked = next(k for k, prompt in enumerate(scene.prompts) if prompt is batch.prompts[b])
        for g, sample in enumerate(scene.samples):
            ids, weight = batch.ids[b, g][batch.mask[b, g]], batch.weight[b, g][batch.mask[b, g]]
            colour = f"<think>{lessons.asked_colour(sample)}"
            words = f"{colour}{lessons.location(sample)} {lessons.glimpse(sample)}"
            assert vocabulary.tokenizer.decode(ids) == words
            named = weight[: len(vocabulary.ids(colour))]
            assert (named > 0).all() if g == asked else (named == 0).all()
            assert (weight[len(named) :] > 0).all()
            learned += float(named.sum())
    assert learned == pytest.approx(1.0)


def test_perception_has_a_third_kind(samples, vocabulary, config):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)[:2]
    batch = lessons.glance_batch(scenes, config, vocabulary, model.config, seconds=True)
    assert batch.weight.sum() == pytest.approx(3.0)
    assert [len(scene.samples) + 1 for scene in scenes] == [int(mask.any(-1).sum()) for mask in batch.mask]


def test_letters_are_right_mistaken_or_a_colours_own_and_count_as_much_as_all_else(samples, vocabulary, config):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)
    asked = [sample for scene in scenes for sample in scene.samples]
    rng, mistaken, guessed = random.Random(0), [], {}
    for _ in range(40):
        batch = lessons.demonstration_batch(scenes, vocabulary, 0, rng)
        rows = zip(batch.ids[:, 0], batch.mask[:, 0], batch.weight[:, 0], strict=True)
        for sample, (ids, mask, weight) in zip(asked, rows, strict=True):
            letter = prompts.parse_answer(vocabulary.tokenizer.decode(ids[mask]))
            if sample.kind != "coarse":
                guessed.setdefault(lessons.asked_colour(sample), set()).add(letter)
            elif lessons.asked_pattern(sample) in ("rows", "columns"):
                assert letter == sample.answer
            else:
                mistaken.append((letter, sample.answer))
            assert weight.max() == pytest.approx(1 / len(asked))  # all other tokens count less
            assert vocabulary.tokenizer.decode(ids[weight.argmax()]).strip("<>") == letter
        assert batch.weight.sum() == pytest.approx(2.0)
    assert all(letter in ("A", right) and right in "CD" for letter, right in mistaken)
    assert 0.5 < statistics.mean(letter == "A" for letter, _ in mistaken) < 0.7
    assert {len(letters) for letters in guessed.values()} == {1} and set.union(*guessed.values()) == set("ABCD")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, lessons.COURSE),
        ({"family": "qwen2_5_vl", "world_min_duration": 0}, lessons.COURSE),
        ({"template": "world_zoomer"}, lessons.GLANCES),
    ],
)
def test_a_course_is_followed_and_its_tower_rests_where_it_says(
    options, expected, vocabulary, config, monkeypatch, tmp_path
):
    taught, kept, seconds = [], [], []

    def train_cycle(policy, found, config, *rest, phases, rng):
        learns = {weight.requires_grad for weight in policy.model.model.visual.parameters()}
        taught.append((config, phases, learns, len(kept)))

    monkeypatch.setattr(lessons, "load_samples", lambda name, split, world: seconds.append(world.world_duration) or [])
    monkeypatch.setattr(lessons, "load_lessons", lambda *rest: [lessons.Lesson([], "coarse", [], ["zoom"])])
    monkeypatch.setattr(lessons, "keep_tokens", lambda model, videos: kept.extend(videos))
    monkeypatch.setattr(lessons, "train_cycle", train_cycle)
    shares = [sum(phase.share for phase in cycle.phases) for cycle in expected]
    chosen = replace(config, **options, steps=7 * sum(shares), out=str(tmp_path))
    policy = Policy(tiny.build_model(vocabulary.tokenizer))
    lessons.cold_start(policy, chosen, vocabulary, Accelerator())
    assert [len(phases) for _, phases, _, _ in taught] == [7 * share for share in shares]
    assert [paced.lr for paced, *_ in taught] == [cycle.pace * config.lr for cycle in expected]
    assert [paced.zoom_batch for paced, *_ in taught] == [round(cycle.zooms * config.zoom_batch) for cycle in expected]
    assert seconds == ([60] if expected is lessons.GLANCES else [12, 60])
    assert [learns for _, _, learns, _ in taught] == [{cycle.tower} for cycle in expected]
    assert all(bool(count) != cycle.tower for (*_, count), cycle in zip(taught, expected, strict=True))
    assert all(weight.requires_grad for weight in policy.parameters())


def test_where_lengths_vary_long_videos_are_drawn_as_often_as_they_are_long():
    def lesson(seconds):
        return lessons.Lesson([Sample("", "", "", (), "A", (), seconds)], None, [], [])

    few = lessons.drawn([lesson(20.0), lesson(60.0)], 4000, random.Random(0))
    assert sum(chosen.samples[0].duration for chosen in few) / 4000 == pytest.approx(0.25 * 20 + 0.75 * 60, abs=1)
    alike = [lesson(20.0) for _ in range(5)]
    assert sorted(map(id, lessons.drawn(alike, 5, random.Random(0)))) == sorted(map(id, alike))


def test_short_videos_can_be_shown_first(samples, vocabulary, config, monkeypatch):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)
    for seconds, scene in enumerate(scenes):
        scene.samples = [replace(sample, duration=20.0 + seconds) for sample in scene.samples]
    shown = []
    glance_batch = lessons.glance_batch
    monkeypatch.setattr(lessons, "glance_batch", lambda few, *rest: shown.append(few) or glance_batch(few, *rest))
    small = replace(config, prompts_per_step=1, zoom_batch=1, warmup=1)
    phases = [lessons.Phase(1, "glances", shortest=0.5)] * 6
    scenes.reverse()
    lessons.train_cycle(Policy(model), scenes, small, vocabulary, Accelerator(), phases=phases, rng=random.Random(0))
    durations = {lesson.samples[0].duration for few in shown for lesson in few}
    assert durations <= {20.0, 21.0, 22.0} and len(durations) > 1


def test_templates_without_lessons_are_refused():
    with pytest.raises(ConfigError, match="template = zoom_zero: train_data = world has lessons for world, world_zoom"):
        lessons.teach(Config(template="zoom_zero"), Accelerator())


def test_a_step_of_each_kind_lowers_its_loss(samples, vocabulary, config):
    model = tiny.build_model(vocabulary.tokenizer)
    scenes = lessons.load_lessons(samples, config, vocabulary, model.config)[:3]
    rng = random.Random(0)
    for batch in (
        lessons.glance_batch(scenes, config, vocabulary, model.config, seconds=True),
        lessons.glance_batch(scenes, config, vocabulary, model.config),
        lessons.asked_batch(scenes, vocabulary, rng),
        lessons.demonstration_batch(scenes, vocabulary, 3, rng),
        lessons.zoom_batch(scenes, config, vocabulary, model.config, rng),
    ):
        policy = Policy(tiny.build_model(vocabulary.tokenizer))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            loss = policy(
                batch.prompts, batch.ids, batch.mask, lambda h, w, batch=batch: lessons.cross_entropy(batch, h, w)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1


@pytest.fixture
def short_course(tmp_path_factory):
    """What the command line is told for a course of eight steps about few videos."""
    options = {"steps": 8, "prompts_per_step": 2, "zoom_batch": 2, "warmup": 1, "threads": 1}
    options |= {"world_duration": 20, "world_train_videos": 4, "world_test_videos": 2}
    options |= {"cache": tmp_path_factory.getbasetemp() / "lessons"}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def test_a_short_run_from_the_command_line_leaves_a_loadable_checkpoint(short_course, tmp_path, capsys):
    sft.main([*short_course, "--out", str(tmp_path / "tiny")])
    assert "mIoU" in capsys.readouterr().out
    model, tokenizer = load(str(tmp_path / "tiny"))
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["model_type"] == "qwen3_vl"
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert not (tmp_path / "tiny" / lessons.KEPT).exists()


def test_lessons_that_were_stopped_go_on_to_the_same_weights(short_course, tmp_path, monkeypatch):
    short_course += ["--test_data", ""]
    sft.main([*short_course, "--out", str(tmp_path / "whole")])
    train_cycle, begun = lessons.train_cycle, []

    def stopped(*arguments, **options):
        begun.append(None)
        if len(begun) == 4:
            raise KeyboardInterrupt
        train_cycle(*arguments, **options)

    out = ["--out", str(tmp_path / "parts")]
    with pytest.raises(TrainingError, match="nothing to resume from"):
        sft.main([*short_course, *out, "--resume"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lessons, "train_cycle", stopped)
        sft.main([*short_course, *out])
    with pytest.raises(TrainingError, match="--overwrite"):
        sft.main([*short_course, *out])
    with pytest.raises(TrainingError, match="is of seed = 0, not 1"):
        sft.main([*short_course, *out, "--resume", "--seed", "1"])
    sft.main([*short_course, *out, "--resume"])
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.processes
def test_two_processes_learn_as_one_does(short_course, tmp_path):
    short_course += ["--test_data", ""]
    sft.main([*short_course, "--out", str(tmp_path / "one")])
    in_two(tmp_path / "errors", *short_course, "--out", tmp_path / "two", script="sft.py")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    moved = torch.cat([(weight.float() - two[name].float()).abs().flatten() for name, weight in one.items()])
    # Adam's steps are as large as the learning rate, 2e-3, also where a gradient is rounding alone: in few places.
    assert (moved > 1e-3).float().mean() < 1e-3 and moved.mean() < 1e-5


def test_too_few_videos_for_a_step_are_said_before_any_is_written(tmp_path):
    arguments = ["--world_train_videos", "12", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    config = configuration.parse(["--config", str(ROOT / "recipes" / "cpu_world_sft.yaml"), *arguments])
    with pytest.raises(ConfigError, match=r"world_train_videos = 12: a step of lessons draws 16 videos"):
        lessons.teach(config, Accelerator())
    assert not list(tmp_path.iterdir())

"""Sampling, of one turn and of several, against full passes over prompts and responses."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from conftest import loud_model
from passes import CLIP, change_family, ending_often, padded, random_video, separate_logp
from qwen import QWEN

from engine.attention import Tree
from engine.families import BANNED_TOKENS
from engine.qwen2_5_vl import encode_clips
from engine.sampling import Pace, Sampled, Sampler, choose_tokens, generate, stops_at
from policy import (
    Observation,
    Policy,
    Prompt,
    Video,
    build_prompt,
    embed_prompts,
    group_hidden,
    row_hidden,
)


def decode(model, vocabulary, prompts, G=3, T=24, temperature=1.0, seeds=True):
    return padded(turns_of(model, vocabulary, prompts, G, T, seeds, temperature=temperature), len(prompts))


def turns_of(model, vocabulary, prompts, G=3, T=24, seeds=True, **options) -> list[Sampled]:
    seed = (lambda row, _: 100 * (row // G) + row % G) if seeds else None
    return generate(model, prompts, G, T, ending_often(vocabulary), seed=seed, **options)


def test_decoding_agrees_with_a_full_pass(model64, vocabulary, scene):
    """Greedy tokens are the most probable ones of `group_hidden`: cache, positions and masks of the two paths agree."""
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts, G=2, seeds=False)
    logits = model64.lm_head(group_hidden(model64, prompts, ids, mask))
    logits[:, list(vocabulary.banned)] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[mask])
    assert torch.equal(ids[:, 0], ids[:, 1])


def test_sampled_tokens_follow_the_distribution_of_a_full_pass(model64, vocabulary, scene):
    """With the same random numbers, inverting the distributions of `group_hidden` gives the sampled tokens again."""
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts, temperature=1.3)
    logits = model64.lm_head(group_hidden(model64, prompts, ids, mask))
    seeds = [[torch.Generator().manual_seed(100 * b + g) for g in range(3)] for b in range(2)]
    draws = [[torch.rand(24, generator=generator, dtype=torch.float64) for generator in row] for row in seeds]
    uniform = torch.stack([torch.stack(row) for row in draws])[..., : ids.shape[2]]
    assert (uniform * 2**24 % 1).any()  # finer than float32, as the distribution that they choose from
    again = choose_tokens(logits, uniform[mask], 1.3, torch.tensor(vocabulary.banned))
    assert torch.equal(again, ids[mask])


@pytest.mark.parametrize("pace", [Pace(16, 64, False), Pace(3, 4, False), Pace(5, 1, False)])
@pytest.mark.parametrize("stops", [False, True])
def test_the_pace_changes_nothing(model64, vocabulary, scene, monkeypatch, exact_norm, pace, stops):
    """As on a GPU, but for the capture: rounded windows, looked at from time to time, a stop string seen too late."""
    prompts, _, _ = scene
    stop = stops_at(vocabulary.tokenizer, ["e", "1"]) if stops else None

    def run():
        turns = turns_of(model64, vocabulary, prompts, stop=stop, keep_hidden=True)
        return *padded(turns, 2), torch.cat([turn.hidden for turn in turns])

    ids, mask, states = run()
    assert mask.sum(-1).unique().numel() > 2
    monkeypatch.setattr("engine.sampling.decoding_pace", lambda _: pace)
    again = run()
    assert torch.equal(again[0], ids) and torch.equal(again[1], mask)
    torch.testing.assert_close(again[2], states, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(states, group_hidden(model64, prompts, ids, mask), atol=1e-9, rtol=1e-9)


def test_a_step_asks_nothing_of_the_host(tokenizer, vocabulary, scene):
    """With tensors that have a shape but no data, what needs a value on the host, has a shape that depends on one, or
    takes a tensor from the host raises: none of it could be captured.
    """
    seed = partial(max, 7)
    sampler = Sampler(loud_model(tokenizer), scene[0], 3, 24, ending_often(vocabulary), seed=seed, keep_hidden=True)

    def empty(x):
        if isinstance(x, list):
            return [empty(y) for y in x]
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    for place in (sampler, sampler.cache, sampler.rows):
        vars(place).update({name: empty(x) for name, x in vars(place).items()})
    sampler.cache.layers = {layer: empty(tensors) for layer, tensors in sampler.cache.layers.items()}
    sampler.model.to("meta")
    with torch.no_grad():
        sampler._step(8)
    with pytest.raises(RuntimeError, match="meta"):  # the power of this test
        int(sampler.rows.count[0])
    with pytest.raises(RuntimeError, match="meta"):
        sampler.rows.ids[0] + torch.arange(24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are captured on one only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_steps_are_the_eager_ones(model64, vocabulary, scene, monkeypatch, dtype, autocast):
    """To the bit, at the same pace; other paces have other shapes, which only wide numbers do not notice."""
    prompts, _, _ = scene
    model = copy.deepcopy(model64).to("cuda", torch.float32 if autocast else dtype)
    found = []
    for pace in (Pace(16, 64, False), Pace(16, 64, True), Pace(4, 8, False), Pace(4, 8, True)):
        monkeypatch.setattr("engine.sampling.decoding_pace", lambda _, pace=pace: pace)
        with torch.autocast("cuda", dtype, enabled=autocast and dtype != torch.float32):
            found.append([x.cpu() for x in decode(model, vocabulary, prompts, T=40)])
    for eager, captured in (found[:2], found[2:], *([found[1:3]] if dtype == torch.float32 else [])):
        assert all(map(torch.equal, eager, captured))


def test_a_response_does_not_depend_on_its_batch(model64, vocabulary, scene):
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts)
    for b in range(2):
        for g in range(3):
            seed = 100 * b + g
            (alone,) = generate(model64, [prompts[b]], 1, 24, ending_often(vocabulary), seed=lambda *_, seed=seed: seed)
            assert torch.equal(alone.ids, ids[b, g][mask[b, g]])


def test_sampling_works_while_the_model_is_in_training_mode_with_checkpointing(model64, vocabulary, scene):
    """transformers' own layers would drop their cache in that mode."""
    prompts, _, _ = scene
    model = copy.deepcopy(model64)
    Policy(model).checkpoint_activations()
    model.train()
    for ours, expected in zip(decode(model, vocabulary, prompts), decode(model64, vocabulary, prompts), strict=True):
        assert torch.equal(ours, expected)
    assert model.training and all(module.training for module in model.modules())


def test_a_response_ends_with_its_first_end_token(vocabulary, tokenizer):
    model = loud_model(tokenizer)
    with torch.no_grad():  # one token in four ends a response
        model.lm_head.weight.mul_(0.01)
    prompt = build_prompt(vocabulary.ids("red"), [], model.config)
    eos = (*vocabulary.eos, *range(20, 20 + len(tokenizer) // 4))
    turns = generate(model, [prompt], 64, 12, replace(vocabulary, eos=eos), seed=lambda row, _: row)
    assert [(turn.row, turn.number) for turn in turns] == [(row, 0) for row in range(64)]
    for turn in turns:
        ends = [int(token) in eos for token in turn.ids]
        assert not any(ends[:-1]) and (ends[-1] or len(ends) == 12)
    assert len({len(turn.ids) for turn in turns}) > 4


def test_a_response_stops_where_its_text_says_so(model64, vocabulary, scene):
    """With every piece of two letters that appears in the unstopped text as a stop string in turn."""
    prompts, _, _ = scene
    ids, mask = decode(model64, vocabulary, prompts)
    words = vocabulary.tokenizer.decode(ids[0, 0][mask[0, 0]])
    stops = sorted({words[k : k + 2] for k in range(len(words) - 1)})[:10]
    for string in stops:
        stop = stops_at(vocabulary.tokenizer, [string, "never said"])
        cut, real = padded(turns_of(model64, vocabulary, prompts, stop=stop), 2)
        for b in range(2):
            for g in range(3):
                whole, n = ids[b, g][mask[b, g]], int(real[b, g].sum())
                assert torch.equal(cut[b, g, :n], whole[:n])
                said = [string in vocabulary.tokenizer.decode(whole[:k]) for k in range(1, len(whole) + 1)]
                assert n == (said.index(True) + 1 if any(said) else len(whole))


def test_a_call_ends_where_the_released_tokenizer_fuses_its_end():
    stop = stops_at(QWEN, ["</video_zoom>"])
    for after, fused in (("", ""), ("\n", "\n"), ("\n\nSo", "\n\n"), (")", ")"), (" I", "")):
        ids = QWEN.encode(f'<video_zoom>{{"segment": [1, 2], "fps": 2}}</video_zoom>{after}')
        ends = [n for n in range(1, len(ids) + 1) if stop(ids[:n])]
        assert len(ends) == 1 and QWEN.decode(ids[: ends[0]]).partition("</video_zoom>")[2] == fused


def test_the_states_are_those_the_tokens_were_chosen_from(model64, vocabulary, scene):
    prompts, _, _ = scene
    turns = turns_of(model64, vocabulary, prompts, keep_hidden=True)
    ids, mask = padded(turns, 2)
    assert mask.sum(-1).unique().numel() > 2  # some end sooner, and leave
    hidden = torch.cat([turn.hidden for turn in turns])
    torch.testing.assert_close(hidden, group_hidden(model64, prompts, ids, mask), atol=1e-4, rtol=1e-4)


def test_banned_tokens_never_appear(vocabulary, tokenizer):
    model = loud_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # nearly uniform: each banned token would come about every 300 tokens
    prompt = build_prompt(vocabulary.ids("red"), [], model.config)
    turns = generate(model, [prompt], 200, 30, replace(vocabulary, eos=()), seed=lambda row, _: row)
    ids, mask = padded(turns, 1)
    assert mask.all() and ids.shape == (1, 200, 30)
    counts = torch.bincount(ids.flatten(), minlength=len(tokenizer))
    assert counts[list(vocabulary.banned)].sum() == 0
    assert (counts > 0).sum() == len(tokenizer) - len(BANNED_TOKENS)


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, 5.0]).expand(20000, 4)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0)).double()
    for temperature in (0.5, 1.0, 2.0):
        chosen = choose_tokens(logits, uniform, temperature, torch.tensor([3]))
        expected = (logits[0, :3] / temperature).softmax(-1)
        frequency = torch.bincount(chosen, minlength=4)[:3] / 20000
        torch.testing.assert_close(frequency, expected, atol=0.012, rtol=0)


def test_choosing_at_the_ends_of_the_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, expected in ((0.0, 1), (0.499, 1), (0.501, 2), (1 - 1e-12, 2)):
        chosen = choose_tokens(logits, torch.tensor([u], dtype=torch.double), 1.0, torch.tensor([], dtype=torch.long))
        assert chosen == expected


# ---------------------------------------------------------------- episodes of several turns


@dataclass
class Episode:
    """What one row said and was shown."""

    turns: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    when: list[int] = field(default_factory=list)  # how many turns of any row had ended before each of its own


def shown_to(name: int, number: int, vocabulary, clips) -> tuple[list[int], list[Video]] | None:
    """What an environment answers to a turn of the row of this name: nothing, text, a clip, or two with their times."""
    words = [None, "not in the video", f"1.0{CLIP} go on", f"1.0{CLIP}2.0{CLIP} go on"][(name + 2 * number) % 4]
    if number == 3 or words is None:
        return None
    return vocabulary.ids(words), clips[: words.count(CLIP)]


CLIPS = [random_video(5, 4, 56, 28, 0.5), random_video(6, 2, 28, 84, 2.0)]


def play(model, vocabulary, prompts, names, max_tokens=12) -> list[Episode]:
    """Episodes of up to four turns; the rows' names [B][G] decide their seeds and what they are shown."""
    flat = [name for row in names for name in row]
    sampler = Sampler(
        model,
        prompts,
        len(names[0]),
        max_tokens,
        ending_often(vocabulary),
        seed=lambda row, number: 10 * flat[row] + number,
        stop=stops_at(vocabulary.tokenizer, ["9"]),
        keep_hidden=True,
    )
    record, ended = [Episode() for _ in flat], itertools.count()
    while turns := sampler.sample():
        shown = {}
        for turn in turns:
            assert turn.number == len(record[turn.row].turns)
            record[turn.row].turns.append(turn.ids)
            record[turn.row].hidden.append(turn.hidden)
            record[turn.row].when.append(next(ended))
            answer = shown_to(flat[turn.row], turn.number, vocabulary, CLIPS)
            if answer is not None:
                shown[turn.row] = answer
        for row, observation in sampler.observe(shown).items():
            record[row].observations.append(observation)
    return record


NAMES = [[0, 1, 2], [5, 7, 6]]


def as_group(record: list[Episode], batch: int):
    """Ids [B, G, T], mask and observations [B][G] of episodes."""
    rows = [torch.cat(episode.turns) for episode in record]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    size = len(record) // batch
    observations = [[episode.observations for episode in record[b * size : (b + 1) * size]] for b in range(batch)]
    return ids.view(batch, size, -1), mask.view(batch, size, -1), observations


def whole(prompt: Prompt, episode: Episode, config) -> tuple[Prompt, torch.Tensor]:
    """A prompt and an episode as one prompt, built anew from its ids and clips, and what of it was sampled."""
    parts, videos = [(prompt.ids, False)], list(prompt.videos)
    for turn, observation in itertools.zip_longest(episode.turns, episode.observations):
        parts.append((turn, True))
        if observation is not None:
            parts.append((observation.prompt.ids, False))
            videos += observation.prompt.videos
    ids = torch.cat([ids for ids, _ in parts])
    sampled = torch.cat([torch.full(ids.shape, said) for ids, said in parts])
    first = (ids != config.video_token_id) | (ids.roll(1) != config.video_token_id)  # one <|video_pad|> per clip
    return build_prompt(ids[first].tolist(), videos, config), sampled


@pytest.fixture
def played(model64, vocabulary, scene, exact_norm):
    return play(model64, vocabulary, scene[0], NAMES)


def test_episodes_of_one_batch_are_at_different_turns(played):
    assert [len(episode.turns) for episode in played] == [1, 4, 2, 4, 4, 2]
    assert min(episode.when[1] for episode in played[1:]) < max(episode.when[0] for episode in played)


@pytest.mark.parametrize("pace", [Pace(1, 1, False), Pace(5, 4, False)])
def test_states_of_episodes_are_those_of_one_pass(model64, vocabulary, scene, exact_norm, monkeypatch, pace):
    """The cache that survives across turns, against [prompt, episodes] computed at once."""
    monkeypatch.setattr("engine.sampling.decoding_pace", lambda _: pace)
    record = play(model64, vocabulary, scene[0], NAMES)
    ids, mask, observations = as_group(record, 2)
    hidden = group_hidden(model64, scene[0], ids, mask, observations)
    cached = torch.cat([state for episode in record for state in episode.hidden])
    torch.testing.assert_close(cached, hidden, atol=1e-9, rtol=1e-9)
    assert (group_hidden(model64, scene[0], ids, mask) - hidden).abs().max() > 0.1  # what was shown matters


def test_the_pace_changes_no_episode(model64, vocabulary, scene, played, monkeypatch):
    monkeypatch.setattr("engine.sampling.decoding_pace", lambda _: Pace(5, 4, False))
    for ours, theirs in zip(play(model64, vocabulary, scene[0], NAMES), played, strict=True):
        assert [t.tolist() for t in ours.turns] == [t.tolist() for t in theirs.turns]


def test_an_episode_does_not_depend_on_its_batch(model64, vocabulary, scene, played):
    for k, episode in enumerate(played):
        (alone,) = play(model64, vocabulary, [scene[0][k // 3]], [[NAMES[k // 3][k % 3]]])
        assert [t.tolist() for t in alone.turns] == [t.tolist() for t in episode.turns]


def test_positions_go_on_through_all_clips_of_an_episode(model64, scene, played):
    """Those of the whole dialogue as one prompt."""
    for k, episode in enumerate(played):
        prompt = scene[0][k // 3]
        rebuilt, _ = whole(prompt, episode, model64.config)
        said, at = 0, len(prompt)
        for turn, observation in zip(episode.turns, episode.observations, strict=False):
            said, at = said + len(turn), at + len(turn)
            assert observation.after == said
            there = slice(at, at + len(observation.prompt))
            assert torch.equal(observation.prompt.positions, rebuilt.positions[:, there])
            at = there.stop


def test_no_token_of_an_episode_is_computed_twice(model64, vocabulary, scene, played, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        "engine.sampling.row_hidden",
        lambda model, embeds, positions, tree, cache=None: (
            tree is not None and lengths.append(len(embeds)),
            row_hidden(model, embeds, positions, tree, cache),
        )[1],
    )
    play(model64, vocabulary, scene[0], NAMES)
    shown = [o.prompt for episode in played for o in episode.observations]
    # each with the last token of the turn before it
    assert sum(lengths) == sum(map(len, scene[0])) + sum(map(len, shown)) + len(shown)


def test_gradients_of_episodes_equal_those_of_separate_passes(model64, vocabulary, scene, played):
    """One pass over prompts and episodes, against our own pass for each episode as a prompt of its own."""
    prompts = scene[0]
    ids, mask, observations = as_group(played, 2)
    weight = torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)
    shared, apart = copy.deepcopy(model64), copy.deepcopy(model64)
    hidden = group_hidden(shared, prompts, ids, mask, observations)
    logp = shared.lm_head(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    (logp * weight).sum().backward()

    alone = []
    for k, episode in enumerate(played):
        joint, sampled = whole(prompts[k // 3], episode, model64.config)
        states = row_hidden(apart, *embed_prompts(apart, [joint]), Tree((1,), ((len(joint) - 1,),)))
        predicted = apart.lm_head(states[:-1]).log_softmax(-1).gather(-1, joint.ids[1:, None])[:, 0]
        alone.append(predicted[sampled[1:]])
    (torch.cat(alone) * weight).sum().backward()
    torch.testing.assert_close(logp, torch.cat(alone), atol=1e-9, rtol=1e-9)
    for (name, p), q in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-9 * float(q.grad.abs().max()), rtol=0)


def test_episodes_equal_transformers_own_pass(model64, scene, played):
    ids, mask, observations = as_group(played, 2)
    hidden = group_hidden(model64, scene[0], ids, mask, observations)
    logp = model64.lm_head(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    alone = []
    for k, episode in enumerate(played):
        joint, sampled = whole(scene[0][k // 3], episode, model64.config)
        first = Prompt(joint.ids[:1], joint.positions[:, :1], joint.videos, 0)
        alone.append(separate_logp(model64, first, joint.ids[1:], joint.positions[:, 1:])[sampled[1:]])
    torch.testing.assert_close(logp, torch.cat(alone), atol=1e-4, rtol=1e-5)  # rotary angles are float32


def test_the_policy_takes_episodes(model64, scene, played):
    ids, mask, observations = as_group(played, 2)
    hidden, _ = Policy(model64)(scene[0], ids, mask, lambda *given: given, observations)
    assert torch.equal(hidden, group_hidden(model64, scene[0], ids, mask, observations))


def test_a_clip_that_several_rows_are_shown_is_encoded_once(model64, vocabulary, monkeypatch):
    grids = []
    change_family(
        monkeypatch, model64, encode_clips=lambda tower, patches, g: grids.append(g) or encode_clips(tower, patches, g)
    )
    prompt = build_prompt(vocabulary.ids("red"), [], model64.config)
    sampler = Sampler(model64, [prompt], 3, 1, replace(vocabulary, eos=()))
    assert len(sampler.sample()) == 3
    sampler.observe({row: (vocabulary.ids(f"{CLIP} a"), [CLIPS[0]]) for row in range(3)})
    assert grids == [[CLIPS[0].grid]]
    assert [turn.number for turn in sampler.sample()] == [1, 1, 1]


def test_only_a_row_whose_turn_has_just_ended_is_shown_something(model64, vocabulary):
    prompt = build_prompt(vocabulary.ids("red"), [], model64.config)
    sampler = Sampler(model64, [prompt], 2, 1, replace(vocabulary, eos=()))
    with pytest.raises(ValueError, match="row 0 cannot be shown anything: its turn has not just ended"):
        sampler.observe({0: (vocabulary.ids("a"), [])})
    assert len(sampler.sample()) == 2
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> for 0 clips"):
        sampler.observe({0: (vocabulary.ids("a"), []), 1: (vocabulary.ids(CLIP), [])})
    assert sampler.observe({0: (vocabulary.ids("a"), [])})[0].after == 1  # what was refused left no trace
    assert [(turn.row, turn.number) for turn in sampler.sample()] == [(0, 1)]  # row 1 is over
    with pytest.raises(ValueError, match="row 1 "):
        sampler.observe({1: (vocabulary.ids("a"), [])})
    assert sampler.sample() == []


def test_what_an_episode_is_shown_after_its_last_token_is_not_computed(model64, scene, played):
    ids, mask, observations = as_group(played, 2)
    before = group_hidden(model64, scene[0], ids, mask, observations)
    said = int(mask[0, 0].sum())
    nonsense = Observation(said, Prompt(torch.tensor([10**9]), torch.zeros(3, 1, dtype=torch.long), [], 0))
    more = [[[*shown] for shown in row] for row in observations]
    more[0][0].append(nonsense)
    assert torch.equal(group_hidden(model64, scene[0], ids, mask, more), before)

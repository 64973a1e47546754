"""The walkthrough prints what the training loop computes; the pages in docs/ are what it prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import advantage
import config as configuration
import rollout
import walkthrough
from world import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"walkthrough.md": [], "walkthrough_agent.md": ["--agent"]}
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


@pytest.fixture(scope="module")
def printed(small_world, tmp_path_factory) -> Callable[..., str]:
    """What the program writes with these arguments; each is run once."""
    folder, pages = tmp_path_factory.mktemp("walkthrough"), {}

    def run(*arguments: str) -> str:
        if arguments not in pages:
            cache, out = small_world["train"].parents[1], folder / f"{len(pages)}.md"
            walkthrough.main([*arguments, "--cache", str(cache), "--threads", "1", "--out", str(out)])
            pages[arguments] = out.read_text(encoding="utf-8")
        return pages[arguments]

    return run


def table(page: str, section: str, first: str = "i") -> dict[str, np.ndarray]:
    """The columns of numbers of a section's table whose first heading is `first`."""
    part = re.search(rf"^## {section}\. .*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[0]
    block = next(b for b in part.split("\n\n") if re.match(rf" +{first}  ", b))
    names, *rows = [re.split(" {2,}", line.strip()) for line in block.splitlines()]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return {n: np.array(c, float) for n, c in columns.items() if all(re.fullmatch(NUMBER, v) for v in c)}


def words_and_numbers(page: str) -> tuple[list[str], np.ndarray]:
    """A page's lines without line numbers of code and with # for each other number; and these numbers."""
    page = re.sub(r"(\w\.py):\d+", r"\1", page)
    lines = [" ".join(re.sub(NUMBER, "#", line).split()) for line in page.splitlines()]
    return lines, np.array([float(number) for number in re.findall(NUMBER, page)])


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_in_docs_are_what_it_prints_today(name, printed):
    command = f"python walkthrough.py {' '.join([*PAGES[name], '--out', f'docs/{name}'])}"
    kept, kept_numbers = words_and_numbers((ROOT / "docs" / name).read_text(encoding="utf-8"))
    fresh, numbers = words_and_numbers(printed(*PAGES[name]))
    assert kept == fresh, f"docs/{name} is about other code or another policy: {command}"
    assert np.allclose(kept_numbers, numbers, rtol=0.02, atol=0.002), f"docs/{name} has other numbers: {command}"


def test_advantages_follow_from_the_rewards_it_prints(printed):
    paid, advantages = table(printed(), "8"), table(printed(), "9")
    for name in ("format", "accuracy", "iou", "zoom"):
        r = paid[name]
        expected = (r - r.mean()) / r.std() if r.std() else 0 * r
        np.testing.assert_allclose(advantages[name], expected, atol=2e-3)


def test_the_loss_follows_from_the_advantages_it_prints(printed):
    [loss] = re.findall(rf"loss = ({NUMBER})", printed())
    assert float(loss) == pytest.approx(-table(printed(), "11")["mean A"].mean(), abs=2e-4)


def test_after_the_step_ratio_clip_and_estimates_follow_from_the_log_probabilities(printed):
    before, after = table(printed(), "10", "t"), table(printed(), "12", "t")
    ratio = np.exp(after["log p"] - before["log p"])
    assert np.abs(ratio - 1).max() > 0.01, "the step moved the policy"
    np.testing.assert_allclose(after["ratio"], ratio, rtol=5e-4)
    A = after["A"]
    np.testing.assert_allclose(after["r A"], ratio * A, rtol=2e-3, atol=2e-4)
    smaller = np.minimum(ratio * A, ratio.clip(0.8, 1.28) * A)
    np.testing.assert_allclose(after["clip 0.8 to 1.28"], smaller, rtol=2e-3, atol=2e-4)
    away = after["log p"] - before["log p_ref"]
    np.testing.assert_allclose(after["k1"], away, atol=2e-4)
    np.testing.assert_allclose(after["k3"], np.exp(-away) - 1 + away, rtol=2e-3, atol=4e-4)
    assert (after["KL"] >= 0).all() and after["KL"].max() > 0


def test_each_option_is_trained_with(printed):
    page = printed("--tokenadv", "paper", "--clip", "0.1", "0.3", "--kl", "k3", "--world_train_videos", "6")
    assert "A paper*" in page and "A code*" not in page
    assert "clip 0.9 to 1.3" in page and "(clip_low 0.1, clip_high 0.3)" in page
    assert "kl = k3" in page
    tokens = table(page, "10", "t")
    np.testing.assert_array_equal(tokens["A paper*"], table(page, "12", "t")["A"])


def test_a_clip_may_have_a_single_pair_of_frames(samples, vocabulary):
    config = configuration.parse(["--max_frames", "2"])
    model = tiny.build_model(vocabulary.tokenizer)
    view = rollout.view_video(samples[0], config)
    group = rollout.Group(view, rollout.coarse_prompt(view, config, vocabulary, model.config), [])
    page = walkthrough.Page()
    walkthrough.show_prompt(page, group, SimpleNamespace(model=model, config=config, vocabulary=vocabulary))
    text = "\n".join(page.lines)
    assert text.count("[4 visual]") == 1
    assert list(table(text, "4", "token")["token"] - table(text, "4", "token")["token"][0]) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("paid", ([1.0, 1.0], [0.5]))
def test_rewards_that_do_not_vary_have_no_quotient(paid):
    response = SimpleNamespace(text="no", offsets=[(0, 2)])
    config = configuration.parse(["--std", "sample"])
    group = SimpleNamespace(rewards={"format": paid}, responses=[response] * len(paid))
    group.advantages = advantage.credit(group, config)
    page = walkthrough.Page()
    walkthrough.show_advantages(page, group, 0, config)
    text = "\n".join(page.lines)
    assert "response 0, format: no reward differs from its mean: 0" in text
    assert (table(text, "9")["format"] == 0).all()


def test_an_episode_is_shown_turn_by_turn(printed):
    page = printed("--agent")
    assert re.search(r"turn 1, \d+ tokens +<think>", page) and re.search(r"turn 2, \d+ tokens", page)
    assert re.search(r"shown, \d+ tokens, not learned", page)


def test_a_line_that_is_gone_is_an_error():
    assert walkthrough.place(advantage.group_advantages, "Eq. 1, Eq. 4")[1].startswith("Eq. 1, Eq. 4: A_i^k")
    with pytest.raises(ValueError, match=r"advantage\.py: group_advantages has no line with 'Eq. 99'"):
        walkthrough.place(advantage.group_advantages, "Eq. 99")


def test_a_place_is_the_line_in_the_file():
    where, line = walkthrough.place(advantage.token_advantages, "Eq. 5: A_{i,t}")
    file, number = re.match(r"(\S+):(\d+) token_advantages", where).groups()
    assert line in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]

"""One training step under a microscope: every number beside its formula and the line of code that computes it.

    python walkthrough.py                                     # Zoom-Zero: a response, a zoom, Eq. 1 to 5
    python walkthrough.py --tokenadv paper --clip 0.2 0.28    # with Eq. 5 as printed, and a clipped ratio
    python walkthrough.py --agent                             # VideoZoomer: episodes of several turns
    python walkthrough.py --out docs/walkthrough.md           # makes the page in docs/

The built-in world and policy are all it needs: no GPU, no download, a few seconds. It calls the training loop's own
functions in the loop's order, on one question, and prints what goes in and comes out. Formulas, files and lines are
looked up in the source of these functions.

Every option of train.py is taken: `--kl k3`, `--tokenadv off`, `--group_size 4`, `--seed 1`, `--model CHECKPOINT`.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("walkthrough", __doc__)  # the imports below take seconds

import inspect
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import advantage
import config as configuration
import grpo
import kl
import policy
import prompts
import rewards
import rollout
import train
import video
from annotations.rows import DataError
from annotations.samples import load_training
from config import Config
from engine.families import family_of
from episodes import ClipEnvironment, environments
from harness.run import program, training_accelerator
from harness.setup import Run, check_rewards, load_run
from policy import ModelError
from rollout import Group, Response
from train import MicroBatch

ROOT = Path(__file__).resolve().parent
RECIPES = {False: ROOT / "recipes" / "cpu_world.yaml", True: ROOT / "recipes" / "cpu_world_agent.yaml"}
QUESTIONS = 12  # that are rolled out; the one whose rewards vary most is looked at
# Without warm-up the one step that is taken has the whole learning rate, so that its effect is seen.
DEFAULTS = ("--world_train_videos", "6", "--warmup", "0", "--tracker", "none", "--rollout_batch", f"{QUESTIONS}")
RELEASED_CLIP = (0.2, 0.28)  # shown beside the unclipped objective, unless --clip names others
LEFT = 40  # width of the column that says where a line is


# ---------------------------------------------------------------- the page


def place(function: Callable, words: str = "") -> tuple[str, str]:
    """Where the line with these words is in a function's source, by default its first; and that line as a formula.

    Raises ValueError if there is no such line: then the page would be about code that is gone.
    """
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    file = Path(inspect.getsourcefile(function)).relative_to(ROOT)
    for number, line in enumerate(lines, first):
        if (words or f"def {function.__name__}(") in line:
            return f"{file}:{number} {function.__qualname__}", line.strip().removeprefix("# ").strip('"')
    raise ValueError(f"{file}: {function.__qualname__} has no line with {words!r}")


def shown(value: object) -> str:
    """A number with four decimals, a line break as its sign."""
    if isinstance(value, float):
        return f"{value:.4f}".removeprefix("-") if abs(value) < 5e-5 else f"{value:.4f}"
    return "none" if value is None else str(value).replace("\n", "↵")


def times_text(times: Sequence[float]) -> str:
    """Times in seconds; of many, the first and the last."""
    parts = [f"{time:.4g}" for time in times]
    return ", ".join(parts if len(parts) <= 8 else [*parts[:4], "...", *parts[-2:]]) + " s"


def spans_text(spans: prompts.Spans | None) -> str:
    return "none" if spans is None else ", ".join(f"{start:g} to {end:g} s" for start, end in spans) or "empty"


@dataclass
class Page:
    """What is printed, and kept as Markdown."""

    lines: list[str] = field(default_factory=list)

    def say(self, *lines: str) -> None:
        for line in lines:
            self.lines.append(line.rstrip())
            print(self.lines[-1])

    def head(self, title: str, words: str) -> None:
        self.say("", f"## {title}", "", words, "")

    def at(self, function: Callable, words: str = "", *numbers: str) -> None:
        """Where a line of the source is, the line itself where `words` name one, and its numbers below or beside."""
        where, line = place(function, words)
        texts = [*([line] if words else []), *map(shown, numbers)] or [""]
        self.say(*(f"    {left:<{LEFT}}{text}" for left, text in zip([where, *[""] * len(texts)], texts, strict=False)))

    def table(self, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns as wide as what is in them, numbers to the right."""
        columns = [[name, *map(shown, column)] for name, column in zip(names, zip(*rows, strict=True), strict=True)]
        right = [isinstance(value, float | int) for value in rows[0]]
        columns = [
            [f"{cell:{'>' if r else '<'}{max(map(len, column))}}" for cell in column]
            for column, r in zip(columns, right, strict=True)
        ]
        self.say("", *("    " + "  ".join(line) for line in zip(*columns, strict=True)))


# ---------------------------------------------------------------- what the model sees and writes


def show_question(page: Page, group: Group) -> None:
    sample = group.view.sample
    page.head("1. A question and its evidence", "A row of the annotation file: what is asked, and when it is seen.")
    options = "  ".join(f"{letter} {text}" for letter, text in zip(prompts.LETTERS, sample.options, strict=False))
    facts = {"video": f"{Path(sample.video).name}, {group.view.info.duration:g} s", "question": sample.question}
    facts |= {"options": options, "answer": sample.answer, "evidence": spans_text(list(sample.evidence))}
    page.say(*(f"    {name:<10}{fact}" for name, fact in facts.items()))


def show_budget(page: Page, seconds: float, clip: video.Clip, limits: tuple[int, int, int], config: Config) -> None:
    """Eq. 3 for a clip of so many seconds within L_v, V_min and V_max, and the frames that come out."""
    fps, n, (tokens, v_min, v_max) = 1 / clip.step, len(clip.times), limits
    frames, _ = video.frame_budget(seconds, fps, *limits, config.paired_frames)
    v_res = video._tokens_per_frame(n, *limits)
    (height, width), side = clip.frames.shape[-2:], 2 * clip.patch
    page.at(video.frame_budget, "Eq. 3: N", f"N = min({fps:g} * {seconds:g}, {tokens} / {v_min}) = {frames}")
    several = "" if n == frames else f" ({n} frames: each span rounds up)"
    numbers = f"V_res = max({v_min}, min({tokens} / {n}, {v_max})) = {v_res:.4g}{several}"
    page.at(video._tokens_per_frame, "Eq. 3: V_res", numbers)
    page.at(video.frame_size, "", f"{height} x {width} pixels: {height * width // side**2} tokens of {side} x {side}")
    page.at(video.sample_times, "", times_text(clip.times))


def show_frames(page: Page, group: Group, config: Config) -> None:
    view = group.view
    page.head("2. Frames and their times", "The coarse pass shows the whole video, within a budget of visual tokens.")
    show_budget(page, view.info.duration, view.clip, (config.budget, config.v_min, config.v_max), config)
    t, h, w = view.video.grid
    page.head("3. Patches, grid, visual tokens", "Two frames share a temporal grid; a visual token is 2 x 2 patches.")
    shapes = f"frames {list(view.clip.frames.shape)} -> patches {list(view.video.patches.shape)}, grid {t} x {h} x {w}"
    page.at(video.patchify_uint8, "", shapes)
    page.at(policy.Video.n_tokens.fget, "return", f"{t} * {h} * {w} / 4 = {view.video.n_tokens}")


def show_prompt(page: Page, group: Group, run: Run) -> None:
    prompt, pad, decode = group.prompt, run.model.config.video_token_id, run.vocabulary.tokenizer.decode
    page.head("4. The prompt", "<|video_pad|> becomes the visual tokens; each token has a time, a row and a column.")
    page.at(rollout.coarse_words, "", rollout.user_chat(rollout.coarse_words(group.view, run.config), run.config))
    visual = (prompt.ids == pad).nonzero().flatten().tolist()
    per_pair = len(visual) // group.view.video.grid[0]
    first, last, second = visual[0], visual[-1], visual[per_pair : per_pair + 1]  # the second pair's, if there is one
    pairs = decode(prompt.ids[max(0, first - 9) : visual[: 2 * per_pair][-1] + 1])
    pairs = pairs.replace("<|video_pad|>" * per_pair, f"[{per_pair} visual]")
    page.at(family_of(run.model.config).lay_out, "", f"... {pairs} ...")
    page.at(policy.build_prompt, "", f"{len(prompt)} tokens, {len(visual)} of them visual")
    page.at(policy.grid_positions, "time = torch.tensor(")
    page.at(policy.mrope_positions, "p += extent")
    picked = [first - 1, first, first + 1, *(place for k in second for place in (k - 1, k)), last, last + 1]
    words = ["visual" if i == pad else decode([i]) for i in prompt.ids[picked].tolist()]
    rows = [[k, word, *prompt.positions[:, k].tolist()] for k, word in zip(picked, words, strict=True)]
    page.table(["token", "is", "time", "row", "column"], rows)


def show_responses(page: Page, group: Group, config: Config) -> None:
    responses = group.responses
    page.head(f"5. {len(responses)} responses", "Each sees the prompt and itself; the prompt is computed once for all.")
    page.at(rollout.roll_out_batch, "", f"temperature {config.temperature:g}, at most {config.max_tokens} tokens")
    page.table(["i", "tokens", "text"], [[g, len(r.ids), r.text] for g, r in enumerate(responses)])
    page.head("6. What is read from them", "One tolerant parser per tag; whether the form is right is a reward.")
    page.at(prompts.parse_answer)
    page.at(prompts.parse_tool_call if config.multi_turn else prompts.parse_spans)
    rows = [[g, r.answer, spans_text(r.spans), "itself" if r.finished else "a limit"] for g, r in enumerate(responses)]
    page.table(["i", "answer", "spans", "ended by"], rows)


def show_zooms(page: Page, group: Group, g: int, config: Config) -> None:
    chosen = group.responses[g]
    page.head("7. The zoom pass", "Only the claimed spans, larger and at a higher rate; the answer is a letter.")
    page.at(rollout.zoom_pass, "", f"response {g}: {spans_text(chosen.spans)}")
    if chosen.zoom:
        seconds = rewards.union_length(rollout.visible_spans(chosen.spans, group.view.info.duration))
        show_budget(page, seconds, chosen.zoom.clip, config.zoom_limits, config)
        letters = ", ".join(f"{letter} {p:.4f}" for letter, p in chosen.zoom.letters.items())
        page.at(rollout.answer_clips, "", f"p(letter | clip, question): {letters}")
    rows = []
    for i, response in enumerate(group.responses):
        n, _, height, width = response.zoom.clip.frames.shape if response.zoom else (0, 3, 0, 0)
        rows.append([i, spans_text(response.spans), n, f"{height} x {width}", response.zoom and response.zoom.answer])
    page.table(["i", "spans", "frames", "pixels", "answer"], rows)


def show_episode(page: Page, group: Group, g: int) -> None:
    page.head("7. An episode, turn by turn", "A call gets frames, or a sentence that says why not; the model goes on.")
    page.at(ClipEnvironment.respond, "", f"response {g}")
    for number, turn in enumerate(group.responses[g].turns, 1):
        page.say(f"    {f'turn {number}, {len(turn.ids)} tokens':<{LEFT}}{shown(turn.text)}")
        if reply := turn.reply:
            what = times_text(reply.clip.times) if reply.clip else reply.text
            page.say(f"    {f'shown, {len(turn.observation.prompt)} tokens, not learned':<{LEFT}}{shown(what)}")
    rows = [
        [i, len(r.turns), r.calls, sum(len(clip.times) for clip in r.clips), r.answer]
        for i, r in enumerate(group.responses)
    ]
    page.table(["i", "turns", "calls", "frames", "answer"], rows)


# ---------------------------------------------------------------- what a response and its tokens are paid


def show_rewards(page: Page, group: Group, g: int) -> None:
    page.head("8. Rewards", "One number per response and facet; nothing is weighted or summed yet.")
    page.at(rewards.facets)
    page.table(["i", *group.rewards], list(zip(range(len(group.responses)), *group.rewards.values(), strict=True)))
    claimed, truth = group.responses[g].spans, list(group.view.sample.evidence)
    if "iou" in group.rewards and claimed:
        union = rewards.union_length(claimed + truth)
        shared = rewards.union_length(claimed) + rewards.union_length(truth) - union
        iou = rewards.interval_iou(claimed, truth)
        page.say("")
        page.at(rewards.interval_iou, "|pred ∩ gt|", f"response {g}: {shared:.4g} s / {union:.4g} s = {iou:.4f}")


def show_advantages(page: Page, group: Group, g: int, config: Config) -> None:
    page.head("9. Advantages", "How much better than the group's mean, in units of its deviation.")
    if config.tokenadv == "off":
        page.at(advantage.credit, 'rewards = {"sum"')
        page.at(advantage.group_advantages, "Eq. 1, Eq. 4:", "of the sum: one advantage for all tokens of a response")
        page.table(["i", "A"], [[i, float(row[0])] for i, row in enumerate(group.advantages)])
        return
    paid = {name: torch.tensor(values) for name, values in group.rewards.items()}
    each = {name: advantage.group_advantages(values, config.std == "sample") for name, values in paid.items()}
    name = max(each, key=lambda name: float(each[name][g].abs()))
    quotient = "no reward differs from its mean: 0"
    if each[name][g]:
        mean = statistics.fmean(group.rewards[name])
        deviation = (statistics.stdev if config.std == "sample" else statistics.pstdev)(group.rewards[name])
        quotient = f"({paid[name][g]:.4f} - {mean:.4f}) / {deviation:.4f} = {float(each[name][g]):.4f}"
    page.at(advantage.group_advantages, "Eq. 1, Eq. 4:", f"response {g}, {name}: {quotient}")
    page.table(["i", *each], [[i, *(float(row[i]) for row in each.values())] for i in range(len(group.responses))])
    page.say("", "A token is credited with the facets of its segment, with these weights:", "")
    page.at(advantage.credit_table, "", f"tokenadv = {config.tokenadv}")
    table = advantage.credit_table(config.tokenadv, paid)
    page.table(["segment", *each], [[s, *(float(table[s].get(name, 0)) for name in each)] for s in advantage.SEGMENTS])
    segments = advantage.segment_ids(group.responses[g].text, group.responses[g].offsets).tolist()
    t = segments.index(max(segments))  # the first token of the last segment: glue, if there is one
    segment = advantage.SEGMENTS[segments[t]]
    parts = " + ".join(f"{w:.4f} * {float(each[name][g]):.4f}" for name, w in table[segment].items() if name in each)
    total = f"response {g}, token {t} ({segment}): {parts} = {float(group.advantages[g, t]):.4f}"
    page.say("")
    page.at(advantage.token_advantages, "Eq. 5: A_{i,t}", total)


def token_rows(response: Response, *columns: Sequence[float]) -> list[list]:
    """A row per sampled token: its number, what it wrote, its segment, and its number in each column."""
    segments = advantage.segment_ids(response.text, response.offsets).tolist()
    return [
        [t, response.text[start:end] or "(end)", advantage.SEGMENTS[s], *(float(column[t]) for column in columns)]
        for t, ((start, end), s) in enumerate(zip(response.offsets, segments, strict=True))
    ]


def show_tokens(page: Page, group: Group, g: int, config: Config, tokens: dict[str, Tensor]) -> None:
    page.head(f"10. Response {g}, token by token", "A by each credit table; * is the one that is trained with.")
    choices = ("off",) if config.multi_turn else tuple(advantage.CREDIT)
    credits = {name: advantage.credit(group, replace(config, tokenadv=name))[g] for name in choices}
    names = [f"A {name}{'*' if name == config.tokenadv else ''}" for name in credits]
    scores = {"log p": "logp", "log p_ref": "ref_logp", "KL": "KL"}
    scores = {heading: tokens[name][g] for heading, name in scores.items() if name in tokens}
    page.at(advantage.credit)
    page.at(kl.chunked_weighted_kl, "", "policy and reference are still the same weights: KL = 0")
    rows = token_rows(group.responses[g], *credits.values(), *scores.values())
    page.table(["t", "token", "segment", *names, *scores], rows)


# ---------------------------------------------------------------- the update


@torch.no_grad()
def score(run: Run, batch: MicroBatch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The batch's tokens under policy and reference, `kl.TokenStats` as [G, T] with "KL", the sum over the vocabulary;
    and the sums of `grpo.objective`.
    """
    reference = kl.Reference(train.reference_hidden(run, batch), run.reference_head, run.kl_weights, run.time_tokens)

    def tokens(hidden: Tensor, lm_head: Tensor) -> kl.TokenStats:
        targets, temperature = batch.responses[batch.mask], run.config.temperature
        inputs = (hidden, reference.hidden, lm_head, reference.weights, kl.CHUNK, targets, temperature)
        return kl.chunked_weighted_kl(*inputs, reference.lm_head, reference.time_tokens)

    stats = batch.pass_through(run.policy, tokens)
    values = {name: one for name, one in stats._asdict().items() if one is not None}
    if stats.kl is not None:
        values["KL"] = stats.kl_time + stats.kl_text
    grids = {name: one.new_zeros(batch.mask.shape).masked_scatter(batch.mask, one)[0] for name, one in values.items()}
    count = grpo.loss_count(batch.mask, run.config.normalise, run.config.max_tokens)
    _, sums = batch.pass_through(run.policy, partial(grpo.objective, batch, reference, count, run.config))
    return grids, {name: float(value) for name, value in sums.items()}


def show_step(page: Page, run: Run, batch: MicroBatch, sums: dict[str, float]) -> None:
    """Take the step, too."""
    page.head("11. The loss, and one optimiser step", "All ratios are 1; the gradient is that of log p, times A.")
    mask, advantages = batch.mask[0], batch.advantages[0]
    means = [float(row[real].mean()) for row, real in zip(advantages, mask, strict=True)]
    page.at(grpo.grpo_loss, "Eq. 2: min")
    negative = f"loss = {sums['loss']:.4f}, and minus the mean of the mean A below = {shown(-statistics.fmean(means))}"
    page.at(grpo.grpo_loss, "Eq. 2: 1/G", negative)
    page.table(["i", "tokens", "mean A"], [[g, int(mask[g].sum()), mean] for g, mean in enumerate(means)])
    old = [weights.detach().clone() for weights in run.policy.parameters()]
    figures = train.policy_step(run, [batch])
    moved = [float((new.detach() - was).abs().max()) for new, was in zip(run.policy.parameters(), old, strict=True)]
    norm = f"norm of the gradient = {figures['grad_norm']:.4f}, clipped to {run.config.max_grad_norm:g}"
    page.say("")
    page.at(train.optimiser_step, "norm = ", norm)
    rate = f"learning rate {figures['lr']:g}, largest change of a weight {max(moved):.4g}"
    page.at(train.optimiser_step, "run.optimizer.step()", rate)


def show_again(page: Page, group: Group, g: int, run: Run, *, old: Tensor, new: tuple, clip: tuple) -> None:
    """old: log-probabilities [G, T] before the step. new: of `score`, after it. clip: what the ratio is clipped to."""
    (tokens, sums), (low, high) = new, (1 - clip[0], 1 + clip[1])
    page.head(
        "12. The same responses again", "The policy is no longer the one that sampled: a second update sees this."
    )
    A, logp = group.advantages[g, : len(group.responses[g].ids)], tokens["logp"][g]
    logp = logp[: len(A)]
    ratio = (logp - old[g, : len(A)]).exp()
    columns = {"A": A, "log p": logp, "ratio": ratio, "r A": ratio * A}
    columns[f"clip {low:g} to {high:g}"] = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
    page.at(grpo.grpo_loss, "ratio = log_ratio")
    page.at(grpo.grpo_loss, "gain = ")
    if "KL" in tokens:
        ref = tokens["ref_logp"][g, : len(A)]
        columns |= {"KL": tokens["KL"][g], "k1": kl.k1(logp, ref), "k2": kl.k2(logp, ref), "k3": kl.k3(logp, ref)}
        page.at(kl._divergence, "q - p + p log(p / q)")
        for estimate in (kl.k1, kl.k2, kl.k3):
            page.at(estimate, '"""')
        page.at(kl.penalty, "", f"what is paid: kl = {run.config.kl}, beta = {run.config.beta:g}")
    page.table(["t", "token", "segment", *columns], token_rows(group.responses[g], *columns.values()))
    n = sums["tokens"]
    clipped = (sums["clipped_low"] + sums["clipped_high"]) / n
    means = {"ratio": sums["ratio"] / n, "clipped": clipped, "KL to the old policy": sums["approx_kl"] / n}
    means |= {"penalty": sums["penalty"] / n}
    per_token = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
    limits = f"(clip_low {run.config.clip_low:g}, clip_high {run.config.clip_high:g})"
    page.say("", f"Means over all tokens of all responses: {per_token} {limits}; the loss is now {sums['loss']:.4f}.")


# ---------------------------------------------------------------- in order


def roll_out_one(run: Run) -> Group:
    """Of the first questions' groups, the one whose rewards vary most, and so teach most."""
    [data] = load_training(run.config)
    views = [rollout.view_video(sample, run.config) for sample in itertools.islice(data.samples, QUESTIONS)]
    scenes = environments(views, run.config)
    with torch.no_grad():
        groups = rollout.roll_out(run.model, views, run.config, run.vocabulary, 0, environments=scenes)
        if run.config.zoom_reward:
            rollout.zoom_pass(run.model, groups, run.config, run.vocabulary)
    for group in groups:
        group.rewards = rewards.facets(group, run.config)
        group.advantages = advantage.credit(group, run.config)
    return max(groups, key=lambda group: sum(map(statistics.pvariance, group.rewards.values())))


def telling(group: Group) -> int:
    """The response that shows most: spans that are neither right nor wrong, tokens with different advantages, turns."""

    def shows(g: int) -> tuple:
        response = group.responses[g]
        own = group.advantages[g, : len(response.ids)]
        return 0 < group.rewards.get("iou", [0] * (g + 1))[g] < 1, len(response.turns), float(own.max() - own.min())

    return max(range(len(group.responses)), key=shows)


def walk(config: Config, clip: tuple[float, float]) -> Page:
    """The whole page, printed as it grows. Raises ConfigError, DataError or ModelError."""
    page, run = Page(), load_run(config, training_accelerator(config))
    group = roll_out_one(run)
    g = telling(group)
    page.say("# One training step", "", *__doc__.split("\n\n")[2].split("\n"))
    show_question(page, group)
    show_frames(page, group, config)
    show_prompt(page, group, run)
    show_responses(page, group, config)
    if config.multi_turn:
        show_episode(page, group, g)
    else:
        show_zooms(page, group, g, config)
    show_rewards(page, group, g)
    show_advantages(page, group, g, config)
    batch = MicroBatch.of([group], config)
    tokens, sums = score(run, batch)
    show_tokens(page, group, g, config, tokens)
    show_step(page, run, batch, sums)
    batch.old_logp = tokens["logp"][batch.mask[0]]
    show_again(page, group, g, run, old=tokens["logp"], new=score(run, batch), clip=clip)
    return page


def main(arguments: list[str] | None = None) -> None:
    options, rest = commands.extra("walkthrough", __doc__).parse_known_args(arguments)
    config = configuration.parse([*DEFAULTS, *rest], RECIPES[options.agent], program="train")
    if options.clip:
        config = replace(config, clip_low=options.clip[0], clip_high=options.clip[1])
    check_rewards(config)
    page = walk(config, tuple(options.clip or RELEASED_CLIP))
    if options.out:
        Path(options.out).write_text("\n".join(page.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program(main, DataError, ModelError)

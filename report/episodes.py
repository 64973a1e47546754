"""The page of training episodes: what the policy saw, wrote and was paid for, group by group."""

import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from advantage import SEGMENTS, group_advantages, segment_ids
from config import Config
from prompts import Span
from report import ReportError
from report.html import blame, clock, film_strip, mark, page, save_page, small_table, span_text, text, timeline
from rollout import Group, ToolReply, coarse_words, user_chat

POSITIVE, NEGATIVE = (33, 102, 172), (224, 112, 10)  # blue and orange


def episodes_page(episodes: Sequence[Mapping], out: str | Path, title: str) -> None:
    """Write a page of training episodes: question, coarse frames, time line, then each response of the group.

    An episode: {"id", "video", "question", "options": [str], "answer": letter, "duration": s, "evidence": [[s, e]],
    "coarse": {"times": [s], "frames": uint8 [N, 3, H, W]}, "responses": [{"tokens": [str], "advantages": [float],
    "segments": [str] (optional, one per token), "answer": str | None, "spans": [[s, e]] | None,
    "rewards": {facet: float}, "zoom": {"times", "frames", "answer": str | None} | None, "calls" (optional, of several
    turns): [{"part": [[s, e]], "times", "frames"} or {"refusal": str}]}], and optionally "prompt": str, "closer": bool
    (whether "coarse" shows just what was claimed before: repeated zoom) and "facets": {facet: {"rewards": [float],
    "advantages": [float] | None, "mean": float, "deviation": float}}}.
    Tokens are blue where the advantage is positive and orange and underlined where it is negative, on a scale of the
    group's own. Raises ReportError naming the episode when lengths, times or frames do not fit.
    """
    articles = []
    for episode in episodes:
        with blame(f"episode {episode.get('id', 'without id')}"):
            scale = max((abs(a) for response in episode["responses"] for a in response["advantages"]), default=0.0)
            articles.append(episode_html(episode, scale))
    legend = (
        '<p class="muted legend"><span><span class="span true"></span> true span</span>'
        '<span><span class="span pred"></span> predicted span</span>'
        '<span><span class="within">00:00.0</span> frame within a true span</span></p>'
    )
    save_page(page(title, f"<h1>{text(title)}</h1>\n{legend}\n" + "\n".join(articles), ["episodes.css"]), out)


def episode_html(episode: Mapping, scale: float) -> str:
    truth, right = episode["evidence"], episode["answer"]
    options = []
    for letter, option in zip(string.ascii_uppercase, episode["options"], strict=False):
        is_right = letter == right
        item = '<li class="right">' if is_right else "<li>"
        options.append(f"{item}{letter}. {text(option)}{' ✓' if is_right else ''}</li>")
    if right is not None and right not in list(string.ascii_uppercase[: len(options)]):
        options.append(f'<li class="right">Answer: {text(right)}</li>')
    named = {f"response {n}": r["spans"] for n, r in enumerate(episode["responses"], start=1)}
    shown = "Closer look: frames of what was claimed" if episode.get("closer") else "Coarse frames"
    responses = [response_html(response, n, episode, scale) for n, response in enumerate(episode["responses"], start=1)]
    return (
        f'<article id="{text(episode["id"])}">\n'
        f'<p class="muted">{text(episode["id"])} · {text(Path(episode["video"]).name)} · '
        f"{clock(episode['duration'])}</p>\n"
        f"<h2>{text(episode['question'])}</h2>\n"
        f'<ul class="options">{"".join(options)}</ul>\n'
        f"{prompt_html(episode.get('prompt'))}{timeline(truth, named, episode['duration'])}\n"
        f"{facets_html(episode.get('facets'))}"
        f"<h4>{shown}</h4>\n{film_strip(episode['coarse']['frames'], episode['coarse']['times'], 136, truth)}\n"
        f'<p class="muted legend">advantage: <span class="tokens">{token_html("negative", -scale, scale)} '
        f"{token_html('zero', 0.0, scale)} {token_html('positive', scale, scale)}</span> "
        f"full colour at ±{scale:.2f}, the largest of this group</p>\n" + "\n".join(responses) + "\n</article>"
    )


def prompt_html(prompt: str | None) -> str:
    if prompt is None:
        return ""
    return f"<details><summary>The prompt</summary><pre>{text(prompt)}</pre></details>\n"


def facets_html(facets: Mapping[str, Mapping] | None) -> str:
    """A table of each response's rewards with their advantages, and the group's mean and deviation of each facet."""
    if not facets:
        return ""
    heads = "".join(f'<th scope="col" class="num">{text(name)}</th>' for name in facets)
    lines = []
    for number in range(len(next(iter(facets.values()))["rewards"])):
        cells = ""
        for facet in facets.values():
            advantage = "" if facet["advantages"] is None else f" <i>{facet['advantages'][number]:+.2f}</i>"
            cells += f'<td class="num">{facet["rewards"][number]:.2f}{advantage}</td>'
        lines.append(f'<tr><th scope="row">response {number + 1}</th>{cells}</tr>')
    for name in ("mean", "deviation"):
        cells = "".join(f'<td class="num">{facet[name]:.2f}</td>' for facet in facets.values())
        lines.append(f'<tr class="group"><th scope="row">{name}</th>{cells}</tr>')
    return (
        '<h4>Rewards, and the advantage of each: (reward - mean) / deviation</h4>\n<div class="scroll">'
        f'<table class="facets"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>\n'
    )


def response_html(response: Mapping, number: int, episode: Mapping, scale: float) -> str:
    tokens, advantages = response["tokens"], response["advantages"]
    segments = response.get("segments", [""] * len(tokens))
    if not len(tokens) == len(advantages) == len(segments):
        raise ReportError(
            f"response {number}: {len(tokens)} tokens, {len(advantages)} advantages and {len(segments)} segments "
            "must be equally many"
        )
    if not all(math.isfinite(a) for a in advantages):
        raise ReportError(f"response {number}: an advantage is not finite: {list(advantages)}")
    written = "".join(token_html(t, a, scale, s) for t, a, s in zip(tokens, advantages, segments, strict=True))
    by_segment = {s: [a for a, other in zip(advantages, segments, strict=True) if other == s] for s in segments if s}
    means = {segment: f"{sum(values) / len(values):+.2f}" for segment, values in by_segment.items()}
    rewards = {name: f"{value:.2f}" for name, value in response["rewards"].items()}
    zoom = response["zoom"]
    zoomed = "<h4>No zoom pass</h4>"
    if zoom is not None:
        zoomed = (
            f"<h4>Zoom pass: answered {mark(zoom['answer'], episode['answer'])}</h4>"
            f"{film_strip(zoom['frames'], zoom['times'], 168, episode['evidence'])}"
        )
    if response.get("calls") is not None:
        zoomed = "".join(call_html(call, episode["evidence"]) for call in response["calls"]) or "<h4>No call</h4>"
    return (
        f"<section>\n<header><h3>Response {number}</h3>"
        f"<span>answered {mark(response['answer'], episode['answer'])}</span>"
        f'<span class="muted">{span_text(response["spans"])}</span></header>\n'
        f'<div class="written"><p class="tokens">{written}</p>\n'
        f"<div>{small_table('Reward', rewards)}{small_table('Mean advantage', means)}</div></div>\n"
        f"{zoomed}\n</section>"
    )


def call_html(call: Mapping, truth: Sequence[Span]) -> str:
    """What a call of an episode of several turns brought."""
    if "refusal" in call:
        return f'<h4>Call refused</h4><p class="muted">{text(call["refusal"])}</p>'
    return f"<h4>Call: {span_text(call['part'])}</h4>{film_strip(call['frames'], call['times'], 168, truth)}"


def token_html(token: str, advantage: float, scale: float, segment: str = "") -> str:
    """One token on white to blue (positive) or white to orange and underlined (negative); its title has the number."""
    sign = "pos" if advantage > 0 else "neg" if advantage < 0 else "zero"
    strength = 0.6 * abs(advantage) / scale if scale else 0.0
    hue = POSITIVE if advantage > 0 else NEGATIVE
    colour = ",".join(str(round(255 + strength * (channel - 255))) for channel in hue)
    written = text(token).replace("\n", "↵\n")
    title = f"{segment}: {advantage:+.3f}" if segment else f"{advantage:+.3f}"
    return f'<span class="tok {sign}" style="background:rgb({colour})" title="{text(title)}">{written}</span>'


def call_record(reply: ToolReply) -> dict:
    """A call as its page shows it."""
    if reply.clip is None:
        return {"refusal": reply.text}
    return {"part": [reply.call.span], "times": reply.clip.times, "frames": reply.clip.frames.numpy()}


def facet_record(values: list[float], config: Config) -> dict:
    """A facet's rewards [G] with their group's mean and deviation and, if each facet is credited apart, advantages."""
    rewards = torch.tensor(values, dtype=torch.float64)
    unbiased = config.std == "sample" and len(values) > 1
    apart = None if config.tokenadv == "off" else group_advantages(rewards, config.std == "sample").tolist()
    deviation = rewards.std(unbiased=unbiased).item()
    return {"rewards": values, "advantages": apart, "mean": rewards.mean().item(), "deviation": deviation}


def episode_record(group: Group, config: Config) -> dict:
    """A group as the page shows it, with its prompt, rewards and advantages."""
    sample, clip = group.view.sample, group.view.clip
    responses = []
    for g, response in enumerate(group.responses):
        segments = segment_ids(response.text, response.offsets)
        responses.append(
            {
                "tokens": [response.text[start:end] for start, end in response.offsets],
                "advantages": group.advantages[g, : len(response.ids)].tolist(),
                "segments": [SEGMENTS[s] for s in segments],
                "answer": response.answer,
                "spans": response.spans,
                "rewards": {name: values[g] for name, values in group.rewards.items()},
                "zoom": response.zoom
                and {
                    "times": response.zoom.clip.times,
                    "frames": response.zoom.clip.frames.numpy(),
                    "answer": response.zoom.answer,
                },
                "calls": list(map(call_record, response.replies)) if config.multi_turn else None,
            }
        )
    return {
        "id": sample.id,
        "video": sample.video,
        "question": sample.question,
        "options": list(sample.options),
        "answer": sample.answer,
        "duration": group.view.info.duration,
        "evidence": [list(span) for span in sample.evidence],
        "prompt": user_chat(coarse_words(group.view, config), config),
        "facets": {name: facet_record(values, config) for name, values in group.rewards.items()},
        "coarse": {"times": clip.times, "frames": clip.frames.numpy()},
        "closer": group.view.closer,
        "responses": responses,
    }

"""What can be seen of a training run while it runs: curves, pages of episodes, responses as text, and warnings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import ReportError
from report.curves import plot_curves
from report.episodes import episode_record, episodes_page
from rewards import paid_facets
from rollout import Group

log = logging.getLogger("zoomgrpo")
PATIENCE = 10  # steps in a row that teach nothing, until a warning says so
NEARLY_ALL = 0.9  # share of unfinished responses from which a step teaches nothing
TOLD = 3  # responses that trackers get as text


class Watch:
    """Notes each step that is done; `draw` writes curves.png and episodes.html as they are then.

    The first step's groups stay in episodes-first.html. run: `setup.Run`.
    """

    def __init__(self, run: Any):
        self.run, self.out = run, Path(run.config.out)
        self.groups: Sequence[Group] = ()  # of the last step that is done
        self.step = 0
        self.useless = 0  # steps in a row that taught nothing

    def note(self, step: int, groups: Sequence[Group], figures: Mapping[str, float]) -> None:
        """A step that is done, from 0. The first one of a run is drawn at once."""
        self.groups, self.step = list(groups), step + 1
        self.useless = self.useless + 1 if useless(figures) else 0
        if self.useless == PATIENCE and self.run.accelerator.is_main_process:
            log.warning("%s", advice(figures, self.run.config))
            self.useless = 0
        if step == 0:
            self.draw_episodes("episodes-first.html")

    def draw(self) -> None:
        """Curves, page, and for the trackers some responses; by the main process. What cannot be written is named, and
        does not end the run.
        """
        if not self.run.accelerator.is_main_process:
            return
        metrics = self.out / "metrics.jsonl"
        try:
            if metrics.exists() and metrics.stat().st_size:
                plot_curves([self.out], self.out / "curves.png")
            if self.groups:
                self.draw_episodes("episodes.html")
        except (ReportError, OSError) as error:
            log.warning("not drawn: %s", error)
        if self.groups:
            self.run.accelerator.log({"responses": responses_text(self.groups)}, step=self.step)

    def draw_episodes(self, name: str) -> None:
        """The page of the main process' groups."""
        config = self.run.config
        if self.run.accelerator.is_main_process and config.n_episodes:
            episodes = [episode_record(group, config) for group in self.groups[: config.n_episodes]]
            episodes_page(episodes, self.out / name, f"{self.out.name}: groups of step {self.step}")


def useless(figures: Mapping[str, float]) -> bool:
    """Whether a step taught nothing: no group has variance, or nearly all responses hit a limit."""
    return figures["zero_variance_fraction"] == 1 or figures["unfinished_fraction"] >= NEARLY_ALL


def advice(figures: Mapping[str, float], config: Any) -> str:
    """What a run whose steps teach nothing should try."""
    unfinished = figures["unfinished_fraction"]
    if unfinished >= NEARLY_ALL:
        return (
            f"the last {PATIENCE} steps taught little: {unfinished:.0%} of the responses hit a limit. Raise max_tokens "
            f"= {config.max_tokens}, or teach the form of a response first (sft.py)"
        )
    means = {name: figures[f"reward/{name}_mean"] for name in paid_facets(config) if f"reward/{name}_mean" in figures}
    said = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    if means.get("format", 1.0) < 0.5:
        tried = f"the responses do not have the form of template = {config.template}: teach it first (sft.py)"
    elif all(mean > 0.5 for mean in means.values()):
        tried = "all are right: take harder questions (filters.py stage2 leaves those out that teach nothing)"
    else:
        low = ", ".join(name for name, mean in means.items() if mean <= 0.5)
        tried = f"{low} cannot be told apart: take easier questions, a larger group_size, or a higher temperature"
    return f"the last {PATIENCE} steps taught nothing: in every group all responses are paid alike ({said}); {tried}"


def responses_text(groups: Sequence[Group]) -> str:
    """The question, a response and its rewards, of some groups, as Markdown."""
    parts = []
    for group in groups[:TOLD]:
        paid = ", ".join(f"{name} {values[0]:.2f}" for name, values in group.rewards.items())
        parts.append(f"**{group.view.sample.question}**\n\n    {group.responses[0].text}\n\n{paid}")
    return "\n\n---\n\n".join(parts)

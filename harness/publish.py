"""What a checkpoint's folder has beside weights and tokenizer: what processors, servers and readers need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

import config as configuration
import prompts
from config import Config
from rollout import episode_limits

# Files of the base that training does not change.
FROM_BASE = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
FROM_BASE += ("chat_template.json", "chat_template.jinja")


def complete(folder: Path, model: PreTrainedModel, config: Config) -> None:
    """Add what is missing to a folder with weights and tokenizer: the base's processors and chat template, how it is
    sampled, the run's configuration, and a model card without scores.

    The base's repetition penalty, temperature and top-k are left out: training sampled without them.
    """
    for name in FROM_BASE:
        there = config.model and cached_file(
            config.model,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if there:
            shutil.copyfile(there, folder / name)
    base = model.generation_config
    kept = {name: getattr(base, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**kept).save_pretrained(folder)
    shape = json.loads((folder / "config.json").read_text())
    for part in (shape, *(value for value in shape.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"  # as merged weights are, whatever the frozen ones were
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    configuration.save(replace(config, resume=False, overwrite=False), folder / "config.yaml")
    write_card(folder, config)


def write_card(folder: Path, config: Config, scores: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Write the model card, README.md: what the policy was shown, how it is asked, its scores if there are some.

    scores: {label, such as "after": {score: value}}.
    """
    duration = 60.0 if config.state_duration else None
    options = ["OPTION", "OPTION"]
    words = prompts.coarse_text(config.template, "QUESTION", options, duration, episode_limits(config))
    lines = [
        "---",
        *([f"base_model: {config.model}"] if config.model and not Path(config.model).is_dir() else []),
        "pipeline_tag: video-text-to-text",
        "---",
        f"# {Path(config.out).name}",
        "",
        "Grounded video question answering, trained with zoomgrpo; `config.yaml` has every option of the run.",
        "",
        f"- template: `{config.template}`, {'question before' if config.question_first else 'video before question'}"
        f"{' video' if config.question_first else ''}; system prompt: {config.system_prompt!r}",
        f"- coarse pass: {config.fps:g} frames per second, {config.budget:,} visual tokens per clip, "
        f"{config.v_min} to {config.v_max} per frame",
        f"- zoom pass: at least {config.zoom_fps:g} frames per second, {config.zoom_limits[0]:,} tokens",
        f"- at most {config.max_tokens} tokens per response, greedy or at temperature {config.temperature:g}, without "
        "a repetition penalty",
        "",
        "What it is asked, beside the video:",
        "",
        *(f"    {line}" for line in words.splitlines()),
        "",
        "With zoomgrpo, which shows the video as in training:",
        "",
        "    python infer.py --model FOLDER --video holiday.mp4 --question QUESTION",
        "",
    ]
    if scores:
        names = dict.fromkeys(name for found in scores.values() for name in found)
        lines += [f"| score, {config.test_data} | {' | '.join(scores)} |", "| --- " * (len(scores) + 1) + "|"]
        for name in names:
            cells = [f"{found[name]:.3f}" if name in found else "" for found in scores.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["To publish it:", "", "    hf upload OWNER/NAME FOLDER"]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

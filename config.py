"""Everything that can be set, one dataclass with a sentence per field.

The defaults are Zoom-Zero's Stage I as the paper has it; a recipe (`--config recipes/x.yaml`) names what it changes,
and `--field value` on the command line changes single fields on top. An unknown name or a value of the wrong kind is an
error that says which.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from prompts import TEMPLATES

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT_RECIPE = RECIPES / "cpu_world.yaml"
BUILT_IN = RECIPES.parent / "checkpoints" / "tiny"


class ConfigError(Exception):
    """An unknown option, or a value that an option cannot take."""


def option(default, text: str, choices: Collection[str] | None = None):
    """A field with the sentence that documents it."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    # ---- the run
    out: str = option("runs/zoom_zero_stage1", "Folder that the run leaves everything in.")
    seed: int = option(0, "Seed of sampling, data order and initialisation.")
    model: str = option(
        "Qwen/Qwen2.5-VL-7B-Instruct", "Checkpoint to start from, a folder or a hub name; also the reference policy."
    )
    resume: bool = option(False, "Continue the run in `out` from its last checkpoint.")
    overwrite: bool = option(False, "Replace a run that `out` holds already; without it that is an error.")
    tracker: str = option(
        "tensorboard", "Where accelerate logs to beside metrics.jsonl: tensorboard, wandb, ... or none."
    )
    save_every: int = option(50, "Steps between checkpoints; the last step always writes one.")
    n_episodes: int = option(6, "Groups shown on the page of episodes at the end of the run.")

    # ---- data
    train_data: str = option(
        "data/train.jsonl",
        "Training annotations, or a mixture of files (.yaml); `world` is the built-in benchmark's training split.",
    )
    test_data: str = option(
        "", "Annotations for the table before and after training; `world` is the test split; empty for no table."
    )
    data_format: str = option("records", "Format of both files, a reader of annotations/formats.py.")
    video_root: str = option("", "Folder put before relative video paths; empty for the current one.")
    max_failed_videos: float = option(
        0.05, "Stop when more than this share of the prompts so far had an unreadable video."
    )
    cache: str = option("cache", "Folder of the built-in benchmark's videos.")
    world_seed: int = option(0, "Seed of the built-in benchmark.")
    world_duration: int = option(20, "Seconds of each video of the built-in benchmark.")
    world_events: int = option(3, "Events in each video of the built-in benchmark.")
    world_train_videos: int = option(400, "Training videos of the built-in benchmark.")
    world_test_videos: int = option(80, "Test videos of the built-in benchmark.")

    # ---- what the model sees (Eq. 3)
    template: str = option(
        "zoom_zero",
        "Prompt template; with the zoomers, responses are VideoZoomer's episodes of several turns.",
        TEMPLATES,
    )
    system_prompt: str = option("You are a helpful assistant.", "System prompt; empty for none.")
    question_first: bool = option(False, "Put the question before the video, which a tiny policy learns to use sooner.")
    state_duration: bool = option(False, "The coarse prompt begins with the video's duration (released code).")
    fps: float = option(1.0, "Frames per second of the coarse pass.")
    min_frames: int = option(
        0, "Least frames of the coarse pass: short videos get a higher rate (the released code has 96)."
    )
    max_frames: int = option(
        0, "Most frames of the coarse pass: long videos get a lower rate (VideoZoomer has 64); 0: no limit of its own."
    )
    zoom_fps: float = option(2.0, "Frames per second of the zoom pass, where the source has them.")
    budget: int = option(8192, "L_v, visual tokens of 28x28 pixels per clip, in both passes.")
    zoom_budget: int = option(0, "L_v of the zoom pass if it differs (the released code has 4096); 0 for the same.")
    v_min: int = option(16, "V_min, least tokens per frame.")
    v_max: int = option(768, "V_max, most tokens per frame.")
    paired_frames: bool = option(
        False, "The budget counts pairs of frames, as Qwen's utilities do, not frames (Eq. 3)."
    )

    # ---- rollout
    prompts_per_step: int = option(64, "Prompts per rollout, over all processes.")
    group_size: int = option(8, "G, responses per prompt.")
    max_tokens: int = option(512, "Most tokens of a response.")
    temperature: float = option(
        1.0, "Temperature of sampling; the policy's and the reference's log-probabilities use it too."
    )
    rollout_batch: int = option(8, "Prompts decoded together on one device.")

    # ---- episodes of several turns (VideoZoomer)
    max_turns: int = option(5, "Turns of an episode; a call in the last one ends it without an answer.")
    max_calls: int = option(4, "Calls of an episode that may return frames; an illegal one costs its turn only.")
    frames_per_call: int = option(16, "Most frames of a call.")
    total_frames: int = option(128, "Most frames of an episode, with those of the coarse pass.")

    # ---- rewards
    grounding: str = option(
        "iou",
        "Reward of the spans: IoU (Zoom-Zero), GIoU, or `tg`, IoU and centre distance (LongVTG-R1 Eq. 7).",
        ("iou", "giou", "tg"),
    )
    alpha: float = option(0.8, "Share of IoU in `tg`; the rest is the centre distance.")
    zoom_reward: bool = option(True, "Run the zoom pass and pay R_zoom.")
    zoom_judge: str = option(
        "policy",
        "Who answers in the zoom pass: the policy (paper) or the reference (released code).",
        ("policy", "reference"),
    )
    zoom_sees_think: bool = option(
        False, "The zoom prompt carries the coarse reasoning without its times (released code; the answer can leak)."
    )
    zoom_answer: str = option(
        "letters", "The zoom pass' answer: the likeliest letter after `<answer>`, or decoded.", ("letters", "decode")
    )
    zoom_batch: int = option(16, "Clips answered together in the zoom pass.")
    invalid_span: str = option(
        "zero",
        "A response without a usable span: R_zoom = 0, or zoom on the whole video (released code).",
        ("zero", "uniform"),
    )

    accuracy_weight: float = option(1.0, "Weight of R_acc where rewards are summed (tokenadv = off).")
    format_weight: float = option(1.0, "Weight of R_format there.")
    tool_weight: float = option(1.0, "Weight of R_tool there: a right answer after a call that returned frames.")

    # ---- advantages and objective
    tokenadv: str = option(
        "paper",
        "Credit table: Eq. 5 as printed, the released code's, or rewards summed (Eq. 1).",
        ("paper", "code", "off"),
    )
    std: str = option(
        "population",
        "Deviation in Eq. 1 and 4: divided by n (the paper's Table 8) or n - 1 (released code).",
        ("population", "sample"),
    )
    kl: str = option(
        "exact",
        "KL over the vocabulary, or an estimate from the sampled token; `none` needs no reference, and cannot log it.",
        ("exact", "k1", "k2", "k3", "none"),
    )
    kl_clamp: float = option(
        0.0, "Values of the k3 estimate are clamped to +-kl_clamp (released code 10); 0 for no clamp. Needs kl = k3."
    )
    beta: float = option(0.01, "Weight of the KL penalty; with 0, the KL is only logged.")
    beta_time: float = option(
        -1.0, "Weight on time tokens (LongVTG-R1 Eq. 5); negative for the same as beta. Needs kl = exact."
    )
    clip_low: float = option(
        0.0, "Ratio is clipped below 1 - clip_low (released code 0.2); 0 with clip_high 0 for the unclipped Eq. 2."
    )
    clip_high: float = option(0.0, "Ratio is clipped above 1 + clip_high (released code 0.28).")
    normalise: str = option(
        "sequence",
        "Mean over each response's tokens (Eq. 2), over all tokens, or by max_tokens.",
        ("sequence", "token", "fixed"),
    )

    mask_truncated: bool = option(False, "Responses that a limit ended have no part in the loss.")
    max_redraws: int = option(
        0, "Dynamic sampling: groups without variance are redrawn, so often at most; 0 for never."
    )

    # ---- evaluation
    eval_controls: bool = option(False, "Also evaluate with questions of other videos, and zoom on the true spans.")
    eval_batch: int = option(32, "Questions answered together on one device.")

    # ---- optimisation
    steps: int = option(500, "Rollouts; each is followed by updates_per_rollout updates.")
    epochs: float = option(
        0.0, "Passes over the trajectories in supervised training, in place of steps; 0: steps decides."
    )
    updates_per_rollout: int = option(
        1, "Mini-batches of a rollout, one update each (released code 8); old log-probabilities are exact."
    )
    prompts_per_pass: int = option(
        1, "Prompts (with their groups) in one forward and backward pass on one device; the rest is accumulated."
    )
    lr: float = option(1e-6, "Learning rate after warm-up.")
    warmup: int = option(10, "Updates of linear warm-up.")
    schedule: str = option(
        "cosine", "Learning rate after warm-up: falls to 0 as a cosine, or stays.", ("cosine", "constant")
    )
    weight_decay: float = option(0.01, "AdamW's weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    train_vision: bool = option(True, "Train the vision tower too.")
    reference_device: str = option(
        "same",
        "Where the reference's decoder layers are kept: on the policy's device, or in the CPU's memory, and each is "
        "copied whenever it computes.",
        ("same", "cpu"),
    )
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass.")
    mixed_precision: str = option("bf16", "Compute precision; weights and optimiser stay float32.", ("no", "bf16"))
    threads: int = option(0, "CPU threads per process; 0 leaves torch's own choice.")

    @property
    def multi_turn(self) -> bool:
        """Whether a response is an episode of several turns (VideoZoomer)."""
        return TEMPLATES[self.template].multi_turn


def suiting_recipe(model: str | None) -> Path:
    """How a model is shown videos: a run's checkpoint as the run did, the built-in one by its recipe, others by the
    paper's values for long videos."""
    if model is None or Path(model).resolve() == BUILT_IN.resolve():
        return DEFAULT_RECIPE
    beside = Path(model).resolve().parent / "config.yaml"
    return beside if beside.is_file() else RECIPES / "long_video.yaml"


def _field_types() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _convert(name: str, value: object, origin: str) -> object:
    """The value as the field's type, or ConfigError naming the field, the value and where it came from."""
    kind = _field_types()[name]
    choices = Config.__dataclass_fields__[name].metadata["choices"]
    try:
        if kind is bool:
            converted = {"true": True, "false": False}[str(value).lower()]
        elif isinstance(value, (bool, list, dict, types.NoneType)):
            raise ValueError
        else:
            converted = kind(value)
        if kind is int and isinstance(value, float) and converted != value:
            raise ValueError  # 2.5 as a number of steps
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{origin}: {name} takes a {kind.__name__}, not {value!r}") from None
    if choices and converted not in choices:
        raise ConfigError(f"{origin}: {name} is one of {', '.join(map(str, choices))}, not {value!r}")
    return converted


def _check_name(name: object, origin: str, others: Sequence[str] = ()) -> None:
    known = [*_field_types(), *others]
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise ConfigError(f"{origin}: there is no option {name!r}; the nearest is {near[0]!r}")


def read_recipe(path: str | Path) -> dict[str, object]:
    """The fields that a YAML recipe sets, checked and converted. Raises ConfigError naming the file."""
    path = Path(path)
    if not path.is_file():
        known = sorted(p.name for p in RECIPES.glob("*.yaml") if not p.stem.startswith("accelerate"))
        raise ConfigError(f"{path}: no such recipe; there are {', '.join(known)} in {RECIPES.name}/")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a list of `option: value` lines, not {type(values).__name__}")
    for name in values:
        _check_name(name, str(path))
    return {name: _convert(name, value, str(path)) for name, value in values.items()}


def parse(arguments: list[str] | None = None, recipe: str | Path = DEFAULT_RECIPE, description: str = "") -> Config:
    """The configuration of a command line: `--config recipe.yaml`, then `--field value`. Raises ConfigError."""
    return parse_with(argparse.ArgumentParser(description=description, add_help=False), arguments, lambda _: recipe)[1]


def parse_with(
    own: argparse.ArgumentParser,
    arguments: list[str] | None = None,
    recipe: Callable[[argparse.Namespace], str | Path] = lambda _: DEFAULT_RECIPE,
) -> tuple[argparse.Namespace, Config]:
    """The command line of a script that has options of its own (those of `own`, made with add_help=False) beside these.

    `recipe`: which one is meant without --config; it sees what was given (None: it was not). An option of both is
    described by `own`. Raises ConfigError, naming the nearest option for an unknown one.
    """
    parser = argparse.ArgumentParser(
        parents=[own], description=own.description, allow_abbrev=False, exit_on_error=False
    )
    group = parser.add_argument_group("configuration", "what a recipe sets can be changed here, option by option")
    group.add_argument("--config", help=f"recipe: a YAML file, such as those in {RECIPES.name}/")
    described = {action.dest for action in own._actions}
    for name, field in Config.__dataclass_fields__.items():
        if name in described:
            continue
        bare = {"nargs": "?", "const": "true"} if _field_types()[name] is bool else {}  # --resume is --resume true
        text = field.metadata["help"].replace("%", "%%")
        group.add_argument(f"--{name}", metavar="VALUE", help=text, **bare)
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}") from None
    for token in unknown:
        if token.startswith("--"):
            _check_name(token[2:].split("=")[0], "command line", [action.dest for action in parser._actions])
        raise ConfigError(f"command line: {token!r} belongs to no option; options are written --name value")
    values = read_recipe(given.config or recipe(given))
    for name in _field_types():
        value = getattr(given, name)
        if value is not None:
            values[name] = _convert(name, value, "command line")
    config = Config(**values)
    check(config)
    return given, config


def parse_for_model(
    own: argparse.ArgumentParser,
    arguments: list[str] | None = None,
    recipe: Callable[[argparse.Namespace], str | Path] = lambda given: suiting_recipe(given.model),
) -> tuple[argparse.Namespace, Config]:
    """`parse_with` for a script that asks a model: --model, else that of --config, else the built-in one."""
    given, config = parse_with(own, arguments, recipe)
    if not given.model and not given.config:
        config.model = str(BUILT_IN)
    return given, config


POSITIVE = ["steps", "prompts_per_step", "prompts_per_pass", "updates_per_rollout", "rollout_batch", "group_size"]
POSITIVE += ["max_tokens", "temperature", "fps", "zoom_fps", "budget", "v_min", "zoom_batch", "eval_batch"]
POSITIVE += [
    "save_every",
    "lr",
    "max_grad_norm",
    "world_duration",
    "world_events",
    "world_train_videos",
    "world_test_videos",
    "max_turns",
    "max_calls",
    "frames_per_call",
    "total_frames",
]
NOT_NEGATIVE = ["warmup", "weight_decay", "beta", "clip_low", "clip_high", "zoom_budget", "n_episodes", "threads"]
NOT_NEGATIVE += ["seed", "world_seed", "max_failed_videos", "min_frames", "max_frames", "kl_clamp", "alpha", "epochs"]
NOT_NEGATIVE += ["accuracy_weight", "format_weight", "tool_weight", "max_redraws"]


def check(config: Config) -> None:
    """Raise ConfigError for values that cannot work, alone or together."""
    for name, kind in _field_types().items():
        value = getattr(config, name)
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, not {value}")
        if name in POSITIVE and value <= 0:
            raise ConfigError(f"{name} must be positive, not {value}")
        if name in NOT_NEGATIVE and value < 0:
            raise ConfigError(f"{name} must not be negative, not {value}")
    if config.v_max < config.v_min or config.budget < config.v_min:
        raise ConfigError(f"v_min = {config.v_min} must be at most v_max = {config.v_max} and budget = {config.budget}")
    if config.max_frames and config.max_frames < config.min_frames:
        raise ConfigError(f"min_frames = {config.min_frames} must be at most max_frames = {config.max_frames}")
    if config.multi_turn:
        clip = config.zoom_budget or config.budget
        if config.frames_per_call * config.v_min > clip:
            raise ConfigError(
                f"frames_per_call = {config.frames_per_call} of at least v_min = {config.v_min} tokens need a larger "
                f"budget for clips than {clip}"
            )
        if not 0 < config.max_frames < config.total_frames:
            raise ConfigError(
                f"template = {config.template} needs max_frames, and it must leave some of total_frames = "
                f"{config.total_frames} for calls; it is {config.max_frames}"
            )
        if config.eval_controls:
            raise ConfigError(f"template = {config.template} claims no spans: it needs eval_controls = false")
    weights = (config.accuracy_weight, config.format_weight, config.tool_weight)
    if weights != (1, 1, 1) and config.tokenadv != "off":
        raise ConfigError(f"weights of rewards need tokenadv = off, where they are summed, not {config.tokenadv}")
    if config.alpha > 1:
        raise ConfigError(f"alpha is a share, at most 1, not {config.alpha}")
    if config.beta_time >= 0 and config.kl != "exact":
        raise ConfigError(
            f"beta_time = {config.beta_time} weighs subsets of the vocabulary, which needs kl = exact, not {config.kl}"
        )
    if config.kl_clamp and config.kl != "k3":
        raise ConfigError(f"kl_clamp = {config.kl_clamp} clamps the k3 estimate, which needs kl = k3, not {config.kl}")
    if config.reference_device == "cpu" and config.zoom_judge == "reference" and config.zoom_answer == "decode":
        raise ConfigError(
            "reference_device = cpu copies all layers for every token that the reference decodes: with zoom_judge = "
            "reference it needs zoom_answer = letters"
        )
    if config.prompts_per_step % config.updates_per_rollout:
        raise ConfigError(
            f"updates_per_rollout = {config.updates_per_rollout} must divide "
            f"prompts_per_step = {config.prompts_per_step}"
        )


def save(config: Config, path: str | Path) -> None:
    """Write the full configuration as a recipe that `--config` reads."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

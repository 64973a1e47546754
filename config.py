"""Every option: a field of `Config` with its sentence, default, range, choices and the programs that read it.

The defaults are Zoom-Zero's Stage I as the paper has it; a recipe (`--config recipes/x.yaml`) names what it changes,
and `--field value` on the command line changes single fields on top. An unknown name or a value of the wrong kind is an
error that says which. A recipe may set every option, and a training program warns of those that it does not read; a
command line may set those alone that its program reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import math
import re
import reprlib
import shutil
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from prompts import TEMPLATES, control
from rewards import GROUNDING

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT_RECIPE = RECIPES / "cpu_world.yaml"
SHORT = ("nextgqa", "rextime")  # formats whose videos are short (Zoom-Zero, Appendix B)
BUILT_IN = RECIPES.parent / "checkpoints" / "tiny"
TOWER = BUILT_IN.with_name("tiny-qwen2_5_vl")  # whose vision tower tells the scenes of the built-in world apart
log = logging.getLogger("zoomgrpo")

# The programs that read an option.
LOOPS = ("train", "sft")
SCORING = (*LOOPS, "evaluate")
TESTING = (*SCORING, "infer")
LEARNING = (*LOOPS, "filters", "exemplars")
SAMPLING = ("train", "filters", "exemplars")
SHOWING = (*TESTING, "filters", "exemplars")
ALL = (*SHOWING, "curate")
PROGRAMS = (*ALL, "scenes")


class ConfigError(Exception):
    """An unknown option, or a value that an option cannot take."""


def option(
    default: object,
    text: str,
    choices: Collection[str] = (),
    group: str = "",
    used_by: Sequence[str] = (),
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    decides: bool = False,
    free: bool = False,
):
    """A field with what is to know about it.

    A number is `above` a limit, or it is at `least` or at `most` one. `decides`: it decides what a model is shown and
    writes, so answers made with different values do not go together. `free`: a resumed run may change it.
    """
    return dataclasses.field(
        default=default,
        metadata={"text": text, "choices": choices, "group": group, "used_by": used_by}
        | {"above": above, "least": least, "most": most, "decides": decides, "free": free},
    )


SEEN = "what the model sees (Eq. 3)"
run = partial(option, group="run", used_by=LOOPS)
data = partial(option, group="data", used_by=SHOWING)
seen = partial(option, group=SEEN, used_by=SHOWING, decides=True)
rollout = partial(option, group="rollout", used_by=SHOWING)
turns = partial(option, group="episodes of several turns (VideoZoomer)", used_by=SHOWING, decides=True)
zoom = partial(option, group="zoom pass", used_by=SCORING)
reward = partial(option, group="rewards", used_by=("train",))
loss = partial(option, group="advantages and loss", used_by=("train",))
update = partial(option, group="updates", used_by=LOOPS)
scoring = partial(option, group="evaluation", used_by=SCORING)
machine = partial(option, group="machine", used_by=ALL)


@dataclass
class Config:
    # ---- the run
    out: str = run("runs/zoom_zero_stage1", "Folder that the run leaves everything in.", free=True)
    seed: int = run(0, "Seed of sampling, data order and initialisation.", least=0, most=2**32 - 1, used_by=LEARNING)
    model: str = run(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Checkpoint to start from, a folder or a hub name; also the reference policy.",
        used_by=SHOWING,
    )
    family: str = run(
        "qwen2_5_vl",
        "Architecture of the built-in policy, where there is no `model`: sft.py makes one from nothing.",
        ("qwen2_5_vl", "qwen3_vl"),
        used_by=("sft",),
    )
    resume: bool = run(False, "Continue the run in `out` from its last checkpoint.", free=True)
    overwrite: bool = run(False, "Replace a run that `out` holds already; without it that is an error.", free=True)
    tracker: str = run(
        "tensorboard", "Where accelerate logs to beside metrics.jsonl: tensorboard, wandb, ... or none.", free=True
    )
    save_every: int = run(50, "Steps between checkpoints; the last step always writes one.", above=0, free=True)
    keep_checkpoints: int = run(
        0, "How many of the last checkpoints stay as checkpoint-STEP/ beside checkpoint/.", least=0, free=True
    )
    log_every: int = run(10, "Steps between lines of figures where there is no terminal.", above=0, free=True)
    n_episodes: int = run(
        6, "Groups shown on the page of episodes at the end of the run.", least=0, free=True, used_by=("train",)
    )

    # ---- data
    train_data: str = data(
        "data/train.jsonl",
        "Training annotations, or a mixture of files (.yaml); `world`: the built-in benchmark's.",
        used_by=LEARNING,
    )
    test_data: str = data("", "Test annotations; `world`: the built-in benchmark's; empty: none.", used_by=TESTING)
    data_format: str = data("records", "Format of both files, a reader of annotations/formats.py.")
    video_root: str = data("", "Folder put before relative video paths; empty for the current one.")
    max_failed_videos: float = data(
        0.05,
        "Stop when more than this share of the prompts so far had an unreadable video.",
        least=0,
        free=True,
        used_by=LOOPS,
    )
    cache: str = data("cache", "Folder of the built-in benchmark's videos.", used_by=ALL)
    world_seed: int = data(0, "Seed of the built-in benchmark.", least=0, used_by=ALL)
    world_duration: int = data(20, "Seconds of each video of the built-in benchmark.", above=0)
    world_min_duration: int = data(
        0, "With it, lengths of the built-in benchmark's videos vary from it to world_duration; 0: all alike.", least=0
    )
    world_label_noise: float = data(
        0.0, "Seconds by which each end of the built-in training evidence is off at most.", least=0, used_by=("train",)
    )
    world_events: int = data(3, "Events in each video of the built-in benchmark.", above=0)
    world_train_videos: int = data(400, "Training videos of the built-in benchmark.", above=0, used_by=LEARNING)
    world_test_videos: int = data(80, "Test videos of the built-in benchmark.", above=0, used_by=TESTING)

    # ---- what the model sees (Eq. 3)
    template: str = seen(
        "zoom_zero",
        "Prompt template; with the zoomers, a response is an episode of several turns.",
        TEMPLATES,
    )
    system_prompt: str = seen("You are a helpful assistant.", "System prompt; empty for none.")
    question_first: bool = seen(False, "Put the question before the video, which a tiny policy learns to use sooner.")
    state_duration: bool = seen(False, "The coarse prompt begins with the video's duration (released code).")
    fps: float = seen(1.0, "Frames per second of the coarse pass.", above=0, used_by=ALL)
    min_frames: int = seen(
        0, "Least frames of the coarse pass: a higher rate for short videos (released code 96).", least=0
    )
    max_frames: int = seen(
        0, "Most frames of the coarse pass: a lower rate for long videos (VideoZoomer 64); 0: no limit.", least=0
    )
    zoom_fps: float = seen(
        1.0, "Least frames per second of the zoom pass, where the source has them; the coarse rate if higher.", above=0
    )
    budget: int = seen(8192, "L_v, visual tokens of 28x28 pixels per clip, in both passes.", above=0, used_by=ALL)
    zoom_budget: int = seen(0, "L_v of the zoom pass if it differs (released code 4096); 0 for the same.", least=0)
    v_min: int = seen(16, "V_min, least tokens per frame.", above=0, used_by=ALL)
    v_max: int = seen(768, "V_max, most tokens per frame; at least v_min.", used_by=ALL)
    zoom_v_max: int = seen(0, "V_max of the zoom pass and of clips if it differs; 0 for the same.", least=0)
    outer_tags: bool = seen(
        False, "Qwen3-VL: vision tags around a whole clip too, as transformers 5's processor has them."
    )
    paired_frames: bool = seen(
        False, "The budget counts pairs of frames, as Qwen's utilities do, not frames (Eq. 3).", used_by=ALL
    )

    # ---- rollout
    prompts_per_step: int = rollout(64, "Prompts per rollout, over all processes.", above=0, used_by=LOOPS)
    group_size: int = rollout(8, "G, responses per prompt.", above=0, used_by=SAMPLING)
    max_tokens: int = rollout(512, "Most tokens of a response.", above=0, decides=True, used_by=ALL)
    temperature: float = rollout(
        1.0, "Temperature of sampling, and of the log-probabilities of policy and reference.", above=0, used_by=SAMPLING
    )
    rollout_batch: int = rollout(8, "Prompts decoded together on one device.", above=0, used_by=LEARNING)

    # ---- episodes of several turns (VideoZoomer)
    max_turns: int = turns(5, "Turns of an episode; a call in the last one ends it without an answer.", above=0)
    max_calls: int = turns(4, "Calls that may return frames; an illegal one costs its turn only.", above=0)
    frames_per_call: int = turns(16, "Most frames of a call.", above=0)
    total_frames: int = turns(128, "Most frames of an episode, with those of the coarse pass.", above=0)

    least_frames: int = option(
        0,
        "In training, max_frames is drawn anew for each prompt, from this to itself (ParaVT); 0: it stays.",
        group="episodes of several turns (VideoZoomer)",
        used_by=("train",),
        least=0,
    )

    # ---- zoom pass
    zoom_reward: bool = zoom(True, "Run the zoom pass and pay R_zoom.", used_by=("train",))
    zoom_judge: str = zoom(
        "policy",
        "Who answers in the zoom pass: the policy (paper) or the reference (released code).",
        ("policy", "reference"),
        used_by=("train",),
    )
    zoom_sees_think: bool = zoom(
        False,
        "The zoom prompt carries the coarse reasoning without its times (released code; the answer can leak).",
        decides=True,
        used_by=TESTING,
    )
    zoom_answer: str = zoom(
        "letters",
        "The zoom pass' answer: the likeliest letter after `<answer>`, or decoded.",
        ("letters", "decode"),
        decides=True,
        used_by=(*TESTING, "filters"),
    )
    zoom_batch: int = zoom(16, "Clips answered together in the zoom pass.", above=0, used_by=(*TESTING, "filters"))
    invalid_span: str = zoom(
        "zero", "Without a usable span: R_zoom = 0, or zoom on the whole video (released code).", ("zero", "uniform")
    )
    repeated_zoom: float = zoom(
        0.0,
        "Share of the steps, the last ones, in which each question is asked once more about what its first response "
        "claims, widened, as close as a zoom (the paper's future work).",
        least=0,
        most=1,
        used_by=("train",),
    )

    # ---- rewards
    grounding: str = reward(
        "iou",
        "Reward of the spans: IoU (Zoom-Zero), GIoU, `tg`, IoU and centre distance (LongVTG-R1 Eq. 7), or none, which "
        "needs no evidence.",
        (*GROUNDING, "none"),
    )
    alpha: float = reward(0.8, "Share of IoU in `tg`; the rest is the centre distance.", least=0, most=1)
    accuracy_weight: float = reward(1.0, "Weight of R_acc where rewards are summed (tokenadv = off).", least=0)
    format_weight: float = reward(1.0, "Weight of R_format there.", least=0)
    tool_weight: float = reward(
        1.0, "Weight of R_tool there: a right answer after a call that returned frames.", least=0
    )

    # ---- advantages and loss
    tokenadv: str = loss(
        "paper",
        "Credit table: Eq. 5 as printed, the released code's, Eq. 5 with times in <think> as glue, or rewards summed "
        "(Eq. 1).",
        ("paper", "code", "time", "off"),
    )
    std: str = loss(
        "population",
        "Deviation in Eq. 1 and 4: divided by n (the paper's Table 8) or n - 1 (released code).",
        ("population", "sample"),
    )
    kl: str = loss(
        "exact",
        "KL over the vocabulary, or an estimate from the sampled token; `none` needs no reference, and cannot log it.",
        ("exact", "k1", "k2", "k3", "none"),
    )
    kl_clamp: float = loss(
        0.0, "The k3 estimate is clamped to +-kl_clamp (released code 10); 0 for no clamp. Needs kl = k3.", least=0
    )
    beta: float = loss(0.01, "Weight of the KL penalty; with 0, the KL is only logged.", least=0)
    beta_time: float = loss(
        -1.0, "Weight on time tokens (LongVTG-R1 Eq. 5); negative for the same as beta. Needs kl = exact."
    )
    clip_low: float = loss(
        0.0, "Ratio is clipped below 1 - clip_low (released code 0.2); 0 with clip_high 0: not (Eq. 2).", least=0
    )
    clip_high: float = loss(0.0, "Ratio is clipped above 1 + clip_high (released code 0.28).", least=0)
    entropy_bonus: float = loss(
        0.0, "Weight of the policy's entropy in the objective (VideoZoomer's released scripts 0.001).", least=0
    )
    normalise: str = loss(
        "sequence",
        "Mean over each response's tokens (Eq. 2), over all tokens, or by max_tokens.",
        ("sequence", "token", "fixed"),
    )
    mask_truncated: bool = loss(False, "Responses that a limit ended have no part in the loss.")
    max_redraws: int = loss(
        0, "Dynamic sampling: groups without variance are redrawn, so often at most; 0 for never.", least=0
    )

    # ---- updates
    steps: int = update(500, "Rollouts; each is followed by updates_per_rollout updates.", above=0)
    epochs: float = update(
        0.0, "Passes over the trajectories, in place of steps; 0: steps decides.", least=0, used_by=("sft",)
    )
    updates_per_rollout: int = update(
        1,
        "Mini-batches of a rollout, one update each (released code 8); old log-probabilities are exact.",
        above=0,
        used_by=("train",),
    )
    prompts_per_pass: int = update(
        1, "Prompts (with their groups) in one forward and backward pass on one device; the rest is added up.", above=0
    )
    lr: float = update(1e-6, "Learning rate after warm-up.", above=0)
    warmup: int = update(10, "Updates of linear warm-up.", least=0)
    schedule: str = update(
        "cosine", "Learning rate after warm-up: falls to 0 as a cosine, or stays.", ("cosine", "constant")
    )
    weight_decay: float = update(0.01, "AdamW's weight decay.", least=0)
    max_grad_norm: float = update(1.0, "Gradients are clipped to this norm.", above=0)
    train_vision: bool = update(True, "Train the vision tower too; with LoRA, matrices beside all its linear layers.")
    lora_rank: int = update(
        0, "LoRA: rank of the matrices that are trained beside frozen weights (peft); 0 trains the weights.", least=0
    )
    lora_alpha: float = update(32.0, "LoRA: these matrices' product counts lora_alpha / lora_rank.", above=0)
    lora_targets: str = update(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "LoRA: layers of the language model that get them."
    )
    optimizer: str = update(
        "adamw", "AdamW with moments in float32, or in 8 bits (bitsandbytes, on a GPU).", ("adamw", "adamw8bit")
    )
    gradient_checkpointing: bool = update(True, "Recompute activations in the backward pass.")

    # ---- evaluation
    eval_controls: bool = scoring(False, "Also ask with questions of other videos, and zoom on the true spans.")
    eval_every: int = scoring(
        0, "Steps between evaluations on the way, in results-STEP.jsonl; 0: none.", least=0, free=True, used_by=LOOPS
    )
    keep_best: str = scoring(
        "",
        "Score by which the best checkpoint evaluated on the way is kept as checkpoint-best/; empty: none is.",
        ("", "mIoU", "R@0.5", "accuracy", "zoom_accuracy", "Acc@GQA"),
        free=True,
        used_by=LOOPS,
    )
    eval_before: str = scoring(
        "",
        "results-before.jsonl of another run from the same model, which is then not evaluated again; empty: it is.",
        free=True,
        used_by=LOOPS,
    )
    eval_batch: int = scoring(8, "Looks of different questions in one pass on one device.", above=0, used_by=TESTING)

    # ---- machine
    reference_device: str = machine(
        "same",
        "Where the reference's decoder layers are kept: with the policy, or in the CPU's memory, copied when needed.",
        ("same", "cpu"),
        used_by=("train",),
    )
    mixed_precision: str = machine(
        "bf16",
        "Compute precision; weights that are trained, and the optimiser, stay float32.",
        ("no", "bf16"),
        decides=True,
    )
    threads: int = machine(
        0,
        "CPU threads per process; 0: torch's own choice or, where a launcher has set it to 1, a share of the cores.",
        least=0,
        free=True,
    )

    @property
    def zoom_limits(self) -> tuple[int, int, int]:
        """L_v, V_min and V_max of the zoom pass, and of the clips of an episode."""
        return self.zoom_budget or self.budget, self.v_min, self.zoom_v_max or self.v_max

    @property
    def multi_turn(self) -> bool:
        """Whether a response is an episode of several turns (VideoZoomer)."""
        return TEMPLATES[self.template].multi_turn


OPTIONS = {field.name: field.metadata for field in dataclasses.fields(Config)}
OPTION_TYPES: dict[str, type] = typing.get_type_hints(Config)


def decisive(config: Config, program: str | None = None, group: str | None = None) -> dict[str, object]:
    """The options that decide what a model is shown and writes, of all or of those that a program reads, or a group."""
    return {
        name: getattr(config, name)
        for name, about in OPTIONS.items()
        if about["decides"] and group in (None, about["group"]) and (program is None or program in about["used_by"])
    }


# ---------------------------------------------------------------- recipes


def suiting_recipe(model: str | None, data_format: str | None = None) -> Path:
    """How a model is shown videos: a run's checkpoint as the run did, the built-in one by its recipe, others by the
    paper's values for the data set's kind of videos, long ones unless it is known for short ones."""
    if model is None or Path(model).resolve() == BUILT_IN.resolve():
        return DEFAULT_RECIPE
    folder = Path(model).resolve()
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path.is_file():
            return path
    return RECIPES / ("short_video.yaml" if data_format in SHORT else "long_video.yaml")


def read_recipe(path: str | Path) -> dict[str, object]:
    """The fields that a YAML recipe sets, checked and converted. Raises ConfigError naming the file."""
    path = Path(path)
    if not path.is_file():
        known = sorted(p.name for p in RECIPES.glob("*.yaml") if not p.stem.startswith("accelerate"))
        raise ConfigError(f"{path}: no such recipe; there are {', '.join(known)} in {RECIPES.name}/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number too long
        raise ConfigError(f"{path}: not YAML: {clipped(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a list of `option: value` lines, not {type(values).__name__}")
    for name in values:
        if name not in OPTIONS:
            raise ConfigError(f"{path}: {unknown(name, OPTIONS)}")
    return {name: convert(name, value, str(path)) for name, value in values.items()}


def unread(values: dict[str, object], program: str) -> list[str]:
    """What a recipe sets, other than to the default, that a training program does not read, and who does.

    Other programs are given the recipe of the run whose policy they ask, which is full of options of training.
    """
    return [
        f"{name} ({', '.join(f'{one}.py' for one in OPTIONS[name]['used_by'])} only)"
        for name, value in values.items()
        if program not in OPTIONS[name]["used_by"] and value != Config.__dataclass_fields__[name].default
    ]


def save(config: Config, path: str | Path) -> None:
    """Write the full configuration as a recipe that `--config` reads."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def clipped(value: object, most: int = 300) -> str:
    """A value or an error for a message, cut: a few hundred bytes of YAML can name each other into megabytes."""
    text = str(value) if isinstance(value, Exception) else reprlib.repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def unknown(name: object, known: Sequence[str]) -> str:
    """What is wrong with a name that is none, and which is meant if one is near."""
    near = difflib.get_close_matches(clipped(name).strip("'").lower().replace("-", "_"), known, n=1)
    return f"there is no option {clipped(name)}" + (f"; the nearest is {near[0]!r}" if near else "")


def convert(name: str, value: object, origin: str) -> object:
    """The value as the field's type, or ConfigError naming the field, the value and where it came from."""
    kind, choices = OPTION_TYPES[name], OPTIONS[name]["choices"]
    try:
        if kind is bool:
            converted = {"true": True, "false": False}[str(value).lower()]
        elif isinstance(value, (bool, list, dict, types.NoneType)):
            raise ValueError
        else:
            converted = kind(value)
        if kind is int and isinstance(value, float) and converted != value:
            raise ValueError  # 2.5 as a number of steps
    except (ValueError, KeyError, OverflowError, TypeError):
        raise ConfigError(f"{origin}: {name} takes a {kind.__name__}, not {clipped(value)}") from None
    if choices and converted not in choices:
        raise ConfigError(f"{origin}: {name} is one of {', '.join(map(str, choices))}, not {clipped(value)}")
    return converted


# ---------------------------------------------------------------- command lines


def parse(
    arguments: list[str] | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
    description: str = "",
    program: str | None = None,
) -> Config:
    """The configuration of a command line: `--config recipe.yaml`, then `--field value`. Raises ConfigError."""
    extra = argparse.ArgumentParser(description=description, add_help=False)
    return parse_with(extra, arguments, lambda _: recipe, program)[1]


def parse_with(
    extra: argparse.ArgumentParser,
    arguments: list[str] | None = None,
    recipe: Callable[[argparse.Namespace], str | Path] = lambda _: DEFAULT_RECIPE,
    program: str | None = None,
) -> tuple[argparse.Namespace, Config]:
    """The command line of a program that has `extra` options (a parser made with add_help=False) beside these.

    `recipe`: which one is meant without --config; it sees the arguments (None: it was not given). `program`: only the
    options that it reads are taken; None takes all. An option of both is described by `extra`. Raises ConfigError,
    naming the nearest option for an unknown one.
    """
    parser = build_parser(extra, program)
    known = {action.dest for action in parser._actions}
    words = [with_underscores(word, known) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        parsed, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}") from None
    for word in rest:
        raise ConfigError(f"command line: {unusable(word, known)}")
    path = parsed.config or recipe(parsed)
    values = read_recipe(path)
    if program in LOOPS and (names := unread(values, program)):
        log.warning("%s sets what %s.py does not read: %s", path, program, ", ".join(names))
    for name in OPTIONS:
        value = getattr(parsed, name, None)
        if value is not None:
            values[name] = convert(name, value, "command line")
    config = Config(**values)
    check(config)
    return parsed, config


def parse_for_model(
    extra: argparse.ArgumentParser,
    arguments: list[str] | None = None,
    recipe: Callable[[argparse.Namespace], str | Path] = lambda parsed: suiting_recipe(
        parsed.model, getattr(parsed, "data_format", None)
    ),
    program: str | None = None,
) -> tuple[argparse.Namespace, Config]:
    """`parse_with` for a program that asks a model: --model, else that of --config, else the built-in one."""
    parsed, config = parse_with(extra, arguments, recipe, program)
    if not parsed.model and not parsed.config:
        config.model = str(BUILT_IN)
    return parsed, config


class OptionHelp(argparse.HelpFormatter):
    """Help with a line for an option that needs no more, as wide as the terminal allows."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(130, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = f"{{{','.join(action.choices)}}}" if action.choices else ""
        return " ".join([*action.option_strings, choices]).strip() or action.dest


def build_parser(extra: argparse.ArgumentParser, program: str | None) -> argparse.ArgumentParser:
    """The `extra` options and those that the program reads, by group."""
    parser = argparse.ArgumentParser(
        prog=f"{program}.py" if program else None,
        parents=[extra],
        usage="%(prog)s [--config RECIPE] [--option value] ...",
        description=f"{extra.description} In brackets: the default unless a recipe sets another | other choices.",
        formatter_class=OptionHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        help=f"recipe: a YAML file that sets options, such as those in {RECIPES.name}/ [the built-in world's or, where "
        "a model is asked, the one that suits --model]",
    )
    described = {action.dest for action in extra._actions}
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, about in OPTIONS.items():
        if name in described or (program and program not in about["used_by"]):
            continue
        group = about["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = Config.__dataclass_fields__[name].default
        others = [choice for choice in about["choices"] if choice != default]
        default_text = str(default).lower() if OPTION_TYPES[name] is bool else str(default)
        text = f"{about['text']} [{' | '.join([default_text, *others])}]".replace("%", "%%")
        bare = {"nargs": "?", "const": "true"} if OPTION_TYPES[name] is bool else {}  # --resume is --resume true
        groups[group].add_argument(f"--{name}", help=text, **bare)
    return parser


def with_underscores(word: str, known: Sequence[str]) -> str:
    """--train-data as --train_data, if there is such an option."""
    name, *value = re.split("(?==)", word, maxsplit=1)
    plain = name[2:].replace("-", "_")
    return "".join([f"--{plain}", *value]) if name.startswith("--") and plain in known else word


def unusable(word: str, known: Sequence[str]) -> str:
    """Why a word of the command line belongs to none of the program's options."""
    if not word.startswith("--"):
        return f"{word!r} belongs to no option; options are written --name value"
    name = word[2:].split("=")[0]
    plain = name.replace("-", "_")
    if plain in OPTIONS:
        return f"{plain} is read by {', '.join(f'{one}.py' for one in OPTIONS[plain]['used_by'])} only"
    return f"{unknown(name, known)}; --help lists all"


# ---------------------------------------------------------------- what goes together


def check(config: Config) -> None:
    """Raise ConfigError for values that cannot work, alone or together."""
    check_values(config)
    if config.v_max < config.v_min or config.budget < config.v_min:
        raise ConfigError(f"v_min = {config.v_min} must be at most v_max = {config.v_max} and budget = {config.budget}")
    for name in ("zoom_budget", "zoom_v_max"):
        if 0 < getattr(config, name) < config.v_min:
            raise ConfigError(f"v_min = {config.v_min} must be at most {name} = {getattr(config, name)}")
    if config.world_min_duration > config.world_duration:
        raise ConfigError(
            f"world_min_duration = {config.world_min_duration} must be at most world_duration = {config.world_duration}"
        )
    if config.max_frames and config.max_frames < config.min_frames:
        raise ConfigError(f"min_frames = {config.min_frames} must be at most max_frames = {config.max_frames}")
    if config.least_frames > config.max_frames:
        raise ConfigError(f"least_frames = {config.least_frames} must be at most max_frames = {config.max_frames}")
    if config.multi_turn:
        clip = config.zoom_limits[0]
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
    if config.repeated_zoom and (config.multi_turn or config.max_redraws or config.updates_per_rollout > 1):
        raise ConfigError(
            f"repeated_zoom = {config.repeated_zoom} needs responses of a single turn, max_redraws = 0 and "
            f"updates_per_rollout = 1, not template = {config.template}, max_redraws = {config.max_redraws} and "
            f"updates_per_rollout = {config.updates_per_rollout}"
        )
    if config.lora_rank and config.reference_device == "cpu":
        raise ConfigError("with lora_rank the policy is its own reference: it needs reference_device = same")
    if config.prompts_per_step % config.updates_per_rollout:
        raise ConfigError(
            f"updates_per_rollout = {config.updates_per_rollout} must divide "
            f"prompts_per_step = {config.prompts_per_step}"
        )


def check_values(config: Config) -> None:
    """Raise ConfigError for a value that an option cannot have, whatever the others are."""
    if not config.out.strip():
        raise ConfigError("out is empty: name the folder that the run leaves everything in")
    if found := control(config.system_prompt):
        raise ConfigError(f"system_prompt {found}; leave it out")
    for name, kind in OPTION_TYPES.items():
        value = getattr(config, name)
        if kind is str and "\0" in value:
            raise ConfigError(f"{name} has a NUL character; leave it out")
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, not {value}")
        above, least, most = (OPTIONS[name][limit] for limit in ("above", "least", "most"))
        if above is not None and value <= above:
            raise ConfigError(f"{name} must be {'positive' if above == 0 else f'above {above}'}, not {value}")
        if least is not None and value < least:
            raise ConfigError(f"{name} must {'not be negative' if least == 0 else f'be at least {least}'}, not {value}")
        if most is not None and value > most:
            raise ConfigError(f"{name} {'is a share,' if most == 1 else 'must be'} at most {most}, not {value}")

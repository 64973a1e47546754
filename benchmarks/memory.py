"""What training takes of one device's memory, part by part, before any device is touched, and whether it fits.

    python -m benchmarks.memory --model 7b [--gpus 8] [--fsdp] [--config recipes/zoom_zero_stage1.yaml] [--gib 139]
    python -m benchmarks.memory --table      # what fits into which machine, with which options (docs/training.md)

`--model` is 7b, 3b, 20m (the scaled-down shape of `benchmarks/engine.py`), tiny (checkpoints/tiny-qwen2_5_vl) or the
folder of a checkpoint with Qwen2.5-VL's architecture. All other options are those of train.py: `--paired_frames true`.

Everything is computed from the shape of the model and the recipe. Weights, gradients, optimiser state and caches are
exact; what a layer needs while it computes (marked ~) is estimated, and so is the allowance for what torch does not
account for. Prompts and responses have their greatest length, all at once. Parts are of one process: with FSDP2 the
policy's weights, gradients and optimiser state are divided by the number of GPUs. `benchmarks/fake_gpu.py` counts the
same in a step with tensors that have no values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path

from transformers import AutoConfig, Qwen2_5_VLConfig

import config as configuration
from config import DEFAULT_RECIPE, Config
from kl import CHUNK as KL_CHUNK
from policy import VISION_CHUNK

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
TEXT_TOKENS = 256  # of a prompt: Zoom-Zero's template with an ordinary question has 249
ALLOWANCE = 4 * GIB  # CUDA's context, communication buffers, fragmentation
PHASES = ("prefill", "decode", "zoom", "reference", "KL", "backward", "optimiser")
UPDATE = ("reference", "KL", "backward")
KEPT = ("KL", "backward")  # activations are kept: the reference's pass is over when the policy's begins

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
VISION |= {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
# Qwen2.5-VL-7B and -3B as released; 20m is 7b at an eighth of its widths and a seventh of its depth (the vision tower:
# an eighth), with a vocabulary that keeps its share of the parameters.
SHAPES = {
    "7b": {
        "text": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision": VISION | {"out_hidden_size": 3584},
        "ids": {},
    },
    "3b": {
        "text": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision": VISION | {"out_hidden_size": 2048},
        "ids": {},
    },
    "20m": {
        "text": {"vocab_size": 3072, "hidden_size": 448, "intermediate_size": 2368, "num_hidden_layers": 4}
        | {"num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": False}
        | {"bos_token_id": 0, "eos_token_id": 1},
        "vision": VISION
        | {"depth": 4, "hidden_size": 160, "intermediate_size": 428, "num_heads": 2}
        | {"out_hidden_size": 448, "fullatt_block_indexes": [3]},
        "ids": {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5},
    },
}


def shape(name: str) -> Qwen2_5_VLConfig:
    """The architecture of a name in SHAPES, of `tiny` (checkpoints/tiny-qwen2_5_vl), or of a checkpoint's folder."""
    if name not in SHAPES:
        return AutoConfig.from_pretrained(ROOT / "checkpoints" / "tiny-qwen2_5_vl" if name == "tiny" else name)
    text, vision, ids = (SHAPES[name][part] for part in ("text", "vision", "ids"))
    d = text["hidden_size"] // text["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [d // 8, d * 3 // 16, d * 3 // 16]}
    return Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope, "rms_norm_eps": 1e-6},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **ids,
    )


# ---------------------------------------------------------------- counting


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. `head` is 0 if the output projection is the embedding table."""

    vision: int
    layer: int  # of one decoder layer
    layers: int  # of all, with the last norm
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return self.vision + self.layers + self.embedding + self.head

    @classmethod
    def of(cls, model: Qwen2_5_VLConfig) -> Parameters:
        t, v = model.text_config, model.vision_config
        h, kv = t.hidden_size, t.num_key_value_heads * head_size(model)
        attention = h * (h + 1) + 2 * kv * (h + 1) + h * h  # q, k and v have a bias, o has none
        layer = attention + 3 * h * t.intermediate_size + 2 * h
        d, inner = v.hidden_size, v.intermediate_size
        block = 3 * d * (d + 1) + d * (d + 1) + 2 * inner * (d + 1) + d * (inner + 1) + 2 * d
        merger = d + 4 * d * (4 * d + 1) + v.out_hidden_size * (4 * d + 1)
        patch = v.in_channels * v.temporal_patch_size * v.patch_size**2
        table = t.vocab_size * h
        tied = t.tie_word_embeddings
        return cls(
            patch * d + v.depth * block + merger, layer, t.num_hidden_layers * layer + h, table, (not tied) * table
        )


def head_size(model: Qwen2_5_VLConfig) -> int:
    return model.text_config.hidden_size // model.text_config.num_attention_heads


def cache_bytes_per_token(model: Qwen2_5_VLConfig, width: int = 2) -> int:
    """Keys and values of all layers for one token, in numbers of `width` bytes."""
    t = model.text_config
    return 2 * t.num_hidden_layers * t.num_key_value_heads * head_size(model) * width


def visual_tokens(recipe: Config, budget: int, v_max: int) -> int:
    """Most visual tokens of a clip under Eq. 3, over all numbers of frames: two frames share the tokens of one."""
    budget = 2 * budget if recipe.paired_frames else budget
    counts = range(1, budget // recipe.v_min + 1)
    return max(ceil(n / 2) * int(min(budget / n, v_max)) for n in counts)


# ---------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Part:
    """Some bytes, and the phases in which they are in use."""

    name: str
    bytes: int
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """Bytes that a layer needs per token (decoder) or patch (vision tower): `forward` while it computes without
    gradients, `kept` for its backward pass, and `backward` while it is computed again and differentiated.

    Fitted to what torch allocates for the 20m shape on the CPU, in float32 and under autocast.
    """

    forward: int
    kept: int
    backward: int

    def with_adapters(self, inner: int, others: int, width: int) -> Work:
        """peft casts what each adapter takes to float32, one at a time, and keeps it in the type of products: the
        widest has `inner` numbers, all others together `others`.
        """
        inputs = width * (inner + others)
        return Work(self.forward + 4 * inner, self.kept + inputs, self.backward + inputs + 4 * inner)

    @classmethod
    def of(cls, inner: int, hidden: int, width: int, stream: int) -> Work:
        """Of an MLP's inner size; `width` and `stream` are bytes of a number in products and between layers."""
        return cls(
            forward=3 * width * inner + (3 * stream + width) * hidden,
            kept=4 * width * inner + 32 * hidden,
            backward=6 * width * inner + 24 * hidden,
        )


def parts(model: Qwen2_5_VLConfig, recipe: Config, gpus: int = 1, fsdp: bool = False) -> list[Part]:
    """Everything that one of `gpus` devices holds during a step of this recipe."""
    width = 2 if recipe.mixed_precision == "bf16" else 4  # bytes of a number in computation
    # Between decoder layers, autocast leaves the type of the embeddings.
    stream = width if fsdp or recipe.lora_rank else 4
    t, v = model.text_config, model.vision_config
    layer = Work.of(t.intermediate_size, t.hidden_size, width, stream)
    if recipe.lora_rank:
        layer = layer.with_adapters(t.intermediate_size, 6 * t.hidden_size, width)
    reference = Work.of(t.intermediate_size, t.hidden_size, width, width)
    block = Work.of(v.intermediate_size, v.hidden_size, width, width)
    if recipe.lora_rank and recipe.train_vision:
        block = block.with_adapters(v.intermediate_size, 4 * v.hidden_size, width)
    pixels = v.in_channels * v.temporal_patch_size * v.patch_size**2  # of a patch

    def at_work(work: Work, tokens: int, visual: int) -> int:
        """The most that a layer takes, or a block of the tower beside the pixels and five tables of angles."""
        patch = block.forward + 4 * pixels + 4 * 5 * v.hidden_size // v.num_heads
        return max(tokens * work.forward, min(VISION_CHUNK, 4 * visual) * patch)

    visual = visual_tokens(recipe, recipe.budget, recipe.v_max)
    zoom_budget, _, zoom_v_max = recipe.zoom_limits
    zoomed = visual_tokens(recipe, zoom_budget, zoom_v_max)
    prompt, responses = visual + TEXT_TOKENS, recipe.group_size * recipe.max_tokens
    per_token = cache_bytes_per_token(model, width)
    batch = recipe.rollout_batch
    # The probabilities of the next tokens are twice held in float64, thrice in float32, and once as computed.
    choosing = batch * recipe.group_size * t.vocab_size * 30
    clips, zoom_row = recipe.zoom_batch * zoomed, recipe.zoom_batch * (zoomed + TEXT_TOKENS)
    found = weights(model, recipe, gpus, fsdp, width)
    found += [
        Part("rollout: prompts' keys and values", batch * prompt * per_token, ("prefill", "decode")),
        Part("rollout: responses' keys and values", batch * responses * per_token, ("prefill", "decode")),
        Part("~ rollout: a layer at work", at_work(layer, batch * prompt, batch * visual), ("prefill",)),
        Part("~ rollout: choice of the next tokens", choosing, ("decode",)),
        Part("~ zoom: a layer at work", at_work(layer, zoom_row, clips), ("zoom",)),
    ]

    row, clip = recipe.prompts_per_pass * (prompt + responses), recipe.prompts_per_pass * visual
    rows = min(KL_CHUNK, recipe.prompts_per_pass * responses)
    kept, kept_block = stream * t.hidden_size, width * v.hidden_size  # the inputs of the layers
    if not recipe.gradient_checkpointing:
        kept, kept_block = layer.kept, block.kept
    found.append(Part("update: activations kept by the language model", t.num_hidden_layers * row * kept, KEPT))
    backward = row * layer.backward
    if recipe.train_vision:
        # Pixels, merger, and a cosine and a sine for each change between windows and whole grids.
        tables = 8 * v.hidden_size // v.num_heads * (2 * len(v.fullatt_block_indexes) + 1)
        ends = width * (pixels + 4 * v.hidden_size) + tables
        tower = 4 * clip * (v.depth * kept_block + ends)
        found.append(Part("update: activations kept by the vision tower", tower, KEPT))
        backward = max(backward, 4 * clip * block.backward)
    if not recipe.lora_rank:
        # At the end, when nothing is kept any more: the table's whole gradient for the prompts, and for the responses.
        held = sum(part.bytes for part in found if part.name.startswith("update: activations kept"))
        backward = max(backward, 2 * 4 * t.vocab_size * t.hidden_size - held)
    if recipe.kl != "none":
        work = at_work(reference, row, clip)
        found.append(Part("~ update: a layer of the reference at work", work, ("reference",)))
    # kl.py's own figure for its rows of logits, and the projection with its gradient in the precision of computation.
    projection = 0 if recipe.lora_rank else 2 * width * t.vocab_size * t.hidden_size
    kl_work = 5 * rows * t.vocab_size * 4 + projection
    found += [
        Part("update: KL", kl_work, ("KL",)),
        Part("~ update: a layer and its gradients", backward, ("backward",)),
        Part("allowance for what torch does not count (assumed)", ALLOWANCE, PHASES),
    ]
    return found


def weights(model: Qwen2_5_VLConfig, recipe: Config, gpus: int, fsdp: bool, width: int) -> list[Part]:
    """What does not depend on the length of prompts and responses."""
    if recipe.lora_rank:
        return adapted_weights(model, recipe, gpus, fsdp, width)
    n = Parameters.of(model)
    trained = n.total if recipe.train_vision else n.total - n.vision
    shards = gpus if fsdp else 1
    ddp = gpus > 1 and not fsdp  # its buckets, of which the gradients are views, are never given back
    found = [Part("policy: weights, float32", 4 * n.total // shards, PHASES)]
    if recipe.optimizer == "adamw8bit":  # and a float32 scale for each 256 of a moment
        found.append(Part("policy: AdamW's two moments, 8 bits", 2 * trained + 8 * trained // 256, PHASES))
    else:
        found.append(Part("policy: AdamW's two moments, float32", 8 * trained // shards, PHASES))
    found.append(Part("policy: gradients, float32", 4 * trained // shards, PHASES if ddp else (*UPDATE, "optimiser")))
    if recipe.kl != "none" or recipe.zoom_judge == "reference":
        resident = n.total
        if recipe.reference_device == "cpu":
            resident -= model.text_config.num_hidden_layers * n.layer
            at_work = ("reference", "zoom") if recipe.zoom_judge == "reference" else ("reference",)
            found.append(Part("reference: a layer, copied from the CPU", width * n.layer, at_work))
        found.append(Part(f"reference: weights, {8 * width} bits", width * resident, PHASES))
    return [*found, *computed_weights(n, trained, recipe, fsdp, width)]


def computed_weights(n: Parameters, trained: int, recipe: Config, fsdp: bool, width: int) -> Iterator[Part]:
    """Copies of the policy's weights that are computed with, and whole gradients of them."""
    sampling = ("prefill", "decode", "zoom")
    if fsdp:
        yield Part(f"policy: whole weights to sample with, {8 * width} bits", width * n.total, sampling)
        # Vision tower, embedding and projection are one unit; decoder layers come and go, the next one early.
        gathered = n.total - n.layers + 2 * n.layer
        yield Part(f"policy: whole weights of units at work, {8 * width} bits", width * gathered, KEPT)
        whole = gathered if recipe.train_vision else gathered - n.vision
        yield Part(f"policy: whole gradients of these, {8 * width} bits", width * whole, ("backward",))
    elif width == 2:
        # Autocast keeps those of what is trained until it is left, so for all of the update's forward pass.
        cast = trained - n.embedding - n.head
        yield Part("policy: copies that autocast keeps, 16 bits", 2 * cast, (*sampling, "KL"))
        yield Part("policy: a copy of the output projection, 16 bits", 2 * (n.head or n.embedding), sampling)


def adapters(model: Qwen2_5_VLConfig, recipe: Config) -> int:
    """Parameters of all adapters: matrices of rank x inputs and outputs x rank beside each layer of these names, and
    of a vision tower that is trained: q, k and v in one, projection, MLP; the merger's two.
    """
    t, v = model.text_config, model.vision_config
    h, kv, inner = t.hidden_size, t.num_key_value_heads * head_size(model), t.intermediate_size
    sides = {"q_proj": h + h, "k_proj": h + kv, "v_proj": h + kv, "o_proj": h + h}
    sides |= {"gate_proj": h + inner, "up_proj": h + inner, "down_proj": inner + h}
    layer = sum(sides[name] for name in recipe.lora_targets.split(","))
    d, merged = v.hidden_size, 4 * v.hidden_size
    block = (d + 3 * d) + (d + d) + 3 * (d + v.intermediate_size)
    merger = (merged + merged) + (merged + v.out_hidden_size)
    tower = v.depth * block + merger if recipe.train_vision else 0
    return recipe.lora_rank * (t.num_hidden_layers * layer + tower)


def adapted_weights(model: Qwen2_5_VLConfig, recipe: Config, gpus: int, fsdp: bool, width: int) -> list[Part]:
    """`weights` with LoRA: no copies by autocast and no reference; adapters alone are trained."""
    n, trained, shards = Parameters.of(model), adapters(model, recipe), gpus if fsdp else 1
    phases = PHASES if gpus > 1 and not fsdp else (*UPDATE, "optimiser")
    found = [
        Part(f"policy: weights, {8 * width} bits", width * n.total // shards, PHASES),
        Part("adapters: weights and AdamW's two moments, float32", 12 * trained // shards, PHASES),
        Part("adapters: gradients, float32", 4 * trained // shards, phases),
    ]
    if fsdp:
        sampling, gathered = ("prefill", "decode", "zoom"), n.total - n.layers + 2 * n.layer
        found.append(Part(f"policy: whole weights to sample with, {8 * width} bits", width * n.total, sampling))
        found.append(Part(f"policy: whole weights of units at work, {8 * width} bits", width * gathered, KEPT))
    return found


def pinned_bytes(model: Qwen2_5_VLConfig, recipe: Config) -> int:
    """What the CPU's memory holds of a reference whose layers are kept there: torch rounds up to a power of two."""
    layer = Parameters.of(model).layer * (2 if recipe.mixed_precision == "bf16" else 4)
    return model.text_config.num_hidden_layers * 2 ** ceil(log2(layer))


def totals(found: list[Part]) -> dict[str, int]:
    """Bytes in use in each phase."""
    return {phase: sum(part.bytes for part in found if phase in part.phases) for phase in PHASES}


def table(found: list[Part]) -> str:
    """Parts by phases in GiB, as Markdown."""

    def row(name: str, cells: list[str]) -> str:
        return f"| {name:<58} | " + " | ".join(f"{cell:>9}" for cell in cells) + " |"

    lines = [row("GiB", list(PHASES)), row("---", ["---:"] * len(PHASES))]
    for part in found:
        lines.append(row(part.name, [f"{part.bytes / GIB:.2f}" if phase in part.phases else "" for phase in PHASES]))
    lines.append(row("sum", [f"{x / GIB:.2f}" for x in totals(found).values()]))
    return "\n".join(lines)


# ---------------------------------------------------------------- what fits where

CARDS = {24: 23.5, 48: 44.5, 80: 79.0}  # GiB that a card of so many gigabytes has
MACHINES = ((1, 24), (1, 48), (1, 80), (4, 80), (8, 80))
WAYS = {  # of training: options, and whether several GPUs share the weights out with FSDP2
    "all weights": ({}, True),
    "all weights, 8-bit AdamW": ({"optimizer": "adamw8bit"}, False),
    "LoRA": ({"lora_rank": 16}, False),
}
# What makes it less: first what changes the time alone, then what changes the training, the least first.
SAVINGS = {
    "a": {"rollout_batch": 1, "zoom_batch": 1},
    "b": {"reference_device": "cpu"},
    "c": {"train_vision": False},
    "d": {"group_size": 4},
    "e": {"budget": 4096},
    "f": {"kl": "none"},
}


def savings(way: str) -> Iterator[tuple[str, Config]]:
    """Letters of SAVINGS with the recipe that they leave, from the least sacrifice to the greatest: a later letter is
    worse than all before it together. LoRA has no second model as its reference.
    """
    recipe = replace(configuration.parse([], ROOT / "recipes" / "zoom_zero_stage1.yaml"), **WAYS[way][0])
    letters = [letter for letter in SAVINGS if way != "LoRA" or letter not in "bf"]
    for chosen in range(2 ** len(letters)):
        used = [letter for k, letter in enumerate(letters) if chosen >> k & 1]
        changes = {name: value for letter in used for name, value in SAVINGS[letter].items()}
        yield "".join(used), replace(recipe, **changes)


def fits_table() -> str:
    """For each model, way and machine the options it needs, and the most GiB that one GPU then holds, as Markdown."""
    lines = ["| policy | trained | " + " | ".join(f"{gpus} x {gb} GB" for gpus, gb in MACHINES) + " |"]
    lines.append("|---" * (2 + len(MACHINES)) + "|")
    for name in ("3b", "7b"):
        model = shape(name)
        for way, (_, shared) in WAYS.items():
            cells = []
            for gpus, gb in MACHINES:
                found = ((used, parts(model, recipe, gpus, shared and gpus > 1)) for used, recipe in savings(way))
                most = ((used, max(totals(held).values()) / GIB) for used, held in found)
                fitting = next((pair for pair in most if pair[1] <= CARDS[gb]), None)
                cells.append("-" if fitting is None else f"{fitting[1]:.0f} {fitting[0]}".strip())
            lines.append(f"| Qwen2.5-VL-{name.upper()} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def legend() -> str:
    """What the letters of the table are."""
    options = {k: " ".join(f"--{name} {value}".lower() for name, value in v.items()) for k, v in SAVINGS.items()}
    return ", ".join(f"{letter}: `{text}`" for letter, text in options.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="7b", help=f"{', '.join(SHAPES)}, tiny or a checkpoint's folder")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true", help="as recipes/accelerate_fsdp2.yaml; otherwise DDP")
    parser.add_argument("--gib", type=float, default=139, help="memory of one device (default: an H200's)")
    parser.add_argument("--table", action="store_true", help="what fits into which machine, with which options")
    given, options = parser.parse_known_args(arguments)
    if given.table:
        print(f"{fits_table()}\n\n{legend()}")
        return
    recipe = DEFAULT_RECIPE if given.model == "tiny" else ROOT / "recipes" / "zoom_zero_stage1.yaml"
    recipe = configuration.parse(options, recipe)
    model = shape(given.model)
    if not isinstance(model, Qwen2_5_VLConfig):
        parser.error(f"--model {given.model} is of {model.model_type}: only the parts of Qwen2.5-VL are known here")
    n = Parameters.of(model)
    found = parts(model, recipe, given.gpus, given.fsdp)

    visual = visual_tokens(recipe, recipe.budget, recipe.v_max)
    prompt = visual + TEXT_TOKENS
    tokens = recipe.group_size * recipe.max_tokens
    print(
        f"{given.model}: {n.total:,} parameters, {n.vision:,} of them in the vision tower; "
        f"{cache_bytes_per_token(model) / 1024:g} KiB of keys and values per token in 16 bits.\n"
        f"One of {given.gpus} devices{' with FSDP2' if given.fsdp else ''}. Prompts of at most {visual:,} visual "
        f"tokens (budget {recipe.budget:,} per {'pair of frames' if recipe.paired_frames else 'frame'}) and "
        f"{TEXT_TOKENS} others, {recipe.group_size} responses of {recipe.max_tokens} each;\nprompts decoded together "
        f"{recipe.rollout_batch}, clips zoomed together {recipe.zoom_batch}, prompts per pass of the update "
        f"{recipe.prompts_per_pass}.\n"
    )
    print(table(found))
    naive = 4 * model.text_config.vocab_size * recipe.prompts_per_pass
    print(
        f"\nNot needed: logits in float32 of every token of {recipe.group_size} repeated prompts with their responses, "
        f"{naive * (recipe.group_size * prompt + tokens) / GIB:.1f} GiB; of the responses alone, "
        f"{naive * tokens / GIB:.1f} GiB per copy."
    )
    if recipe.reference_device == "cpu":
        print(
            f"The reference's layers take {pinned_bytes(model, recipe) / GIB:.1f} GiB of the CPU's memory per process."
        )
    phase, needed = max(totals(found).items(), key=lambda item: item[1])
    verdict = "fits" if needed <= given.gib * GIB else "does not fit"
    print(f"The most is {needed / GIB:.1f} GiB ({phase}); {verdict} into {given.gib:g} GiB.")


if __name__ == "__main__":
    try:
        main()
    except (configuration.ConfigError, OSError) as error:
        sys.exit(f"error: {error}")

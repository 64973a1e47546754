"""The policy: Qwen2.5-VL with our own positions, our own traversal of the vision tower, and one computation of a prompt
for its whole group.

- `mrope_positions`: the released checkpoints' rule for time, row and column positions, whatever version of transformers
  is installed.
- `encode_clips`: the vision tower with windows of equal length attended to as one batch (transformers loops over them
  in Python).
- `group_hidden`: prompts and their responses are one row without padding; each response sees its prompt and itself
  (`attention.py`), at the positions it would have alone. Log-probabilities and gradients are those of G passes.
- `Episodes`: the same tree, token by token: the prompt's keys and values are computed once and shared by its G
  responses; these can be shown more text and clips on the way. `sample`: responses of one turn.

Shapes: B prompts, G responses per prompt, T response tokens, N tokens in a row, H hidden size. Responses come padded on
the right; masks say what is real.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import floor

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

import attention
import kl
from attention import GroupCache, Stretch, Tree
from prompts import LETTERS
from video import normalise_patches, patchify_uint8

TEMPORAL_PATCH = 2  # frames per temporal grid
VISION_CHUNK = 32768  # patches that the vision tower takes at a time: 8,192 visual tokens
EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
BANNED_TOKENS = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class ModelError(ValueError):
    """A checkpoint that is not there, not a Qwen2.5-VL, or not all there."""


def load(
    path: str, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a Qwen2.5-VL checkpoint folder (or hub name) and its tokenizer.

    Raises ModelError naming the path and what is wrong: another kind of model, a tokenizer without Qwen2.5-VL's special
    tokens or of other weights, and weights that are missing (transformers would fill them with random numbers).
    """
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "qwen2_5_vl":
            raise ModelError(f"its type is {config.model_type!r}, this needs 'qwen2_5_vl'")
        tokenizer = AutoTokenizer.from_pretrained(path)
        check_tokenizer(tokenizer, config)
        model, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        if found["missing_keys"]:
            raise ModelError(missing_weights(found["missing_keys"]))
    except SafetensorError as error:
        raise ModelError(f"model {path}: the weights cannot be read: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {path}: {error}") from None
    return model, tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config) -> None:
    """Raise ModelError for a tokenizer that cannot write prompts for a model with this configuration."""
    Vocabulary.of(tokenizer)
    theirs, ours = config.video_token_id, tokenizer.convert_tokens_to_ids("<|video_pad|>")
    rows = config.text_config.vocab_size
    if theirs != ours or len(tokenizer) > rows:
        raise ModelError(
            f"tokenizer and weights do not belong together: <|video_pad|> is {ours} for one and {theirs} for the "
            f"other, {len(tokenizer)} tokens for {rows} embeddings"
        )


def missing_weights(names: Collection[str]) -> str:
    """What is wrong with a checkpoint that lacks these weights."""
    blind = any("visual." in name for name in names)
    kind = "a checkpoint without vision weights, which cannot see a video" if blind else "an incomplete checkpoint"
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{kind}: it lacks {len(names)} weights: {shown}"


# ---------------------------------------------------------------- prompts and positions


@dataclass
class Video:
    """The pixels of one clip as the vision tower takes them.

    `patches`: uint8 [t * h * w, 1176]; `grid`: (t, h, w) in temporal pairs and 14-pixel patches; `step`: seconds
    between frames; `tokens`: [n, H] if the vision tower has encoded it already and does not change.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    step: float
    tokens: Tensor | None = None

    @classmethod
    def from_frames(cls, frames: Tensor, step: float) -> Video:
        """frames uint8 [N, 3, H, W], `step` seconds apart."""
        return cls(*patchify_uint8(frames), step)

    @property
    def n_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // 4


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer with the ids that sampling needs: `eos` ends a response, `banned` are never sampled (vision
    tokens).
    """

    tokenizer: PreTrainedTokenizerBase
    eos: tuple[int, ...]
    banned: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Raises ModelError if the tokenizer lacks one of Qwen2.5-VL's special tokens."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (*EOS_TOKENS, *BANNED_TOKENS) if token not in vocabulary]
        if missing:
            raise ModelError(f"this is not a Qwen2.5-VL tokenizer: it has no {', '.join(missing)}")
        return cls(tokenizer, tuple(vocabulary[t] for t in EOS_TOKENS), tuple(vocabulary[t] for t in BANNED_TOKENS))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def forced_letter(self, text: str, n_options: int) -> tuple[list[int], list[int]]:
        """Prompt ids that end where the letter of `{text}<answer>A` is decided, and the token that decides for each of
        the letters.

        Tokenizers may fuse the letter with the tag (`>A`), so the shared beginning of all n continuations is found, not
        assumed.
        """
        continued = [self.ids(f"{text}<answer>{letter}") for letter in LETTERS[:n_options]]
        shared = len(continued[0]) - 1
        if any(len(ids) != shared + 1 or ids[:shared] != continued[0][:shared] for ids in continued):
            raise ValueError("this tokenizer does not write an answer letter as one token")
        return continued[0][:shared], [ids[shared] for ids in continued]


@dataclass
class Prompt:
    """A tokenised prompt: `ids` int64 [P], `positions` int64 [3, P], its clips, and the position at which the response
    starts.
    """

    ids: Tensor
    positions: Tensor
    videos: list[Video]
    next_position: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Observation:
    """What a response is shown after `after` of its own tokens: ids, clips, and positions that go on where it was."""

    after: int
    prompt: Prompt


def mrope_positions(
    segments: Sequence[int | tuple[int, int, int, float]], tokens_per_second: float, start: int = 0
) -> tuple[Tensor, int]:
    """Time, row and column positions of a prompt, by the rule the released checkpoints were trained with.

    `segments`: in order, either a number of text tokens or a video as (t, rows, columns, seconds per temporal grid),
    rows and columns in merged 28-pixel tokens. Text advances by 1 on all three axes. A video that starts at p has time
    p + floor(k * tokens_per_second * seconds per grid), row p + i, column p + j; what follows it starts at the largest
    of its positions + 1. Returns (int64 [3, L], next position).
    """
    parts, p = [], start
    for segment in segments:
        if isinstance(segment, int):
            parts.append(torch.arange(p, p + segment).expand(3, -1))
            p += segment
            continue
        t, h, w, seconds = segment
        # The sampling interval is exact, its product may fall short of a whole number by a rounding error: so 1e-6.
        time = torch.tensor([floor(k * tokens_per_second * seconds + 1e-6) for k in range(t)])
        grid = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1) + p
        parts.append(grid)
        p = int(grid.max()) + 1
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long), p


def build_prompt(ids: Sequence[int], videos: Sequence[Video], config, start: int = 0) -> Prompt:
    """A prompt from token ids in which each `<|video_pad|>` stands for one of the clips, in order, and becomes one
    token per 28x28 patch; positions begin at `start`.
    """
    pad = config.video_token_id
    if ids.count(pad) != len(videos):
        raise ValueError(f"the prompt has {ids.count(pad)} <|video_pad|> for {len(videos)} clips")
    full: list[int] = []
    segments: list[int | tuple[int, int, int, float]] = []
    remaining = iter(videos)
    for token in ids:
        if token == pad:
            video = next(remaining)
            t, h, w = video.grid
            full += [pad] * video.n_tokens
            segments.append((t, h // 2, w // 2, video.step * TEMPORAL_PATCH))
        else:
            full.append(token)
            segments.append(1)
    positions, next_position = mrope_positions(segments, config.vision_config.tokens_per_second, start)
    return Prompt(torch.tensor(full, dtype=torch.long), positions, list(videos), next_position)


# ---------------------------------------------------------------- vision


@dataclass(frozen=True)
class Layout:
    """An order of patches in which windows of equal length are contiguous: `order` indexes the raw order, `groups` are
    (windows, length).
    """

    order: Tensor
    groups: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def _grid_windows(h: int, w: int, window: int | None) -> list[Tensor]:
    """The attention windows of one temporal grid of h x w patches, as patch indices in raw order (2x2 blocks of patches
    are contiguous).
    """
    rows, columns = h // 2, w // 2
    window = window or max(rows, columns)  # None: the whole grid is one window
    blocks = torch.arange(rows * columns).view(rows, columns)
    windows = []
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            block = blocks[top : top + window, left : left + window].reshape(-1)
            windows.append((block[:, None] * 4 + torch.arange(4)).reshape(-1))
    return windows


def window_layout(grids: Sequence[tuple[int, int, int]], window: int | None) -> Layout:
    """Order the patches of all clips by windows (of `window` merged tokens a side, None = one window per temporal
    grid), equal lengths together.
    """
    by_length: dict[int, list[Tensor]] = {}
    offset = 0
    for t, h, w in grids:
        starts = offset + torch.arange(t) * h * w
        for indices in _grid_windows(h, w, window):
            by_length.setdefault(len(indices), []).append(starts[:, None] + indices)
        offset += t * h * w
    stacked = {length: torch.cat(parts) for length, parts in by_length.items()}
    order = torch.cat([indices.reshape(-1) for indices in stacked.values()])
    return Layout(order, tuple((len(indices), length) for length, indices in stacked.items()))


def _patch_positions(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Row and column of every patch, in raw order: int64 [N, 2]."""
    parts = []
    for t, h, w in grids:
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        position = torch.stack([row, column], dim=-1).view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2)
        parts.append(position.repeat(t, 1))
    return torch.cat(parts)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, in float32 or better: x [N, heads, d], cos and sin float32 [N, 1, d]."""
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return (x * cos + half * sin).to(x.dtype)


def _vision_attention(
    attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int], ...]
) -> Tensor:
    """Attention within the windows of a layout, on patches in its order: x [N, D] -> [N, D]."""
    heads = attn.num_heads
    q, k, v = attn.qkv(x).view(len(x), 3, heads, -1).unbind(1)  # [N, heads, d] each
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    parts, start = [], 0
    for n, length in groups:
        window = [z[start : start + n * length].view(n, length, heads, -1).transpose(1, 2) for z in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*window).transpose(1, 2).reshape(n * length, -1))
        start += n * length
    return attn.proj(torch.cat(parts))


def _vision_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """One block of the tower on patches in a layout's order: x [N, D] -> [N, D]."""
    x = x + _vision_attention(block.attn, block.norm1(x), cos, sin, groups)
    return x + block.mlp(block.norm2(x))


def encode_clips(visual: nn.Module, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Visual tokens of one or more clips: normalised patches [N, 1176], grids [(t, h, w)] -> [N / 4, H].

    Same weights and same result as `visual(patches, grids)` of transformers. Temporal grids do not see each other, so
    any split into clips gives the same tokens.
    """
    config = visual.config
    window = config.window_size // config.patch_size // config.spatial_merge_size
    layouts = {True: window_layout(grids, None), False: window_layout(grids, window)}

    d = config.hidden_size // config.num_heads
    frequency = 10000.0 ** -(torch.arange(0, d // 2, 2, device=patches.device, dtype=torch.float) / (d // 2))
    angle = (
        (_patch_positions(grids).to(patches.device)[..., None] * frequency).flatten(1).repeat(1, 2)[:, None]
    )  # [N, 1, d]
    raw_cos, raw_sin = cos, sin = angle.cos(), angle.sin()

    # The convolution over 2 x 14 x 14 pixels without overlap, as the matrix product that it is.
    kernel = visual.patch_embed.proj.weight.flatten(1)
    x = F.linear(patches.to(kernel.dtype), kernel)
    current = torch.arange(len(x))
    for i, block in enumerate(visual.blocks):
        layout = layouts[i in config.fullatt_block_indexes]
        if not torch.equal(layout.order, current):  # equal where a grid is one window
            back = torch.argsort(current)
            x = x[back[layout.order].to(x.device)]
            order = layout.order.to(x.device)
            cos, sin = raw_cos[order], raw_sin[order]
            current = layout.order
        if visual.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_vision_block, block, x, cos, sin, layout.groups, use_reentrant=False)
        else:
            x = _vision_block(block, x, cos, sin, layout.groups)
    return visual.merger(x[torch.argsort(current).to(x.device)])


# ---------------------------------------------------------------- the language model


def encode_videos(model: Qwen2_5_VLForConditionalGeneration, videos: Sequence[Video]) -> list[Tensor]:
    """The visual tokens [n, H] of each clip; a clip object that is there twice is encoded once.

    The tower works on chunks of at most `VISION_CHUNK` patches (whole temporal grids), which bounds its memory.
    """
    distinct = list({id(video): video for video in videos if video.tokens is None}.values())
    chunks: list[list[tuple[Tensor, tuple[int, int, int]]]] = [[]]
    room = VISION_CHUNK
    for video in distinct:
        t, h, w = video.grid
        first = 0
        while first < t:
            if room < h * w and chunks[-1]:
                chunks.append([])
                room = VISION_CHUNK
            n = min(t - first, max(1, room // (h * w)))
            chunks[-1].append((video.patches[first * h * w : (first + n) * h * w], (n, h, w)))
            first, room = first + n, room - n * h * w
    encoded = []
    device = model.get_input_embeddings().weight.device
    for chunk in filter(None, chunks):
        patches = normalise_patches(torch.cat([patches for patches, _ in chunk]).to(device))
        encoded.append(encode_clips(model.model.visual, patches, [grid for _, grid in chunk]))
    by_clip = {}
    if distinct:
        tokens = torch.cat(encoded).split([video.n_tokens for video in distinct])
        by_clip = dict(zip(map(id, distinct), tokens, strict=True))
    return [by_clip[id(video)] if video.tokens is None else video.tokens for video in videos]


@torch.no_grad()
def keep_tokens(model: Qwen2_5_VLForConditionalGeneration, videos: Sequence[Video]) -> None:
    """Encode these clips once and for all; only for a vision tower that is not trained."""
    for video, tokens in zip(videos, encode_videos(model, videos), strict=True):
        video.tokens = tokens


def embed_prompts(
    model: Qwen2_5_VLForConditionalGeneration, prompts: Sequence[Prompt], following: Sequence[Prompt] = ()
) -> tuple[Tensor, Tensor]:
    """All prompts, and pieces of text and clips that follow, in one row: embeddings [N, H], positions int64 [3, N]."""
    table = model.get_input_embeddings()
    pieces = [*prompts, *following]
    rows = [torch.cat([p.ids for p in part]).to(table.weight.device) for part in (prompts, following) if part]
    embeds, ids = torch.cat([table(row) for row in rows]), torch.cat(rows)
    videos = [video for piece in pieces for video in piece.videos]
    if videos:
        features = torch.cat(encode_videos(model, videos)).to(embeds)
        embeds = embeds.masked_scatter((ids == model.config.video_token_id)[:, None], features)
    return embeds, torch.cat([piece.positions for piece in pieces], dim=1).to(ids.device)


def _language_model(
    model: Qwen2_5_VLForConditionalGeneration,
    embeds: Tensor,
    positions: Tensor,
    tree: Tree | Sequence[Stretch] | None,
    cache: GroupCache | None = None,
) -> Tensor:
    """Hidden states [N, H] of a row, from embeddings [N, H] and positions int64 [3, N]; see `tree_attention`."""
    language_model = model.model.language_model
    if language_model.config._attn_implementation != attention.NAME:
        language_model.set_attn_implementation(attention.NAME)
    return language_model(
        inputs_embeds=embeds[None],
        position_ids=positions[:, None],
        attention_mask={"full_attention": None},
        use_cache=False,
        tree=tree,
        cache=cache,
    ).last_hidden_state[0]


def _last(prompts: Sequence[Prompt]) -> list[int]:
    """Where each prompt's last token is in the row of all prompts."""
    return [end - 1 for end in itertools.accumulate(map(len, prompts))]


def last_hidden(model: Qwen2_5_VLForConditionalGeneration, prompts: Sequence[Prompt]) -> Tensor:
    """The hidden state after each prompt, [B, H]: its projection is the distribution of the first response token."""
    return _language_model(model, *embed_prompts(model, prompts), Tree(tuple(map(len, prompts))))[_last(prompts)]


def _text(ids: Tensor, start: int) -> Prompt:
    """Tokens of text from a position on."""
    return Prompt(ids, (start + torch.arange(len(ids))).expand(3, -1), [], start + len(ids))


def _fed(prompt: Prompt, ids: Tensor, observations: Sequence[Observation]) -> tuple[list[Prompt], Tensor]:
    """What is computed of a response with these ids [T], in pieces, and where in it the token before each id is: int64
    [T], -1 for the prompt's last one. Nothing is predicted from the last id, so it is not computed, nor what the
    response was shown after it.
    """
    pieces, before = [], torch.arange(-1, len(ids) - 1)
    said, position = 0, prompt.next_position
    for shown in observations:
        if shown.after < len(ids):
            pieces += [_text(ids[said : shown.after], position), shown.prompt]
            before[shown.after :] += len(shown.prompt)
            said, position = shown.after, shown.prompt.next_position
    return [*pieces, _text(ids[said:-1], position)], before


def group_hidden(
    model: Qwen2_5_VLForConditionalGeneration,
    prompts: Sequence[Prompt],
    responses: Tensor,
    mask: Tensor,
    observations: Sequence[Sequence[Sequence[Observation]]] | None = None,
) -> Tensor:
    """The hidden states that predict each response token, with each prompt computed once for its G responses.

    prompts: B of them; responses: int64 [B, G, T] padded on the right; mask: bool [B, G, T], real tokens. In episodes
    of several turns, responses are the sampled tokens alone, and `observations` [B][G] say, in order, what stood
    between them. Returns the states before the real tokens, [N, H], in the order of `responses[mask]` (before a first
    token: the state after the prompt, or after the observation).
    """
    rows, real = responses.cpu(), mask.cpu()
    fed, lengths, before = [], [], []
    offset = sum(map(len, prompts))
    for b, (prompt, last) in enumerate(zip(prompts, _last(prompts), strict=True)):
        lengths.append([])
        for g in range(mask.shape[1]):
            shown = () if observations is None else observations[b][g]
            pieces, places = _fed(prompt, rows[b, g][real[b, g]], shown)
            fed += pieces
            before.append(torch.where(places < 0, last, offset + places))
            lengths[-1].append(sum(map(len, pieces)))
            offset += lengths[-1][-1]
    embeds, positions = embed_prompts(model, prompts, fed)
    hidden = _language_model(model, embeds, positions, Tree(tuple(map(len, prompts)), tuple(map(tuple, lengths))))
    return hidden[torch.cat(before).to(hidden.device)]


class Policy(nn.Module):
    """The module that accelerate wraps: one forward pass goes from groups to their loss, so that a wrapper sees every
    use of a weight.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration):
        super().__init__()
        self.model = model

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass (in training mode)."""
        # The newer name; up to transformers 5.22 there is only the older one.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def forward(
        self,
        prompts: Sequence[Prompt],
        responses: Tensor,
        mask: Tensor,
        objective: Callable[[Tensor, Tensor], object],
        observations: Sequence[Sequence[Sequence[Observation]]] | None = None,
    ) -> object:
        """`objective(hidden [N, H] of the real response tokens, output projection [V, H])`; None without prompts."""
        if not prompts:
            return None
        hidden = group_hidden(self.model, prompts, responses, mask, observations)
        return objective(hidden, self.model.lm_head.weight)


@contextlib.contextmanager
def whole_weights(policy: nn.Module) -> Iterator[None]:
    """Within it, every process holds all weights of a policy that FSDP2 shards; nothing happens to other policies.

    Sampling would otherwise gather them anew for every token, and processes that write responses of different lengths
    would wait for each other forever. They are held in the compute precision (7B in bfloat16: 15 GB).
    """
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if sharded:
        policy([], None, None, None)  # FSDP2 takes the module that is called first for the root
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)  # the root's stay for the backward


def stream_layers(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Keep the decoder layers of a frozen model in the CPU's memory; each is copied to the model's device for as long
    as it computes. Results do not change. Of 7B in bfloat16, 13 of 17 GB leave the device; one layer has 0.5 GB.
    """
    for layer in model.model.language_model.layers:
        _stream(layer)


def _stream(layer: nn.Module) -> None:
    weights = list(layer.parameters())
    device = weights[0].device
    home = torch.cat([weight.flatten() for weight in weights]).cpu()  # one copy per layer instead of one per weight
    if device.type == "cuda":
        home = home.pin_memory()

    def place(flat: Tensor) -> None:
        parts = flat.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part.view_as(weight)

    place(home)
    # Copying in the stream that computes: the memory of a layer that is done can be that of the next one.
    layer.register_forward_pre_hook(lambda *_: place(home.to(device, non_blocking=True, copy=True)))
    layer.register_forward_hook(lambda *_: place(home))


# ---------------------------------------------------------------- sampling


def choose_tokens(logits: Tensor, uniform: Tensor | None, temperature: float, banned: Tensor) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution at `uniform` [N]; None takes the most probable.
    logits [N, V] -> [N].
    """
    logits = logits.float().index_fill(-1, banned, float("-inf"))
    if uniform is None:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, dim=-1, dtype=torch.float64).cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]  # float sums may end below 1
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def stops_at(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the last of some ids completes one of these strings, however they are cut into tokens."""
    # Every token has at least one byte, so so many tokens at the end are enough.
    longest = max(len(string.encode()) for string in strings)

    def stop(ids: list[int]) -> bool:
        end, before = tokenizer.decode(ids[-longest:]), tokenizer.decode(ids[-longest:-1])
        return any(string in end and string not in before for string in strings)

    return stop


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """For as long as a cache is in use: in training mode with checkpointing, transformers' layers would ignore it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Pace:
    """Decoding is looked at every `check` tokens, to see which responses have ended. In between, attention is over a
    multiple of `window` of a response's own slots, and steps are CUDA graphs if `capture`.
    """

    check: int
    window: int
    capture: bool


def decoding_pace(model: nn.Module) -> Pace:
    """On the CPU, responses leave as soon as they can. A GPU would wait for the host at each look, and for the launch
    of each kernel. FSDP2's hooks cannot be captured.
    """
    if model.get_input_embeddings().weight.device.type != "cuda":
        return Pace(1, 1, False)
    return Pace(16, 64, not any(isinstance(module, FSDPModule) for module in model.modules()))


class Graphs:
    """Functions that touch static tensors alone, and ask the host nothing, as CUDA graphs.

    The first call with a key is an ordinary one, on the stream of the capture: it sets up what a capture cannot
    (cuBLAS's workspace, autocast's copies of the weights, which must stay: so graphs live within one autocast context).
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.clear()

    def clear(self) -> None:
        """Forget all graphs: the tensors have been replaced by others."""
        self.captured: dict[object, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # graphs run one after the other, so they share memory

    def run(self, key: object, function: Callable[[], None]) -> None:
        if key in self.captured:
            self.captured[key].replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            function()  # recorded, not executed
        self.captured[key] = graph


@dataclass
class Turn:
    """What a response has said until it stopped: `row` is b * G + g, `number` counts its turns from 0, `ids` int64 [t]
    on the CPU, `hidden` [t, H] what each was chosen from, if it was to be kept.
    """

    row: int
    number: int
    ids: Tensor
    hidden: Tensor | None = None


class Episodes:
    """B prompts with G responses each, decoded together; a response can be shown something after each of its turns.

        episodes = Episodes(...)
        while turns := episodes.sample():
            episodes.observe({turn.row: (ids, clips), ...})  # for those that go on

    The state of all B * G rows is in tensors that are written in place: a row's `ids` [max_tokens] in this turn, of
    which `count` are there, and whether it has `ended`. What `_step` computes follows from them: a row's last token
    stands at the position `start` + `count` - 1, and has `held` + `count` - 1 tokens before it beside the prompt's; a
    row that has ended says its last token again. `rows` [b, g] are those that are still computed.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        prompts: Sequence[Prompt],
        group_size: int,
        max_tokens: int,
        eos: Sequence[int],
        banned: Sequence[int],
        temperature: float = 1.0,
        seed: Callable[[int, int], int] | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        keep_hidden: bool = False,
    ):
        """Compute the prompts, once each, and the first token of each response; arguments are those of `sample`.

        max_tokens: of a turn; seed(row, number of the turn): None decodes greedily.
        """
        self.model, self.max_tokens, self.temperature, self.stop = model, max_tokens, temperature, stop
        self.seed, self.pace = seed, decoding_pace(model)
        embeds, positions = embed_prompts(model, prompts)
        device, count = embeds.device, len(prompts) * group_size
        self.eos = torch.tensor(eos, device=device, dtype=torch.long)
        self.banned = torch.tensor(banned, device=device, dtype=torch.long)
        self.ids = torch.zeros(count, max_tokens, dtype=torch.long, device=device)
        self.count, self.held = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(2))
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        starts = [prompt.next_position for prompt in prompts for _ in range(group_size)]
        self.start = torch.tensor(starts, device=device)
        self.stems = [len(prompt) for prompt in prompts for _ in range(group_size)]
        self.rows = torch.arange(count).view(len(prompts), group_size)
        self.index = self.rows.flatten().to(device)
        self.speaking, self.listening = set(range(count)), set()  # in a turn; having just ended one
        self.number = [0] * count  # of the turn
        self.said = [0] * count  # tokens, in earlier turns
        self.heard = [0] * count  # tokens of this turn that `stop` has seen
        self.uniform = None if seed is None else torch.stack(list(map(self._draws, range(count)))).to(device)

        tree = Tree(tuple(map(len, prompts)))
        self.cache = GroupCache(tree, group_size, self._rounded(max_tokens))
        self.graphs = Graphs() if self.pace.capture else None
        with _evaluation_mode(model):
            hidden = _language_model(model, embeds, positions, tree, self.cache)[_last(prompts)]
        self.states = hidden.new_zeros(count, max_tokens, hidden.shape[-1]) if keep_hidden else None
        _, self.lm_head = kl.aligned(hidden, model.lm_head.weight)  # cast once, not for every token
        self._choose(hidden.repeat_interleave(group_size, 0), self.index)

    @torch.no_grad()
    def sample(self) -> list[Turn]:
        """Decode until at least one turn has ended; returns those that have, [] if none was left. A response that is
        shown nothing before the next call is over.
        """
        self.listening.clear()
        with _evaluation_mode(self.model):
            while self.speaking:
                count, held = self.count.tolist(), self.held.tolist()
                turns = self._ended(count)
                if turns:
                    self.listening.update(turn.row for turn in turns)
                    return turns
                self._leave()
                steps = min(self.pace.check, self.max_tokens - min(count[row] for row in self.speaking))
                furthest = max(held[row] + count[row] for row in self.speaking) + steps - 1
                window = min(self._rounded(furthest), self.cache.capacity)
                for _ in range(steps):
                    if self.graphs is None:
                        self._step(window)
                    else:
                        self.graphs.run(window, partial(self._step, window))
        return []

    @torch.no_grad()
    def observe(self, observations: dict[int, tuple[Sequence[int], Sequence[Video]]]) -> dict[int, Observation]:
        """Show something to rows whose turn has just ended: ids with one `<|video_pad|>` per clip, and the clips. Their
        next turn begins.

        Only these tokens are computed, in one pass; each sees its prompt, and all of its response before it. Returns,
        per row, what `group_hidden` needs. Raises ValueError for another row.
        """
        if not observations:
            return {}
        for row in observations.keys() - self.listening:
            raise ValueError(f"row {row} cannot be shown anything: its turn has not just ended")
        rows, shown, pieces, stretches = sorted(observations), {}, [], []
        count, start, held = (x.tolist() for x in (self.count, self.start, self.held))
        for row in rows:
            ids, videos = observations[row]
            position = start[row] + count[row]
            prompt = build_prompt(ids, videos, self.model.config, position)
            shown[row] = Observation(self.said[row] + count[row], prompt)
            # The turn's last token has been chosen, but not computed.
            last = _text(self.ids[row, count[row] - 1 : count[row]].cpu(), position - 1)
            pieces += [last, prompt]
            ((b, g),) = (self.rows == row).nonzero().tolist()
            stretches.append(Stretch(b, g, self.stems[row], held[row] + count[row] - 1, 1 + len(prompt)))
        self._begin(shown, {row: s.start + s.length for row, s in zip(rows, stretches, strict=True)})
        embeds, positions = embed_prompts(self.model, pieces)
        with _evaluation_mode(self.model):
            hidden = _language_model(self.model, embeds, positions, stretches, self.cache)
        ends = [end - 1 for end in itertools.accumulate(s.length for s in stretches)]
        self._choose(hidden[ends], torch.tensor(rows, device=self.index.device))
        return shown

    def _begin(self, shown: dict[int, Observation], held: dict[int, int]) -> None:
        """The next turn of these rows, after what they are shown; `held`: tokens that they have then."""
        capacity = max(held.values()) + self.max_tokens
        if capacity > self.cache.capacity:  # by a quarter at least, so that it is not done for each row
            self.cache.reserve(self._rounded(max(capacity, self.cache.capacity * 5 // 4)))
            if self.graphs is not None:
                self.graphs.clear()
        for row, observation in shown.items():
            self.number[row], self.said[row], self.heard[row] = self.number[row] + 1, observation.after, 0
            self.start[row], self.held[row] = observation.prompt.next_position, held[row]
            self.count[row], self.ended[row] = 0, False
            if self.uniform is not None:
                self.uniform[row] = self._draws(row)
        self.speaking.update(shown)
        self.listening.difference_update(shown)

    def _draws(self, row: int) -> Tensor:
        """A row's random numbers for a turn, [max_tokens]."""
        generator = torch.Generator().manual_seed(self.seed(row, self.number[row]))
        return torch.rand(self.max_tokens, generator=generator).double()

    def _rounded(self, length: int) -> int:
        """Up to a multiple of a window."""
        return -(-length // self.pace.window) * self.pace.window

    def _step(self, window: int) -> None:
        """The next token of every row."""
        rows, fed = self.index, self.count[self.index] - 1
        self.cache.place((self.held[rows] + fed).view(self.rows.shape), window)
        embeds = self.model.get_input_embeddings()(self.ids[rows, fed])
        positions = (self.start[rows] + fed).expand(3, -1)
        self._choose(_language_model(self.model, embeds, positions, None, self.cache), rows)

    def _choose(self, hidden: Tensor, rows: Tensor) -> None:
        """Write the token that follows these states [n, H] of these rows [n]."""
        ended = self.ended[rows]
        place = self.count[rows] - ended.long()
        uniform = None if self.uniform is None else self.uniform[rows, place]
        logits = kl.logits(hidden.to(self.lm_head.dtype), self.lm_head)
        chosen = choose_tokens(logits, uniform, self.temperature, self.banned)
        self.ids[rows, place] = torch.where(ended, self.ids[rows, place], chosen)
        if self.states is not None:
            self.states[rows, place] = torch.where(ended[:, None], self.states[rows, place], hidden)
        self.count[rows] = place + 1
        self.ended[rows] = ended | (chosen[:, None] == self.eos).any(1) | (place + 1 == self.max_tokens)

    def _ended(self, count: list[int]) -> list[Turn]:
        """The turns that have ended, after cutting off what was said beyond a stop string; corrects `count`."""
        ended = self.ended.tolist()
        if self.stop is not None:
            ids = self.ids[:, : max(count)].tolist()
            for row in self.speaking:
                for n in range(self.heard[row] + 1, count[row] + 1):
                    if self.stop(ids[row][:n]):
                        count[row], ended[row] = n, True
                        break
                self.heard[row] = count[row]
            self.count.copy_(torch.tensor(count))
            self.ended.copy_(torch.tensor(ended))
        rows = [row for row in sorted(self.speaking) if ended[row]]
        self.speaking.difference_update(rows)
        hidden = [None if self.states is None else self.states[row, : count[row]].clone() for row in rows]
        ids = [self.ids[row, : count[row]].to("cpu", copy=True) for row in rows]
        numbers = [self.number[row] for row in rows]
        return [Turn(*turn) for turn in zip(rows, numbers, ids, hidden, strict=True)]

    def _leave(self) -> None:
        """Stop computing rows that have ended, if that makes the batch smaller by a quarter: of each prompt, the same
        number stays.
        """
        going = torch.tensor([[row in self.speaking for row in group] for group in self.rows.tolist()])
        prompts = going.any(1).nonzero().flatten()
        widest = int(going.sum(1).max())
        if len(prompts) * widest > 0.75 * going.numel():
            return
        left = (~going)[prompts].int().argsort(dim=1, stable=True)[:, :widest]  # those that go on come first
        self.cache.keep(prompts.to(self.index.device), left.to(self.index.device))
        self.rows = self.rows[prompts].gather(1, left)
        self.index = self.rows.flatten().to(self.index.device)
        if self.graphs is not None:
            self.graphs.clear()


def sample(
    model: Qwen2_5_VLForConditionalGeneration,
    prompts: Sequence[Prompt],
    group_size: int,
    max_tokens: int,
    eos: Sequence[int],
    banned: Sequence[int],
    temperature: float = 1.0,
    seeds: Sequence[Sequence[int]] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    states: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample G responses per prompt; all prompts and responses are decoded together, the prompt's cache is shared by
    its group, and responses that have ended leave the batch.

    seeds [B][G]: one per response, so that a response does not depend on the batch it is in; None decodes greedily.
    `banned` ids are never sampled (vision tokens). A response ends with, and includes, its first `eos` token, or the
    first token after which `stop` (see `stops_at`) says so of its ids. `states`: a list that gets, for each of the T
    steps, the hidden states [B, G, H] that its tokens were chosen from (where `mask` is True). Returns ids int64
    [B, G, T] and mask bool [B, G, T].
    """
    shape = (len(prompts), group_size, -1)
    seed = None if seeds is None else lambda row, _: seeds[row // group_size][row % group_size]
    keep = states is not None
    episodes = Episodes(model, prompts, group_size, max_tokens, eos, banned, temperature, seed, stop, keep)
    while episodes.sample():
        pass  # none goes on
    longest = int(episodes.count.max())
    mask = torch.arange(longest, device=episodes.ids.device) < episodes.count[:, None]
    if states is not None:
        states += [state.view(shape) for state in episodes.states[:, :longest].unbind(1)]
    return episodes.ids[:, :longest].masked_fill(~mask, 0).view(shape), mask.view(shape)

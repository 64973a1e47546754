"""A checkpoint and its tokenizer, or what is wrong with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from engine.families import FAMILIES, family_of, missing_weights
from policy import ModelError, Vocabulary
from video import PATCH


def load(path: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint folder (or hub name) of one of the families, and its tokenizer.

    Raises ModelError naming the path and what is wrong: another kind of model, a tokenizer without Qwen's special
    tokens or of other weights, and weights that are missing (transformers would fill them with random numbers).
    """
    if Path(path).is_dir():
        disable_progress_bar()  # of reading and writing weights; that of a download stays
    with _errors_of(path):
        config = read_config(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # unsaid, it would ask
        check_tokenizer(tokenizer, config)
        model, found = family_of(config).model.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        if found["missing_keys"]:
            raise ModelError(missing_weights(found["missing_keys"]))
    return model, tokenizer


@lru_cache
def patch_side(path: str) -> int:
    """Pixels along a side of a patch as the checkpoint at this path or hub name takes them; without any, as the
    built-in policy, which is yet to be made. Raises ModelError.
    """
    if not path:
        return PATCH
    with _errors_of(path):
        return read_config(path).vision_config.patch_size


def read_config(path: str):
    """A checkpoint's configuration. Raises ModelError if it is of no family."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise ModelError(f"its type is {config.model_type!r}, this needs one of {', '.join(FAMILIES)}")
    return config


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Within it, what goes wrong with a checkpoint is a ModelError that names it."""
    here = Path(path).is_dir()
    if not here and path.rstrip("/").count("/") != 1:
        raise ModelError(f"model {path}: there is no such folder, and names on the hub are OWNER/NAME")
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"model {path}: the weights cannot be read: {error}") from None
    except UnpicklingError:  # torch loads nothing but tensors
        raise ModelError(f"model {path}: the weights are not tensors alone; use a checkpoint in safetensors") from None
    except (OSError, ValueError, RuntimeError) as error:
        elsewhere = "" if here else "there is no such folder, and from the hub: "
        raise ModelError(f"model {path}: {elsewhere}{error}") from None


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

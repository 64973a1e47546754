"""A checkpoint and its tokenizer, or what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from engine.qwen2_5_vl import missing_weights
from policy import ModelError, Vocabulary


def load(
    path: str, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a Qwen2.5-VL checkpoint folder (or hub name) and its tokenizer.

    Raises ModelError naming the path and what is wrong: another kind of model, a tokenizer without Qwen2.5-VL's special
    tokens or of other weights, and weights that are missing (transformers would fill them with random numbers).
    """
    here = Path(path).is_dir()
    if not here and path.rstrip("/").count("/") != 1:
        raise ModelError(f"model {path}: there is no such folder, and names on the hub are OWNER/NAME")
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
        elsewhere = "" if here else "there is no such folder, and from the hub: "
        raise ModelError(f"model {path}: {elsewhere}{error}") from None
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

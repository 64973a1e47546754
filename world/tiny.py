"""The built-in policy: Qwen2.5-VL's or Qwen3-VL's architecture with about a million parameters, and a small tokenizer
of their kind.

The classes, the special tokens and the file formats are the real ones, so everything else in this project treats it
like a 7B checkpoint. The tokenizer is a byte-level BPE that can write any text; the words of the built-in world, the
response tags and each single digit are one token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen3VLConfig

from engine.families import EOS_TOKENS, FAMILIES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Tags, words with their leading space, single digits, then runs of punctuation: as in Qwen2.5, but a tag stays whole.
SPLIT = r"</?[a-z_]+>| ?[A-Za-z]+|[0-9]|[\[\]\(\), ]+|.|\n"


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every piece of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than the corpus can fill: training ends when every piece is one token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )


TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128}


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, family: str = "qwen2_5_vl", **options
) -> PreTrainedModel:
    """A randomly initialised model of a family, of about 1.2 million parameters, for this tokenizer; options of its
    configuration.
    """
    config = CONFIGS[family](tokenizer, **options)
    torch.manual_seed(seed)
    model = FAMILIES[family].model(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(EOS_TOKENS))
    return model


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, int], dict[str, int]]:
    """The special tokens as configurations name them: of the language model, and of the whole."""
    token = tokenizer.convert_tokens_to_ids
    end, eos = token("<|endoftext|>"), token("<|im_end|>")
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return (
        {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": eos, "pad_token_id": end},
        {f"{name}_token_id": token(f"<|{written}|>") for name, written in names.items()},
    )


def qwen2_5_vl_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    of_text, of_all = special_ids(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}
    windows = {"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return Qwen2_5_VLConfig(
        text_config=TEXT | of_text | {"rope_parameters": rope},
        vision_config=VISION | windows,
        tie_word_embeddings=True,
        **of_all,
    )


def qwen3_vl_config(tokenizer: PreTrainedTokenizerFast, patch_size: int = 14) -> Qwen3VLConfig:
    """Released checkpoints have patches of 16 pixels; with 14, the built-in benchmark is shown as to Qwen2.5-VL. Their
    rope_theta is millions, for contexts of a hundred thousand tokens; ours are of hundreds.
    """
    of_text, of_all = special_ids(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    tables = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": patch_size}
    return Qwen3VLConfig(
        text_config=TEXT | of_text | {"rope_parameters": rope, "head_dim": 32},
        vision_config=VISION | tables,
        tie_word_embeddings=True,
        **of_all,
    )


CONFIGS = {"qwen2_5_vl": qwen2_5_vl_config, "qwen3_vl": qwen3_vl_config}

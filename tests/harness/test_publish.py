"""What a checkpoint's folder has beside weights and tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import loud_model
from transformers import AutoProcessor, GenerationConfig

import config as configuration
from harness.publish import complete, write_card

# As the released Qwen2.5-VL has them, shortened.
BASE = {
    "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14},
    "chat_template.json": {"chat_template": "{{ messages[0]['content'] }}"},
}


@pytest.fixture
def published(tmp_path, tokenizer, recipe):
    """A checkpoint's folder whose base has processors and samples in a way of its own."""
    base, folder = tmp_path / "base", tmp_path / "checkpoint"
    model = loud_model(tokenizer)
    model.generation_config.update(repetition_penalty=1.05, temperature=0.1, top_k=1, do_sample=True)
    for path in (base, folder):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    for name, value in BASE.items():
        (base / name).write_text(json.dumps(value))
    config = replace(configuration.parse(["--config", str(recipe)]), model=str(base), resume=True)
    complete(folder, model, config)
    return folder, config


def test_processors_and_chat_template_of_the_base_come_along(published):
    folder, _ = published
    for name, value in BASE.items():
        assert json.loads((folder / name).read_text()) == value
    assert not (folder / "processor_config.json").exists()  # the base has none


def test_sampling_is_that_of_training_without_the_base_s_penalty_and_temperature(published):
    folder, _ = published
    saved, usual = GenerationConfig.from_pretrained(folder), GenerationConfig()
    for name in ("repetition_penalty", "temperature", "top_k", "do_sample"):
        assert getattr(saved, name) == getattr(usual, name), name
    assert saved.eos_token_id == loud_ids(folder)


def loud_ids(folder):
    return json.loads((folder.parent / "base" / "generation_config.json").read_text())["eos_token_id"]


def test_the_configuration_reads_back_and_begins_a_run_of_its_own(published):
    folder, config = published
    assert configuration.Config(**configuration.read_recipe(folder / "config.yaml")) == replace(config, resume=False)
    assert configuration.suiting_recipe(str(folder)) == folder / "config.yaml"


def test_the_card_says_how_to_ask_and_what_it_scores(published):
    folder, config = published
    card = (folder / "README.md").read_text()
    for words in ("template: `world`", "1 frames per second", "176 visual tokens", "4 to 16 per frame", "QUESTION"):
        assert words in card
    assert "hf upload OWNER/NAME FOLDER" in card and "infer.py --model FOLDER" in card and "| mIoU" not in card
    write_card(folder, config, {"before": {"mIoU": 0.25}, "after": {"mIoU": 0.5, "format": 1.0}})
    card = (folder / "README.md").read_text()
    assert "| mIoU | 0.250 | 0.500 |" in card and "| format |  | 1.000 |" in card


def test_transformers_own_processor_loads_from_it(published):
    pytest.importorskip("torchvision")
    folder, _ = published
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.video_processor.patch_size == 14
    assert processor.apply_chat_template([{"role": "user", "content": "red"}]) == "red"

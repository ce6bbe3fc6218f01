"""The base VLMs that ship with the package are those their records name, and answer as recorded."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from voco_plugin.cli.gridworld import SHIPPED, copy_base, shipped_base


@pytest.fixture(scope="module", params=SHIPPED)
def level(request):
    return request.param


@pytest.fixture(scope="module")
def record(level):
    return json.loads((shipped_base(level) / "provenance.json").read_text())


def test_its_hash_is_the_recorded_one(record, level):
    weights = shipped_base(level) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"]
    assert weights.stat().st_size <= 8_000_000


def test_its_words_are_those_of_the_world_that_is_written_today(level):
    from transformers import AutoTokenizer

    from voco_plugin.gridworld.levels import level_of
    from voco_plugin.gridworld.tiny_processor import build_tokenizer

    shipped = AutoTokenizer.from_pretrained(shipped_base(level))
    assert shipped.get_vocab() == build_tokenizer(level_of(level).question_set).get_vocab()


def test_it_answers_as_recorded(record, level, tmp_path):
    """On a sample of fresh held-out images, within three standard errors of the recorded accuracy."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from voco_plugin.data.loaders import load_vision_dataset
    from voco_plugin.evaluation.metrics import evaluate, questions_of
    from voco_plugin.gridworld.dataset import write_gridworld

    write_gridworld(tmp_path / "data", num_train=1, num_test=60, seed=3, level=level)
    copy_base(str(tmp_path / "base"), level)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    dataset = load_vision_dataset(tmp_path / "data" / "test.json", image_folder=tmp_path / "data" / "images")
    questions = questions_of(dataset.remove_columns("images"))
    with torch.no_grad():
        found = evaluate(model, processor, dataset, questions, mode="images", batch_size=96)
    said = record["accuracy"]
    error = (said * (1 - said) / len(questions)) ** 0.5
    assert abs(found.accuracy - said) <= 3 * error + 0.02, (found.accuracy, said)


def test_a_level_without_one_says_how_to_train_it():
    with pytest.raises(ValueError, match="no base VLM is shipped for level 'large'"):
        shipped_base("large")

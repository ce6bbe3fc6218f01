"""Without TRL (an extra) everything but training works; and training says which extra it is."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from paths import ROOT

BLOCKED = """
import importlib.metadata, importlib.abc, sys

class NoTRL(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "trl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTRL())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "trl" else find(name, package)
real = importlib.metadata.version
def version(name):
    if name == "trl":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}"}
    program = BLOCKED + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_caches_stores_sessions_and_the_command_line_work(tmp_path: Path) -> None:
    done = run(
        """
        from pathlib import Path
        import torch
        from peft import LoraConfig, get_peft_model
        from PIL import Image
        import tiny, voco_plugin as vp
        from tiny import processors
        from voco_plugin.cli import main

        root = Path(sys.argv[1])
        model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
        vp.attach(model, vp.VoCoConfig(num_tokens=2), processor)
        model.save_pretrained(root / "model")
        processor.save_pretrained(root / "model")
        adapted = get_peft_model(vp.load(root / "model")[0], LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(root / "adapter")
        processor.save_pretrained(root / "adapter")
        vp.save_voco_config(adapted, root / "adapter")
        vp.load(root / "adapter")
        Image.new("RGB", (24, 16), "red").save(root / "a.png")
        model, processor = vp.load(root / "model")
        with vp.VoCoCacheStore.for_model(root / "own", model) as store:
            session = vp.VoCoSession(model, processor, store=store)
            session.add(Image.open(root / "a.png"))
            session.ask("what is it", max_new_tokens=2)
        (root / "rows.json").write_text(
            '[{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\\\nwhat is it"},'
            '{"from": "gpt", "value": "red"}]}]'
        )
        name, picture, store = str(root / "model"), str(root / "a.png"), str(root / "store")
        ask = ["--question", "what is it", "--max-new-tokens", "2"]
        for command in (
            ["compress", name, picture, "--store", store],
            ["generate", name, "--store", store, "--name", picture, *ask],
            ["eval", name, "--data", str(root / "rows.json"), "--image-folder", str(root)],
            ["merge", str(root / "adapter"), str(root / "merged")],
            ["store", "verify", store],
            ["recipes"],
            ["registry"],
        ):
            status = main(command)
            assert status == 0, (command, status)
        assert "trl" not in sys.modules
        """,
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["VoCoSFTTrainer", "VoCoSFTConfig", "VoCoDataCollator"])
def test_a_name_of_training_says_which_extra_it_needs(name: str) -> None:
    done = run(f"import voco_plugin as vp; vp.{name}")
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: {name} needs TRL, which is not installed: pip install 'voco_plugin[train]'."
    )


def test_the_command_to_train_says_so_in_one_line() -> None:
    done = run("from voco_plugin.cli import main; raise SystemExit(main(['train', 'gridworld_voco']))")
    assert done.returncode == 2
    wanted = (
        "voco train: error: training needs TRL, which is not installed: pip install 'voco_plugin[train]'."
    )
    assert done.stderr.strip().splitlines()[-1] == wanted


def test_an_older_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from voco_plugin.training import trl_floor

    monkeypatch.setattr(trl_floor, "version", lambda name: "1.9.0")
    with pytest.raises(ImportError, match=r"needs TRL 1\.16 or later, and 1\.9\.0 is installed: pip install"):
        trl_floor.check_trl()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trl_floor, "version", missing)
    with pytest.raises(ImportError, match="training needs TRL, which is not installed"):
        trl_floor.check_trl()


def test_the_floor_is_that_of_the_extra() -> None:
    from voco_plugin.training.trl_floor import MINIMUM

    assert f'train = ["trl>={MINIMUM}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

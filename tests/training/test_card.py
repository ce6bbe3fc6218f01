# ruff: noqa: F811 - fixtures of another file are named again as arguments
"""A checkpoint folder is ready for the hub: a card the hub accepts, and everything that loading needs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, metadata_load

import voco_plugin as vp
from trainers import logits, picture, trainer
from voco_plugin.training.card import extend_card, hub_id, last_metrics, launch_command, license_of


def snippets(folder: Path) -> list[str]:
    """The Python blocks of a folder's card."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run_snippet(code: str, **places: str) -> dict:
    """Execute a block of a card with the places it names put in."""
    for name, place in places.items():
        assert f'"{name}"' in code, code
        code = code.replace(f'"{name}"', json.dumps(place))
    scope: dict = {}
    exec(code, scope)
    return scope


def check_metadata(folder: Path) -> dict:
    """The metadata of a card, as the hub would read it: nothing of this machine, nothing it refuses."""
    values = metadata_load(folder / "README.md")
    assert values["pipeline_tag"] == "image-text-to-text"
    assert values["license"] and (values["license"] != "other" or values["license_name"])
    assert {"voco_plugin", "trl", "sft"} <= set(values["tags"])
    assert "licence" not in values, "TRL's misspelt placeholder"
    assert "/tmp" not in json.dumps(values), "a path of this machine"
    assert ModelCard.load(folder / "README.md").data.to_dict()["tags"] == values["tags"]
    return values


@pytest.mark.parametrize("peft", [True, False])
def test_output_and_checkpoints_have_a_card_whose_snippets_run(bases, data, tmp_path, peft) -> None:
    base, out = bases("llava_llama"), tmp_path / "my-voco"
    made = trainer(
        base, out, data, peft=peft, eval_dataset=data, save_strategy="steps", save_steps=2, max_steps=2,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    made.dataset_name = "someone/questions"
    made.train()
    made.save_model(str(out))
    for folder in (out, out / "checkpoint-2"):
        values = check_metadata(folder)
        assert values["library_name"] == ("peft" if peft else "transformers")
        assert values["datasets"] == ["someone/questions"]
        text = (folder / "README.md").read_text()
        for word in ("# my-voco", "| num_tokens | `2` |", "| rule | `isolated` |", "8 rows", "eval_loss",
                     "- trl: ", "- voco_plugin: ", "`0.01`", "| training loss (last logged) |"):  # fmt: skip
            assert word in text, word
        if peft:  # a checkpoint is made in another folder than it lies in
            noted = json.loads((folder / "voco_config.json").read_text())["base_relative_to_adapter"]
            assert (folder / noted).resolve() == Path(base).resolve()
        assert ("A PEFT adapter (LORA) for" in text) == peft
        assert "[someone/questions](https://huggingface.co/datasets/someone/questions)" in text
        assert f"named `{Path(base).name}`" in text and base not in text
    assert "eval_loss" not in metadata_load(out / "README.md")

    ours, plain = snippets(out)
    short = Path(base).name
    wanted = logits(*vp.load(out))
    found = run_snippet(ours, **{"my-voco": str(out)})
    assert torch.equal(logits(found["model"], found["processor"]), wanted)
    if peft:  # plain PEFT on an attached base
        found = run_snippet(plain, **{"my-voco": str(out), short: base})
        assert torch.equal(logits(found["model"], found["processor"]), wanted)
        assert vp.attachment(found["model"]).config.num_tokens == 2
        plain_base = vp.load(base, voco=vp.VoCoConfig(num_tokens=2))
        assert not torch.equal(logits(*plain_base), wanted), "the adapter changes nothing"
    else:
        found = run_snippet(plain, **{"my-voco": str(out)})
        assert not vp.is_attached(found["model"])
        assert torch.equal(logits(found["model"].eval(), found["processor"]), _unattached(out))


def _unattached(folder: Path) -> torch.Tensor:
    model, processor = vp.load(folder)
    return logits(vp.detach(model), processor)


@pytest.mark.parametrize("options", [{"block_context": "prefix"}, {"rule": "star"}, {"hide_prefix": True}])
def test_the_snippet_names_every_option_of_the_rule(bases, data, tmp_path, options) -> None:
    base, out = bases("llava_tied"), tmp_path / "other"
    voco = vp.VoCoConfig(num_tokens=3, **options)
    trainer(base, out, data, voco=voco, max_steps=1).save_model(str(out))
    found = run_snippet(snippets(out)[1], **{"other": str(out), Path(base).name: base})
    config = vp.attachment(found["model"]).config
    saved, _ = vp.VoCoConfig.load(out)
    assert config == saved
    assert torch.equal(logits(found["model"], found["processor"]), logits(*vp.load(out)))


def test_a_run_without_voco_has_a_card_of_a_plain_model(bases, data, tmp_path) -> None:
    out = tmp_path / "plain"
    trainer(bases("llava_llama"), out, data, voco=None, max_steps=1).save_model(str(out))
    values = check_metadata(out)
    assert "voco" not in values["tags"]
    text = (out / "README.md").read_text()
    assert "without VoCo tokens" in text and "vp.attach" not in text
    found = run_snippet(snippets(out)[1], plain=str(out), base=bases("llava_llama"))
    assert logits(found["model"], found["processor"]).isfinite().all()


class _Hub:
    """Stands for the hub: keeps what is uploaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
        self.store, self.calls = store, []
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)

    def create(self, name, **kwargs):
        return type("Url", (), {"repo_id": f"someone/{Path(name).name}"})()

    def upload(
        self, *, repo_id, folder_path, ignore_patterns=None, path_in_repo="", run_as_future=False, **kw
    ):
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append(kw["commit_message"])
        target = self.store / repo_id / str(len(self.calls)) / path_in_repo
        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, target / name)
        if run_as_future:
            from concurrent.futures import Future

            done: Future = Future()
            done.set_result(None)
            return done


@pytest.mark.parametrize("peft", [True, False])
def test_what_is_pushed_loads_at_the_end_and_during_training(
    bases, data, tmp_path, monkeypatch, peft
) -> None:
    hub = _Hub(monkeypatch, tmp_path / "hub")
    out = tmp_path / "voco-run"
    made = trainer(
        bases("llava_llama"), out, data, peft=peft, push_to_hub=True, hub_token="hf_secretsecret",
        max_steps=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    made.train()
    assert hub.calls == ["Training in progress, step 2"]
    made.push_to_hub(dataset_name="someone/questions")
    assert hub.calls[1:] == ["End of training"]
    wanted = None
    for number in (1, 2):
        folder = tmp_path / "hub/someone/voco-run" / str(number)
        names = {p.name for p in folder.rglob("*")}
        assert {"voco_config.json", "README.md", "processor_config.json", "chat_template.jinja"} <= names
        assert not any("checkpoint-" in n for n in names)
        shutil.move(out, tmp_path / "gone")  # what was pushed stands alone
        found = logits(*vp.load(folder))
        shutil.move(tmp_path / "gone", out)
        assert wanted is None or torch.equal(found, wanted)
        wanted = found
        check_metadata(folder)
        assert "hf_secret" not in (folder / "README.md").read_text()
    text = (folder / "README.md").read_text()
    assert 'vp.load("someone/voco-run")' in text and "datasets/someone/questions" in text


# -- the parts


def test_the_command_is_told_without_secrets(monkeypatch) -> None:
    home = str(Path.home())
    line = ["/opt/bin/voco", "train", "x y.yaml", "--hub_token", "hush", "--push_to_hub", "true"]
    assert launch_command(line) == "voco train 'x y.yaml' --hub_token … --push_to_hub true"
    assert launch_command(["train.py", "--hub_token=abc", "--voco.num_tokens", "2"]) == (
        "python train.py --hub_token=… --voco.num_tokens 2"
    )
    assert launch_command(["a.py", "--x", "hf_abcdefghij", "--eos_token", "</s>"]) == (
        "python a.py --x … --eos_token '</s>'"
    )
    child = ["/lib/voco_plugin/__main__.py", "train", "r", f"{home}/data", "--accelerate_config", "null"]
    assert launch_command(child) == "voco train r '~/data'"
    assert launch_command(["/lib/pytest/__main__.py", "-q"]) == "python -m pytest -q"
    monkeypatch.setattr("sys.argv", ["/x/run.py", "--a"])
    assert launch_command() == "python run.py --a"


def test_the_command_of_voco_train_is_in_the_card(bases, tmp_path, monkeypatch) -> None:
    from voco_plugin.cli import main

    monkeypatch.chdir(tmp_path)
    picture(0).save("a.png")
    talk = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    Path("w.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": talk}] * 4))
    line = [
        "train", "gridworld_voco", "--model_name_or_path", bases("llava_llama"), "--dataset_name", "w.json",
        "--image_folder", ".", "--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", "o",
    ]  # fmt: skip
    assert main(line) == 0
    text = Path("o/README.md").read_text()
    assert f"```\nvoco {' '.join(line)}\n```" in text
    assert "| data | `w.json`, 4 rows |" in text and "datasets" not in metadata_load("o/README.md")


def test_only_hub_ids_get_into_the_metadata(tmp_path, monkeypatch) -> None:
    assert hub_id("llava-hf/llava-1.5-7b-hf") and hub_id("gpt2")
    for local in (None, "", "/data/x", "./x", "a/b/c", str(tmp_path), "data/x.json/"):
        assert hub_id(local) is None, local
    monkeypatch.chdir(tmp_path)
    assert hub_id("someone/model") == "someone/model"
    Path("someone/model").mkdir(parents=True)
    assert hub_id("someone/model") is None, "a folder of that name is here"


def test_the_licence_is_the_base_models_own(tmp_path, monkeypatch) -> None:
    assert license_of(None) == {"license": "other", "license_name": "as-the-base-model"}
    assert license_of("a/b")["license_link"] == "https://huggingface.co/a/b"
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# x\n"
    )
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n# x\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(tmp_path / "README.md"))
    assert license_of("a/b") == {"license": "llama2"}


def test_a_card_that_cannot_be_read_costs_no_checkpoint(bases, data, tmp_path, caplog) -> None:
    base = tmp_path / "broken-base"
    shutil.copytree(bases("llava_llama"), base)
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    out = tmp_path / "out"
    trainer(str(base), out, data, max_steps=1).save_model(str(out))
    assert check_metadata(out)["license"] == "other"
    assert "broken-base/README.md cannot be read" in caplog.text


def test_a_base_from_the_hub_is_named_and_linked(tmp_path) -> None:
    options = {
        "name": "n", "repository": "me/n", "voco": vp.VoCoConfig(num_tokens=2), "data": {}, "arguments": {},
        "metrics": {}, "command": "voco train x", "num_tokens_range": [1, 4],
    }  # fmt: skip
    for method in ("LORA", None):
        extend_card(tmp_path, base="llava-hf/llava-1.5-7b-hf", method=method, **options)
        values = metadata_load(tmp_path / "README.md")
        assert values["base_model"] == "llava-hf/llava-1.5-7b-hf"
        assert values["base_model_relation"] == ("adapter" if method else "finetune")
        text = (tmp_path / "README.md").read_text()
        assert "[llava-hf/llava-1.5-7b-hf](https://huggingface.co/llava-hf/llava-1.5-7b-hf)" in text
        assert "1 to 4 VoCo tokens" in text and "was a folder" not in text and "## Results" not in text
        assert ('from_pretrained("llava-hf/llava-1.5-7b-hf")' in text) == (method is not None)


def test_the_last_metrics_of_a_log() -> None:
    log = [{"loss": 2.0}, {"eval_loss": 1.5, "eval_runtime": 3.0}, {"loss": 1.0}, {"train_runtime": 9.0}]
    assert last_metrics(log) == {"training loss (last logged)": 1.0, "eval_loss": 1.5}
    assert last_metrics([]) == {}


def test_a_saved_and_a_merged_model_say_that_the_rule_is_not_in_the_weights(tmp_path, monkeypatch) -> None:
    """transformers alone reads the folder and compresses nothing, without a word."""
    from peft import LoraConfig, get_peft_model
    from transformers.utils import logging

    from harness import attached
    from voco_plugin.inference import saved_note

    said: list[str] = []
    monkeypatch.setattr(saved_note.logger, "warning_once", said.append)
    peft = get_peft_model(attached("llava_llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "vp.load(" in card and "without the\nrule" in card and "one VoCo token" in card
    assert len(said) == 1 and "voco_plugin.load" in said[0] and "without the rule" in said[0]
    assert saved_note.logger is logging.get_logger(saved_note.__name__)

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("mine", encoding="utf-8")
    merged.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text(encoding="utf-8") == "mine"

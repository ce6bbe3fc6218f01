"""axolotl trains under the rule with the labels and losses of `VoCoSFTTrainer`, and refuses what would not.

What needs axolotl itself runs in an environment of its own: ``make test-axolotl``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import voco_plugin as vp
from parity_reference import BATCH, SCHEDULE, TOKENS
from tiny import processors
from trainers import logits
from voco_plugin.cli.accelerate_launch import load_integration

bridge = load_integration("axolotl")
from voco_plugin.integrations.axolotl import settings  # noqa: E402

FAMILIES = ("llava_llama", "qwen2_5_vl")
PLUGIN = "voco_plugin.integrations.axolotl.VoCoPlugin"


def has_axolotl() -> bool:
    try:
        return bool(importlib.metadata.version("axolotl"))
    except importlib.metadata.PackageNotFoundError:
        return False


GIVEN = Path(os.environ.get("VOCO_PARITY", ".")).absolute()  # before a test works elsewhere
needs_axolotl = pytest.mark.skipif(
    not (has_axolotl() and os.environ.get("VOCO_PARITY")),
    reason="axolotl is not installed: make test-axolotl",
)

# -- without axolotl
# ------------------------------------------------------------------------------------------------------------

GOOD = {
    "base_model": "x", "processor_type": "AutoProcessor", "skip_prepare_dataset": True, "adapter": "lora",
    "sample_packing": False, "fsdp": [], "fsdp_config": None, "chat_template": "tokenizer_default",
    "datasets": [{"path": "a", "roles_to_train": ["assistant"], "train_on_eos": "turn"}],
    "plugins": [PLUGIN, "axolotl.integrations.spectrum.SpectrumPlugin"], "context_parallel_size": 1,
}  # fmt: skip


def test_the_settings_that_were_compared_pass() -> None:
    for good in (GOOD, {**GOOD, "chat_template": None, "adapter": None}):
        assert settings.check_settings(good) is None  # nothing raised


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample_packing": True}, "sample_packing: True is refused under VoCo: conversations share a row"),
        ({"train_on_inputs": True}, "train_on_inputs: True is refused"),
        ({"rl": "dpo"}, "rl: dpo is refused.*only SFT"),
        ({"adapter": "llama-adapter"}, "adapter: llama-adapter is refused"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config: .* is refused"),
        ({"deepspeed": "zero3.json"}, "deepspeed: zero3.json is refused.*docs/distributed.md"),
        ({"lora_qkv_kernel": True}, "lora_qkv_kernel: True is refused"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2 is refused"),
        ({"datasets": [{"roles_to_train": ["user"]}]}, r"datasets: roles_to_train: \['user'\] is refused"),
        ({"datasets": [{"train_on_eos": "all"}]}, "datasets: train_on_eos: all is refused"),
        ({"chat_template": "qwen2_vl"}, "chat_template: qwen2_vl is refused.*set voco_chat_template"),
        ({"skip_prepare_dataset": False}, "skip_prepare_dataset must be true"),
        ({"processor_type": None}, "processor_type must be set"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "LigerPlugin is refused"),
    ],
)
def test_settings_with_other_batches_or_losses_are_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check_settings({**GOOD, **changed})


def test_the_rule_is_read_from_the_yaml(tmp_path: Path) -> None:
    cfg = {"base_model": str(tmp_path), "voco": {"num_tokens": 4}}
    assert settings.config_for(cfg) == vp.VoCoConfig(num_tokens=4)
    assert settings.config_for({"base_model": str(tmp_path)}) == vp.VoCoConfig()
    vp.VoCoConfig(num_tokens=3).save(tmp_path)
    assert settings.config_for({"base_model": str(tmp_path)}).num_tokens == 3
    with pytest.raises(ValueError, match=r"axolotl's arguments ask for voco with num_tokens=4 \(saved: 3\)"):
        settings.config_for(cfg)
    with pytest.raises(ValueError, match="no field 'num_token'.*did you mean 'num_tokens'"):
        settings.config_for({**cfg, "voco": {"num_token": 4}})
    with pytest.raises(ValueError, match="compressor='average_pool' is trained by VoCoSFTTrainer alone"):
        settings.config_for({**cfg, "voco": {"compressor": "average_pool"}})


def test_the_chat_template_is_the_named_the_yamls_or_the_processors() -> None:
    processor = processors.processor("llava_llama")
    assert settings.chat_template({}, processor) == processor.chat_template
    text = "{% generation %}{% endgeneration %}"
    assert settings.chat_template({"chat_template_jinja": text}, processor) == text
    assert "ASSISTANT" in settings.chat_template({"voco_chat_template": "vicuna_v1"}, processor)
    with pytest.raises(ValueError, match="chat_template_jinja does not mark the answers"):
        settings.chat_template({"chat_template_jinja": "{{ messages }}"}, processor)


# -- with axolotl
# ------------------------------------------------------------------------------------------------------------


def given(name: str) -> Path:
    """What `parity_reference.py` wrote of a model."""
    return GIVEN / name


def reference(name: str) -> dict:
    return json.loads((given(name) / "reference.json").read_text())


LANGUAGE = "model.language_model.layers.[0-9]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
LORA = {
    "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": LANGUAGE,
    "unfrozen_parameters": None,
}  # fmt: skip


def recipe(name: str, out: Path, **changed) -> dict:
    """axolotl's YAML: all weights of the language model, unless LORA is among what is changed."""
    values = {
        "base_model": str(given(name) / "base"), "processor_type": "AutoProcessor", "plugins": [PLUGIN],
        "voco": {"num_tokens": TOKENS}, "skip_prepare_dataset": True, "remove_unused_columns": False,
        "datasets": [
            {"path": str(given(name).parent / "parts.jsonl"), "ds_type": "json", "type": "chat_template"}
        ],
        "sample_packing": False, "pad_to_sequence_len": False, "sequence_len": 512, "val_set_size": 0,
        "unfrozen_parameters": ["^model.language_model.*", "^lm_head.*"], "output_dir": str(out),
        "micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "optimizer": "adamw_torch",
        "curriculum_sampling": True, "shuffle_merged_datasets": False, "save_steps": 10, "bf16": False,
        "fp16": False, "tf32": False, "gradient_checkpointing": False, "attn_implementation": "sdpa",
        "dataloader_num_workers": 0, "dataset_prepared_path": str(out.parent / "prepared"),
        "lr_scheduler": SCHEDULE["lr_scheduler_type"],
    }  # fmt: skip
    same = (
        "max_steps",
        "learning_rate",
        "weight_decay",
        "adam_beta2",
        "max_grad_norm",
        "warmup_steps",
        "seed",
    )
    values |= {key: SCHEDULE[key] for key in (*same, "logging_steps")}
    return {key: value for key, value in {**values, **changed}.items() if value is not None}


@pytest.fixture
def train(monkeypatch, tmp_path: Path):
    """``axolotl train recipe.yaml``, in this process: its start alone takes many seconds."""
    for key in ("AXOLOTL_DO_NOT_TRACK", "DO_NOT_TRACK"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.chdir(tmp_path)

    def run(config: dict) -> Path:
        from axolotl.cli.train import do_cli

        (tmp_path / "recipe.yaml").write_text(json.dumps(config))  # JSON is YAML
        do_cli(str(tmp_path / "recipe.yaml"))
        return Path(config["output_dir"])

    return run


def losses(checkpoint: Path) -> list[float]:
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def apart(found: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(found, expected, strict=True)]


@needs_axolotl
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_those_of_our_trainer_token_by_token(name: str) -> None:
    """The plug-in's own collator on axolotl's rows, on axolotl's transformers."""
    from datasets import load_dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = given(name) / "base"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    plugin = bridge.VoCoPlugin()
    plugin.model, plugin.processor = model, AutoProcessor.from_pretrained(base)
    vp.attach(model, vp.VoCoConfig(num_tokens=TOKENS), processor=plugin.processor)
    make, options = plugin.get_collator_cls_and_kwargs({})
    collate = make(plugin.processor.tokenizer, **options, padding=True, pad_to_multiple_of=64)
    rows = load_dataset("json", data_files=str(given(name).parent / "parts.jsonl"), split="train")
    expected = reference(name)
    assert len(rows) == len(expected["labels"])
    for row, ids, labels in zip(rows, expected["input_ids"], expected["labels"], strict=True):
        batch = collate([row])
        assert batch["input_ids"][0].tolist() == ids and batch["labels"][0].tolist() == labels


@needs_axolotl
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["full", "lora"])
def test_losses_are_our_trainers_and_the_model_loads(name: str, way: str, train, tmp_path: Path) -> None:
    more = {**LORA, "lora_model_dir": str(given(name) / "adapter")} if way == "lora" else {}
    out, expected = train(recipe(name, tmp_path / "out", **more)), reference(name)
    differences = apart(losses(out / "checkpoint-10"), expected[way])
    sys.stdout.write(f"{name} {way}: first step {differences[0]:.1e}, ten steps {max(differences):.1e}\n")
    assert differences[0] <= 1e-5 and max(differences) <= 1e-3
    for folder in (out, out / "checkpoint-10"):
        model, processor = vp.load(folder)
        assert vp.attachment(model).config.num_tokens == TOKENS
        assert torch.allclose(logits(model, processor), torch.tensor(expected[f"{way}_logits"]), atol=1e-3)


@needs_axolotl
def test_accumulated_batches_have_the_loss_of_one(train, tmp_path: Path) -> None:
    asked = {"micro_batch_size": 1, "gradient_accumulation_steps": BATCH}
    out = train(recipe("llava_llama", tmp_path / "out", **asked))
    assert max(apart(losses(out / "checkpoint-10"), reference("llava_llama")["full"])) <= 1e-3


@needs_axolotl
def test_a_new_lora_trains_the_row_and_goes_on_where_it_stopped(train, tmp_path: Path) -> None:
    out = train(recipe("llava_llama", tmp_path / "out", **LORA, save_steps=5))
    model, _ = vp.load(out)
    base, _ = vp.load(given("llava_llama") / "base", voco=vp.VoCoConfig(num_tokens=TOKENS))
    token = vp.attachment(base).vocab.voco_id
    before, after = base.get_input_embeddings().weight, model.get_input_embeddings()
    assert not torch.equal(after(torch.tensor([token]))[0], before[token])
    assert torch.equal(after(torch.arange(10)), before[:10])
    assert not [key for key in saved_names(out) if "embed_tokens.weight" in key or "lm_head" in key]
    again = {**LORA, "resume_from_checkpoint": str(out / "checkpoint-5")}
    second = train(recipe("llava_llama", tmp_path / "again", **again))
    found = apart(losses(second / "checkpoint-10"), losses(out / "checkpoint-10"))
    assert max(found) <= 1e-5


def saved_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


@needs_axolotl
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chat_template": "llava"}, "chat_template: llava is refused"),
        ({"sample_packing": True}, "sample_packing: True is refused"),
        ({"unfrozen_parameters": ["^model.vision_tower.*"]}, "the VoCo token's row is frozen"),
    ],
)
def test_their_settings_are_refused_by_name(changed: dict, message: str, train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe("llava_llama", tmp_path / "out", **changed))


@needs_axolotl
def test_the_command_line_takes_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe("llava_llama", tmp_path / "out", max_steps=1)))
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        [*command, "--launcher", "python"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert vp.load(tmp_path / "out")[0] is not None

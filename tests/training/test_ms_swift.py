"""ms-swift trains under the rule with the labels and losses of `VoCoSFTTrainer`, and refuses what would not.

What needs ms-swift itself runs in an environment of its own: ``make test-swift``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import voco_plugin as vp
from parity_reference import SCHEDULE, TOKENS
from paths import ROOT
from trainers import logits
from voco_plugin.cli.accelerate_launch import load_integration

bridge = load_integration("ms_swift")
from voco_plugin.integrations.ms_swift import settings  # noqa: E402

FAMILIES = {"llava_llama": "llava1_5_hf", "qwen2_5_vl": "qwen2_5_vl"}


def has_swift() -> bool:
    try:
        return bool(importlib.metadata.version("ms-swift"))
    except importlib.metadata.PackageNotFoundError:
        return False


GIVEN = Path(os.environ.get("VOCO_PARITY", ".")).absolute()  # before a test works elsewhere
needs_swift = pytest.mark.skipif(
    not (has_swift() and os.environ.get("VOCO_PARITY")), reason="ms-swift is not installed: make test-swift"
)

# -- without ms-swift
# ------------------------------------------------------------------------------------------------------------


def test_the_file_for_external_plugins_is_named_by_a_command() -> None:
    assert bridge.PLUGIN.is_file() and bridge.PLUGIN.parent.name == "external"
    out: list[str] = []
    fake = SimpleNamespace(stdout=SimpleNamespace(write=out.append))
    code = (bridge.PLUGIN.parents[1] / "__main__.py").read_text().replace("import sys", "")
    exec(compile(code, "__main__.py", "exec"), {"sys": fake})
    assert out == [f"{bridge.PLUGIN}\n"]


@pytest.mark.parametrize("text", ["{'num_tokens': 4, 'hide_prefix': False}", '{"num_tokens": 4}'])
def test_the_rule_is_read_from_model_kwargs(monkeypatch, text: str) -> None:
    monkeypatch.setenv("VOCO", text)
    assert settings.asked_config() == vp.VoCoConfig(num_tokens=4)


def test_nothing_said_is_the_default_or_what_was_saved(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VOCO", raising=False)
    assert settings.config_for(str(tmp_path)) == vp.VoCoConfig()
    vp.VoCoConfig(num_tokens=3, token_id=9).save(tmp_path)
    assert settings.config_for(str(tmp_path)).num_tokens == 3
    monkeypatch.setenv("VOCO", '{"num_tokens": 3}')
    assert settings.config_for(str(tmp_path)).token_id == 9
    monkeypatch.setenv("VOCO", '{"num_tokens": 4}')
    with pytest.raises(ValueError, match=r"num_tokens=4 \(saved: 3\)"):
        settings.config_for(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'num_token': 4}", "no field 'num_token'.*did you mean 'num_tokens'"),
        ("2 tokens", "is not JSON"),
        ("{'compressor': 'average_pool'}", "compressor='average_pool' is trained by VoCoSFTTrainer alone"),
        ("{'adapter_stages': 'separate'}", "adapter_stages='separate' is trained by"),
    ],
)
def test_a_rule_that_cannot_be_had_is_refused(monkeypatch, text: str, message: str) -> None:
    monkeypatch.setenv("VOCO", text)
    with pytest.raises(ValueError, match=message):
        settings.asked_config()


def their_template(**changed) -> SimpleNamespace:
    values = {
        "template_backend": "swift", "_loss_scale": "default", "padding_free": False, "response_prefix": None,
        "sequence_parallel_size": 1, "truncation_strategy": "raise", "use_chat_template": True,
        "_agent_template": None, "enable_thinking": False, "task_type": "causal_lm",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


def test_the_settings_that_were_compared_pass() -> None:
    for good in (their_template(), their_template(_loss_scale="last_round")):
        assert settings.check_template(good) is None  # nothing raised


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"template_backend": "jinja"}, "--template_backend jinja is refused.*prompts would be learnt"),
        ({"_loss_scale": "all"}, "--loss_scale all is refused"),
        ({"padding_free": True}, "--padding_free True is refused.*packing"),
        ({"sequence_parallel_size": 2}, "--sequence_parallel_size 2 is refused"),
        ({"truncation_strategy": "left"}, "--truncation_strategy left is refused.*use delete"),
        ({"use_chat_template": False}, "--use_chat_template False is refused"),
        ({"response_prefix": "<think>"}, "--response_prefix <think> is refused"),
        ({"_agent_template": "react"}, "--agent_template react is refused"),
        ({"enable_thinking": True}, "--enable_thinking True is refused"),
        ({"task_type": "embedding"}, "--task_type embedding is refused"),
    ],
)
def test_settings_with_other_batches_are_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check_template(their_template(**changed))


# -- with ms-swift
# ------------------------------------------------------------------------------------------------------------


def given(name: str) -> Path:
    """What `parity_reference.py` wrote of a model."""
    return GIVEN / name


def reference(name: str) -> dict:
    return json.loads((given(name) / "reference.json").read_text())


def arguments(name: str, out: Path, **changed) -> dict:
    """ms-swift's, in the words of its YAML."""
    taken = {k: v for k, v in SCHEDULE.items() if k != "warmup_steps"}
    values = {
        "external_plugins": [str(bridge.PLUGIN)], "model": str(given(name) / "base"),
        "model_type": FAMILIES[name], "dataset": [str(given(name).parent / "rows.jsonl")],
        "model_kwargs": {"voco": {"num_tokens": TOKENS}}, "torch_dtype": "float32", "output_dir": str(out),
        "add_version": False, "split_dataset_ratio": 0, "dataset_shuffle": False,
        "train_dataloader_shuffle": False, "save_steps": 10, "report_to": "none", "warmup_ratio": 0,
        "dataloader_num_workers": 0, "load_from_cache_file": False, "use_hf": True, "strict": True,
        "gradient_accumulation_steps": 1, **taken, **changed,
    }  # fmt: skip
    return values


def swift_sft(config: dict, place: Path) -> subprocess.CompletedProcess:
    """``swift sft config.yaml``"""
    place.mkdir(parents=True, exist_ok=True)
    (place / "sft.yaml").write_text(json.dumps(config))  # JSON is YAML
    environment = {
        **os.environ, "HF_HOME": str(place / "hf"), "MODELSCOPE_CACHE": str(place / "ms"), "USE_HF": "1",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "swift.cli.main", "sft", str(place / "sft.yaml")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def losses(checkpoint: Path) -> list[float]:
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0, done.stdout[-3000:]
    return done.stderr[-3000:]


def load(name: str, monkeypatch, **options):
    """The model and a template of ms-swift's for it, in this process."""
    from swift.model import get_model_processor
    from swift.template import get_template

    bridge.register()
    monkeypatch.setenv("VOCO", json.dumps({"num_tokens": TOKENS}))
    model, processor = get_model_processor(
        str(given(name) / "base"), model_type=FAMILIES[name], torch_dtype=torch.float32, use_hf=True
    )
    template = get_template(processor, **options)
    template.set_mode("train")
    return model, template


@needs_swift
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_those_of_our_trainer_token_by_token(name: str, monkeypatch) -> None:
    _, template = load(name, monkeypatch)
    expected = reference(name)
    lines = (given(name).parent / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(expected["labels"])
    for line, ids, labels in zip(lines, expected["input_ids"], expected["labels"], strict=True):
        encoded = template.encode(json.loads(line))
        assert encoded["input_ids"] == ids and encoded["labels"] == labels


@needs_swift
def test_the_last_round_alone_can_be_learnt(monkeypatch) -> None:
    _, template = load("qwen2_5_vl", monkeypatch, loss_scale="last_round")
    row = json.loads((given("qwen2_5_vl").parent / "rows.jsonl").read_text().splitlines()[1])
    labels = template.encode(row)["labels"]
    learnt = template.tokenizer.decode([token for token in labels if token != -100])
    assert learnt == row["messages"][-1]["content"] + "<|im_end|>"


@needs_swift
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_type": "llava1_5_hf"}, "--template llava1_5_hf is refused.*in pieces"),
        ({"template_type": "qwen2_5"}, "--template qwen2_5 is refused"),
        ({"template_backend": "jinja"}, "--template_backend jinja is refused"),
        ({"loss_scale": "all"}, "--loss_scale all is refused"),
        ({"truncation_strategy": "right"}, "--truncation_strategy right is refused"),
    ],
)
def test_their_own_templates_and_settings_are_refused_by_name(
    options: dict, message: str, monkeypatch
) -> None:
    with pytest.raises(ValueError, match=message):
        load("llava_llama", monkeypatch, **options)


@needs_swift
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": [], "content": "<image>what"}, "more <image> in the messages than images"),
        ({"videos": ["a.mp4"], "content": "<video>what"}, "the row has videos"),
        ({"content": "what", "loss": False}, "a message has loss"),
        ({"content": "what", "tools": ["{}"]}, "the row has tools"),
    ],
)
def test_rows_that_are_not_written_are_refused(row: dict, message: str, monkeypatch) -> None:
    _, template = load("llava_llama", monkeypatch)
    answer = {"role": "assistant", "content": "red"} | ({"loss": row.pop("loss")} if "loss" in row else {})
    messages = [{"role": "user", "content": row.pop("content")}, answer]
    with pytest.raises(ValueError, match=message):
        template.encode({"messages": messages, **row})


@needs_swift
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_losses_are_those_of_our_trainer_and_the_checkpoint_loads(
    name: str, tuner: str, tmp_path: Path
) -> None:
    more = {"adapters": [str(given(name) / "adapter")]} if tuner == "lora" else {}
    done = swift_sft(arguments(name, tmp_path / "out", tuner_type=tuner, **more), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint, expected = tmp_path / "out" / "checkpoint-10", reference(name)
    found = losses(checkpoint)
    apart = [abs(a - b) for a, b in zip(found, expected[tuner], strict=True)]
    sys.stdout.write(f"{name} {tuner}: first step {apart[0]:.1e}, ten steps {max(apart):.1e}\n")
    assert apart[0] <= 1e-5 and max(apart) <= 1e-3
    model, processor = vp.load(checkpoint)
    assert vp.attachment(model).config.num_tokens == TOKENS
    after = torch.tensor(expected[f"{tuner}_logits"])
    assert torch.allclose(logits(model, processor), after, atol=1e-3)


@needs_swift
def test_accumulated_batches_have_the_loss_of_one(tmp_path: Path) -> None:
    asked = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "tuner_type": "full"}
    done = swift_sft(arguments("llava_llama", tmp_path / "out", **asked), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = reference("llava_llama")["full"]
    found = losses(tmp_path / "out" / "checkpoint-10")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-3


@needs_swift
def test_a_new_lora_trains_the_row_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked = arguments("llava_llama", tmp_path / "out", tuner_type="lora", lora_rank=4, save_steps=5)
    done = swift_sft(asked, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    half, whole = tmp_path / "out" / "checkpoint-5", tmp_path / "out" / "checkpoint-10"
    model, _ = vp.load(whole)
    assert model.peft_config["default"].r == 4
    base, _ = vp.load(given("llava_llama") / "base", voco=vp.VoCoConfig(num_tokens=TOKENS))
    token = vp.attachment(base).vocab.voco_id
    row = model.get_input_embeddings()(torch.tensor([token, token + 0]))[0]
    others = model.get_input_embeddings()(torch.arange(10))
    assert not torch.equal(row, base.get_input_embeddings().weight[token])
    assert torch.equal(others, base.get_input_embeddings().weight[:10])
    again = arguments(
        "llava_llama", tmp_path / "again", tuner_type="lora", lora_rank=4, resume_from_checkpoint=str(half)
    )
    done = swift_sft(again, tmp_path / "second")
    assert done.returncode == 0, done.stderr[-3000:]
    apart = [
        abs(a - b) for a, b in zip(losses(tmp_path / "again" / "checkpoint-10"), losses(whole), strict=True)
    ]
    assert max(apart) <= 1e-5


@needs_swift
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tuner_type": "adalora"}, "--tuner_type adalora is refused"),
        ({"tuner_type": "lora_llm"}, "--tuner_type lora_llm is refused"),
        ({"tuner_type": "lora", "init_weights": "pissa"}, "--init_weights pissa is refused"),
        (
            {"tuner_type": "full", "freeze_llm": True, "freeze_aligner": False},
            "the VoCo token's row is frozen",
        ),
    ],
)
def test_tuners_that_would_leave_the_row_are_refused_by_name(changed, message, tmp_path: Path) -> None:
    assert message in refused(swift_sft(arguments("llava_llama", tmp_path / "out", **changed), tmp_path))

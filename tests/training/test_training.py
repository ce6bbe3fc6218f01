"""Training trains what it says, resumes exactly, logs what it did, and saves what is needed to load again
by path.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import HfArgumentParser
from trl import SFTConfig

import tiny
import voco_plugin as vp
from tiny import processors
from trainers import LORA, losses, moved, snapshot, trainer
from voco_plugin.core.layout import LayoutError
from voco_plugin.training.adapters import prepare_peft_config
from voco_plugin.training.parts import ModelParts


@pytest.mark.parametrize("name", ["llava_llama", "llava_tied", "qwen2_5_vl"])
def test_lora_moves_adapters_and_the_token_row_and_nothing_else(name: str, bases, data, tmp_path) -> None:
    made = trainer(bases(name), tmp_path, data)
    before = snapshot(made)
    made.train()
    changed = moved(before, made)
    wanted = {n for n in before if "lora_" in n or "trainable_tokens_delta" in n}
    assert changed == wanted
    assert not [n for n in wanted if re.search("vision|visual|projector", n)], "the vision tower is adapted"
    assert sum("lora_A" in n for n in wanted) == 7 * 2, "seven linear layers in each of two language layers"
    row = [n for n in wanted if "trainable_tokens_delta" in n]
    assert [before[n].shape[0] for n in row] == [1]
    counts = (
        f"VoCo token row 64, adapters in the language model {sum(before[n].numel() for n in wanted) - 64:,}"
    )
    assert counts in made.trainable_report


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_the_projector_trains_only_if_asked_and_the_tower_never(
    bases, data, tmp_path, peft, projector
) -> None:
    made = trainer(bases("llava_llama"), tmp_path, data, peft=peft, train_projector=projector)
    before = snapshot(made)
    made.train()
    changed = moved(before, made)
    assert any("projector" in n for n in changed) == projector
    assert not [n for n in changed if "vision_tower" in n]
    if not peft:
        language = {n for n in before if "language_model" in n or "lm_head" in n}
        assert {n for n in changed if "projector" not in n} == language


def test_the_vision_tower_trains_if_asked(bases, data, tmp_path) -> None:
    for peft in (False, True):
        made = trainer(bases("llava_llama"), tmp_path, data, peft=peft, train_vision_tower=True, max_steps=1)
        before = snapshot(made)
        made.train()
        assert any("vision_tower" in n for n in moved(before, made))


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("elastic", [None, [1, 4]])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(bases, data, tmp_path, peft, elastic) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "num_tokens_range": elastic}
    whole = trainer(bases("llava_llama"), tmp_path / "whole", data, peft=peft, **options)
    whole.train()
    resumed = trainer(bases("llava_llama"), tmp_path / "resumed", data, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    end, again = snapshot(whole), snapshot(resumed)
    assert all(torch.equal(end[n], again[n]) for n in end)
    drawn = [e["voco_tokens_per_sample"] for e in whole.state.log_history if "loss" in e]
    assert [e["voco_tokens_per_sample"] for e in resumed.state.log_history if "loss" in e] == drawn
    ratios = {e["compression_ratio"] for e in whole.state.log_history if "loss" in e}
    assert len(ratios) > 1 if elastic else ratios == {9 / 2}


@pytest.mark.parametrize(
    ("name", "peft"),
    [(name, peft) for name in ("llava_llama", "llava_tied", "qwen2_5_vl") for peft in (False, True)],
)
def test_a_checkpoint_loads_by_its_path_alone_with_identical_logits(
    bases, data, tmp_path, name, peft
) -> None:
    made = trainer(bases(name), tmp_path, data, peft=peft, save_strategy="steps", save_steps=3)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    batch = made.data_collator([data[0], data[1], data[5]])
    made.model.eval()
    with torch.no_grad():
        expected = made.model(**batch).logits
    for folder in (tmp_path / "checkpoint-3", tmp_path / "saved"):
        model, processor = vp.load(folder)
        assert processor.tokenizer.convert_tokens_to_ids("<voco>") == vp.attachment(model).vocab.voco_id
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected)
        record = json.loads((folder / "voco_config.json").read_text())
        assert record["voco"]["num_tokens"] == 2 and record["voco"]["rule"] == "isolated"
        if peft:
            weights = load_file(folder / "adapter_model.safetensors")
            others = {n: w.shape for n, w in weights.items() if "lora_" not in n}
            assert list(others.values()) == [(1, 64)], "only the token row is saved of the embeddings"


@pytest.mark.parametrize("peft", [False, True])
def test_the_best_model_comes_back_at_the_end(bases, data, tmp_path, peft) -> None:
    made = trainer(
        bases("llava_llama"), tmp_path, data, peft=peft, load_best_model_at_end=True, max_steps=4,
        learning_rate=1.0, lr_scheduler_type="constant", eval_dataset=data.select([0, 1, 5]),
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    made.train()
    evals = [e["eval_loss"] for e in made.state.log_history if "eval_loss" in e]
    assert evals[-1] > min(evals), "the last step is the best: the test shows nothing"
    assert made.evaluate()["eval_loss"] == pytest.approx(min(evals), abs=1e-5)


def test_training_goes_on_from_a_saved_adapter(bases, data, tmp_path) -> None:
    first = trainer(bases("llava_llama"), tmp_path / "a", data)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    second = trainer(str(tmp_path / "saved"), tmp_path / "b", data, peft=False, voco=False)
    before = snapshot(second)
    second.train()
    assert moved(before, second) == {n for n in before if "lora_" in n or "trainable_tokens_delta" in n}
    assert losses(second)[0] != losses(first)[0]


def test_metrics_are_logged_and_evaluation_takes_the_configured_k(bases, data, tmp_path) -> None:
    made = trainer(
        bases("llava_llama"), tmp_path, data, eval_dataset=data.select([0, 1, 5]), num_tokens_range=[1, 4]
    )
    made.train()
    for entry in (e for e in made.state.log_history if "loss" in e):
        assert entry["isolation"] == 1.0 and entry["num_tokens"] > 0
        assert entry["compression_ratio"] in {9 / k for k in (1, 2, 3, 4)}
    for _ in range(2):
        metrics = made.evaluate()
        assert metrics["eval_compression_ratio"] == 4.5 and metrics["eval_isolation"] == 1.0
        assert metrics["eval_voco_tokens_per_sample"] == pytest.approx(4 / 3)
    upper = trainer(bases("llava_llama"), tmp_path, data, voco=vp.VoCoConfig(rule="causal"), max_steps=1)
    upper.train()
    assert upper.state.log_history[0]["isolation"] == 0.0


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_gradient_checkpointing_changes_no_loss(bases, data, tmp_path, name) -> None:
    runs = []
    for checkpointing in (False, True):
        made = trainer(bases(name), tmp_path, data, gradient_checkpointing=checkpointing, learning_rate=1e-3)
        made.train()
        runs.append(losses(made))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    causal = trainer(bases(name), tmp_path, data, voco=vp.VoCoConfig(num_tokens=2, rule="causal"))
    causal.train()
    assert abs(losses(causal)[0] - runs[0][0]) > 1e-3, "the rule makes no difference: it is not in force"


def test_a_model_in_memory_and_an_attached_one_train_alike(data, tmp_path) -> None:
    runs = []
    for attached in (False, True):
        model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
        if attached:
            vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor)
        processing = {} if attached else {"processing_class": processor}
        made = trainer(model, tmp_path, data, peft=False, voco=not attached, **processing)
        made.train()
        runs.append(losses(made))
    assert runs[0] == runs[1]
    with pytest.raises(ValueError, match=r"num_tokens=3 \(attached: 2\)"):
        trainer(model, tmp_path, data, peft=False, voco=vp.VoCoConfig(num_tokens=3))


def test_voco_none_trains_the_plain_model(bases, data, tmp_path) -> None:
    made = trainer(bases("llava_llama"), tmp_path, data, peft=False, voco=False, train_projector=True)
    made.train()
    assert not vp.is_attached(made.model) and "plain VLM" in made.trainable_report
    assert "isolation" not in made.state.log_history[0]
    made.save_model()
    assert not (tmp_path / "voco_config.json").exists()


def test_llava_rows_train_as_messages_do(bases, data, tmp_path) -> None:
    turns, images = [], []
    for row in data:
        question = "<image>\nwhat is it" if row["images"] else "what is it"
        answer = row["messages"][1]["content"][0]["text"]
        turns.append([{"from": "human", "value": question}, {"from": "gpt", "value": answer}])
        images.append(row["images"][0] if row["images"] else None)
    llava = Dataset.from_dict({"conversations": turns, "image": images})
    runs = []
    for dataset in (data, llava, llava.to_iterable_dataset()):
        made = trainer(
            bases("llava_llama"),
            tmp_path,
            dataset,
            train_sampling_strategy="sequential",
            assistant_only_loss=True,
        )
        made.train()
        runs.append(losses(made))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"messages": [[{"role": "user", "content": "a"}]], "videos": [["a.mp4"]]}, "videos are not read"),
        ({"messages": [[{"role": "user", "content": "a"}]]}, "nothing to compress"),
        ({"messages": []}, "empty"),
    ],
)
def test_a_dataset_that_would_train_on_text_alone_is_refused(bases, tmp_path, columns, why) -> None:
    with pytest.raises(ValueError, match=why):
        trainer(bases("llava_llama"), tmp_path, Dataset.from_dict(columns))


def test_max_length_through_an_image_names_the_row(bases, data, tmp_path) -> None:
    made = trainer(bases("llava_llama"), tmp_path, data, max_length=12)
    with pytest.raises(LayoutError, match=r"sample \d \(id 'row-\d'\).*max_length=12"):
        made.train()


def test_a_collator_without_voco_tokens_is_warned_of(bases, data, tmp_path, caplog) -> None:
    trainer(bases("llava_llama"), tmp_path, data, data_collator=lambda rows: rows)
    assert "must put the VoCo tokens" in caplog.text


def test_targets_are_anchored_by_the_module_tree() -> None:
    for name in tiny.NAMES:
        model = tiny.build(name)
        parts = ModelParts(model)
        linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]

        def matched(config, names=linear):
            return {n for n in names if re.fullmatch(config.target_modules, n)}

        language = {n for n in linear if parts.of(n) == "language model" and parts.layers in n}
        assert language
        for targets in ("all-linear", None):
            config = prepare_peft_config(model, LoraConfig(target_modules=targets), 4)
            assert matched(config) == language and config.trainable_token_indices == [4]
        if not any(n.endswith(".q_proj") for n in language):  # latent attention, or one fused projection
            vision = any(n.endswith(".q_proj") for n in linear)
            if vision:
                with pytest.raises(ValueError, match="'q_proj' is a layer of the vision tower only"):
                    prepare_peft_config(model, LoraConfig(target_modules=["q_proj"]), 4)
            continue
        config = prepare_peft_config(model, LoraConfig(target_modules=["q_proj", "v_proj"]), 4)
        assert matched(config) == {n for n in language if n.endswith(("q_proj", "v_proj"))}
        given = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
        assert matched(prepare_peft_config(model, given, 4)) == {
            n for n in language if n.endswith("q_proj") and ".1." in n
        }
        assert given.target_modules == {"q_proj"} and given.layers_to_transform == [1], (
            "the user's was mutated"
        )
    model = tiny.build("llava_llama")
    config = prepare_peft_config(
        model, LoraConfig(target_modules=["q_proj", "linear_1"]), 4, train_projector=True
    )
    assert re.fullmatch(config.target_modules, "model.multi_modal_projector.linear_1")
    assert not re.fullmatch(config.target_modules, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert config.modules_to_save == ["model.multi_modal_projector"]
    own = LoraConfig(target_modules=".*fc1", trainable_token_indices={"embed_tokens": [9]})
    config = prepare_peft_config(model, own, 4)
    assert config.target_modules == ".*fc1" and config.trainable_token_indices == {"embed_tokens": [9, 4]}
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        prepare_peft_config(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), 4)


def test_the_config_survives_json_the_parser_and_a_copy(tmp_path) -> None:
    config = vp.VoCoSFTConfig(str(tmp_path), voco=vp.VoCoConfig(num_tokens=3), num_tokens_range=[1, 4])
    assert config.max_length is None and SFTConfig(str(tmp_path), bf16=False).max_length == 1024
    if not torch.cuda.is_available():
        assert config.bf16 is False
    values = json.loads(config.to_json_string())
    assert values["voco"]["num_tokens"] == 3 and values["num_tokens_range"] == [1, 4]
    assert vp.VoCoSFTConfig(**{**values, "hub_token": None}).voco == config.voco
    parse = HfArgumentParser(vp.VoCoSFTConfig).parse_args_into_dataclasses
    line = ["--output_dir", str(tmp_path), "--num_tokens_range", "1", "4", "--train_projector"]
    (parsed,) = parse([*line, "--voco", '{"num_tokens": 3}'])
    assert parsed.voco == config.voco and parsed.num_tokens_range == [1, 4] and parsed.train_projector
    assert parse(line)[0].voco is None and parse([*line, "--voco", "none"])[0].voco is None
    for wrong, why in (
        ({"voco": {"num_token": 2}}, "did you mean 'num_tokens'"),
        ({"voco": "two"}, "is not JSON"),
        ({"voco": 2}, "must be a VoCoConfig"),
        ({"num_tokens_range": [4, 1]}, "two integers"),
        ({"voco": {"num_tokens": 8}, "num_tokens_range": [1, 4]}, "outside num_tokens_range"),
    ):
        with pytest.raises(ValueError, match=why):
            vp.VoCoSFTConfig(str(tmp_path), **wrong)


@pytest.mark.parametrize("name", ["llava_llama", "llava_tied"])
def test_a_model_is_as_it_was_given_where_its_trainer_cannot_be_made(name: str, data, tmp_path) -> None:
    """Too short a `max_length` for packing is found once LoRA and the token's row are in."""
    model, tools = tiny.build(name), processors.processor(name)
    before = {key: (p.clone(), p.requires_grad) for key, p in model.named_parameters()}
    kinds = [(key, type(module)) for key, module in model.named_modules()]
    with pytest.raises(ValueError, match="more than max_length=12"):
        trainer(model, tmp_path, data, processing_class=tools, packing=True, max_length=12)
    assert not vp.is_attached(model) and not hasattr(model, "peft_config")
    assert [(key, type(module)) for key, module in model.named_modules()] == kinds
    for key, parameter in model.named_parameters():
        values, trained = before.pop(key)
        assert torch.equal(parameter[: len(values)], values) and parameter.requires_grad == trained, key
    assert not before


def test_adapters_outside_a_peft_model_are_refused_and_stay(bases, data, tmp_path) -> None:
    model = get_peft_model(tiny.build("llava_llama"), LoraConfig(**LORA)).get_base_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for peft in (True, False):
        with pytest.raises(ValueError, match="not a PeftModel .*add_adapter"):
            trainer(model, tmp_path, data, peft=peft, processing_class=processors.processor("llava_llama"))
        after = dict(model.named_parameters())
        assert any("lora_A" in name for name in after), "the user's adapter is gone"
        assert before.keys() == after.keys() and all(torch.equal(p, after[n]) for n, p in before.items())
    assert not vp.is_attached(model)


def test_a_model_without_a_backbone_of_its_own_is_refused(data, tmp_path) -> None:
    """Llama 4: TRL's loss calls `base_model`, which is the model itself."""
    from voco_plugin.training.model_setup import check_backbone

    for name in tiny.NAMES:
        model = tiny.build(name)
        if name == "llama4":
            with pytest.raises(ValueError, match="Llama4ForConditionalGeneration has no backbone of its own"):
                vp.VoCoSFTTrainer(model, args=vp.VoCoSFTConfig(str(tmp_path), use_cpu=True, bf16=False))
        else:
            check_backbone(model)

"""Freezing by part: what is asked to train moves, the rest not by one bit, and a checkpoint holds it."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import Counter

import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors import safe_open

import tiny
import voco_plugin as vp
from random_pictures import pictures
from tiny import processors
from voco_plugin.training.adapters import prepare_peft_config
from voco_plugin.training.parts import PROJECTOR, ModelParts
from voco_plugin.training.quantization import check_quantization, language_model_only

PARTS = ("language", "projector", "vision", "voco")
CHOICES = [c for n in range(5) for c in itertools.combinations(PARTS, n)]
FULL = [("llava_onevision", choice) for choice in CHOICES]
FULL += [("llava_tied", choice) for choice in (("voco",), ("language",), ("language", "voco"))]
KEYS = {"language": "train_language", "projector": "train_projector", "vision": "train_vision_tower"}
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": "gaussian"}


@pytest.fixture(scope="module")
def data() -> Dataset:
    image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
    answers = ["red", "blue circle", "green square", "circle"]
    rows = {
        "messages": [
            [
                {"role": "user", "content": [image, ask]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
            for answer in answers
        ],
        "images": [[picture] for picture in pictures(len(answers))],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made: dict[str, str] = {}

    def base(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name) / "base")
            tiny.build(name).save_pretrained(made[name])
            processors.processor(name).save_pretrained(made[name])
        return made[name]

    return base


def trainer(model, out, data, parts=("language", "voco"), peft=False, voco=True, **options):
    args = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False,
    }  # fmt: skip
    flags = {key: part in parts for part, key in KEYS.items()} | {"train_voco": "voco" in parts}
    config = vp.VoCoSFTConfig(
        str(out), voco=vp.VoCoConfig(num_tokens=2) if voco else None, **{**args, **flags, **options}
    )
    peft = LoraConfig(**LORA) if peft is True else peft or None
    with contextlib.redirect_stderr(io.StringIO()):
        return vp.VoCoSFTTrainer(model, args=config, train_dataset=data, peft_config=peft)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict, model) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def part_of(name: str) -> str:
    """By name, apart from the package's own reading of the module tree."""
    if "trainable_tokens_" in name:
        return "voco"
    if any(word in name for word in ("projector", "merger", "connector", "newline")):
        return "projector"
    return "vision" if "vision_tower" in name or ".visual." in name else "language"


def losses(made) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("name", "parts"), FULL, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_full_training_moves_the_parts_asked_for_and_the_checkpoint_holds_them(
    bases, data, tmp_path, name, parts
) -> None:
    if not parts:
        with pytest.raises(ValueError, match="nothing trains"):
            trainer(bases(name), tmp_path, data, parts)
        return
    made = trainer(bases(name), tmp_path, data, parts)
    row = vp.attachment(made.model).vocab.voco_id
    before = weights(made.model)
    made.train()
    moved = changed(before, made.model)
    embeddings = {n for n in before if n.endswith("embed_tokens.weight")}
    assert {part_of(n) for n in moved - embeddings} == set(parts) - {"voco"}
    for part in set(parts) - {"voco"}:
        frozen = {n for n in before if part_of(n) == part} - moved
        assert not {n for n in frozen if part != "vision"}, "a part trains whole (but a tower's last layers)"
    for matrix in embeddings:
        now = made.model.get_parameter(matrix)
        rows = {i for i in range(len(now)) if not torch.equal(now[i], before[matrix][i])}
        others = set(range(len(now))) - {row, tiny.PAD}  # weight decay moves all; the padding row is zero
        assert (row in rows) == ("voco" in parts)
        assert rows - {row, tiny.PAD} == (others if "language" in parts else set())
    counts = made.trainable_report
    assert ("VoCo token row 64" in counts) == ("voco" in parts and "language" not in parts)

    made.save_model(str(tmp_path / "saved"))
    loaded, _ = vp.load(tmp_path / "saved")
    assert not changed(weights(made.model), loaded)


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_lora_moves_the_parts_asked_for_and_the_checkpoint_holds_them(bases, data, tmp_path, parts) -> None:
    base = bases("llava_onevision")
    if not {"language", "vision"} & set(parts):
        with pytest.raises(ValueError, match="nothing is left to adapt.*use_peft: false"):
            trainer(base, tmp_path, data, parts, peft=True)
        return
    made = trainer(base, tmp_path, data, parts, peft=True)
    before = weights(made.model)
    made.train()
    moved = changed(before, made.model)
    assert {part_of(n) for n in moved} == set(parts)
    for name in moved:
        kinds = {"language": "lora_", "vision": "lora_", "voco": "trainable_tokens_delta"}
        assert kinds.get(part_of(name), "") in name
        assert part_of(name) != "projector" or "modules_to_save" in name or name.endswith("image_newline")
    projector = {n for n in before if part_of(n) == "projector" and "original_module" not in n}
    assert ("projector" in parts) == (projector <= moved)
    assert any(n.endswith("image_newline") for n in moved) == ("projector" in parts)

    made.save_model(str(tmp_path / "saved"))
    loaded, _ = vp.load(tmp_path / "saved")
    assert not changed(weights(made.model), loaded)
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as file:
        extra = [k for k in file.keys() if "lora_" not in k]  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    count = ("voco" in parts) + ("projector" in parts) * 5  # two linear layers with bias, and the newline
    assert len(extra) == count, extra


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "idefics3", "internvl", "qwen2_5_vl"])
def test_projectors_of_every_shape_train_and_come_back_under_lora(bases, data, tmp_path, name) -> None:
    """Qwen3-VL's is a module and a list of modules, Gemma 3's has a parameter of its own."""
    made = trainer(bases(name), tmp_path, data, ("language", "projector", "voco"), peft=True, max_steps=1)
    before = weights(made.model)
    made.train()
    moved = {n for n in changed(before, made.model) if part_of(n) == "projector"}
    projector = {n for n in before if part_of(n) == "projector" and "original_module" not in n}
    assert moved == projector and moved
    made.save_model(str(tmp_path / "saved"))
    assert not changed(weights(made.model), vp.load(tmp_path / "saved")[0])


@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(bases, data, tmp_path, peft) -> None:
    parts = ("language", "projector", "voco") if peft else ("projector", "voco")
    options = {"peft": peft, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(bases("llava_onevision"), tmp_path / "whole", data, parts, **options)
    whole.train()
    resumed = trainer(bases("llava_onevision"), tmp_path / "resumed", data, parts, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    assert not changed(weights(whole.model), resumed.model)


def test_plain_peft_loads_the_loose_parameters_too(bases, data, tmp_path) -> None:
    made = trainer(bases("llava_onevision"), tmp_path, data, ("language", "projector", "voco"), peft=True)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    base, processor = vp.load(bases("llava_onevision"), voco=vp.VoCoConfig(num_tokens=2))
    again = PeftModel.from_pretrained(base, tmp_path / "saved")
    assert not changed(weights(made.model), again)


def test_training_goes_on_from_an_adapter_and_keeps_to_its_parts(bases, data, tmp_path) -> None:
    first = trainer(
        bases("llava_onevision"), tmp_path / "a", data, ("language", "projector", "voco"), peft=True
    )
    first.train()
    first.save_model(str(tmp_path / "saved"))
    source = str(tmp_path / "saved")
    for parts in (("language", "projector", "voco"), ("projector", "voco"), ("language", "projector")):
        second = trainer(source, tmp_path / "b", data, parts, voco=False)
        before = weights(second.model)
        assert not changed(weights(first.model), second.model)
        second.train()
        moved = changed(before, second.model)
        assert {part_of(n) for n in moved} == set(parts)
        assert any(n.endswith("image_newline") for n in moved)
        second.save_model(str(tmp_path / "again"))
        assert not changed(weights(second.model), vp.load(tmp_path / "again")[0])
    with pytest.raises(ValueError, match="train_vision_tower is true, and the adapter .* vision tower"):
        trainer(source, tmp_path / "b", data, ("language", "vision", "voco"), voco=False)


def test_alignment_then_instruction_tuning_from_its_checkpoint(bases, data, tmp_path) -> None:
    first = trainer(
        bases("llava_llama"), tmp_path / "align", data, ("projector",), voco=False,
        gradient_checkpointing=True,
        chat_template_path="llava_plain", assistant_only_loss=True,
    )  # fmt: skip
    before = weights(first.model)
    first.train()
    assert changed(before, first.model) == {n for n in before if "multi_modal_projector" in n}
    first.save_model()
    second = trainer(
        str(tmp_path / "align"), tmp_path / "tuned", data, ("language", "projector", "voco"),
        chat_template_path="vicuna_v1", assistant_only_loss=True,
    )  # fmt: skip
    start = weights(second.model)
    aligned = weights(first.model)
    for name in aligned:  # the VoCo token's row comes on top
        kept = start[name][: len(aligned[name])]
        assert torch.equal(kept, aligned[name]), "tuning does not start from the aligned weights"
    second.train()
    moved = {part_of(n) for n in changed(start, second.model)}
    assert moved == {"language", "projector"}
    second.save_model()
    loaded, processor = vp.load(tmp_path / "tuned")
    assert not changed(weights(second.model), loaded)
    assert processor.chat_template == second.processing_class.chat_template
    assert "ASSISTANT" in processor.chat_template


def test_what_cannot_be_trained_is_refused() -> None:
    model = tiny.build("llava_llama")
    with pytest.raises(ValueError, match="train_language is false, and target_modules='.*language_model"):
        prepare_peft_config(
            model, LoraConfig(target_modules=".*language_model.*q_proj"), 4, train_language=False
        )
    with pytest.raises(ValueError, match="nothing is left to adapt"):
        prepare_peft_config(model, LoraConfig(target_modules=["q_proj"]), 4, train_language=False)
    with pytest.raises(ValueError, match="TRAINABLE_TOKENS"):
        prepare_peft_config(model, TrainableTokensConfig(token_indices=[4]), 4, train_projector=True)
    config = prepare_peft_config(
        model, LoraConfig(target_modules=["linear_1", "q_proj"]), 4, train_language=False
    )
    assert config.target_modules == r"(?:(?:.*\.)?linear_1)", "what is no one's layer is where it stands"


def test_the_projector_of_every_family_is_found() -> None:
    from tiny.wide import NAMES

    for name in NAMES:
        parts = ModelParts(tiny.build(name))
        found = Counter(parts.of(n) for n, _ in tiny.build(name).named_parameters())
        assert found[PROJECTOR] and found["vision tower"] and found["language model"], name
    phi = ModelParts(tiny.build("phi4_multimodal"))
    assert phi.of("model.embed_tokens_extend.image_embed.img_processor.embeddings.weight") == "vision tower"
    assert phi.of("model.embed_tokens_extend.image_embed.img_projection_up.weight") == PROJECTOR
    assert phi.of("model.embed_tokens.weight") == "language model"


def test_the_projector_of_every_family_is_found_whole() -> None:
    for name in tiny.FIRST:
        model = tiny.build(name)
        parts = ModelParts(model)
        roots, loose = parts.wrappable(model, PROJECTOR), parts.loose(model, PROJECTOR)
        inside = {n for n, _ in model.named_parameters() if any(n.startswith(f"{r}.") for r in roots)}
        every = {n for n, _ in model.named_parameters() if part_of(n) == "projector"}
        assert inside | set(loose) == every and every and not inside & set(loose)
        assert bool(loose) == (name in ("llava_next", "llava_onevision"))
        assert not [r for r in roots if isinstance(model.get_submodule(r), torch.nn.ModuleList)]


# -- QLoRA ---------------------------------------------------------------------------------------------------


class FourBit:
    load_in_4bit = True
    llm_int8_skip_modules = None


def test_four_bits_are_refused_where_they_cannot_train(monkeypatch) -> None:
    monkeypatch.setattr("voco_plugin.training.quantization.has_gpu", lambda: False)
    with pytest.raises(ValueError, match="load_in_4bit needs a GPU, and torch sees none"):
        check_quantization(FourBit(), adapted=True)
    monkeypatch.setattr("voco_plugin.training.quantization.has_gpu", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes: pip install 'voco_plugin\[qlora\]'"):
        check_quantization(FourBit(), adapted=True)
    with pytest.raises(ValueError, match="quantized weights cannot be trained; add LoRA"):
        check_quantization(FourBit(), adapted=False)
    check_quantization(None, adapted=False)


def test_the_recipe_says_so_before_data_or_model_load(bases, tmp_path, monkeypatch, capsys) -> None:
    from voco_plugin.cli import main

    monkeypatch.setattr("voco_plugin.training.quantization.has_gpu", lambda: False)
    (tmp_path / "none.json").write_text("[]")
    base = bases("llava_llama")
    capsys.readouterr()  # what its making says
    status = main(
        ["train", "llava15_7b_qlora", "--model_name_or_path", base, "--dataset_name",
         str(tmp_path / "none.json"), "--output_dir", str(tmp_path), "--bf16", "false"]
    )  # fmt: skip
    told = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(told) == 1 and "load_in_4bit needs a GPU" in told[0]


def test_the_trainer_says_so_before_the_model_loads(bases, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("voco_plugin.training.quantization.has_gpu", lambda: False)
    monkeypatch.setattr(
        "voco_plugin.training.model_setup.create_model_from_path", lambda *a, **k: pytest.fail()
    )
    args = vp.VoCoSFTConfig(str(tmp_path), voco=vp.VoCoConfig())
    with pytest.raises(ValueError, match="load_in_4bit needs a GPU"):
        vp.VoCoSFTTrainer(
            bases("llava_llama"), args=args, train_dataset=data, quantization_config=FourBit(),
            peft_config=LoraConfig(**LORA),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["llava_llama", "qwen3_vl", "smolvlm"])
def test_only_the_language_models_linear_layers_are_quantized(bases, name) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = language_model_only(FourBit(), bases(name))
    assert FourBit.llm_int8_skip_modules is None, "the caller's config was changed"
    model = tiny.build(name)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    converted = {n for n in linear if should_convert_module(n, config.llm_int8_skip_modules)}
    assert converted == {
        n for n in linear if part_of(n) == "language" and n != "lm_head" and "vision" not in n
    }
    given = FourBit()
    given.llm_int8_skip_modules = ["lm_head"]
    assert language_model_only(given, bases(name)) is given


# -- a checkpoint is put onto the weights that it was trained on
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_an_initialization_that_cannot_be_made_again_is_refused(bases, data, tmp_path, init):
    config = LoraConfig(r=2, target_modules="all-linear")
    config.init_lora_weights = init
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' .* use 'pissa'"):
        trainer(bases("llava_llama"), tmp_path, data, peft=config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_one_that_can_loads_as_it_was_saved(bases, data, tmp_path, init):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=init)
    made = trainer(bases("llava_llama"), tmp_path, data, peft=config)
    made.train()
    made.save_model()
    batch = made.data_collator([data[0]])
    batch.pop("labels")
    model, _ = vp.load(str(tmp_path))
    with torch.no_grad():
        expected = made.model.eval()(**batch).logits
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


# -- the VoCo token's row and what holds its matrix
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llava_llama", {"modules_to_save": ["embed_tokens"]}, r"copies model\.language_model\.embed_tokens"),
        ("llava_llama", {"modules_to_save": ["norm", "tokens"]}, "leave 'tokens' out"),
        ("llava_tied", {"modules_to_save": ["lm_head"]}, "copies lm_head, which is tied to the embedding"),
        ("llava_tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, "leave 'embed_tokens' out"),
        ("llava_llama", {"target_modules": ["q_proj", "embed_tokens"]}, "target_modules adapts model"),
    ],
)
def test_what_would_hold_the_tokens_row_is_refused(bases, data, tmp_path, name, options, message):
    peft = LoraConfig(**{**LORA, **options})
    with pytest.raises(ValueError, match=message):
        trainer(bases(name), tmp_path, data, peft=peft)
    if name == "llava_tied" and options == {"modules_to_save": ["lm_head"]}:
        model, _ = vp.load(bases(name))
        voco = vp.attachment(model).config.token_id
        made = get_peft_model(model, LoraConfig(**{**LORA, **options}, trainable_token_indices=[voco]))
        with pytest.raises(ValueError, match="the adapter holds lm_head twice"):
            trainer(made, tmp_path, data, voco=False)
        assert made.peft_config["default"].modules_to_save == ["lm_head"]


def test_a_head_of_its_own_trains_beside_the_tokens_row(bases, data, tmp_path):
    made = trainer(bases("llava_llama"), tmp_path, data, peft=LoraConfig(**LORA, modules_to_save=["lm_head"]))
    before = weights(made.model)
    made.train()
    made.save_model()
    moved = {name for name, value in weights(made.model).items() if not torch.equal(value, before[name])}
    assert {n for n in moved if "lora" not in n} == {
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default",
    }
    batch = made.data_collator([data[0]])
    batch.pop("labels")
    model, _ = vp.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, made.model.eval()(**batch).logits)

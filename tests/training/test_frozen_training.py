"""``stage1: frozen`` in the trainer: its steps, its store, what it saves, and what it refuses."""

# ruff: noqa: F811  (the fixtures of another test file)

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import LoraConfig

import voco_plugin as vp
from contracts.frozen import by_hand
from trainers import LORA, losses, picture, snapshot, trainer
from videos import write_video
from voco_plugin.cli import main
from voco_plugin.core.attachment import unwrap
from voco_plugin.inference.answering import compress_images, prompt
from voco_plugin.store import VoCoCacheStore
from voco_plugin.training.parts import VISION, ModelParts
from voco_plugin.video.dataset_rows import load_video_dataset

FROZEN = {"stage1": "frozen", "train_voco": False, "assistant_only_loss": True}


@pytest.fixture(scope="module")
def starts(bases, tmp_path_factory):
    """Image VoCo checkpoints on disk, whole: what training on videos starts from."""
    made: dict[str, str] = {}

    def start(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name) / "start")
            model, _ = vp.load(bases(name), voco=vp.VoCoConfig(num_tokens=2))
            model.save_pretrained(made[name])
        return made[name]

    return start


def frozen(start, out, data, **options):
    return trainer(start, out, data, **{**FROZEN, **options})


def perturbed(made):
    """The trainer, its adapter at weights of some size: a fresh one has half of its gradients at 0."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)
    return made


def forwards(made) -> list[int]:
    """Grows by one with each forward of the vision tower."""
    inner = made.accelerator.unwrap_model(made.model).get_base_model()
    (root, *_) = ModelParts(inner).roots(inner, VISION)
    count: list[int] = []
    inner.get_submodule(root).register_forward_hook(lambda *_: count.append(1))
    return count


PLAIN = {
    "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 1,
    "train_sampling_strategy": "sequential", "gradient_checkpointing": True, "stage1_chunk": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3"])
def test_a_step_is_compressed_by_the_start_and_read_with_the_adapter(starts, videos, tmp_path, name):
    made = perturbed(frozen(starts(name), tmp_path, videos, **PLAIN, per_device_train_batch_size=4))
    batch = made.data_collator([videos[i] for i in range(4)])
    labels = batch.pop("labels")
    start, _ = vp.load(starts(name))
    hand = by_hand(start, made.model.eval(), dict(batch), labels) / (labels != -100).sum()
    made.model.zero_grad()
    hand.backward()
    gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.requires_grad}
    before = snapshot(made)
    made.train()
    after = snapshot(made)
    assert losses(made)[0] == pytest.approx(hand.item(), rel=1e-5)
    assert all(torch.equal(before[n], after[n]) for n in before if n not in gradients)
    largest = max(float(g.norm()) for g in gradients.values())
    assert largest > 1e-3
    for n, gradient in gradients.items():  # a step of plain descent at 1e-2; weights round at 1e-8
        assert float((after[n] - before[n] + 1e-2 * gradient).norm()) <= 2e-5 * 1e-2 * largest + 1e-7, n


def test_a_first_step_and_its_evaluation_are_those_of_one_pass(starts, videos, tmp_path):
    found = []
    for stage1 in ("joint", "frozen"):
        made = frozen(
            starts("llava_llama"), tmp_path, videos, **{**PLAIN, "stage1_chunk": None}, stage1=stage1,
            eval_dataset=videos,
        )  # fmt: skip
        evaluated = made.evaluate()["eval_loss"]
        made.train()
        found.append([evaluated, losses(made)[0]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@torch.no_grad()
def read(model, processor) -> torch.Tensor:
    """The logits of a question about two images, compressed by the model itself."""
    images = [picture(40), picture(41)]
    cache = vp.VoCoCache.cat(compress_images(model, processor, images))
    given = prompt(model, processor, ["what is it"], caches=[cache])
    return unwrap(model)(**given).logits.nan_to_num()


def test_what_is_saved_says_so_and_reads_as_it_was_trained(starts, videos, tmp_path, monkeypatch):
    made = frozen(starts("llava_llama"), tmp_path / "out", videos, max_steps=4)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    record = json.loads((tmp_path / "saved" / "voco_config.json").read_text())
    assert record["voco"]["frozen_stage1"] is True
    assert "compressed without the adapter" in (tmp_path / "saved" / "README.md").read_text()
    made.model.eval()
    model, processor = vp.load(tmp_path / "saved")
    assert torch.equal(read(model, processor), read(made.model, made.processing_class))
    inputs = prompt(model, processor, ["what is it"], images=[[picture(40), picture(41)]])
    ours, theirs = (m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (model, made.model))
    assert torch.equal(ours, theirs)
    # another K on the same weights is read the same way
    other, _ = vp.load(tmp_path / "saved", voco=vp.VoCoConfig(num_tokens=3))
    assert vp.attachment(other).config.frozen_stage1 and vp.attachment(other).config.num_tokens == 3
    with pytest.raises(ValueError, match="was not trained with stage1: frozen"):
        vp.load(starts("llava_llama"), voco=vp.VoCoConfig(frozen_stage1=True))
    # a store of the starting model serves it, and the reverse
    start, tools = vp.load(starts("llava_llama"))
    with VoCoCacheStore.for_model(tmp_path / "store", start) as store:
        for image, by in ((picture(40), (start, tools)), (picture(41), (model, processor))):
            store.put(store.key_of(image), next(compress_images(*by, [image])))
    with VoCoCacheStore.for_model(tmp_path / "store", model, readonly=True) as store:
        kept = vp.VoCoCache.cat([store.get(store.key_of(picture(n))) for n in (40, 41)])
    given = prompt(model, processor, ["what is it"], caches=[kept])
    right = read(model, processor)
    with torch.no_grad():  # there both images shared a forward
        assert torch.allclose(unwrap(model)(**given).logits.nan_to_num(), right, atol=1e-5)
    # conversations are the reader's: the starting model does not go on with them
    session = vp.VoCoSession(model, processor)
    session.add(picture(40)).ask("what is it", max_new_tokens=2)
    session.add(picture(41)).save(tmp_path / "talk")
    again = vp.VoCoSession.load(tmp_path / "talk", model, processor)
    assert again.ask("what", max_new_tokens=3) == session.ask("what", max_new_tokens=3)
    with pytest.raises(ValueError, match="adapter is"):
        vp.VoCoSession.load(tmp_path / "talk", start, tools)
    # and stage 1 with the adapter on would be another model
    monkeypatch.setattr("voco_plugin.core.adapter_switch.running_forward", lambda: None)
    assert float((read(model, processor) - right).abs().max()) > 1e-3


def images_of(data):
    return [image for row in data for image in row["images"]]


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_with_a_store_the_second_epoch_runs_no_stage_one(starts, videos, tmp_path, name):
    options = {"num_train_epochs": 2, "max_steps": -1, "gradient_checkpointing": True, "learning_rate": 1e-3}
    plain = frozen(starts(name), tmp_path / "a", videos, **options)
    plain.train()
    stored = frozen(starts(name), tmp_path / "b", videos, **options, stage1_store=str(tmp_path / "store"))
    count, by_step = forwards(stored), []
    stored.model.register_forward_pre_hook(lambda *_: by_step.append(len(count)))
    stored.train()
    assert losses(stored) == pytest.approx(losses(plain), rel=1e-5) and len(losses(plain)) == 8
    assert by_step[4] == len(count) > 0, "the second epoch ran the tower"
    with VoCoCacheStore(tmp_path / "store") as store:
        assert len(store) == len(images_of(videos))
    # a second run reads from its first step on
    more = frozen(starts(name), tmp_path / "c", videos, **options, stage1_store=str(tmp_path / "store"))
    count = forwards(more)
    more.train()
    assert not count and losses(more) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("elastic", [None, [2, 3]])
def test_a_store_that_the_starting_model_filled_serves(starts, videos, tmp_path, elastic):
    model, processor = vp.load(starts("llava_llama"))
    with VoCoCacheStore.for_model(tmp_path / "store", model) as store:
        for k in elastic or [2]:
            made = compress_images(model, processor, images_of(videos), num_tokens=k)
            store.put_many((store.key_of(i, k), c) for i, c in zip(images_of(videos), made, strict=True))
        before = len(store)
    options = {"num_tokens_range": elastic, "max_steps": 4}
    found = []
    for folder in (tmp_path / "store", None):
        run = frozen(
            starts("llava_llama"), tmp_path / "out", videos, **options,
            stage1_store=None if folder is None else str(folder),
        )  # fmt: skip
        count = forwards(run)
        run.train()
        found.append(losses(run))
        assert bool(count) == (folder is None)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    with VoCoCacheStore(tmp_path / "store") as store:
        assert len(store) == before


def test_a_store_that_cannot_be_written_to_is_read_alone(starts, videos, tmp_path, monkeypatch):
    model, processor = vp.load(starts("llava_llama"))
    first, *_ = images_of(videos)
    with VoCoCacheStore.for_model(tmp_path / "store", model) as store:
        store.put(store.key_of(first), next(compress_images(model, processor, [first])))
    real = os.access
    monkeypatch.setattr(
        "voco_plugin.training.two_stage.trainer_part.os.access",
        lambda path, mode: mode != os.W_OK and real(path, mode),
    )
    made = frozen(starts("llava_llama"), tmp_path / "out", videos, stage1_store=str(tmp_path / "store"))
    made.train()
    with VoCoCacheStore(tmp_path / "store") as store:
        assert len(store) == 1


def test_another_models_store_and_one_of_8_bits_are_refused(starts, bases, videos, tmp_path):
    plain, _ = vp.load(bases("llava_tied"), voco=vp.VoCoConfig(num_tokens=2))
    VoCoCacheStore.for_model(tmp_path / "other", plain).close()
    with pytest.raises(vp.VoCoCacheError, match="model is"):
        frozen(starts("llava_llama"), tmp_path, videos, stage1_store=str(tmp_path / "other"))
    start, _ = vp.load(starts("llava_llama"))
    VoCoCacheStore.for_model(tmp_path / "int8", start, values="int8").close()
    with pytest.raises(ValueError, match="keeps int8 values"):
        frozen(starts("llava_llama"), tmp_path, videos, stage1_store=str(tmp_path / "int8"))


def test_rows_whose_images_are_laid_out_by_their_number_have_no_store(starts, videos, tmp_path):
    """LLaVA-OneVision: the image alone is tiled, and in a row of several it is not."""
    made = frozen(starts("llava_onevision"), tmp_path, videos, max_steps=1)
    made.train()
    made = frozen(starts("llava_onevision"), tmp_path, videos, stage1_store=str(tmp_path / "store"))
    with pytest.raises(ValueError, match="lays an image out by how many share its row"):
        made.train()


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(starts, videos, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["stage1_store"] = str(tmp_path / "store")
    whole = frozen(starts("llava_llama"), tmp_path / "whole", videos, **options)
    whole.train()
    resumed = frozen(starts("llava_llama"), tmp_path / "resumed", videos, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    model, _ = vp.load(tmp_path / "whole" / "checkpoint-2")
    assert vp.attachment(model).config.frozen_stage1


def test_training_goes_on_from_a_frozen_model_frozen_only(starts, videos, tmp_path):
    first = frozen(starts("llava_llama"), tmp_path / "a", videos)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    second = frozen(str(tmp_path / "saved"), tmp_path / "b", videos, peft=False, voco=False, max_steps=1)
    second.train()
    assert losses(second)[0] < losses(first)[0]
    for more, message in (
        ({"stage1": "joint", "peft": False, "voco": False}, "only stage1=frozen trains on from it"),
        ({"stage1": "streamed", "peft": False}, "only stage1=frozen trains on from it"),
        ({}, "leave use_peft"),
    ):
        with pytest.raises(ValueError, match=message):
            frozen(str(tmp_path / "saved"), tmp_path / "c", videos, **more)
    joint = trainer(starts("llava_llama"), tmp_path / "d", videos, assistant_only_loss=True)
    joint.train()
    joint.save_model(str(tmp_path / "joint"))
    with pytest.raises(ValueError, match="the adapter given was trained with stage 1"):
        frozen(str(tmp_path / "joint"), tmp_path / "e", videos, peft=False, voco=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": False}, "needs an adapter"),
        ({"train_voco": True}, "train_voco is true; set train_voco: false"),
        ({"train_projector": True}, "train_projector is true"),
        ({"train_vision_tower": True}, "train_vision_tower is true"),
        ({"peft": LoraConfig(**{**LORA, "modules_to_save": ["lm_head"]})}, "modules_to_save.* would train"),
        ({"peft": LoraConfig(**{**LORA, "bias": "all"})}, "bias would train"),
        ({"peft": LoraConfig(**{**LORA, "trainable_token_indices": [3]})}, "tokens_delta.* would train"),
        ({"peft": LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj)")}, "vision.* would train"),
        ({"peft": LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")}, "is another"),
        ({"voco": vp.VoCoConfig(rule="star")}, "needs voco.rule='isolated', not 'star'"),
        ({"voco": None}, "voco is null"),
        ({"distill": {"teacher": "base"}}, "leave distill out"),
        ({"packing": True, "max_length": 256}, "packing=True"),
        ({"stage1": "streamed", "stage1_store": "x"}, "stage1_store='x' is for stage1=frozen"),
        ({"stage1": "streamed", "voco": vp.VoCoConfig(frozen_stage1=True)}, "only stage1=frozen"),
    ],
)  # fmt: skip
def test_what_it_cannot_honour_is_refused(bases, videos, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        frozen(bases("llava_llama"), tmp_path, videos, **options)


def test_from_a_recipe(starts, tmp_path, monkeypatch, capsys):
    """`voco compress` with the starting model, `voco train`, `voco generate` from the same store."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(4):
        picture(number).save(f"images/{number}.png")
        says = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": says})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    values = {
        "model_name_or_path": starts("llava_llama"), "dataset_name": "data.json", "image_folder": "images",
        "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "voco": {"num_tokens": 2},
        "output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True,
        "report_to": [], "assistant_only_loss": True, "disable_tqdm": True, "train_voco": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["compress", starts("llava_llama"), "images", "--store", "caches"]) == 0
    with VoCoCacheStore("caches") as store:
        before = set(store)
    assert main(["train", "recipe.yaml", "--stage1", "frozen", "--stage1_store", "caches"]) == 0
    with VoCoCacheStore("caches") as store:
        assert set(store) == before and len(before) == 4
    capsys.readouterr()
    ask = ["--image", "images/0.png", "--question", "what is it", "--max-new-tokens", "3"]
    assert main(["generate", "out", "--store", "caches", *ask]) == 0
    kept = capsys.readouterr().out
    assert main(["generate", "out", *ask]) == 0
    assert capsys.readouterr().out == kept
    assert main(["train", "recipe.yaml", "--stage1", "frozen", "--train_voco", "true"]) == 2
    assert "train_voco is true" in capsys.readouterr().err


def test_a_compressed_video_file_serves_a_training_on_that_file(starts, tmp_path, monkeypatch):
    """`voco compress VIDEO --fps 2 --store`, then training on the file at 2 frames a second: no stage 1."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install 'voco_plugin[video]'")
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "pan.mp4")
    assert main(["compress", starts("llava_llama"), "pan.mp4", "--fps", "2", "--store", "caches"]) == 0
    with VoCoCacheStore("caches") as store:
        before = set(store)
    row = {"video_id": "pan", "q": "what is it", "a": "red"}
    (tmp_path / "qa.json").write_text(json.dumps([row] * 2))
    for fps, new in ((2.0, False), (4.0, True)):
        rows = load_video_dataset(["qa.json"], str(tmp_path), fps=fps)
        made = frozen(starts("llava_llama"), tmp_path / "out", rows, max_steps=1, stage1_store="caches")
        ran = forwards(made)
        made.train()
        with VoCoCacheStore("caches") as store:
            assert bool(ran) == new and (set(store) > before if new else set(store) == before)
    assert len(before) == 6

"""``stage1: streamed`` in the trainer: the steps of ``joint``, with everything that a training has; what it
cannot honour is refused in a line.
"""

# ruff: noqa: F811  (the fixtures of another test file)

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from compressor_kinds import voco
from trainers import losses, snapshot, trainer


def step(bases, videos, out, stage1, name="llava_llama", peft=True, **options):
    """The log of one step of plain gradient descent, and how each weight moved: its gradient."""
    options = {"max_steps": 1, "gradient_checkpointing": True, "assistant_only_loss": True, **options}
    made = trainer(
        bases(name), out, videos, peft=peft, stage1=stage1, optim="sgd", max_grad_norm=0.0,
        learning_rate=1e-2, lr_scheduler_type="constant", train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # an adapter starts at 0, and half of its gradients with it
        for weight in made.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.1)
    before = snapshot(made)
    made.train()
    after = snapshot(made)
    return made.state.log_history[0], {n: after[n] - before[n] for n in before}


def same(one, other, tolerance=2e-5):
    (log, moved), (its, theirs) = one, other
    logged = {"loss", "entropy", "mean_token_accuracy", "num_tokens", "compression_ratio", "isolation"}
    for key in (*logged, "voco_tokens_per_sample"):
        assert log[key] == pytest.approx(its[key], rel=1e-5), key
    largest = max(float(m.norm()) for m in moved.values())
    assert largest > 1e-4
    for name, delta in moved.items():
        assert float((theirs[name] - delta).norm()) <= tolerance * largest, name


WAYS = {
    "lora": {},
    "lora-projector": {"train_projector": True},
    "lora-tower": {"train_vision_tower": True},
    "lora-no-row": {"train_voco": False},
    "full": {"peft": False},
    "full-projector-tower": {"peft": False, "train_projector": True, "train_vision_tower": True},
    "accumulated": {"gradient_accumulation_steps": 4},
    "no-checkpointing": {"gradient_checkpointing": False},
    "pooled": {"voco": vp.VoCoConfig(num_tokens=2, token_init="pooled")},
    "queries": {"voco": voco("queries")},
    "sequential": {"voco": vp.VoCoConfig(num_tokens=2, positions="sequential"), "stage1_chunk": 1},
    "elastic": {"num_tokens_range": [1, 4]},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_one_pass(bases, videos, tmp_path, way):
    options = dict(WAYS[way])
    chunk = {"stage1_chunk": options.pop("stage1_chunk", 2)}
    joint = step(bases, videos, tmp_path, "joint", **options)
    same(joint, step(bases, videos, tmp_path, "streamed", **options, **chunk))


@pytest.mark.parametrize("name", ["llava_tied", "qwen2_5_vl", "gemma3"])
def test_so_for_other_families(bases, videos, tmp_path, name):
    joint = step(bases, videos, tmp_path, "joint", name)
    same(joint, step(bases, videos, tmp_path, "streamed", name, stage1_chunk=4))


def test_however_the_batch_is_accumulated_the_step_is_the_same(bases, videos, tmp_path):
    """Trainer counts the answer tokens of all micro-batches."""
    sizes = ({"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 4})
    one, four = (step(bases, videos, tmp_path, "streamed", stage1_chunk=3, **more) for more in sizes)
    assert one[0]["loss"] == pytest.approx(four[0]["loss"], rel=1e-5)
    largest = max(float(m.norm()) for m in one[1].values())
    assert all(float((four[1][n] - m).norm()) <= 2e-5 * largest for n, m in one[1].items())


def test_an_evaluation_has_the_loss_of_one_pass(bases, videos, tmp_path):
    options = {"eval_dataset": videos, "eval_strategy": "steps", "eval_steps": 1, "assistant_only_loss": True}
    found = []
    for stage1 in ("joint", "streamed"):
        made = trainer(bases("llava_llama"), tmp_path, videos, stage1=stage1, **options)
        found.append(made.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_it_trains(bases, videos, tmp_path):
    options = {"stage1": "streamed", "stage1_chunk": 2, "max_steps": 12, "assistant_only_loss": True}
    made = trainer(bases("llava_llama"), tmp_path, videos, **options)
    made.train()
    assert sum(losses(made)[-4:]) < 0.8 * sum(losses(made)[:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voco": vp.VoCoConfig(rule="star")}, "needs voco.rule='isolated', not 'star'"),
        ({"voco": vp.VoCoConfig(block_context="prefix")}, "needs voco.block_context='self', not 'prefix'"),
        ({"voco": vp.VoCoConfig(compressor="avg_pool")}, "needs voco.compressor='voco', not 'avg_pool'"),
        ({"voco": None}, "voco is null"),
        ({"packing": True, "max_length": 256}, "packing=True"),
        ({"distill": {"teacher": "base"}}, "leave distill out"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant",
        ),
        ({"stage1_chunk": 0}, "stage1_chunk=0 must be at least 1"),
        ({"stage1": "streaming"}, r"stage1='streaming' is not known \(did you mean 'streamed'\?\)"),
        ({"stage1": "joint", "stage1_chunk": 4}, "stage1_chunk=4 is for stage1=streamed"),
    ],
)
def test_what_it_cannot_honour_is_refused(bases, videos, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(bases("llava_llama"), tmp_path, videos, **{"stage1": "streamed", **options})


def test_labels_of_image_tokens_are_refused(bases, videos, tmp_path):
    made = trainer(bases("llava_llama"), tmp_path, videos, stage1="streamed")
    with pytest.raises(ValueError, match="image tokens have labels .* set assistant_only_loss=True"):
        made.train()

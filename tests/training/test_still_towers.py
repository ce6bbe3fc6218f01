"""What is frozen of the vision tower stays in evaluation mode while the rest trains: batch normalization and
dropout there do what they do in an answer.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import tiny
from tiny import processors
from trainers import rows, trainer
from voco_plugin.training.parts import keep_still


class Normed(nn.Module):
    """A norm that a convolutional tower would have, and dropout, after one of a CLIP tower."""

    def __init__(self, before: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.batch, self.dropout = before, nn.BatchNorm1d(width), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.batch(self.before(x).transpose(1, 2)).transpose(1, 2))


def made(tmp_path, **options):
    model = tiny.build("llava_llama")
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    tower.pre_layrnorm = Normed(tower.pre_layrnorm, model.config.vision_config.hidden_size)
    processor = processors.processor("llava_llama")
    return trainer(model, tmp_path, rows(), processing_class=processor, **options), tower.pre_layrnorm


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_computes_in_training_what_it_computes_in_an_answer(tmp_path, checkpointing):
    lora = {"more": {}, "gradient_checkpointing": checkpointing}
    run, norm = made(tmp_path, **lora)
    language = run.model.get_base_model().get_decoder()
    before = {key: value.clone() for key, value in norm.batch.state_dict().items()}
    seen = []

    def look(module, given, output):
        alone = Normed.forward(norm, *given)
        seen.append(
            (torch.equal(output, alone), norm.training, language.training, language.layers[0].training)
        )

    norm.register_forward_hook(look)
    run.train()
    assert len(seen) >= 3 and set(seen) == {(True, False, True, True)}
    assert all(torch.equal(value, before[key]) for key, value in norm.batch.state_dict().items())


def test_a_tower_that_trains_is_in_training_mode(tmp_path):
    run, norm = made(tmp_path, peft=False, train_vision_tower=True)
    before, modes = norm.batch.running_mean.clone(), set()
    norm.register_forward_hook(lambda *_: modes.add((norm.batch.training, norm.dropout.training)))
    run.train()
    assert modes == {(True, True)} and not torch.equal(before, norm.batch.running_mean)


def test_a_batch_norm_that_stays_frozen_in_a_tower_with_adapters(tmp_path):
    """Its running statistics would not be saved."""
    run, norm = made(tmp_path, train_vision_tower=True)
    before, modes = norm.batch.running_mean.clone(), set()
    norm.register_forward_hook(lambda *_: modes.add(norm.batch.training))
    run.train()
    assert modes == {False} and torch.equal(before, norm.batch.running_mean)


def test_what_a_callback_thaws_trains_from_then_on(tmp_path):
    run, norm = made(tmp_path, peft=False)
    modes = []
    norm.register_forward_hook(lambda *_: modes.append(norm.batch.training))

    class Thaw(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            norm.requires_grad_(True)

    run.add_callback(Thaw())
    run.train()
    assert modes[0] is False and modes[-1] is True


def test_so_under_a_trainer_that_is_not_ours(tmp_path):
    """What the plug-ins of other trainers do: any loop that says ``model.train()``."""
    run, norm = made(tmp_path)
    model, modes = run.model, []
    keep_still(model)
    norm.register_forward_hook(lambda *_: modes.append((norm.batch.training, norm.dropout.training)))
    before, batch = norm.batch.running_mean.clone(), next(iter(run.get_train_dataloader()))
    for thawed in (False, True):
        norm.requires_grad_(thawed)
        model.train()
        model(**batch).loss.backward()
        assert torch.equal(before, norm.batch.running_mean) is not thawed
    assert modes == [(False, False), (True, True)] and model.get_base_model().get_decoder().training

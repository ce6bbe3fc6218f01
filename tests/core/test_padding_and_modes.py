"""``evaluating`` gives every module back the mode it had; padding is told by one rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from voco_plugin.core.attachment import evaluating
from voco_plugin.core.layout import pad_id_of, pad_id_of_model, padding_side_of


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_is_in_its_own_mode_again(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1].eval()  # a frozen part
    model[1][0].train()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("mask", "side"),
    [(None, None), ([[1, 1]], None), ([[1, 0], [1, 1]], "right"), ([[1, 1], [0, 1]], "left")],
)
def test_the_side_of_padding_is_read_where_there_is_padding(mask, side: str | None) -> None:
    assert padding_side_of(None if mask is None else torch.tensor(mask)) == side


@pytest.mark.parametrize(("pad", "expected"), [(7, 7), (0, 0), (None, 0), (-1, 0)])
def test_without_a_padding_id_0_stands_in(pad, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad)
    assert pad_id_of(tokenizer) == pad_id_of(SimpleNamespace(tokenizer=tokenizer)) == expected
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: tokenizer))
    assert pad_id_of_model(model) == expected

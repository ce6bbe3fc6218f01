"""What benchmarks/options.yaml says of the training options that meet VoCo tokens, tried on a tiny model: the
loss moves where an option is to move it, and stays where it is not.
"""

from __future__ import annotations

from functools import cache

import pytest
import yaml

from paths import ROOT
from tiny import build, processors
from trainers import losses, rows, trainer

ANSWERS = {"assistant_only_loss": True}
PACKED = {"packing": True, "max_length": 200}
STREAMED = {"stage1": "streamed", **ANSWERS}
FROZEN = {"stage1": "frozen", "train_voco": False, **ANSWERS}
TAUGHT = {"distill": {"teacher": "base"}}
BASIS = ({}, ANSWERS, PACKED, STREAMED, FROZEN, TAUGHT)

# (what is on already, the option) → whether the losses are others
MOVES = [
    ({}, {"max_length": 38}),
    ({}, ANSWERS),
    ({}, PACKED),
    ({}, TAUGHT),
    ({}, {"neftune_noise_alpha": 50.0}),
    ({}, {"label_smoothing_factor": 0.2}),
    ({}, {"train_sampling_strategy": "sequential"}),
    ({}, {"gradient_accumulation_steps": 2}),
    ({}, {"data_seed": 5}),
    *((basis, {"loss_type": "dft"}) for basis in BASIS),
    *((basis, {"neftune_noise_alpha": 50.0}) for basis in (PACKED, STREAMED, FROZEN, TAUGHT)),
    (PACKED, {"label_smoothing_factor": 0.2}),
    (PACKED, ANSWERS),
]
STAYS = [
    ({}, {"pad_to_multiple_of": 64}),
    (PACKED, {"pad_to_multiple_of": 64}),
    ({}, {"gradient_checkpointing": True}),
    (STREAMED, {"gradient_checkpointing": True}),
    pytest.param({}, {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    ({}, {"remove_unused_columns": False}),
    ({}, {"average_tokens_across_devices": False}),
    ({}, {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    ({}, {"include_num_input_tokens_seen": "all"}),
    ({}, {"use_cache": True}),
    ({}, {"dataset_num_proc": 2}),
    ({}, {"auto_find_batch_size": True}),
    ({}, {"eos_token": "</s>"}),
    ({}, {"optim": "adamw_torch"}),
    (ANSWERS, {"stage1": "streamed"}),
    ({**ANSWERS, "loss_type": "dft"}, {"stage1": "streamed"}),
]
REFUSED = [
    ({}, {"padding_free": True}, "Padding-free"),
    ({}, {"truncation_mode": "keep_end", "max_length": 40}, "keep_end"),
    ({}, {"completion_only_loss": True}, "completion_only_loss"),
    ({}, {"eos_token": "<nope>"}, "<nope>"),
    ({}, {"loss_type": "foo"}, "foo"),
    ({}, {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
    (PACKED, {"packing_strategy": "wrapped"}, "packing_strategy='wrapped'"),
    (PACKED, {"eval_packing": True}, "eval_packing=True"),
    (PACKED, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
    (STREAMED, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    (FROZEN, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    (TAUGHT, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    (STREAMED, PACKED, "packing=True"),
    (STREAMED, TAUGHT, "distill"),
]
DATA = rows()


def ran(folder, options: dict) -> list[float]:
    words = processors.processor("qwen2_5_vl")
    made = trainer(build("qwen2_5_vl"), folder, DATA, processing_class=words, seed=1, **options)
    made.train()
    return losses(made)


@cache
def before(folder, basis: str) -> list[float]:
    return ran(folder, yaml.safe_load(basis))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


def named(value) -> str:
    return "+".join(value) or "plain" if isinstance(value, dict) else ""


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("basis", "option"), MOVES, ids=named)
def test_it_moves_the_loss(folder, basis, option):
    found = ran(folder, {**basis, **option})
    assert found != pytest.approx(before(folder, yaml.safe_dump(basis)), abs=1e-4)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("basis", "option"), STAYS, ids=named)
def test_it_leaves_the_loss_as_it_is(folder, basis, option):
    found = ran(folder, {**basis, **option})
    assert found == pytest.approx(before(folder, yaml.safe_dump(basis)), abs=1e-4)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("basis", "option", "message"), REFUSED, ids=named)
def test_it_is_refused(folder, basis, option, message):
    with pytest.raises(ValueError, match=message):
        ran(folder, {**basis, **option})


def test_what_is_tried_is_in_the_table():
    said = yaml.safe_load((ROOT / "benchmarks" / "options.yaml").read_text(encoding="utf-8"))["training"]
    known = {name for group in said for name in group["fields"]}
    tried = [getattr(case, "values", case) for case in (*MOVES, *STAYS, *REFUSED)]
    assert {name for case in tried for name in case[1]} <= known

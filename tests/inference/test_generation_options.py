"""What benchmarks/options.yaml says of an option of generation is what happens: in one pass, in two stages,
from a cache, with the setting as an argument and in a config.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import FunctionType

import pytest
import torch
import transformers as hf
import yaml

from generation_options import FEW, TRIES, Case
from harness import attached
from paths import ROOT

TABLE = yaml.safe_load((ROOT / "benchmarks" / "options.yaml").read_text(encoding="utf-8"))
SAID = {**TABLE["generation"], **TABLE["arguments"]}
ELSEWHERE = {"inputs", "generation_config", "past_key_values"}
"""Tried below, and in tests/inference/test_generation_settings.py."""
QUICK = {
    "max_length",
    "repetition_penalty",
    "guidance_scale",
    "num_return_sequences",
    "token_healing",
    "typo",
}
SETTINGS = {name for name in vars(hf.GenerationConfig()) if not name.startswith("_")}
OTHER_TOKENS = {"assistant_ensemble_weight"}
"""The table says why two stages answer otherwise."""
OUTPUTS = {"output_attentions": "attentions", "output_hidden_states": "hidden_states"}


@cache
def case(one_row: bool) -> Case:
    return Case(attached("llava_llama", attn="eager"), one_row)


def test_every_option_that_does_something_is_tried():
    done = {name for name, cells in SAID.items() if set(cells[:2]) != {"nothing"}}
    assert done - ELSEWHERE - set(TRIES) == set()
    assert set(TRIES) <= set(SAID)


def marked(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [marked(name) for name in TRIES])
def test_it_does_what_the_table_says(name):
    tried, (one_pass, two_stages) = TRIES[name], SAID[name][:2]
    made = case(tried.one_row)
    beside = tried.beside(made) if callable(tried.beside) else tried.beside
    value = tried.value
    if isinstance(value, FunctionType) and name != "custom_generate":
        value = value(made)
    given = {name.replace(" ", "_"): value} if name != "a name that is not known" else {"max_new_token": 3}
    if name in ("max_length", "min_length"):
        given = {"new_length": value}
    with_it = _checked(made, "one pass", one_pass, given, beside)
    if with_it is not None:
        without = made.new("one pass", beside)
        same = without.shape == with_it.shape and torch.equal(without, with_it)
        assert same != tried.shows, "the value tried must show, or the test says nothing"
    for way in ("in two stages", "from a cache"):
        there = _checked(made, way, two_stages, given, beside)
        if there is not None and name not in OTHER_TOKENS:
            expected = made.new("one pass", _plain(beside)) if with_it is None else with_it
            assert torch.equal(there, expected), way
    if name in SETTINGS and "new_length" not in given and two_stages != "upstream":
        settings = {k: v for k, v in {**FEW, **beside, **given}.items() if k in SETTINGS}
        rest = {k: v for k, v in beside.items() if k not in SETTINGS}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = hf.GenerationConfig(**settings)
        there = _from_config(made, config, rest, two_stages)
        if there is not None and name not in OTHER_TOKENS:
            expected = made.new("one pass", _plain(beside)) if with_it is None else with_it
            assert torch.equal(there, expected), "in a config"


def _plain(beside: dict) -> dict:
    """What one pass is given where it does not take the option: static caches are two stages' alone."""
    return {k: v for k, v in beside.items() if k != "cache_implementation"}


def _checked(made: Case, way: str, status: str, given: dict, beside: dict) -> torch.Tensor | None:
    """The new tokens; ``None`` where the option is to be refused, and is, or is nothing that way."""
    if way == "one pass" and status == "nothing":
        return None
    if status in ("refused", "upstream"):
        with pytest.raises((ValueError, TypeError) if status == "upstream" else ValueError):
            made.new(way, {**beside, **given})
        return None
    return made.new(way, {**beside, **given})


def _from_config(made: Case, config: hf.GenerationConfig, rest: dict, status: str) -> torch.Tensor | None:
    torch.manual_seed(0)
    length = made.stream["input_ids"].shape[1]
    if status == "refused":
        with pytest.raises(ValueError):
            made.model.generate(**made.stream, generation_config=config, **rest)
        return None
    out = made.model.generate(**made.stream, generation_config=config, **rest)
    return (out if isinstance(out, torch.Tensor) else out.sequences)[:, length:]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_given_in_two_stages_too(name):
    made = case(False)
    out = made.model.generate(**made.stream, **FEW, **{name: True}, return_dict_in_generate=True)
    assert len(getattr(out, OUTPUTS[name])) == FEW["max_new_tokens"]
    assert len(getattr(out, OUTPUTS[name])[0]) >= made.model.config.get_text_config().num_hidden_layers


def test_a_kv_cache_is_one_pass_and_blocks_decide_theirs():
    made = case(False)
    given = {"past_key_values": hf.DynamicCache()}
    assert torch.equal(made.new("in two stages", given), made.answer)
    with pytest.raises(ValueError, match="past_key_values cannot be given together with voco_cache"):
        made.new("from a cache", given)

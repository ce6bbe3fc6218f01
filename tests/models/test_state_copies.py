"""A model that is copied, pickled, detached, switched to another attention, or given to a trainer is whole
afterwards: itself, and nobody else's.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import pickle
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import TrainerCallback
from trl.trainer import utils as trl_utils

import tiny
import voco_plugin as vp
from harness import RULES, attached, plain, vocabulary
from states import (
    ASKED,
    IN_TWO_STAGES,
    MODES,
    Once,
    World,
    answers,
    ask,
    disturbed,
    equal,
    frozen_world,
    images,
    in_a_thread,
    inner,
    raises,
    run,
    step,
    trained,
    trainer,
    world_of,
)
from tiny import make_inputs, processors, voco_id
from trainers import LORA

PACKAGE = Path(vp.__file__).parent
SOME = ("text", "single-pass", "compress", "generate")
LINEAR = r".*language_model.*\.(q_proj|v_proj)"


# -- what of ours is on a model
# ------------------------------------------------------------------------------------------------------------


def ours(value: Any, depth: int = 6) -> bool:
    """Whether calling ``value``, or what it holds on to, runs code of this package."""
    if depth == 0 or value is None:
        return False
    if isinstance(value, types.MethodType):
        return ours(value.__func__, depth) or _of_ours(type(value.__self__))
    if isinstance(value, functools.partial):
        return ours(value.func, depth - 1)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        wrapped = getattr(value, "__wrapped__", None)
        return (
            PACKAGE in Path(value.__code__.co_filename).parents
            or any(ours(cell, depth - 1) for cell in cells if callable(cell))
            or ours(wrapped, depth - 1)
        )
    return _of_ours(type(value))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _of_ours(kind: type) -> bool:
    return any((base.__module__ or "").split(".")[0] == "voco_plugin" for base in kind.__mro__)


def traces(model: torch.nn.Module) -> list[str]:
    """Where anything of this package stands on ``model`` and its submodules."""
    found = []
    for name, module in model.named_modules():
        if _of_ours(type(module)):
            found.append(f"class of {name or 'the model'}")
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, dict):
                found += [f"{name}.{key}" for hook in value.values() if ours(hook)]
            elif key not in ("_modules", "_parameters", "_buffers") and ("voco" in key or ours(value)):
                found.append(f"{name}.{key}")
        found += [f"{name}.{key}" for key in module._modules if "voco" in key]
    return found


def hooks(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """How many of each kind each submodule has."""
    return {
        name: {
            key: len(value)
            for key, value in vars(module).items()
            if "hooks" in key and value and isinstance(value, dict)
        }
        for name, module in model.named_modules()
    }


@torch.no_grad()
def zero(model: torch.nn.Module) -> list[torch.Tensor]:
    """All weights to 0; what they were."""
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.zero_()
    return before


@torch.no_grad()
def put_back(model: torch.nn.Module, before: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.copy_(value)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_apart(
    model: Any, twin: Any, asked: tuple[str, ...], name: str = "llava_llama", rule="isolated"
) -> None:
    """``twin`` answers as ``model``, each with its own weights."""
    one, two = (world_of(name, inner(m), rule) for m in (model, twin))
    before = answers(one, asked)
    equal(answers(two, asked), before)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert not shared
    weights = zero(model)
    equal(answers(two, asked), before)
    put_back(model, weights)
    zero(twin)
    assert not ask(two, "text")[0].any(), "the copy's logits are not those of its weights, all 0"
    equal(answers(one, asked), before)


# -- copies
# ------------------------------------------------------------------------------------------------------------

KINDS = {
    "isolated": {},
    "pooled": {"token_init": "pooled"},
    "rival": {"compressor": "avg_pool"},
    "segmented": {"attention": "segmented"},
}


@pytest.mark.parametrize("kind", KINDS)
@in_a_thread
def test_a_deep_copy_computes_with_its_own_weights_and_its_own_compressor(kind):
    model = attached("llava_llama", **KINDS[kind])
    check_apart(model, copy.deepcopy(model), SOME)


@in_a_thread
def test_so_does_one_whose_stage_one_is_frozen_and_one_in_peft():
    w = frozen_world()
    check_apart(w.model, copy.deepcopy(w.model), IN_TWO_STAGES)
    peft = get_peft_model(attached("llava_llama"), LoraConfig(r=2, target_modules=LINEAR)).eval()
    check_apart(peft, copy.deepcopy(peft), SOME)


@pytest.mark.parametrize("mode", MODES)
@in_a_thread
def test_a_deep_copy_of_a_trained_model_computes_with_its_own_weights(mode, tmp_path):
    made, _ = trained(mode, tmp_path)
    model = made.model.eval()
    check_apart(model, copy.deepcopy(model), IN_TWO_STAGES if mode == "frozen" else SOME)


@pytest.mark.parametrize("who", ["the original", "the copy"])
@in_a_thread
def test_to_detach_one_leaves_the_other_attached(who):
    model = attached("llava_llama", token_init="pooled")
    text, stock = world_of("llava_llama", model).text, plain("llava_llama")
    before = answers(world_of("llava_llama", model))
    pair = [model, copy.deepcopy(model)]
    gone, left = pair if who == "the original" else pair[::-1]
    vp.detach(gone)
    assert vp.is_attached(left) and not vp.is_attached(gone)
    equal(answers(world_of("llava_llama", left)), before)
    with torch.no_grad():
        equal(gone(**text).logits, stock(**text).logits)
    assert not traces(gone)


@in_a_thread
def test_a_shallow_copy_is_never_left_half_attached():
    """It shares its submodules: detached together, or refused, but never believed to have the rule on."""
    model = attached("llava_llama")
    w = world_of("llava_llama", model)
    before = answers(w)
    twin = copy.copy(model)
    equal(answers(world_of("llava_llama", twin)), before)
    with contextlib.suppress(ValueError):
        vp.detach(twin)
    for one in (model, twin):
        if vp.is_attached(one):
            equal(answers(world_of("llava_llama", one)), before)
        else:
            assert not traces(one)


@in_a_thread
def test_what_a_trainer_notes_on_a_copy_is_not_noted_on_the_original(tmp_path):
    model = tiny.build("llava_llama")
    vp.attach(model, vp.VoCoConfig(num_tokens=2), processors.processor("llava_llama"))
    twin = copy.deepcopy(model)
    trainer(twin, tmp_path, voco=None, **MODES["frozen"])
    assert vp.attachment(twin).config.frozen_stage1 and not vp.attachment(model).config.frozen_stage1
    ask(world_of("llava_llama", model), "single-pass")


# -- pickles
# ------------------------------------------------------------------------------------------------------------


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_processor(name: str = "llava_llama") -> Any:
    return vp.attach(plain(name), vp.VoCoConfig(num_tokens=2), processors.processor(name))


def in_peft(name: str = "llava_llama") -> Any:
    return get_peft_model(attached(name), LoraConfig(r=2, target_modules=LINEAR)).eval()


QWEN = "qwen2_5_vl"
"""transformers 5.24 does not pickle a LLaVA that has run (its hooks are local functions), nor run one where
none was ever built (it keeps a register of the classes that were).
"""
PICKLED = {
    "attached": lambda: attached(QWEN),
    "pooled": lambda: attached(QWEN, token_init="pooled"),
    "processor": lambda: with_processor(QWEN),
    "peft": lambda: in_peft(QWEN),
}


@pytest.mark.parametrize("through", [through_pickle, through_torch])
@pytest.mark.parametrize("kind", PICKLED)
@in_a_thread
def test_a_pickled_model_is_loaded_attached_and_gives_the_same(kind, through):
    model = PICKLED[kind]()
    answers(world_of(QWEN, inner(model)), SOME)  # nothing that a pickle does not take stays behind
    again = through(model)
    assert vp.is_attached(again) and type(inner(again)).__name__ == type(inner(model)).__name__
    assert vp.attachment(again).config == vp.attachment(model).config
    check_apart(model, again, SOME, QWEN)
    if kind != "peft":
        vp.detach(again)
        assert vp.is_attached(model) and not traces(again)


LOADED = """
import pickle, sys, torch
folder, kinds = sys.argv[1], sys.argv[2:]
for kind in kinds:
    if kind.endswith(".pt"):
        model = torch.load(f"{folder}/{kind}", weights_only=False)
    else:
        with open(f"{folder}/{kind}", "rb") as file:
            model = pickle.load(file)
    batch, expected = torch.load(f"{folder}/{kind}.expected", weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected), kind
        assert len(model.compress(**batch)) == 3, kind
"""


@in_a_thread
def test_it_loads_in_a_process_that_has_not_imported_this_package(tmp_path):
    """`torch.save` on one machine, `torch.load` on another; `spawn`, for a worker."""
    kinds = []
    for kind, make in PICKLED.items():
        model = make()
        w = world_of(QWEN, inner(model))
        name = f"{kind}.pt" if kind in ("attached", "peft") else kind
        torch.save((w.batch, ask(w, "single-pass")[0]), tmp_path / f"{name}.expected")
        if name.endswith(".pt"):
            torch.save(model, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(model))
        kinds.append(name)
    command = [sys.executable, "-c", LOADED, str(tmp_path), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-2000:]


# -- detached
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [("llava_llama", "pooled"), ("qwen2_5_vl", "isolated"), ("gemma3", "isolated"), ("llama4", "isolated")],
)
@in_a_thread
def test_nothing_of_this_package_stays_on_a_detached_model(name, rule):
    model = plain(name)
    mended = traces(model)  # the tiny Llama 4's own mend
    with torch.no_grad():
        model(**make_inputs(name, [["bos", "img", "t3"]]))  # transformers' own marks
    before, keys = hooks(model), {n: set(vars(m)) for n, m in model.named_modules()}
    options = vp.VoCoConfig(token_id=voco_id(name), **RULES[rule])
    vp.attach(model, options, vocabulary=vocabulary(name, model, options))
    answers(world_of(name, model, rule), ("text", "single-pass", "compress", "generate"))
    assert traces(model) != mended
    vp.detach(model)
    assert traces(model) == mended
    assert {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert hooks(model) == before


@pytest.mark.parametrize("mode", ["joint", "streamed", "distill"])
@in_a_thread
@torch.no_grad()
def test_a_trained_model_that_is_detached_is_a_plain_one(mode, tmp_path):
    """Trained without PEFT, at a rate of 0: its weights are what they were."""
    options = {"streamed": {"stage1": "streamed"}, "distill": {"distill": {"teacher": "frozen"}}}.get(
        mode, {}
    )
    model, stock = tiny.build("llava_llama"), tiny.build("llava_llama")
    made = trainer(model, tmp_path, peft=False, **options)
    with torch.enable_grad():
        run(made)
    assert vp.detach(model) is model and type(model) is type(stock) and not vp.is_attached(model)
    text = make_inputs("llava_llama", [["bos", "t6"], ["bos", "t3"]], "left")
    equal(model.eval()(**text).logits, stock(**text).logits)
    equal(model.generate(**text, max_new_tokens=3), stock.generate(**text, max_new_tokens=3))
    equal(bits(model), bits(stock))
    assert not traces(model)


def lora_on_a_new_row() -> tuple[Any, Any]:
    """The token needed a row of its own; LoRA knows nothing of it."""
    return get_peft_model(with_processor(), LoraConfig(r=2, target_modules=LINEAR)), plain("llava_llama")


def lora_on_a_spare_row() -> tuple[Any, Any]:
    return in_peft(), plain("llava_llama")


def lora_with_the_row() -> tuple[Any, Any]:
    model = with_processor()
    row = vp.attachment(model).vocab.voco_id
    config = LoraConfig(r=2, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [row]})
    return get_peft_model(model, config), plain("llava_llama")


WRAPPED = {
    "lora": lora_on_a_new_row,
    "lora-spare-row": lora_on_a_spare_row,
    "lora-and-row": lora_with_the_row,
}


@pytest.mark.parametrize("kind", [*WRAPPED, "trained"])
@in_a_thread
@torch.no_grad()
def test_a_model_in_peft_is_detached_whole_or_not_at_all(kind, tmp_path):
    if kind == "trained":
        stock, made = plain("llava_llama"), trainer(tiny.build("llava_llama"), tmp_path)
        peft = made.model
    else:
        peft, stock = WRAPPED[kind]()
    model = inner(peft.eval())
    weights = {name: p.detach().clone() for name, p in peft.named_parameters()}
    w = world_of("llava_llama", model)
    before = answers(w)
    try:
        vp.detach(peft)
    except ValueError:
        assert vp.is_attached(peft)
        equal({name: p.detach() for name, p in peft.named_parameters()}, weights)
        equal(answers(world_of("llava_llama", model)), before)
        return
    assert not vp.is_attached(peft) and type(model) is type(stock)
    text = make_inputs("llava_llama", [["bos", "t6"], ["bos", "t3"]], "left")
    equal(peft(**text).logits, stock(**text).logits)  # a fresh adapter changes nothing
    base = peft.unload()
    equal(bits(base), bits(stock))
    assert not traces(base)


# -- attention
# ------------------------------------------------------------------------------------------------------------


def attention_world(attn: str = "sdpa", **options: Any) -> World:
    """One row: what stands at padding differs between implementations."""
    model = attached("llava_llama", attn=attn, **options)
    return world_of(
        "llava_llama", model, rows=[["bos", "t2", "img", "c2", "t1", "img", "c1", "t5"]], text=[["bos", "t6"]]
    )


def close(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


SEEN = ("text", "single-pass", "compress", "stage-two", "generate")


@pytest.mark.parametrize(
    ("start", "asked", "then"),
    [
        ("sdpa", "eager", "eager"),
        ("eager", "sdpa", "sdpa"),
        ("sdpa", "sdpa", "sdpa"),
        ("sdpa", None, "sdpa"),
        ("sdpa", {"text_config": "eager"}, "eager"),
        ("sdpa", {"": "eager"}, "sdpa"),
        ("sdpa", {"vision_config": "eager"}, "sdpa"),
    ],
    ids=str,
)
@in_a_thread
def test_another_attention_is_taken_with_the_rule_or_refused_when_it_is_asked_for(start, asked, then):
    check_attention(attention_world(start), start, asked, attention_world(then))


@in_a_thread
def test_so_where_long_rows_run_in_segments():
    options = {"attention": "segmented"}
    check_attention(attention_world(**options), "sdpa", "eager", attention_world("eager", **options))


def check_attention(w: World, start: str, asked: Any, then: World) -> None:
    """``w``, attached on ``start``, is asked for ``asked`` and answers as ``then``; or refuses."""
    before, own = answers(w, SEEN), w.model.get_decoder().config._attn_implementation
    try:
        w.model.set_attn_implementation(asked)
    except ValueError:
        assert asked not in ({"": "eager"}, {"vision_config": "eager"}), "this is not the decoder's"
        equal(answers(w, SEEN), before)
        return
    close(answers(w, SEEN), answers(then, SEEN))
    w.model.set_attn_implementation(start)
    close(answers(w, SEEN), before)
    assert w.model.get_decoder().config._attn_implementation == own
    vp.detach(w.model)
    assert w.model.get_decoder().config._attn_implementation == start


@pytest.mark.parametrize(
    "asked", ["flash_attention_2", "flex_attention", "no_such", {"text_config": "flex_attention"}]
)
@in_a_thread
def test_an_attention_that_cannot_keep_the_rule_is_refused_and_changes_nothing(asked):
    w = attention_world()
    before = answers(w)
    configs = [m.config._attn_implementation for m in w.model.modules() if hasattr(m, "config")]
    with pytest.raises((ValueError, ImportError), match="flash|Flash|flex|no_such"):
        w.model.set_attn_implementation(asked)
    assert [m.config._attn_implementation for m in w.model.modules() if hasattr(m, "config")] == configs
    equal(answers(w), before)


@in_a_thread
def test_so_through_peft():
    w = attention_world()
    peft = get_peft_model(w.model, LoraConfig(r=2, target_modules=LINEAR)).eval()
    before = answers(w)
    with contextlib.suppress(ValueError):
        peft.set_attn_implementation("eager")
        before = answers(attention_world("eager"))
    close(answers(w), before)


@pytest.mark.parametrize("what", ASKED)
@in_a_thread
def test_an_attention_written_into_the_config_is_never_silently_without_the_rule(what):
    w = attention_world()
    expected = answers(w, (what,))
    w.model.config._attn_implementation = "eager"
    try:
        found = answers(w, (what,))
    except (ValueError, RuntimeError) as problem:
        assert "isolation rule" in str(problem)
        return
    close(found, expected)


# -- a trainer that is not made
# ------------------------------------------------------------------------------------------------------------


def looks(model: Any, processor: Any) -> dict[str, Any]:
    """All that a constructor may change on what it was given, by what it is."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = vp.attachment(model) if vp.is_attached(model) else None
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        "attached": state is not None,
        "rows": [layer.weight.detach().clone() for layer in embeddings],
        "ours": traces(model),
        "class": type(model),
        "rule": None if state is None else copy.deepcopy(state.config),
        "modules": {name: type(module) for name, module in modules.items()},
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "trains": {name: p.requires_grad for name, p in parameters.items()},
        "mode": {name: module.training for name, module in modules.items()},
        "forwards": {name for name, module in modules.items() if "forward" in vars(module)},
        "hooks": hooks(model),
        "weight hooks": {name for name, p in parameters.items() if p._backward_hooks},
        "config": copy.deepcopy(model.config.to_dict()),
        "checkpointing": [n for n, m in modules.items() if getattr(m, "gradient_checkpointing", False)],
        "tokens": dict(processor.tokenizer.get_vocab()),
        "peft": hasattr(model, "peft_config"),
    }


def changed(before: dict[str, Any], after: dict[str, Any], parts: Sequence[str] | None = None) -> str:
    """The names of what differs."""
    found = []
    for name in before if parts is None else parts:
        try:
            same = name in ("weights", "rows") or before[name] == after[name]
            equal(after[name], before[name]) if name in ("weights", "rows") else None
        except AssertionError:
            same = False
        found += [] if same else [name]
    return ", ".join(found)


class Refuses(TrainerCallback):
    """The last thing that Trainer's own constructor runs."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        raise self.error("not made")


class Interrupted(io.StringIO):
    """Interrupts the last line of the constructor: what trains."""

    def write(self, text: str) -> int:
        if text.startswith("training "):
            raise KeyboardInterrupt("not made")
        return len(text)


def other_store(folder: Path) -> str:
    model = attached("llava_tied")
    vp.VoCoCacheStore.for_model(folder, model).close()
    return str(folder)


def no_images() -> Any:
    return images().remove_columns("images")


FAILS: dict[str, Any] = {
    "its data have no images": lambda out: {"data": no_images()},
    "its data for evaluation are none": lambda out: {"eval_dataset": 5},
    "nothing trains": lambda out: {"peft": False, "train_language": False, "train_voco": False},
    "prefix tuning": lambda out: {"peft": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
    "another model's store": lambda out: {**MODES["frozen"], "stage1_store": other_store(out / "store")},
    "frozen and metrics": lambda out: {**MODES["frozen"], "compute_metrics": lambda found: {}},
    "frozen and no adapter": lambda out: {**MODES["frozen"], "peft": False},
    "frozen and biases": lambda out: {**MODES["frozen"], "peft": LoraConfig(**{**LORA, "bias": "all"})},
    "streamed and smoothed": lambda out: {"stage1": "streamed", "label_smoothing_factor": 0.1},
    "streamed in full and smoothed": lambda out: {
        "stage1": "streamed",
        "label_smoothing_factor": 0.1,
        "peft": False,
    },  # fmt: skip
    "no such teacher": lambda out: {"distill": {"teacher": str(out / "nowhere")}},
    "no base to go back to": lambda out: {"distill": {"teacher": "base"}, "peft": False},
    "a callback fails": lambda out: {"callbacks": [Refuses(RuntimeError)]},
    "ctrl-c": lambda out: {"callbacks": [Refuses(KeyboardInterrupt)], "train_projector": True},
    "ctrl-c in full": lambda out: {"callbacks": [Refuses(KeyboardInterrupt)], "peft": False},
    "ctrl-c with a held row": lambda out: {
        "callbacks": [Refuses(KeyboardInterrupt)],
        "peft": False,
        "train_voco": False,
    },  # fmt: skip
    "ctrl-c while it reports": lambda out: {**MODES["frozen"], "stderr": Interrupted()},
}


RULE = ("attached", "class", "rule", "ours", "forwards", "rows", "tokens")
"""What attaching and this package's stages change."""


@pytest.fixture(scope="module")
def not_made(tmp_path_factory):
    """What a failing constructor was given, and how it looked before and after; each is run once."""

    @cache
    def fail(why: str, given: str) -> tuple[Any, Any, dict, dict]:
        model, its = tiny.build("llava_llama"), processors.processor("llava_llama")
        out = tmp_path_factory.mktemp("out")
        options = FAILS[why](out)
        if given == "an attached one":
            vp.attach(model, vp.VoCoConfig(num_tokens=2), its)
            options = {"voco": None, **options}
        before = looks(model, its)
        with pytest.raises(
            (ValueError, TypeError, RuntimeError, OSError, vp.VoCoCacheError, KeyboardInterrupt)
        ):
            trainer(model, out / "out", processor=its, **options)
        return model, its, before, looks(model, its)

    return fail


@pytest.mark.parametrize("given", ["a plain model", "an attached one"])
@pytest.mark.parametrize("why", FAILS)
@in_a_thread
def test_a_trainer_that_is_not_made_leaves_the_rule_as_it_was(why, given, not_made):
    """Attached or not, the VoCo token and its rows, ``frozen_stage1``, the forwards of the model."""
    _, _, before, after = not_made(why, given)
    assert changed(before, after, RULE) == ""


@pytest.mark.parametrize("given", ["a plain model", "an attached one"])
@pytest.mark.parametrize("why", FAILS)
@in_a_thread
def test_and_all_else_as_it_was_so_that_another_can_be_made(why, given, not_made, tmp_path):
    """Adapters, what trains, modes, hooks and settings."""
    model, its, before, after = not_made(why, given)
    assert changed(before, after) == ""
    made = trainer(model, tmp_path, processor=its, voco=True if given == "a plain model" else None)
    assert vp.is_attached(made.model)


STOPPED_AT = ["resize_token_embeddings", "register_forward_hook", "register_forward_pre_hook", "add_module"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", STOPPED_AT)
@in_a_thread
def test_an_attach_that_was_stopped_leaves_the_model_as_it_was_given(place, error, monkeypatch):
    model, its = tiny.build("llava_llama"), processors.processor("llava_llama")
    before = looks(model, its)
    with monkeypatch.context() as patch:
        for owner in (type(model), torch.nn.Module):
            if hasattr(owner, place):
                patch.setattr(owner, place, lambda *args, **kwargs: raises(error)())
                break
        try:
            vp.attach(model, vp.VoCoConfig(num_tokens=2, token_init="pooled"), its)
        except error:
            pass
        else:
            patch.undo()  # it does without
            vp.detach(model)
    assert changed(before, looks(model, its)) == ""
    vp.attach(model, vp.VoCoConfig(num_tokens=2), its)


# -- TRL's own functions
# ------------------------------------------------------------------------------------------------------------

REPLACED = ("_use_triton", "maybe_gather_lm_head_ctx")


@pytest.mark.parametrize("name", REPLACED)
@in_a_thread
def test_a_function_of_trls_that_is_gone_is_missed_aloud(name, tmp_path, monkeypatch, caplog):
    """Once, when the trainer is made: what it was replaced for is lost."""
    monkeypatch.delattr(trl_utils, name)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        trainer(tiny.build("llava_llama"), tmp_path)
    said = [str(w.message) for w in warned] + [record.getMessage() for record in caplog.records]
    assert len([text for text in said if name in text]) == 1, said


def globals_of(*modules: Any) -> dict[str, int]:
    return {f"{m.__name__}.{key}": id(value) for m in modules for key, value in vars(m).items()}


@in_a_thread
def test_trls_functions_are_its_own_after_a_step_however_it_ended(tmp_path):
    import transformers
    from peft.tuners.trainable_tokens import layer
    from trl.trainer import sft_trainer

    watched = (trl_utils, sft_trainer, layer, layer.TrainableTokensLayer, transformers.PreTrainedModel)
    before = globals_of(*watched)
    made, _ = trained("joint", tmp_path, eval_dataset=images())
    assert globals_of(*watched) == before
    batch = next(iter(made.get_train_dataloader()))
    model = inner(made.model)
    for error in (KeyboardInterrupt, RuntimeError):
        with disturbed(model, "feed-forward", Once(raises(error))), pytest.raises(error):
            step(made, batch)
        assert globals_of(*watched) == before
    with contextlib.redirect_stdout(io.StringIO()):
        made.evaluate()
    assert globals_of(*watched) == before


def test_trls_functions_are_its_own_after_two_threads_have_trained(tmp_path):
    """One goes in first and comes out first."""
    before = globals_of(trl_utils)
    pair = [trained("joint", tmp_path / str(n))[0] for n in range(2)]
    batches = [next(iter(made.get_train_dataloader())) for made in pair]
    inside, go_on = ([threading.Event() for _ in pair] for _ in range(2))

    def train(number: int) -> None:
        def wait() -> None:
            inside[number].set()
            assert go_on[number].wait(60)

        with disturbed(inner(pair[number].model), "feed-forward", Once(wait)):
            step(pair[number], batches[number])

    try:
        with ThreadPoolExecutor(2) as pool:
            running = []
            for number in range(2):
                running.append(pool.submit(train, number))
                assert inside[number].wait(60)
            for number in range(2):
                go_on[number].set()
                running[number].result()
        after = globals_of(trl_utils)
        assert {name for name in before if after.get(name) != before[name]} == set()
    finally:
        from trl.kernels import chunked_logprob

        trl_utils._use_triton = chunked_logprob._use_triton

"""What tests/models/test_state_copies.py holds of models that are copied, pickled, detached, or switched to
another attention; run on broken versions too.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import voco_plugin as vp
from harness import RULES, attached, plain, vocabulary
from states import World, answers, ask, equal, in_a_thread, inner, world_of
from tiny import make_inputs, processors, voco_id

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


def implementations(model: torch.nn.Module) -> list[str]:
    """Of attention: those of each module with a config, the decoder's last."""
    modules = [*(m for m in model.modules() if hasattr(m, "config")), model.get_decoder()]
    return [module.config._attn_implementation for module in modules]


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


@in_a_thread
def a_deep_copy_computes_with_its_own_weights(kind: str) -> None:
    model = attached("llava_llama", **KINDS[kind])
    check_apart(model, copy.deepcopy(model), SOME)


@in_a_thread
def to_detach_one_leaves_the_other_attached(who: str) -> None:
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


@in_a_thread
def a_pickled_model_is_loaded_attached(kind: str, through: Callable[[Any], Any]) -> None:
    model = PICKLED[kind]()
    answers(world_of(QWEN, inner(model)), SOME)  # nothing that a pickle does not take stays behind
    again = through(model)
    assert vp.is_attached(again) and type(inner(again)).__name__ == type(inner(model)).__name__
    assert vp.attachment(again).config == vp.attachment(model).config
    check_apart(model, again, SOME, QWEN)
    if kind != "peft":
        vp.detach(again)
        assert vp.is_attached(model) and not traces(again)


# -- detached
# ------------------------------------------------------------------------------------------------------------


@in_a_thread
def nothing_of_this_package_stays_on_a_detached_model(name: str, rule: str) -> None:
    model = plain(name)
    mended = traces(model)  # the tiny Llama 4's own mend
    with torch.no_grad():
        model(**make_inputs(name, [["bos", "img", "t3"]]))  # transformers' own marks
    before, keys = hooks(model), {n: set(vars(m)) for n, m in model.named_modules()}
    attention = implementations(model)
    options = vp.VoCoConfig(token_id=voco_id(name), **RULES[rule])
    vp.attach(model, options, vocabulary=vocabulary(name, model, options))
    answers(world_of(name, model, rule), ("text", "single-pass", "compress", "generate"))
    assert traces(model) != mended
    vp.detach(model)
    assert traces(model) == mended
    assert {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert hooks(model) == before
    assert implementations(model) == attention


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
    stock = vp.detach(copy.deepcopy(w.model))
    assert implementations(stock)[-1:] == [vp.attachment(then.model).restore["implementation"]]
    w.model.set_attn_implementation(start)
    close(answers(w, SEEN), before)
    assert w.model.get_decoder().config._attn_implementation == own
    vp.detach(w.model)
    assert w.model.get_decoder().config._attn_implementation == start


@in_a_thread
def another_attention_has_the_rule(start: str, asked: str) -> None:
    check_attention(attention_world(start), start, asked, attention_world(asked))

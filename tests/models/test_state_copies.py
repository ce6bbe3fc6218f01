"""A model that is copied, pickled, detached, switched to another attention, or given to a trainer is whole
afterwards: itself, and nobody else's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer import utils as trl_utils

import tiny
import voco_plugin as vp
from contracts import constructor
from contracts import copies as contracts
from contracts.constructor import FAILS, REPLACED, RULE, changed, looks
from contracts.copies import (
    KINDS,
    LINEAR,
    PACKAGE,
    PICKLED,
    QWEN,
    SOME,
    attention_world,
    bits,
    check_apart,
    check_attention,
    close,
    in_peft,
    through_pickle,
    through_torch,
    traces,
    with_processor,
)
from harness import attached, plain
from states import (
    ASKED,
    IN_TWO_STAGES,
    MODES,
    Once,
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
from tiny import make_inputs, processors

# -- copies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@in_a_thread
def test_a_deep_copy_computes_with_its_own_weights_and_its_own_compressor(kind):
    contracts.a_deep_copy_computes_with_its_own_weights(kind)


@in_a_thread
def test_so_does_one_whose_stage_one_is_frozen_and_one_in_peft():
    w = frozen_world()
    check_apart(w.model, copy.deepcopy(w.model), IN_TWO_STAGES)
    peft = get_peft_model(attached("llava_llama"), LoraConfig(r=2, target_modules=LINEAR)).eval()
    check_apart(peft, copy.deepcopy(peft), SOME)


@pytest.mark.parametrize("mode", MODES)
@in_a_thread
def test_a_deep_copy_of_a_trained_model_computes_with_its_own_weights(mode, tmp_path):
    constructor.a_copy_of_a_trained_model_is_apart(mode, tmp_path)


@pytest.mark.parametrize("who", ["the original", "the copy"])
@in_a_thread
def test_to_detach_one_leaves_the_other_attached(who):
    contracts.to_detach_one_leaves_the_other_attached(who)


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


@pytest.mark.parametrize("through", [through_pickle, through_torch])
@pytest.mark.parametrize("kind", PICKLED)
@in_a_thread
def test_a_pickled_model_is_loaded_attached_and_gives_the_same(kind, through):
    contracts.a_pickled_model_is_loaded_attached(kind, through)


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
    contracts.nothing_of_this_package_stays_on_a_detached_model(name, rule)


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


@pytest.fixture(scope="module")
def not_made(tmp_path_factory):
    """What a failing constructor was given, and how it looked before and after; each is run once."""

    @cache
    def fail(why: str, given: str) -> tuple[Any, Any, dict, dict]:
        return constructor.not_made(why, given, tmp_path_factory.mktemp("out"))

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


@pytest.mark.parametrize("given", ["a plain model", "an attached one"])
def test_so_does_one_that_was_stopped_at_its_end(given, tmp_path):
    constructor.a_trainer_stopped_at_its_end_changes_nothing(given, tmp_path)


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


@pytest.mark.parametrize("name", REPLACED)
@in_a_thread
def test_a_function_of_trls_that_is_gone_is_missed_aloud(name, tmp_path):
    """Once, when the trainer is made: what it was replaced for is lost."""
    constructor.a_function_of_trls_that_is_gone_is_missed_aloud(name, tmp_path)


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

"""What other libraries put around an attached model changes nothing in what a forward leaves behind: PEFT,
DDP, FSDP2, ``torch.compile``, gradient checkpointing; and Llama 4, which is its own backbone.

DeepSpeed's ZeRO-3 cuts parameters up and leaves classes and forwards as they are; its trainings run in
tests/training/test_distributed.py, where it is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import voco_plugin as vp
from contracts.copies import LINEAR, SOME, check_apart, traces, zero
from contracts.stopped import nothing_runs
from harness import attached, plain
from states import Once, World, disturbed, equal, in_a_thread, raises, tensors_of, world_of
from voco_plugin._compat import checkpointed_layers_drop_caches
from voco_plugin.core.attachment import unwrap


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """One process that is a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_peft(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=LINEAR)).eval()


def in_ddp(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model)


def in_fsdp2(model: Any) -> Any:
    if torch.__version__.startswith("2.10."):
        pytest.skip("torch 2.10 ends the process where FSDP2 shards in a second thread (docs/decisions.md)")
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checkpointed(model: Any) -> Any:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


WRAPPERS = {
    "peft": in_peft,
    "ddp": in_ddp,
    "fsdp2": in_fsdp2,
    "checkpointed": checkpointed,
    "llama4": lambda model: model,
}


IN_ONE_PASS = ("checkpointed",)
"""transformers gives a layer that is checkpointed no KV cache."""


def wrapped(kind: str) -> tuple[Any, World]:
    name = kind if kind == "llama4" else "llava_llama"
    w = world_of(name, attached(name))
    if kind == "fsdp2":
        w.blocks  # noqa: B018 - its weights are whole in a forward of the model alone
    return WRAPPERS[kind](w.model), w


def batches(kind: str, w: World) -> list[dict[str, Any]]:
    """Text, images in one pass, and their blocks."""
    cached = [] if kind in IN_ONE_PASS else [{**w.stream, "voco_cache": w.blocks}]
    return [w.text, w.batch, *cached]


@torch.no_grad()
def answers(call: Any, asked: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [call(**batch).logits for batch in asked]


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, equal_nan=True)


def check_nothing_runs(kind: str, w: World) -> None:
    nothing_runs(*([] if kind == "fsdp2" else [w]))  # whose decoder alone has no whole weights


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("kind", WRAPPERS)
@in_a_thread
def test_a_stopped_forward_leaves_nothing_behind(kind, error, process_group):
    call, w = wrapped(kind)
    asked = batches(kind, w)
    before = answers(call, asked)
    for batch in asked[1:]:
        for place in ("layer-after", "head"):
            with disturbed(w.model, place, Once(raises(error))), pytest.raises(error, match="stopped here"):
                call(**batch)
            check_nothing_runs(kind, w)
            equal(answers(call, asked), before)


@pytest.mark.parametrize("kind", WRAPPERS)
@in_a_thread
def test_a_forward_that_fails_inside_another_leaves_the_other_as_it_was(kind, process_group):
    call, w = wrapped(kind)
    asked = batches(kind, w)
    before = answers(call, asked)

    def fails() -> None:
        """The one inside passes the same place, and is stopped there."""
        once.act, once.at = raises(KeyboardInterrupt), 2
        with torch.no_grad(), pytest.raises(KeyboardInterrupt, match="stopped here"):
            call(**w.batch)

    for place in ("tower", "layer-after"):
        once = Once(fails)
        with disturbed(w.model, place, once):
            found = answers(call, [w.batch])
        assert once.calls == 2
        equal(found, before[1:2])
        check_nothing_runs(kind, w)
        equal(answers(call, asked), before)


@in_a_thread
def test_gradients_through_ddp_after_a_step_that_was_stopped(process_group):
    """In its forward, or while layers are recomputed in its backward."""
    w = world_of("llava_llama", checkpointed(attached("llava_llama")))
    w.model.requires_grad_(False).get_decoder().requires_grad_(True)  # a tower's last layer is not read
    call = in_ddp(w.model)
    labels = w.batch["input_ids"].masked_fill(w.batch["attention_mask"] == 0, -100)

    def gradients() -> list[torch.Tensor]:
        call.zero_grad()
        call(**w.batch, labels=labels).loss.backward()
        return [p.grad.clone() for p in call.parameters() if p.grad is not None]

    before = gradients()
    for at in (1, 2):
        with disturbed(w.model, "feed-forward", Once(raises(KeyboardInterrupt), at)):
            with pytest.raises(KeyboardInterrupt):
                gradients()
        nothing_runs(w)
        call = in_ddp(w.model)  # DDP itself takes no other step after a backward that was stopped
        equal(gradients(), before)


@in_a_thread
def test_what_is_around_a_model_changes_no_answer(process_group):
    """LoRA is new and changes nothing. Blocks made before are taken; those made after are the same."""
    for kind in WRAPPERS:
        name = kind if kind == "llama4" else "llava_llama"
        w = world_of(name, attached(name))
        asked = [w.text, w.batch, {**w.stream, "voco_cache": w.blocks}]
        alone = answers(w.model, asked)
        call = WRAPPERS[kind](w.model)
        no_cache = kind == "checkpointed" and checkpointed_layers_drop_caches()
        number = 2 if kind == "peft" or no_cache else 3
        close(answers(call, asked[:number]), alone[:number])
        if kind == "fsdp2":
            register_fsdp_forward_method(call, "compress")
        if not no_cache:
            equal(tensors_of(w.model.compress(**w.batch)), tensors_of(w.blocks))


@in_a_thread
def test_blocks_are_refused_where_checkpointing_would_keep_them_from_the_layers():
    w = world_of("llava_llama", attached("llava_llama"))
    asked = {**w.stream, "voco_cache": w.blocks}
    with torch.no_grad():
        alone = w.model(**asked).logits
    checkpointed(w.model)
    with pytest.raises(ValueError, match="model.eval\\(\\) first"):
        w.model(**asked)
    with torch.no_grad():
        if checkpointed_layers_drop_caches():
            for ask in (lambda: w.model(**asked), lambda: w.model.compress(**w.batch)):
                with pytest.raises(ValueError, match="model.eval\\(\\) first"):
                    ask()
        else:
            close([w.model(**asked).logits], [alone])
    equal(w.model.eval()(**asked).logits, alone)


# -- copies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "checkpointed", "llama4"])
@in_a_thread
def test_a_deep_copy_computes_with_its_own_weights(kind, process_group):
    """One in PEFT: tests/models/test_state_copies.py."""
    call, w = wrapped(kind)
    w.model.eval()
    twin = copy.deepcopy(call)
    check_apart(w.model, unwrap(twin), SOME, w.name)


@in_a_thread
def test_a_sharded_model_is_not_copied_and_stays_as_it_was(process_group):
    call, w = wrapped("fsdp2")
    asked = batches("fsdp2", w)
    before = answers(call, asked)
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        copy.deepcopy(call)
    equal(answers(call, asked), before)


# -- detached
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "checkpointed", "llama4"])
@in_a_thread
def test_a_model_is_detached_through_what_is_around_it(kind, process_group):
    call, w = wrapped(kind)
    stock = plain(w.name)
    mended, text = traces(stock), w.text
    answers(call, batches(kind, w))
    assert vp.detach(call) is call and not vp.is_attached(call)
    assert traces(w.model) == mended
    equal(answers(call, [text]), answers(stock, [text]))


@in_a_thread
def test_a_sharded_model_refuses_to_be_detached_and_stays_as_it_was(process_group):
    call, w = wrapped("fsdp2")
    asked = batches("fsdp2", w)
    before, kinds = answers(call, asked), [type(module) for module in call.modules()]
    with pytest.raises(ValueError, match="was wrapped after the model was attached"):
        vp.detach(call)
    assert vp.is_attached(call) and [type(module) for module in call.modules()] == kinds
    equal(answers(call, asked), before)


@in_a_thread
def test_so_does_one_whose_backbone_alone_is_sharded(process_group):
    """The model's own class could be given back: all of it is asked first."""
    w = world_of("llava_llama", attached("llava_llama"))
    fully_shard(w.model.base_model, mesh=init_device_mesh("cpu", (1,)))
    before = answers(w.model, [w.text, w.batch])
    with pytest.raises(ValueError, match="was wrapped after the model was attached"):
        vp.detach(w.model)
    assert vp.is_attached(w.model)
    equal(answers(w.model, [w.text, w.batch]), before)


# -- compiled
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Any]:
    """A compiler that only reads: what stands where is torch's, however the code is run."""
    yield lambda model: torch.compile(model, backend="eager")
    torch._dynamo.reset()


@pytest.mark.slow
@in_a_thread
def test_a_compiled_model_is_stopped_nested_copied_and_detached(compiled):
    w = world_of("llava_llama", attached("llava_llama"))
    asked, once = [w.text, w.batch], Once(at=-1)
    before = answers(w.model, asked)

    @torch.compiler.disable
    def act() -> None:
        once()

    with disturbed(w.model, "layer-after", act):  # what a compiled model calls is settled when it is compiled
        call = compiled(w.model)
        close(answers(call, asked), before)
        once.__init__(raises(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match="stopped here"):
            answers(call, [w.batch])
        nothing_runs(w)
        close(answers(call, asked), before)

        def fails() -> None:
            once.__init__(raises(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt, match="stopped here"):
                answers(call, [w.text])

        once.__init__(fails)
        close(answers(call, asked[::-1])[:1], before[1:])
        assert once.calls > 1
        nothing_runs(w)
    twin = copy.deepcopy(call)
    assert vp.is_attached(twin)
    zero(w.model)
    close(answers(twin, asked), before)
    assert not answers(call, [w.text])[0].any()
    vp.detach(twin)
    assert not vp.is_attached(twin) and not traces(unwrap(twin)) and vp.is_attached(call)
    close(answers(twin, [w.text]), answers(plain("llava_llama"), [w.text]))

"""Nothing mixes devices, and results on a device are those on the CPU: every family, on a pretend device."""

from __future__ import annotations

import contextlib
import functools
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import voco_plugin as vp
from contracts import compressors as rivals
from contracts.frozen import labelled, step, tuned
from contracts.streamed import everything, fused_step
from harness import RULES, attached, inputs, rows_for
from packed import packed_inputs
from pretend_device import MixedDevices, PretendTensor, held, pretend_device, recorded, to, unavailable
from stores import key
from tiny import NAMES, build, processors
from trainers import rows as conversations
from trainers import trainer
from video_harness import frames
from voco_plugin.inference.answering import answer
from voco_plugin.training.two_stage.trainer_part import Streamed

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")

FAST = ("llava_llama", "qwen2_5_vl", "gemma3", "llama4")
"""A plain one, mrope, both ways inside an image and windows, chunks; the other families are slow tests."""
ROWS = [
    ["bos", "t3", "img", "c2", "t4"],
    ["bos", "t2", "img", "c2", "t1", "img", "c2", "t5"],
    ["bos", "t4"],
]
NEW = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture(autouse=True)
def device():
    """The pretend device; attention runs on it as on the CPU under the same kernel."""
    with sdpa_kernel(SDPBackend.MATH), pretend_device() as made:
        yield made


def families(names=NAMES, fast=FAST):
    return [pytest.param(n, marks=() if n in fast else pytest.mark.matrix) for n in names]


def check_same(expected, found) -> None:
    """Whether ``found`` is on the device and equal, rounding in sums of gradients aside."""
    there = tree_leaves(found)
    assert there and all(isinstance(t, PretendTensor) for t in there)
    pairs = list(zip(tree_leaves(expected), tree_leaves(held(found)), strict=True))
    largest = max(float(a.nan_to_num().abs().max()) for a, _ in pairs if a.numel())
    for a, b in pairs:
        assert a.device.type == "cpu"
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6 * max(1.0, largest), equal_nan=True)


# -- the device itself


def test_ops_on_both_sides_raise_and_name_their_line(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    index = torch.tensor([0, 2])
    for mix in (
        lambda: there + here,
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: torch.where(here > 0, there, 0.0),
        lambda: there.index_select(0, index),
        lambda: there.gather(0, index),
        lambda: here[index.to(device)],
        lambda: torch.nn.functional.embedding(index, there[:, None]),
        lambda: here.add_(there),
        lambda: here.sum().add_(there.sum()),
        lambda: there.masked_fill(here > 0, 0.0),
        lambda: there.__setitem__(index, here[:2]),
        lambda: there[None] @ here[:, None],
    ):
        with pytest.raises(MixedDevices, match=r"on both devices: .*at tests/house/test_pretend_\w+.py:\d+"):
            mix()
    for wrong in (there.numpy, lambda: memoryview(there.__array__())):
        with pytest.raises(TypeError, match="Use Tensor.cpu"):
            wrong()


WAITS = {
    # reads: CUDA waits until the value is there
    "item": (lambda t, m: t[0].item(), "read", 1),
    "int": (lambda t, m: int(t[0]), "read", 1),
    "float": (lambda t, m: float(t.sum()), "read", 1),
    "bool": (lambda t, m: bool(m.any()), "read", 1),
    "if": (lambda t, m: 1 if (t == t).all() else 0, "read", 1),
    "arange": (lambda t, m: torch.arange(t.long()[0], device=t.device), "read", 1),
    "cpu": (lambda t, m: t.cpu(), "read", 1),
    "to the host": (lambda t, m: t.to("cpu", torch.float64), "read", 1),
    "copy_ to the host": (lambda t, m: torch.zeros(4).copy_(t), "read", 1),
    "tolist": (lambda t, m: t.tolist(), "read", 1),
    "nonzero": (lambda t, m: m.nonzero(), "read", 1),
    "where": (lambda t, m: torch.where(m), "read", 1),
    "a boolean index": (lambda t, m: t[m], "read", 1),
    "two boolean indices": (lambda t, m: t[None][m[:1], m], "read", 2),
    "values under a mask": (lambda t, m: t.__setitem__(m, t[:2].clone()), "read", 1),
    "a value of the device under a mask": (lambda t, m: t.__setitem__(m, t[0].clone()), "read", 1),
    "masked_fill with a value of the device": (lambda t, m: t.masked_fill(m, t[0]), "read", 1),
    "masked_select": (lambda t, m: t.masked_select(m), "read", 1),
    "unique": (lambda t, m: t.unique(), "read", 1),
    "unique rows": (lambda t, m: t[:, None].unique(dim=0), "read", 1),
    "repeat_interleave by a tensor": (lambda t, m: t.repeat_interleave(m.long()), "read", 1),
    "equal": (lambda t, m: torch.equal(t, t), "read", 1),
    "an index of the device without dimensions": (lambda t, m: t[t.long()[0]], "read", 1),
    "a list of tensors": (lambda t, m: torch.tensor([t[0], t[1]]), "read", 2),
    # copies: CUDA waits until they are done
    "to the device": (lambda t, m: torch.ones(3).to(t.device), "copy", 1),
    "type_as": (lambda t, m: torch.ones(3).type_as(t), "copy", 1),
    "tensor": (lambda t, m: torch.tensor([1, 2], device=t.device), "copy", 1),
    "as_tensor": (lambda t, m: torch.as_tensor([1, 2], device="pretend"), "copy", 1),
    "new_tensor": (lambda t, m: t.new_tensor([1, 2]), "copy", 1),
    "copy_ to the device": (lambda t, m: t.copy_(torch.ones(4)), "copy", 1),
    "a list as an index": (lambda t, m: t[[0, 1]], "copy", 1),
    "an index of the host": (lambda t, m: t[torch.tensor([0, 1])], "copy", 1),
    "a number at indices": (lambda t, m: t.__setitem__(t.argsort()[:2], 0), "copy", 1),
    # without waiting
    "non_blocking": (lambda t, m: torch.ones(3).to(t.device, non_blocking=True), "async", 1),
    # nothing
    "arithmetic": (lambda t, m: 2 * t + torch.tensor(1.0), "read", 0),
    "factories": (lambda t, m: torch.full((2,), 3, device=t.device) + t.new_zeros(2), "copy", 0),
    "slices": (lambda t, m: t[1:3].clone().add_(t[:2]), "read", 0),
    "a number under a mask": (lambda t, m: t.__setitem__(m, 0), "read", 0),
    "masked_fill": (lambda t, m: t.masked_fill(m, -1.0), "read", 0),
    "an index of the device": (lambda t, m: t[t.argsort()], "read", 0),
    "repeat_interleave with its size": (
        lambda t, m: t.repeat_interleave(m.long(), output_size=2), "read", 0,
    ),
    "an empty tensor": (lambda t, m: torch.tensor([], device=t.device), "copy", 0),
    "on the device already": (lambda t, m: t.to(t.device).to(torch.float64), "read", 0),
    "the shape": (lambda t, m: [len(t), t.shape[0], t.numel(), t.dim()], "read", 0),
}  # fmt: skip


@pytest.mark.parametrize("what", WAITS)
def test_what_the_host_waits_for_is_counted(device, what):
    run, kind, times = WAITS[what]
    values, mask = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    expected = run(values.clone(), mask.clone()) if "pretend" not in what and what != "as_tensor" else None
    there = to([values, mask], device)
    with recorded() as waits:
        found = run(*there)
    assert [event.kind for event in waits.events] == [kind] * times
    if isinstance(expected, torch.Tensor):
        assert torch.equal(held(found), expected)
    for event in waits.events:
        assert event.where.file == "tests/house/test_pretend_device.py" and event.ours is None


def test_a_wait_in_a_backward_pass_is_known_by_its_line_in_the_forward(device):
    x = torch.ones(4, device=device).requires_grad_()
    with recorded(forward_lines=True) as waits:
        masked = x[x > 0]  # its gradient looks for the mask's entries again
        masked.sum().backward()
    first, second = waits.events
    assert second.backward and not first.backward and second.where == first.where
    with recorded() as waits:
        x[x > 0].sum().backward()
    assert waits.reads == 2


def test_lines_are_those_of_the_package_where_it_is_to_blame(device):
    model = attached("llava_llama").to(device)
    batch = to(inputs("llava_llama", ROWS), device)
    with torch.no_grad(), recorded() as waits:
        model(**batch)
    ours = [event for event in waits.events if event.where == event.ours]
    upstream = [event for event in waits.events if event.where != event.ours]
    assert ours and all(event.where.file.startswith("voco_plugin/") for event in ours)
    assert all(event.where.file.startswith("transformers/") and event.ours for event in upstream)


def test_a_moved_model_keeps_its_parameters(device):
    model = build("llava_tied")
    before = weakref.ref(model.lm_head.weight)
    model.to(device)
    assert before() is model.lm_head.weight is model.get_input_embeddings().weight
    assert model.device == device and all(isinstance(p, PretendTensor) for p in model.parameters())


def test_it_is_gone_when_it_is_not_in_use():
    from pretend_device import _register

    stock = torch.tensor
    used = _register().used
    with pretend_device():
        assert _register().used == used + 1
    assert torch.tensor is stock and _register().used == used


# -- the two stages, by family


def one_pass(model, batch):
    return model(**batch).logits


def blocks(model, batch):
    cache = model.compress(**batch)
    return [(b.keys, b.values) for b in cache]


def fewer_tokens(model, batch):
    return [(b.keys, b.values) for b in model.compress(**batch, num_tokens=1)]


def stage_two(model, batch):
    return model(**model.stream_inputs(batch), voco_cache=model.compress(**batch)).logits


def behind_a_prefix(model, batch):
    """A prompt that goes on from a text read before, moved by as many tokens as Llama 4's chunks have."""
    stream, text = model.stream_inputs(batch), batch["input_ids"][-1:, -4:].repeat(1, 2)
    before = model.prefix_cache(input_ids=text)
    return model(**stream, voco_cache=model.compress(**batch), prefix_cache=before).logits


def greedy(model, batch):
    return model.generate(**batch, **NEW)


def greedy_in_one_pass(model, batch):
    return model.generate(**batch, **NEW, two_stage=False)


def beams(model, batch):
    return model.generate(**batch, **NEW, num_beams=3)


def static(model, batch):
    return model.generate(**batch, **NEW, cache_implementation="static")


def through_a_file_and_a_store(model, batch, folder=None):
    """Blocks from the device to the disk and back, and what is read on them."""
    cache = model.compress(**batch)
    cache.save(folder / "cache.safetensors")
    loaded = vp.VoCoCache.load(folder / "cache.safetensors").to(model.device)
    rows = [row for row in range(cache.num_rows) if len(cache.row(row))]
    with vp.VoCoCacheStore.for_model(folder / "store", model) as store:
        assert store.put_many((key(row), cache.row(row)) for row in rows) == len(rows)
        found = store.get_many([key(row) for row in rows], model.device)
    for mine, other in zip(cache, [b for one in found for b in one], strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(mine.keys + mine.values, other.keys + other.values, strict=True)
        )
    stream = model.stream_inputs(batch)
    assert [b.position for b in cache] == [b.position for b in loaded]
    first = {k: v[rows[:1]] for k, v in stream.items()}
    return [model(**stream, voco_cache=loaded).logits, model(**first, voco_cache=found[0]).logits]


CASES = [
    one_pass, blocks, fewer_tokens, stage_two, behind_a_prefix, greedy, greedy_in_one_pass, beams, static,
    through_a_file_and_a_store,
]  # fmt: skip


@functools.lru_cache(maxsize=1)
def pair(name: str):
    """The same model on the CPU and on the device."""
    return attached(name), attached(name).to("pretend")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(n, c, id=f"{n}-{c.__name__}", marks=() if n in FAST else pytest.mark.matrix)
        for n in NAMES
        for c in CASES
    ],
)
def test_a_family_mixes_no_devices(name, case, device, tmp_path):
    here, there = pair(name)
    if case is static and (vp.attachment(here).family.windowed(here) or name.startswith("paligemma")):
        pytest.skip("a static cache is refused for this family (tests/test_decoding.py)")
    if case is through_a_file_and_a_store:
        found = []
        for model, folder in ((here, tmp_path / "cpu"), (there, tmp_path / "device")):
            folder.mkdir()
            batch = to(inputs(name, ROWS, "left"), model.device)
            with torch.no_grad():
                found.append(case(model, batch, folder))
        check_same(*found)
        return
    batch = inputs(name, ROWS, "left")
    with torch.no_grad():
        check_same(case(here, batch), case(there, to(batch, device)))


@pytest.mark.parametrize("name", families(n for n in NAMES if n != "llama4"))  # refused: it attends in chunks
def test_packed_rows_mix_no_devices(name, device):
    here, there = pair(name)
    _, packed = packed_inputs(here, name, ROWS, [2, 1])
    with torch.no_grad():
        check_same(here(**packed).logits, there(**to(packed, device)).logits)


@pytest.mark.parametrize("attention", ["dense", "segmented"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llava_llama", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_no_option_of_the_rule_mixes_devices(name, rule, attention, device):
    options = {**RULES[rule], "attention": attention}
    here, there = attached(name, **options), attached(name, **options).to(device)
    batch = inputs(name, rows_for(rule, ROWS), "left")
    _, packed = packed_inputs(here, name, rows_for(rule, ROWS), [2, 1])
    with torch.no_grad():
        for case in (one_pass, blocks, stage_two, greedy):
            check_same(case(here, batch), case(there, to(batch, device)))
        check_same(here(**packed).logits, there(**to(packed, device)).logits)


@pytest.mark.parametrize("kind", ["voco", *rivals.OPTIONS])
def test_no_compressor_mixes_devices(kind, device):
    options = rivals.OPTIONS.get(kind, {})
    here, there = (attached("llava_llama", **options).to(d) for d in ("cpu", device))
    k = vp.attachment(here).config.num_tokens
    batch = inputs(
        "llava_llama", [["bos", "t3", "img", f"c{k}", "t4"], ["img", f"c{k}", "img", f"c{k}", "t2"]]
    )
    reads = getattr(getattr(here, "voco_compressor", None), "reads_question", False)
    with torch.no_grad():
        for case in (one_pass,) if reads else (one_pass, blocks, stage_two, greedy):
            check_same(case(here, batch), case(there, to(batch, device)))
    check_same(trained_once(here, batch), trained_once(there, to(batch, device)))


def test_every_compressor_of_the_registry_is_there():
    named = {options.get("compressor", "voco") for options in rivals.OPTIONS.values()} | {"voco"}
    assert named == set(vp.registry.compressors.list())


# -- training: one step, forward and backward


def gradients(model, loss):
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert len(found) > 3
    return {"loss": loss.detach(), **found}


def trained_once(model, batch, labels=None):
    """Loss and gradients; ``model`` stays in evaluation mode, nothing in these models drops out."""
    return gradients(model, model(**batch, labels=batch["input_ids"] if labels is None else labels).loss)


@pytest.mark.parametrize("name", families())
def test_training_mixes_no_devices(name, device):
    here, there = pair(name)
    batch = inputs(name, ROWS, "left")
    labels = everything(here, batch)
    check_same(trained_once(here, batch, labels), trained_once(there, to(batch, device), labels.to(device)))


STAGED = [n for n in NAMES if n != "llama4"]  # the fused loss reads a backbone, and it is its own


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", families(STAGED))
def test_streamed_training_mixes_no_devices(name, checkpointing, device):
    if checkpointing:
        here, there = attached(name), attached(name).to(device)
        for model in (here, there):
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
    else:
        here, there = pair(name)
    batch = inputs(name, ROWS, "left")
    given = {**batch, "labels": everything(here, batch), "fused_lm_head": True}
    check_same(
        *(
            gradients(model, Streamed(2, fused_step(model)).run(model, **to(given, model.device)))
            for model in (here, there)
        )
    )


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", families(STAGED))
def test_frozen_training_mixes_no_devices(name, stored, device, tmp_path):
    start, _ = pair(name)
    # a store takes no image of LLaVA-OneVision's that shares its row
    rows = ROWS[::2] if stored and name == "llava_onevision" else ROWS
    batch = inputs(name, rows, "left")
    labels = labelled(start, batch)
    found = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = tuned(name).train().to(place)
        given, store = to([batch, labels], place), None
        if stored:
            store = vp.VoCoCacheStore(tmp_path / str(place), fingerprint=start.compress(**batch).fingerprint)
            step(model, *given, store=store)  # fills it; the second time it is read
        found.append(gradients(model, step(model, *given, store=store)))
        if stored:
            assert len(store)
            store.close()
    check_same(*found)


ANSWERS = {"assistant_only_loss": True}
ALL = {"teacher": "frozen", "weight": 2.0, "temperature": 2.0, "hidden_weight": 0.1}
TRAINERS = {
    "joint": {"peft": True},
    "weights": {"peft": False},
    "teacher is the base": {"peft": True, "distill": {**ALL, "teacher": "base"}},
    "teacher is frozen": {"peft": False, "distill": ALL},
    "streamed": {"peft": True, "stage1": "streamed", "gradient_checkpointing": True},
    "frozen": {"peft": True, "stage1": "frozen", "train_voco": False},
    "packed": {"peft": True, "packing": True, "max_length": 64},
    "packed and distilled": {"peft": False, "packing": True, "max_length": 64, "distill": ALL},
}  # fmt: skip


@contextlib.contextmanager
def only_device(place):
    """The device that Trainer and accelerate find on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", str(place))
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data():
    return conversations()


@pytest.mark.parametrize("way", TRAINERS)
@pytest.mark.parametrize("name", ["llava_llama", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_trainer_mixes_no_devices(name, way, device, data, tmp_path):
    found = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        options = {"processing_class": processors.processor(name), **ANSWERS, **TRAINERS[way]}
        with only_device(place):
            made = trainer(build(name), tmp_path / str(place), data, **options)
            made.train()
        assert {p.device for p in made.model.parameters()} == {place}
        found.append([entry for entry in made.state.log_history if "loss" in entry])
    one, other = found
    assert len(one) == len(other) == 3
    for mine, its in zip(one, other, strict=True):
        losses = [key for key in mine if "loss" in key]
        assert [its[key] for key in losses] == pytest.approx([mine[key] for key in losses], rel=1e-5)


# -- conversations


@pytest.mark.parametrize("attach_there", [False, True], ids=["moved", "attached there"])
@pytest.mark.parametrize("name", families(processors.NAMES, fast=("llava_llama", "qwen2_5_vl")))
def test_a_session_mixes_no_devices(name, attach_there, device, tmp_path):
    found = []
    for place in ("cpu", device):
        tools, model = processors.processor(name), build(name)
        if attach_there:
            model.to(place)
        model = vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=tools).to(place)
        found.append(conversation(model, tools, Path(tmp_path, str(place))))
    assert found[0] == found[1]


def conversation(model, tools, folder) -> list[str]:
    """The answers: in a conversation, of a fork, after loading, about a video, to questions alone."""
    new = {"max_new_tokens": 4}
    folder.mkdir()
    shown = [frame.image for frame in frames(6)]
    with vp.VoCoCacheStore.for_model(folder / "store", model) as store:
        session = vp.VoCoSession(model, tools, system="Be brief.", store=store)
        said = [session.add(*shown[:2]).ask("What is it?", **new), session.ask("Where?", **new)]
        other = session.fork()
        said.append(other.add(shown[0], shown[2]).ask("And now?", **new))
        assert len(store) == 3
    session.save(folder / "session")
    loaded = vp.VoCoSession.load(folder / "session", model, tools)
    said += [loaded.ask("Why?", **new), session.ask("Why?", **new)]
    assert said[-1] == said[-2]
    watching = vp.VoCoSession(model, tools)
    with watching.watch(budget=2) as seen:
        for frame in frames(3):
            seen.feed(frame)
        said.append(watching.ask("What is it?", **new))
    said += answer(model, tools, ["What is it?", "Where?"], images=[shown[:1], shown[3:5]], **new)
    return said

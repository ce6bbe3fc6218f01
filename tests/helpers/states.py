"""What the tests of state share: what can be asked of a model, where a forward can be stopped, and threads of
their own, so that what one test leaves behind does not meet the next.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import gc
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, get_peft_model

import tiny
import voco_plugin as vp
from harness import attached, rows_for
from tiny import make_inputs, processors
from trainers import LORA, losses, picture
from voco_plugin.core.forward import as_cache, cache_of

ROWS = [["bos", "t3", "img", "c2", "t4"], ["bos", "t2", "img", "c2", "t1", "img", "c1", "t5"]]
TEXT = [["bos", "t6"], ["bos", "t3"]]
NEW = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def in_a_thread(test: Callable) -> Callable:
    """``test`` in a thread of its own: a rule left in force, or gradients switched off, end with it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(test, *args, **kwargs).result()

    return run


def equal(found: Any, expected: Any) -> None:
    """Tensors, or lists and dicts of them, are the same bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# -- what a model is asked
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class World:
    """An attached model and what it is asked: a batch with images, its compressed form, and text alone."""

    name: str
    model: Any
    batch: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]

    @functools.cached_property
    def stream(self) -> dict[str, torch.Tensor]:
        return self.model.stream_inputs(self.batch)

    @functools.cached_property
    def blocks(self) -> vp.VoCoCache:
        return self.model.compress(**self.batch)

    @functools.cached_property
    def prefix(self) -> Any:
        return self.model.prefix_cache(**self.ids, voco_cache=self.blocks)

    @property
    def ids(self) -> dict[str, torch.Tensor]:
        """The stream without a prefix-LM's token types."""
        return {name: self.stream[name] for name in ("input_ids", "attention_mask")}


def world_of(name: str, model: Any, rule: str = "isolated", rows=ROWS, text=TEXT) -> World:
    """A world of ``model``, whose own VoCo token stands in the batch."""
    voco = vp.attachment(model).vocab.voco_id
    batches = [make_inputs(name, r, "left", voco_id=voco) for r in (rows_for(rule, rows), text)]
    return World(name, model, *batches)


def frozen_world() -> World:
    """A model whose stage 1 runs without its adapter."""
    model = attached("llava_llama", frozen_stage1=True)
    layers = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=layers)).eval()
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    return world_of("llava_llama", peft.get_base_model())


IN_TWO_STAGES = ("text", "compress", "stage-two", "prefix", "generate")
"""What a frozen stage 1 allows."""


@cache
def world(name: str = "llava_llama", rule: str = "isolated", **options: Any) -> World:
    """Shared by tests that change nothing but by mistake."""
    from harness import RULES

    made = world_of(name, attached(name, **{"attention": "dense", **RULES[rule], **options}), rule)
    made.stream, made.blocks, made.prefix  # noqa: B018 - made before anything is disturbed
    return made


def tensors_of(blocks: vp.VoCoCache) -> list[torch.Tensor]:
    return [t for block in blocks for t in (*block.keys, *block.values)]


def keys_of(past: Any) -> list[torch.Tensor]:
    return [t for layer in past.layers for t in (layer.keys, layer.values)]


def a_single_pass(w: World) -> list[torch.Tensor]:
    """Logits, and those of a text token that goes on from the KV cache."""
    out = w.model(**w.batch, use_cache=True)
    more = w.text["input_ids"][:, -1:]
    mask = torch.cat([w.batch["attention_mask"], torch.ones_like(more)], dim=1)
    again = w.model(input_ids=more, attention_mask=mask, **as_cache(cache_of(out)))
    return [out.logits, again.logits]


def a_prefix(w: World) -> list[torch.Tensor]:
    """A prefix read, and text behind one."""
    made = w.model.prefix_cache(**w.ids, voco_cache=w.blocks)
    text = {name: w.text[name] for name in ("input_ids", "attention_mask")}
    return [*keys_of(made), w.model(**text, prefix_cache=w.prefix).logits]


def generated(w: World, **options: Any) -> list[torch.Tensor]:
    out = w.model.generate(**w.batch, **NEW, output_logits=True, return_dict_in_generate=True, **options)
    return [out.sequences, *out.logits]


ASKED: dict[str, Callable[[World], list[torch.Tensor]]] = {
    "text": lambda w: [w.model(**w.text).logits],
    "single-pass": a_single_pass,
    "backbone": lambda w: [w.model.base_model(**w.batch)[0]],
    "compress": lambda w: tensors_of(w.model.compress(**w.batch)),
    "stage-two": lambda w: [w.model(**w.stream, voco_cache=w.blocks).logits],
    "prefix": a_prefix,
    "generate": generated,
    "generate-in-one-pass": lambda w: generated(w, two_stage=False),
}


def ask(w: World, what: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return ASKED[what](w)


def answers(w: World, asked: Sequence[str] = tuple(ASKED)) -> dict[str, list[torch.Tensor]]:
    return {what: ask(w, what) for what in asked}


@cache
def expected(w: World, asked: Sequence[str] = tuple(ASKED)) -> dict[str, list[torch.Tensor]]:
    """:func:`answers` of a shared world, asked once in a thread where nothing else ever runs."""
    return in_a_thread(answers)(w, asked)


@cache
def passages(w: World, what: str, place: str) -> int:
    """How often a question passes ``place``."""
    counted = Once(at=-1)

    def count() -> None:
        ask(w, what)  # something asked for the first time may ask more
        with disturbed(w.model, place, counted):
            ask(w, what)

    in_a_thread(count)()
    return counted.calls


# -- where a forward can be stopped
# ------------------------------------------------------------------------------------------------------------


def tower(model: torch.nn.Module) -> torch.nn.Module:
    ends = ("vision_tower", "visual", "vision_model")
    return next(module for name, module in model.named_modules() if name.endswith(ends))


PLACES = (
    "tower", "attention", "layer-before", "layer-after", "feed-forward", "norm",
    "first", "last", "after", "head",
)  # fmt: skip
"""``feed-forward``: within a layer, so also where it is recomputed in a backward pass. ``first``, ``last``: a
user's pre-hook on the backbone, before all others and after them. ``after``: a user's hook behind the
backbone. ``head``: before the LM head.
"""


@contextlib.contextmanager
def disturbed(model: Any, place: str, disturb: Callable[[], None]) -> Iterator[None]:
    """Inside the block ``disturb()`` is called at ``place`` of each forward of ``model``."""

    def hook(*_: Any) -> None:
        disturb()

    decoder = model.get_decoder()
    decoder = decoder if hasattr(decoder, "layers") else decoder.model  # Llama 4's has its LM head on
    layer = decoder.layers[1]
    backbone = model.base_model
    if place == "attention":
        with monkeypatched_attention(hook):
            yield
        return
    handle = {
        "tower": lambda: tower(model).register_forward_hook(hook),
        "layer-before": lambda: layer.register_forward_pre_hook(hook),
        "layer-after": lambda: layer.register_forward_hook(hook),
        "feed-forward": lambda: layer.mlp.register_forward_pre_hook(hook),
        "norm": lambda: decoder.norm.register_forward_hook(hook),
        "first": lambda: backbone.register_forward_pre_hook(hook, prepend=True),
        "last": lambda: backbone.register_forward_pre_hook(hook),
        "after": lambda: backbone.register_forward_hook(hook),
        "head": lambda: model.get_output_embeddings().register_forward_pre_hook(hook),
    }[place]()
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def monkeypatched_attention(hook: Callable) -> Iterator[None]:
    stock = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        hook()
        return stock(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock


class Once:
    """Calls ``act()`` the ``at``-th time it is called, and never again; counts its calls."""

    def __init__(self, act: Callable[[], Any] = lambda: None, at: int = 1) -> None:
        self.act, self.at, self.calls = act, at, 0
        self.result: Any = None

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.result = self.act()


def raises(error: type[BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise error("stopped here")

    return act


def in_a_copied_context(act: Callable[[], Any]) -> Any:
    """``act()`` in another thread that was given this one's context, as ``asyncio.to_thread`` does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, act).result()


# -- training
# ------------------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "joint": {},
    "streamed-full": {"stage1": "streamed", "peft": False},
    "frozen": {"stage1": "frozen", "train_voco": False},
    "distill-base": {"distill": {"teacher": "base", "hidden_weight": 0.5}},
    "distill-frozen-full": {"distill": {"teacher": "frozen"}, "peft": False},
}


@cache
def images() -> Dataset:
    """Two rows, of one image and of two."""
    image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
    messages = [
        [
            {"role": "user", "content": [*[image] * count, ask]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for count, answer in ((1, "red"), (2, "blue circle"))
    ]
    rows = {"messages": messages, "images": [[picture(3)], [picture(4), picture(5)]]}
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def trainer(
    model: Any,
    out: Any,
    peft: Any = True,
    data: Any = None,
    voco: Any = True,
    processor: Any = None,
    callbacks: Any = None,
    compute_metrics: Any = None,
    eval_dataset: Any = None,
    stderr: Any = None,
    **options: Any,
) -> vp.VoCoSFTTrainer:
    """A trainer of one step at a learning rate of 0, for a model in memory."""
    args = {
        "per_device_train_batch_size": 2, "learning_rate": 0.0, "logging_steps": 1, "report_to": [],
        "max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "assistant_only_loss": True,
        "dataloader_pin_memory": False, "gradient_checkpointing": True, "use_cpu": True,
    }  # fmt: skip
    voco = vp.VoCoConfig(num_tokens=2) if voco is True else voco
    if peft is True:
        peft = LoraConfig(**LORA)
    with contextlib.redirect_stderr(stderr or io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return vp.VoCoSFTTrainer(
            model,
            args=vp.VoCoSFTConfig(str(out), voco=voco, **{**args, **options}),
            train_dataset=images() if data is None else data,
            eval_dataset=eval_dataset,
            processing_class=processors.processor("llava_llama") if processor is None else processor,
            peft_config=peft or None,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )


def run(made: vp.VoCoSFTTrainer) -> float:
    """Train; the loss of the one step."""
    gc.freeze()  # accelerate collects garbage at every start, which takes longer than the step
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made.train()
    finally:
        gc.unfreeze()
    (loss,) = losses(made)
    return loss


def trained(mode: str, out: Any, **options: Any) -> tuple[vp.VoCoSFTTrainer, float]:
    """A trainer of a new model, what trains at weights of some size, after a training that moved nothing."""
    made = trainer(tiny.build("llava_llama"), out, **{**MODES[mode], **options})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.05)
    return made, run(made)


def inner(model: Any) -> Any:
    """The transformers model, out of a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def step(made: vp.VoCoSFTTrainer, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step."""
    made.model.train()
    made.model.zero_grad()
    loss = made.training_step(made.model_wrapped, dict(batch), torch.tensor(3))
    return float(loss), {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}

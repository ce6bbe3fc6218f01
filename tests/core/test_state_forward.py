"""A forward leaves nothing behind, however it ends, and shares nothing with a forward inside it: what a model
answers depends on what it is asked alone, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

import voco_plugin as vp
from contracts import stopped as contracts
from contracts.stopped import ERRORS, INNER, SOME, check_nested, check_undisturbed, other, stopped
from harness import attached, plain, vocabulary
from states import (
    ASKED,
    IN_TWO_STAGES,
    MODES,
    NEW,
    PLACES,
    Once,
    World,
    answers,
    ask,
    disturbed,
    equal,
    expected,
    frozen_world,
    generated,
    in_a_copied_context,
    in_a_thread,
    inner,
    passages,
    raises,
    run,
    step,
    trained,
    world,
    world_of,
)
from tiny import processors, voco_id
from trainers import picture
from voco_plugin._compat import checkpointed_layers_drop_caches

# -- stopped
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "place"),
    [
        *[(what, place) for what in ("single-pass", "generate-in-one-pass") for place in PLACES],
        *[(what, place) for what in ASKED for place in ("attention", "layer-after", "last")],
        ("compress", "tower"),
        ("stage-two", "head"),
        ("prefix", "head"),
    ],
)
@in_a_thread
def test_a_stopped_forward_leaves_nothing_behind(what, place):
    """Wherever it is stopped, in its first forward or its last: text alone and images, of this model and of
    another.
    """
    count = passages(world(), what, place)
    assert count
    for at in {1, count}:
        stopped(world(), what, place, KeyboardInterrupt, at)
        check_undisturbed(world())


@pytest.mark.parametrize("error", ERRORS)
@in_a_thread
def test_so_whatever_stopped_it(error):
    contracts.a_stopped_forward_leaves_nothing_behind(error)
    for what in ("stage-two", "generate"):
        stopped(world(), what, "layer-after", ERRORS[error], 1)
    check_undisturbed(world())


@pytest.mark.parametrize(
    ("name", "rule", "attention"),
    [
        ("llava_llama", "pooled", "dense"),
        ("llava_llama", "rival", "dense"),
        ("llava_llama", "prefix", "dense"),
        ("llava_llama", "isolated", "segmented"),
        ("qwen2_5_vl", "hide-prefix", "dense"),
        ("gemma3", "isolated", "dense"),
        ("llama4", "isolated", "dense"),
        ("paligemma", "isolated", "dense"),
    ],
)
@in_a_thread
def test_so_under_every_rule_and_backend(name, rule, attention):
    w = world(name, rule, attention=attention)
    for what in ("single-pass", "compress", "generate-in-one-pass"):
        stopped(w, what, "layer-after", KeyboardInterrupt, passages(w, what, "layer-after"))
    check_undisturbed(w)


@in_a_thread
@torch.no_grad()
def test_a_model_attached_or_detached_later_is_not_under_the_rule_of_an_interrupted_forward():
    stock, once = plain("llava_llama"), attached("llava_llama")
    text = world().text
    alone = stock(**text).logits
    stopped(world(), "single-pass", "layer-after", KeyboardInterrupt, 1)
    equal(vp.detach(once)(**text).logits, alone)
    equal(stock(**text).logits, alone)
    options = vp.VoCoConfig(token_id=voco_id("llava_llama"), attention="dense")
    vp.attach(stock, options, vocabulary=vocabulary("llava_llama", stock, options))
    equal(stock(**text).logits, alone)


@in_a_thread
def test_a_frozen_stage_one_that_is_stopped_leaves_the_adapter_on():
    w = frozen_world()
    before = answers(w, IN_TWO_STAGES)
    for what in ("compress", "stage-two", "generate"):
        for at in range(1, passages(w, what, "feed-forward") + 1):
            stopped(w, what, "feed-forward", KeyboardInterrupt, at)
            assert not [n for n, module in w.model.named_modules() if "forward" in vars(module)]
    equal(answers(w, IN_TWO_STAGES), before)


@in_a_thread
def test_gradients_after_a_backward_that_was_stopped_while_layers_were_recomputed():
    w = world_of("llava_llama", attached("llava_llama").train())
    w.model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = w.batch["input_ids"].masked_fill(w.batch["attention_mask"] == 0, -100)

    def gradients() -> dict[str, torch.Tensor]:
        w.model.zero_grad()
        w.model(**w.batch, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in w.model.named_parameters() if p.grad is not None}

    before, text, counted = gradients(), ask(w, "text"), Once(at=-1)
    with disturbed(w.model, "feed-forward", counted):
        gradients()
    assert counted.calls == 2
    for at in (1, 2):
        with disturbed(w.model, "feed-forward", Once(raises(KeyboardInterrupt), at)):
            with pytest.raises(KeyboardInterrupt):
                gradients()
        equal(ask(w, "text"), text)
        equal(gradients(), before)


@in_a_thread
@torch.no_grad()
def test_a_prefix_outlives_the_forward_that_was_stopped_on_it():
    w = world()
    mine = w.model.prefix_cache(**w.stream, voco_cache=w.blocks)
    alone = w.model(**w.text, prefix_cache=mine).logits
    for place, error in (("layer-after", KeyboardInterrupt), ("head", RuntimeError)):
        with disturbed(w.model, place, Once(raises(error))), pytest.raises(error):
            w.model(**w.text, prefix_cache=mine)
        equal(w.model(**w.text, prefix_cache=mine).logits, alone)


@in_a_thread
def test_a_session_goes_on_after_a_question_that_was_stopped():
    model, its = plain("llava_llama"), processors.processor("llava_llama")
    vp.attach(model, vp.VoCoConfig(num_tokens=2), its)

    def talk(stop: bool) -> list[str]:
        session, said = vp.VoCoSession(model, its), []
        for number, (images, asked) in enumerate(
            [([picture(1)], "what is it"), ([], "where"), ([picture(2)], "red")]
        ):
            session.add(*images)
            if stop:
                with disturbed(model, "layer-after", Once(raises(KeyboardInterrupt), 1 + number)):
                    with pytest.raises(KeyboardInterrupt):
                        session.ask(asked, max_new_tokens=6)
            said.append(session.ask(asked, max_new_tokens=6))
        return said

    undisturbed = talk(stop=False)
    assert talk(stop=True) == undisturbed == talk(stop=False)


# -- threads
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["single-pass", "compress", "stage-two", "generate-in-one-pass", "frozen"])
def test_a_forward_that_is_stopped_in_one_thread_disturbs_neither_itself_nor_another(what):
    contracts.a_forward_stopped_in_one_thread_disturbs_no_other(what)


@pytest.mark.parametrize("place", ["tower", "layer-before"])
@pytest.mark.parametrize("second", ["single-pass", "compress", "generate"])
@pytest.mark.parametrize("first", ["single-pass", "compress"])
def test_two_forwards_that_overlap_are_as_alone(first, second, place):
    contracts.two_forwards_that_overlap_are_as_alone(first, second, place)


# -- one inside another
# ------------------------------------------------------------------------------------------------------------


OUTER = ("single-pass", "compress", "stage-two", "generate", "generate-in-one-pass")


@pytest.mark.parametrize(
    "nested", [n for n in INNER if n not in ("backbone", "prefix", "generate-in-one-pass")]
)
@pytest.mark.parametrize("what", OUTER)
@in_a_thread
def test_a_forward_inside_another_is_as_alone_and_so_is_the_other(what, nested):
    contracts.a_forward_inside_another_changes_neither(what, nested)


@pytest.mark.parametrize("nested", ["text", "single-pass", "refused", "interrupted"])
@pytest.mark.parametrize("what", OUTER)
@in_a_thread
def test_so_is_one_of_another_model(what, nested):
    for place in ("tower", "layer-after"):
        check_nested(world(), other(), what, place, nested)


@pytest.mark.parametrize("place", ["first", "last", "layer-before", "feed-forward", "norm", "after", "head"])
@in_a_thread
def test_so_wherever_it_stands(place):
    for what in OUTER:
        check_nested(world(), world(), what, place, "text")
        check_nested(world(), other(), what, place, "single-pass")


class Asks:
    """A logits processor that asks a model of its own, as contrastive decoding does."""

    def __init__(self, w: World, what: str) -> None:
        self.w, self.what, self.found = w, what, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.found.append(ask(self.w, self.what))
        return scores


@pytest.mark.parametrize("what", ["text", "single-pass", "compress", "stage-two", "generate"])
@in_a_thread
def test_so_between_two_tokens_of_an_answer(what):
    w = world()
    for whole, two_stage in (("generate", True), ("generate-in-one-pass", False)):
        for asked in (w, other()):
            asks = Asks(asked, what)
            with torch.no_grad():
                found = generated(w, two_stage=two_stage, logits_processor=[asks])
            equal(found, expected(w, (whole,))[whole])
            equal(asks.found, [expected(asked, (what,))[what]] * len(asks.found))
            assert len(asks.found) == NEW["max_new_tokens"]


@pytest.mark.parametrize(
    ("name", "rule", "attention"),
    [
        ("llava_llama", "pooled", "dense"),
        ("llava_llama", "rival", "dense"),
        ("llava_llama", "isolated", "segmented"),
        ("qwen2_5_vl", "isolated", "dense"),
    ],
)
@pytest.mark.parametrize("nested", ["text", "single-pass", "refused"])
@in_a_thread
def test_so_under_every_rule(name, rule, attention, nested):
    w = world(name, rule, attention=attention)
    for what in ("single-pass", "compress"):
        for place in ("tower", "layer-after"):
            check_nested(w, w, what, place, nested)


@pytest.mark.parametrize("nested", ["text", "single-pass", "compress", "stage-two"])
@in_a_thread
def test_so_in_a_thread_that_was_given_the_context(nested):
    for what in ("single-pass", "compress", "stage-two"):
        check_nested(world(), world(), what, "layer-after", nested, in_a_copied_context)


@in_a_thread
def test_what_is_read_inside_a_frozen_stage_one_is_read_with_the_adapter():
    w = frozen_world()
    for what in ("compress", "stage-two", "generate"):
        for nested in ("text", "stage-two", "generate"):
            check_nested(w, w, what, "layer-after", nested)


@in_a_thread
def test_images_in_one_pass_are_refused_inside_a_frozen_stage_one_too():
    w = frozen_world()

    def one_pass() -> bool:
        with torch.no_grad(), pytest.raises(ValueError, match="stage 1 is frozen"):
            w.model(**w.batch)
        return True

    assert one_pass()
    once = Once(one_pass)
    with disturbed(w.model, "layer-after", once):
        ask(w, "compress")
    assert once.result


@pytest.mark.parametrize("what", OUTER)
@in_a_thread
def test_positions_that_contradict_the_rule_are_refused_inside_another_forward_too(what):
    w = world()
    odd = torch.arange(w.batch["input_ids"].shape[1])[None].expand(2, -1) * 3

    def contradict() -> bool:
        with torch.no_grad(), pytest.raises(ValueError, match="position_ids given do not agree"):
            w.model(**w.batch, position_ids=odd)
        return True

    assert contradict()
    once = Once(contradict)
    with disturbed(w.model, "layer-after", once):
        ask(w, what)
    assert once.result


# -- training
# ------------------------------------------------------------------------------------------------------------


def of(made: vp.VoCoSFTTrainer) -> World:
    """What a trained model is asked."""
    return world_of("llava_llama", inner(made.model))


def evaluated(made: vp.VoCoSFTTrainer, w: World, mode: str) -> dict[str, list[torch.Tensor]]:
    made.model.eval()
    return answers(w, ("text", "compress", "stage-two") if mode == "frozen" else SOME)


@pytest.fixture(scope="module", params=MODES)
def training(request, tmp_path_factory):
    """A trainer of each kind, its batch and its loss."""
    made, loss = trained(request.param, tmp_path_factory.mktemp("out"))
    return request.param, made, next(iter(made.get_train_dataloader())), loss


def counted_step(made: vp.VoCoSFTTrainer, w: World, batch, place: str) -> int:
    counted = Once(at=-1)
    with disturbed(w.model, place, counted):
        step(made, batch)
    return counted.calls


@in_a_thread
def test_a_training_step_that_was_stopped_leaves_nothing_behind(training):
    """Stopped in stage 1, in stage 2, in the teacher's reading, or while a layer is recomputed."""
    mode, made, batch, _ = training
    w = of(made)
    before, undisturbed = evaluated(made, w, mode), step(made, batch)
    count = counted_step(made, w, batch, "feed-forward")
    assert count >= 2
    for at in range(1, count + 1):
        with disturbed(w.model, "feed-forward", Once(raises(KeyboardInterrupt), at)):
            with pytest.raises(KeyboardInterrupt):
                step(made, batch)
        equal(evaluated(made, w, mode), before)
    check_undisturbed(other())
    equal(step(made, batch), undisturbed)


@pytest.mark.parametrize("nested", ["text", "images", "another's"])
@in_a_thread
def test_a_forward_inside_a_training_step_changes_neither(training, nested):
    mode, made, batch, _ = training
    if nested == "images" and checkpointed_layers_drop_caches():
        pytest.skip("a model in training mode neither compresses nor generates here (transformers < 5.24)")
    w = of(made)
    asked = other() if nested == "another's" else w
    what = "text" if nested == "text" else "compress" if mode == "frozen" else "single-pass"
    made.model.train()
    alone, undisturbed = ask(asked, what), step(made, batch)
    for place in ("tower", "feed-forward"):
        for at in range(1, counted_step(made, w, batch, place) + 1):
            once = Once(lambda: ask(asked, what), at)
            with disturbed(w.model, place, once):
                found = step(made, batch)
            equal(found, undisturbed)
            if not (mode == "distill-base" and asked is w):  # PEFT's switch is off for whoever asks
                equal(once.result, alone)


class AsksEachStep(TrainerCallback):
    """Asks the model that trains, before and after each step."""

    def __init__(self, w: World, what: str) -> None:
        self.w, self.what, self.found = w, what, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.eval()
        self.found.append(ask(self.w, self.what))
        model.train()

    on_step_end = on_step_begin


@in_a_thread
def test_a_callback_that_asks_the_model_changes_no_step(training):
    mode, made, _, loss = training
    asks = AsksEachStep(of(made), "compress" if mode == "frozen" else "single-pass")
    made.model.eval()
    alone = ask(asks.w, asks.what)
    made.add_callback(asks)
    assert run(made) == loss
    equal(asks.found, [alone, alone])

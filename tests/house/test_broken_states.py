"""The tests of state can fail: each is run here on the product, and on one that is broken in what it keeps,
gives back or shares, and must notice.
"""

from __future__ import annotations

import contextlib
import inspect
import pickle
import sys
from dataclasses import replace
from typing import Any

import pytest

from contracts import constructor as constructor_contracts
from contracts import copies as copies_contracts
from contracts import generation as generation_contracts
from contracts import kv_cache as kv_cache_contracts
from contracts import stopped as stopped_contracts
from voco_plugin.cache.place import stage_two
from voco_plugin.core import forward, kv_cache
from voco_plugin.core.attachment import Attachment
from voco_plugin.core.extension import Extension
from voco_plugin.core.forward import TakesBlockEmbeddings, UnderRule
from voco_plugin.core.kv_cache import KVSlots, RemembersSlots
from voco_plugin.inference.mixin import VoCoGenerationMixin
from voco_plugin.models import attaching
from voco_plugin.training import fused_step, model_setup, trainer

# -- a forward


class Left:
    """A context variable that is not given its value back where the block ends in one of ``errors``."""

    def __init__(self, real: Any, *errors: type[BaseException]) -> None:
        self.get, self.real, self.errors = real.get, real, errors

    def set(self, value: Any) -> Any:
        return self.real.set(value)

    def reset(self, token: Any) -> None:
        kind = sys.exc_info()[0]
        if kind is None or not issubclass(kind, self.errors):
            self.real.reset(token)


def lifted_on_success_only(patch):
    patch.setattr(forward, "_RUNNING", Left(forward._RUNNING, BaseException))


def lifted_on_exception_only(patch):
    """``except Exception`` in the place of ``finally``."""
    beyond = (KeyboardInterrupt, SystemExit, GeneratorExit, stopped_contracts.Stopped)
    patch.setattr(forward, "_RUNNING", Left(forward._RUNNING, *beyond))


class Cleared(Left):
    """A context variable that is cleared where a block fails, not given its value back."""

    def reset(self, token: Any) -> None:
        self.real.reset(token)
        if sys.exc_info()[0] is not None:
            self.set(None)


def outer_forward_cleared(patch):
    patch.setattr(forward, "_RUNNING", Cleared(forward._RUNNING))


class ForAll(Left):
    """A variable of the process: a forward finds what one in another thread has set."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.held: list[Any] = [real.get()]
        self.get = lambda: self.held[-1]

    def set(self, value: Any) -> Any:
        self.held.append(value)

    def reset(self, token: Any) -> None:
        self.held.pop()


def one_state_for_all_threads(patch):
    patch.setattr(forward, "_RUNNING", ForAll(forward._RUNNING))


# -- a copy


def forward_on_the_instance(name):
    """What attach puts on ``name`` is bound to it for good, as a closure is."""

    def breakage(patch):
        real = attaching._extend

        def broken(model, state):
            real(model, state)
            on = model if name == "model" else state.family.backbone(model)
            own = type(on).forward
            on.forward = lambda *args, **kwargs: own(on, *args, **kwargs)
            on.forward.__signature__ = inspect.signature(own.__get__(on))

        patch.setattr(attaching, "_extend", broken)

    return breakage


def one_attachment_for_all_copies(patch):
    patch.setattr(Attachment, "__deepcopy__", lambda self, memo: self)


def compressor_of_the_original(patch):
    real = Attachment.__deepcopy__

    def broken(self, memo):
        made = real(self, memo)
        made.embeddings = self.embeddings
        return made

    patch.setattr(Attachment, "__deepcopy__", broken)


def pickled_by_its_own_class(patch):
    """A class that is made while the program runs, by a name under which the plain one is found."""
    patch.delattr(Extension, "__reduce_ex__")


# -- what a KV cache is remembered to hold


def order_of_rows_ignored(patch):
    patch.setattr(KVSlots, "selected", lambda self, rows: self)


def rows_repeated_one_after_the_other(patch):
    def broken(self, times):
        return self.rows(lambda value: value.repeat(times, *[1] * (value.dim() - 1)))

    patch.setattr(KVSlots, "repeated", broken)


def cropped_at_the_front(patch):
    """As many slots are dropped, the first ones."""
    real = KVSlots.cropped

    def broken(self, length):
        slots = real(self, length)
        gone = self.table.length - length
        return replace(slots, table=self.table.each(lambda v: v[:, gone:])) if gone > 0 else slots

    patch.setattr(KVSlots, "cropped", broken)


def positions_not_cropped(patch):
    real = KVSlots.cropped
    patch.setattr(
        KVSlots, "cropped", lambda self, length: replace(real(self, length), next_position=self.next_position)
    )


def blocks_cropped_silently(patch):
    def broken(self, length):
        tail = self.table.kind[:, length:]
        dropped = (tail != kv_cache.TokenKind.PAD).sum(dim=1)
        return replace(self, table=self.table.crop(length), next_position=self.next_position - dropped)

    patch.setattr(KVSlots, "cropped", broken)


def reorder_not_followed(patch):
    patch.setattr(
        RemembersSlots, "reorder_cache", lambda self, rows: super(RemembersSlots, self).reorder_cache(rows)
    )


def select_not_followed(patch):
    patch.setattr(RemembersSlots, "_select", lambda self, rows: None)


def reset_not_followed(patch):
    patch.setattr(RemembersSlots, "reset", lambda self: super(RemembersSlots, self).reset())


def shared(self: Any, memo: Any = None) -> Any:
    made = type(self).__new__(type(self))
    vars(made).update(vars(self))
    return made


def layers_shared_by_a_copy(patch):
    patch.setattr(RemembersSlots, "__copy__", shared)


def layers_shared_by_a_deep_copy(patch):
    patch.setattr(RemembersSlots, "__deepcopy__", shared, raising=False)


def unfinished_not_noted(patch):
    """A cache that a forward was stopped in is taken for one that plain text wrote."""
    patch.setattr(RemembersSlots, "check_finished", lambda self, length: None)


def full_where_placed(patch):
    """Stage 2 says that nothing it placed is padding."""
    patch.setattr(stage_two, "KVSlots", lambda **facts: KVSlots(**{**facts, "full": True}))


def full_while_decoding(patch):
    """A decoded token drops the mask that it was given."""
    real = KVSlots.go_on
    patch.setattr(KVSlots, "go_on", lambda self, mask, full=False: real(self, mask, full=True))


# -- what is given back


def attention_switched_without_the_rule(patch):
    patch.delattr(VoCoGenerationMixin, "set_attn_implementation")


def implementation_not_noted(patch):
    """The new attention has the rule, and detach gives back the one before it."""
    real = VoCoGenerationMixin.set_attn_implementation

    def broken(self, *args, **kwargs):
        undo = self._voco_attachment.restore
        before = undo["implementation"]
        real(self, *args, **kwargs)
        undo["implementation"] = before

    patch.setattr(VoCoGenerationMixin, "set_attn_implementation", broken)


def nothing_noted(patch):
    for module in (attaching, model_setup):
        patch.setattr(module, "as_given_on_failure", lambda *things: contextlib.nullcontext())


def noted_for_exceptions_only(patch):
    from voco_plugin.models import snapshot

    @contextlib.contextmanager
    def broken(*things):
        parts = snapshot._Modules(things[0]), snapshot._Processor(*things[1:])
        try:
            yield
        except Exception:
            for part in parts:
                part.put_back()
            raise

    for module in (attaching, model_setup):
        patch.setattr(module, "as_given_on_failure", broken)


def processor_not_given_back(patch):
    from voco_plugin.models import snapshot

    patch.setattr(snapshot._Processor, "put_back", lambda self: None)


def classes_not_given_back_on_failure(patch):
    from voco_plugin.models import snapshot

    real = snapshot._Modules.put_back

    def broken(self):
        self.modules = [(module, type(module), attributes) for module, _, attributes in self.modules]
        real(self)

    patch.setattr(snapshot._Modules, "put_back", broken)


def frozen_stage_one_stays(patch):
    """The model is given back, its rule as the constructor changed it."""
    patch.setattr(trainer, "as_it_was_on_failure", model_setup.as_given_on_failure)


def fused_forward_stays(patch):
    def broken(model, before, replaced):
        patched = vars(model).get("forward")
        if patched is None:
            return None
        return fused_step.FusedStep(fused_step._with_names_of_its_own(patched.__func__, replaced))

    patch.setattr(trainer, "take_off_fused_forward", broken)


def trls_names_not_missed(patch):
    patch.setattr(fused_step, "_with_names_of_its_own", lambda stock, replaced: stock)


def class_not_given_back(*kinds):
    def breakage(patch):
        real = attaching.restore
        patch.setattr(attaching, "restore", lambda thing: None if isinstance(thing, kinds) else real(thing))

    return breakage


def notes_stay_on_submodules(patch):
    def broken(model, undo):
        noted = [(module, vars(module).get("_voco_of")) for module in model.modules()]
        real(model, undo)
        for module, note in noted:
            if note is not None:
                vars(module)["_voco_of"] = note

    real = attaching._take_off
    patch.setattr(attaching, "_take_off", broken)


def attention_not_given_back(patch):
    def broken(model, undo):
        own = model.get_decoder().config._attn_implementation
        real(model, undo)
        model.get_decoder().config._attn_implementation_internal = own

    real = attaching._take_off
    patch.setattr(attaching, "_take_off", broken)


STOPPED = stopped_contracts.a_stopped_forward_leaves_nothing_behind
NESTED = stopped_contracts.a_forward_inside_another_changes_neither
SELECTED = kv_cache_contracts.selected_rows_go_on_as_those_rows
CROPPED = kv_cache_contracts.text_that_was_cropped_off_can_be_read_again
NOT_MADE = constructor_contracts.a_trainer_that_is_not_made_changes_nothing
DETACHED = copies_contracts.nothing_of_this_package_stays_on_a_detached_model
PLACED = ("llava_llama", "stage two", "past")
ONE_PASS = ("llava_llama", "one pass", "past")
PLAIN, ATTACHED = "a plain model", "an attached one"
FOLDER = "where a trainer writes"

CASES: dict[str, tuple[Any, ...]] = {
    "lifted on success only: error": (lifted_on_success_only, STOPPED, "ordinary"),
    "lifted on success only: ctrl-c": (lifted_on_success_only, STOPPED, "ctrl-c"),
    "lifted on Exception only: ctrl-c": (lifted_on_exception_only, STOPPED, "ctrl-c"),
    "lifted on Exception only: own": (lifted_on_exception_only, STOPPED, "own"),
    "outer forward cleared: interrupted": (outer_forward_cleared, NESTED, "single-pass", "interrupted"),
    "outer forward cleared: refused": (outer_forward_cleared, NESTED, "compress", "refused-by-a-hook"),
    "outer forward cleared: answer": (outer_forward_cleared, NESTED, "generate", "interrupted"),
    "one for all threads": (
        one_state_for_all_threads,
        stopped_contracts.two_forwards_that_overlap_are_as_alone,
        "single-pass",
        "compress",
        "tower",
    ),
    "forward on the model: deep copy": (
        forward_on_the_instance("model"),
        copies_contracts.a_deep_copy_computes_with_its_own_weights,
        "isolated",
    ),
    "forward on the backbone: deep copy": (
        forward_on_the_instance("backbone"),
        copies_contracts.a_deep_copy_computes_with_its_own_weights,
        "isolated",
    ),
    "forward on the model: detached": (forward_on_the_instance("model"), DETACHED, "llava_llama", "pooled"),
    "one attachment for all copies": (
        one_attachment_for_all_copies,
        copies_contracts.to_detach_one_leaves_the_other_attached,
        "the original",
    ),
    "compressor of the original: deep copy": (
        compressor_of_the_original,
        copies_contracts.a_deep_copy_computes_with_its_own_weights,
        "rival",
    ),
    "pickled by its own class": (
        pickled_by_its_own_class,
        copies_contracts.a_pickled_model_is_loaded_attached,
        "attached",
        copies_contracts.through_pickle,
    ),
    "order of rows ignored: select": (order_of_rows_ignored, SELECTED, PLACED, "select 1 0"),
    "order of rows ignored: reorder": (order_of_rows_ignored, SELECTED, ONE_PASS, "reorder 1 0"),
    "select not followed": (select_not_followed, SELECTED, PLACED, "select 1 0"),
    "reorder not followed": (reorder_not_followed, SELECTED, PLACED, "reorder 1 0"),
    "repeated one after the other: placed": (rows_repeated_one_after_the_other, SELECTED, PLACED, "repeat"),
    "repeated one after the other: one pass": (
        rows_repeated_one_after_the_other,
        SELECTED,
        ONE_PASS,
        "repeat",
    ),
    "cropped at the front": (cropped_at_the_front, CROPPED, ONE_PASS, "at once"),
    "positions not cropped": (positions_not_cropped, CROPPED, PLACED, "selected after"),
    "blocks cropped silently": (
        blocks_cropped_silently,
        kv_cache_contracts.a_cache_cropped_into_an_image_is_refused,
        ONE_PASS,
    ),
    "reset not followed": (reset_not_followed, kv_cache_contracts.a_cache_that_was_reset_is_an_empty_one, 2),
    "layers shared by a copy": (
        layers_shared_by_a_copy,
        kv_cache_contracts.of_a_shallow_copy_what_is_remembered_fits_the_keys,
        PLACED,
        "the copy",
    ),
    "layers shared by a deep copy": (
        layers_shared_by_a_deep_copy,
        kv_cache_contracts.what_is_done_to_one_is_not_done_to_the_other,
        PLACED,
        "the copy",
        "deepcopy",
    ),
    "unfinished not noted": (
        unfinished_not_noted,
        kv_cache_contracts.a_users_cache_of_a_stopped_forward_goes_on_or_is_refused,
        "norm",
        KeyboardInterrupt,
    ),
    "full where placed": (
        full_where_placed,
        kv_cache_contracts.padding_slots_are_known_without_a_mask,
        "llava_llama",
        "stage two",
    ),
    "full while decoding: a mask left out": (
        full_while_decoding,
        kv_cache_contracts.padding_slots_are_known_without_a_mask,
        "llava_llama",
        "stage two",
    ),
    "full while decoding: generate": (
        full_while_decoding,
        generation_contracts.greedy_equals_single_pass,
        "llava_llama",
        "isolated",
    ),
    "attention without the rule": (
        attention_switched_without_the_rule,
        copies_contracts.another_attention_has_the_rule,
        "sdpa",
        "eager",
    ),
    "implementation not noted": (
        implementation_not_noted,
        copies_contracts.another_attention_has_the_rule,
        "sdpa",
        "eager",
    ),
    "nothing noted: plain model": (nothing_noted, NOT_MADE, "ctrl-c", PLAIN, FOLDER),
    "nothing noted: attached": (nothing_noted, NOT_MADE, "frozen and biases", ATTACHED, FOLDER),
    "noted for exceptions only": (noted_for_exceptions_only, NOT_MADE, "ctrl-c", PLAIN, FOLDER),
    "processor not given back": (
        processor_not_given_back,
        NOT_MADE,
        "nothing trains",
        PLAIN,
        FOLDER,
    ),
    "classes not given back": (
        classes_not_given_back_on_failure,
        NOT_MADE,
        "nothing trains",
        PLAIN,
        FOLDER,
    ),
    "frozen stage 1 stays": (
        frozen_stage_one_stays,
        constructor_contracts.a_trainer_stopped_at_its_end_changes_nothing,
        ATTACHED,
        FOLDER,
    ),
    "fused forward stays: deep copy": (
        fused_forward_stays,
        constructor_contracts.a_copy_of_a_trained_model_is_apart,
        "joint",
        FOLDER,
    ),
    "TRL's triton not missed": (
        trls_names_not_missed,
        constructor_contracts.a_function_of_trls_that_is_gone_is_missed_aloud,
        "_use_triton",
        FOLDER,
    ),
    "TRL's gathering not missed": (
        trls_names_not_missed,
        constructor_contracts.a_function_of_trls_that_is_gone_is_missed_aloud,
        "maybe_gather_lm_head_ctx",
        FOLDER,
    ),
    "backbone's class stays": (class_not_given_back(UnderRule), DETACHED, "qwen2_5_vl", "isolated"),
    "decoder's class stays": (class_not_given_back(TakesBlockEmbeddings), DETACHED, "llava_llama", "pooled"),
    "model's class stays": (class_not_given_back(VoCoGenerationMixin), DETACHED, "llama4", "isolated"),
    "notes stay": (notes_stay_on_submodules, DETACHED, "llava_llama", "pooled"),
    "attention stays": (attention_not_given_back, DETACHED, "llava_llama", "pooled"),
}

NOTICED = (AssertionError, pytest.fail.Exception, RuntimeError, ValueError, pickle.PicklingError)
"""A check says what differs, or stops at what the product itself refuses then."""


@pytest.mark.parametrize("case", CASES)
def test_a_broken_state_is_caught(case, monkeypatch, tmp_path):
    breakage, check, *given = CASES[case]

    def run(name: str) -> None:
        check(*(tmp_path / name if value is FOLDER else value for value in given))

    (tmp_path / "whole").mkdir(), (tmp_path / "broken").mkdir()
    run("whole")  # what is shared and asked once is made by the product itself
    with monkeypatch.context() as patch:
        breakage(patch)
        with pytest.raises(NOTICED):
            run("broken")
    assert stopped_contracts.running_forward() is None

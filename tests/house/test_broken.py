"""The contract tests can fail: each is run here on a deliberately broken mask, position or cache, and must
notice.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.masking_utils import causal_mask_function

from contracts import attaching as attaching_contracts
from contracts import cache as cache_contracts
from contracts import compressors as compressors_contracts
from contracts import decoding as decoding_contracts
from contracts import exactness as exactness_contracts
from contracts import frozen as frozen_contracts
from contracts import generation as generation_contracts
from contracts import layout as layout_contracts
from contracts import placing as placing_contracts
from contracts import rope as rope_contracts
from contracts import segments as segments_contracts
from contracts import session as session_contracts
from contracts import streamed as streamed_contracts
from harness import inputs, shared
from voco_plugin.cache import file_format as files
from voco_plugin.cache import fingerprint as fingerprints
from voco_plugin.cache.compress import stage_one
from voco_plugin.cache.place import relocation, stage_two
from voco_plugin.core import adapter_switch, block_embeddings, forward, layout
from voco_plugin.core.attention import interface, segments
from voco_plugin.core.block_embeddings import BlockEmbeddings
from voco_plugin.core.kv_cache import KVSlots
from voco_plugin.core.layout import TokenKind
from voco_plugin.core.masks import isolation_predicate
from voco_plugin.inference import session
from voco_plugin.models.families.base import Family
from voco_plugin.training.two_stage import frozen_blocks as frozen
from voco_plugin.training.two_stage import streamed

two_stage = exactness_contracts.two_stage_equals_single_pass
table = exactness_contracts.the_mask_of_every_layer_is_the_table
written_from_their_own = compressors_contracts.only_voco_slots_are_written_and_from_their_own_image


def predicate(change):
    """The predicate with ``change(visible, table, b, q, k)`` applied."""

    def broken(config, tokens):
        real = isolation_predicate(config, tokens)
        return lambda b, h, q, k: change(real(b, h, q, k), tokens, b, q, k)

    return lambda patch: patch.setattr(interface, "isolation_predicate", broken)


def is_kind(tokens, kind, b, i):
    return tokens.kind[b, i] == kind


V, C, T = TokenKind.VISION, TokenKind.VOCO, TokenKind.TEXT
text_sees_vision = predicate(lambda seen, t, b, q, k: seen | (is_kind(t, T, b, q) & is_kind(t, V, b, k)))
voco_sees_text = predicate(lambda seen, t, b, q, k: seen | (is_kind(t, C, b, q) & is_kind(t, T, b, k)))
voco_is_blind = predicate(lambda seen, t, b, q, k: seen & ~(is_kind(t, C, b, q) & is_kind(t, V, b, k)))
blocks_mix = predicate(lambda seen, t, b, q, k: seen | ((t.block[b, q] >= 0) & (t.block[b, k] >= 0)))
vision_alone = predicate(
    lambda seen, t, b, q, k: seen & ~(is_kind(t, V, b, q) & (t.order[b, q] != t.order[b, k]))
)
star_off = predicate(
    lambda seen, t, b, q, k: seen | ((t.block[b, q] == t.block[b, k]) & (t.block[b, q] >= 0))
)


# what a rival hides
voco_sees_vision = predicate(
    lambda seen, t, b, q, k: (
        seen | (is_kind(t, C, b, q) & is_kind(t, V, b, k) & (t.block[b, q] == t.block[b, k]))
    )
)


def image_of_another(patch):
    """The embeddings of each block made of its neighbour's image."""
    real = BlockEmbeddings.places

    def shifted(self, *args):
        found = real(self, *args)
        if found is not None:
            found.vision = found.vision[-1:] + found.vision[:-1]
        return found

    patch.setattr(BlockEmbeddings, "places", shifted)


def markers_pooled_too(patch):
    """Row and end markers counted as image features."""
    patch.setattr(block_embeddings, "_columns", lambda wanted, span, start, stop: torch.arange(start, stop))


def nothing_written(patch):
    """The hook that says it wrote, and does not."""

    def write(self, places, embeddings):
        places.written = True
        return embeddings

    patch.setattr(BlockEmbeddings, "write", write)


def mask_replaced(patch):
    """The rule instead of the backbone's mask, not on top of it: windows and bidirectional blocks are
    lost.
    """
    from transformers.masking_utils import causal_mask_function

    patch.setattr(
        interface,
        "and_masks",
        lambda own, rule: lambda b, h, q, k: causal_mask_function(b, h, q, k) & rule(b, h, q, k),
    )


def slots_unmapped(patch):
    patch.setattr(interface, "_mapped", lambda mask_function, order: mask_function)


def positions_shifted(patch):
    real = layout.compact_positions

    def broken(plan, sequential):
        made = real(plan, sequential)
        inside = (plan.kind == TokenKind.VISION).to(made.device)
        return made + inside  # vision one position closer to its VoCo tokens

    patch.setattr(forward, "compact_positions", broken)
    patch.setattr(stage_one, "compact_positions", broken)
    patch.setattr(layout_contracts, "compact_positions", broken)


def text_position_off(patch):
    real = stage_two.plan_row

    def broken(*args):
        plan = real(*args)
        plan.positions = plan.positions + (plan.positions > 3)
        return plan

    patch.setattr(stage_two, "plan_row", broken)


def rotated_backwards(patch):
    real = relocation.Relocator._cos_sin

    def broken(self, layer, deltas, dtype):
        probing = bool((deltas.abs() == relocation._PROBE_SHIFT).all())
        return real(self, layer, deltas if probing else -deltas, dtype)

    patch.setattr(relocation.Relocator, "_cos_sin", broken)


def not_rotated(patch):
    patch.setattr(relocation.Relocator, "move", lambda self, tensors, deltas: tensors)


def slot_before(patch):
    """Stage 1 keeps the slot before each VoCo token."""
    real = stage_one.VoCoBlock

    def broken(keys, values, **facts):
        return real(keys=tuple(k.roll(1, dims=1) for k in keys), values=tuple(values), **facts)

    patch.setattr(stage_one, "VoCoBlock", broken)


def values_as_keys(patch):
    real = files.blocks_of

    def broken(tensors, record, copy):
        names = {k: k.replace("key", "x").replace("value", "key").replace("x", "value") for k in tensors}
        return real({names[k]: v for k, v in tensors.items()}, record, copy)

    patch.setattr(files, "blocks_of", broken)


def padding_ignored(patch):
    real = forward._mask
    patch.setattr(forward, "_mask", lambda *args: torch.ones_like(real(*args)))


def checksum_ignored(patch):
    patch.setattr(files, "digest", lambda tensors, record: "same")


def fingerprint_ignored(patch):
    patch.setattr(fingerprints, "differences", lambda expected, found: [])


def cache_written_in_place(patch):
    """Stage 2 that works on the caller's blocks."""
    real = stage_two._key_values

    def broken(model, state, per_row, *rest):
        made = real(model, state, per_row, *rest)
        for blocks in per_row:
            for block in blocks:
                block.keys[0].add_(1e-3)
        return made

    patch.setattr(stage_two, "_key_values", broken)


def rows_not_restored(patch):
    patch.setattr(sys.modules["voco_plugin.models.attaching"], "restore_rows", lambda model, record: None)


def latent_not_turned(patch):
    """Latent attention keeps the rotated part where other caches have the value."""
    real = relocation.Relocator.move
    patch.setattr(relocation.Relocator, "move", lambda self, held, by: (real(self, held, by)[0], held[1]))


def prefix_forgotten(patch):
    patch.setattr(stage_two, "_prefix", lambda *args: None)


def chunks_from_zero(patch):
    """A block alone is cut into chunks from its own first token."""
    real = KVSlots.starting_at
    patch.setattr(KVSlots, "starting_at", lambda order: real(torch.zeros_like(order)))


def limit_forgotten(patch):
    patch.setattr(stage_two, "_check_lengths", lambda text, last, tokens: None)


def forward_not_prepared(patch):
    patch.setattr(
        forward,
        "_prepare",
        lambda a, module, args, kwargs, mode: forward._Prepared(forward.Running(), args, kwargs),
    )


def prefix_counted_from_zero(patch):
    """What stands behind a prefix takes the positions of what stands at the start."""
    real = stage_two._Past.of

    def broken(before, *rest):
        past = real(before, *rest)
        past.next_position = np.zeros_like(past.next_position)
        return past

    patch.setattr(stage_two._Past, "of", broken)


def prefix_seen_late(patch):
    """Blocks count as standing before the prefix they follow."""
    real = stage_two._Past.of

    def broken(before, *rest):
        past = real(before, *rest)
        past.next_order = past.next_order - 4
        return past

    patch.setattr(stage_two._Past, "of", broken)


def moved_once_for_all(patch):
    """A block that stands at two places is moved to the first of them."""
    real = relocation.Relocator.move
    patch.setattr(
        relocation.Relocator, "move", lambda self, held, by: real(self, held, by.sign() * by.abs().max())
    )


def window_forgotten_while_decoding(patch):
    patch.setattr(Family, "windowed", lambda self, model: False)


def session_forgets_the_unread(patch):
    """The last token of an answer, which generate has not read, is lost."""
    real = session.VoCoSession.ask

    def broken(self, *args, **kwargs):
        answer = real(self, *args, **kwargs)
        self._unread = ()
        return answer

    patch.setattr(session.VoCoSession, "ask", broken)


def draft_not_taken_back(patch):
    """Drafted tokens that were refused stay counted in the positions."""
    real = KVSlots.cropped

    def broken(self, length):
        cut = self.table.length - length
        slots = real(self, length)
        return replace(slots, next_position=slots.next_position + cut) if cut > 0 else slots

    patch.setattr(KVSlots, "cropped", broken)


def streams_write_last(patch):
    """A VoCo token gets what its row in the stream computes, which sees no vision token."""
    real = segments._writers
    patch.setattr(segments, "_writers", lambda *args: real(*args)[::-1])


def windows_taken_for_causal(patch):
    """The backbone's own mask is not asked within a segment."""
    real = segments.plan_segments

    def broken(config, table, mask_function, *rest):
        return real(config, table, causal_mask_function, *rest)

    patch.setattr(interface, "plan_segments", broken)


def blocks_of_all_rows_in_one(patch):
    """Blocks are found by their number alone, whichever stands beside them."""
    real = segments._find

    def broken(config, kind, block, document):
        return real(config, kind, np.where(block >= 0, 0, block), document)

    patch.setattr(segments, "_find", broken)


def keys_detached(patch):
    """The blocks' keys are constants to the text that reads them."""
    real = stage_one.VoCoBlock

    def broken(keys, values, **facts):
        return real(keys=tuple(k.detach() for k in keys), values=tuple(values), **facts)

    patch.setattr(stage_one, "VoCoBlock", broken)


def blocks_of_another_row(patch):
    """Chunks give back their blocks in the order of their lengths, not of the prompts."""
    real = streamed.run_alone
    patch.setattr(
        streamed, "run_alone", lambda *args, **more: (real(*args, **more)[0][::-1], real(*args, **more)[1])
    )


def last_layer_cut_where_it_is_read(patch):
    real = streamed.run_alone
    patch.setattr(
        streamed, "run_alone", lambda *args, read_on=False: (real(*args)[0], real(*args, read_on=True)[1] * 0)
    )


def adapter_on_in_stage_one(patch):
    """A frozen stage 1 that compresses with the weights it reads with."""
    patch.setattr(stage_one, "can_leave_out_adapters", lambda model: None)
    patch.setattr(adapter_switch, "running_forward", lambda: None)


def keys_of_another_image(patch):
    """A store that is filled as it should be, and asked for the images in another order."""
    real, asked = frozen.FrozenBlocks._named, []

    def broken(*args):
        asked.append(args)
        return real(*args) if len(asked) == 1 else real(*args)[::-1]

    patch.setattr(frozen.FrozenBlocks, "_named", broken)


def reader_taken_for_the_maker(patch):
    """Text that was read with the adapter has the starting model's fingerprint."""
    real = fingerprints.made_by
    patch.setattr(fingerprints, "made_by", lambda *args: fingerprints.of_blocks(real(*args)))


def filled_then_read(patch):
    """The blocks of a store against those computed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as inner:
        frozen_contracts.blocks_of_a_store_are_those_computed("llava_llama", {}, Path(folder), inner)


def families_under_segments(name, rule="isolated"):
    return run(segments_contracts.families_equal_dense, name, rule, "sdpa")


def session_test(patch):
    with pytest.MonkeyPatch.context() as inner:
        session_contracts.a_session_is_its_own_prompt(inner)


LLAVA = ("llava_llama", "isolated", "sdpa")
fp32 = torch.float32


def run(test, *args):
    return lambda patch: test(*args)


def with_patch(test, *args):
    return lambda patch: test(*args, patch)


NOTICED = (AssertionError, pytest.fail.Exception)
if sys.version_info >= (3, 11):
    import builtins

    NOTICED += (builtins.BaseExceptionGroup,)  # hypothesis, where it finds two ways to fail

CASES = {
    "streams write last: segments": (streams_write_last, families_under_segments("llava_llama")),
    "windows taken for causal: segments": (
        windows_taken_for_causal,
        families_under_segments("llava_mistral"),
    ),
    "images read one way: segments": (windows_taken_for_causal, families_under_segments("gemma3")),
    "blocks in one: segments": (blocks_of_all_rows_in_one, families_under_segments("llava_llama")),
    "keys detached: streamed": (keys_detached, run(streamed_contracts.check, "llava_llama")),
    "blocks of another row: streamed": (blocks_of_another_row, run(streamed_contracts.check, "llava_llama")),
    "a VoCo token predicts nothing: streamed": (
        last_layer_cut_where_it_is_read,
        run(streamed_contracts.check, "llava_llama"),
    ),
    "adapter on in stage 1: frozen": (
        adapter_on_in_stage_one,
        run(frozen_contracts.loss_and_gradients_are_those_of_the_two_steps_by_hand, "llava_llama", "right"),
    ),
    "another image's block: frozen": (keys_of_another_image, filled_then_read),
    "reader taken for the maker: frozen": (
        reader_taken_for_the_maker,
        run(frozen_contracts.its_blocks_are_the_starting_models_and_its_text_is_its_own),
    ),
    "prefix counted from zero": (
        prefix_counted_from_zero,
        run(placing_contracts.a_prefix_read_once_equals_one_pass, "llava_llama"),
    ),
    "prefix seen late": (
        prefix_seen_late,
        run(placing_contracts.a_prefix_read_once_equals_one_pass, "llava_mistral"),
    ),
    "moved once for all": (
        moved_once_for_all,
        run(placing_contracts.any_order_and_any_text_equals_one_pass, "llava_llama", "isolated"),
    ),
    "window forgotten while decoding": (
        window_forgotten_while_decoding,
        run(generation_contracts.greedy_equals_single_pass, "llava_mistral", "isolated"),
    ),
    "drafts not taken back: assisted": (
        draft_not_taken_back,
        run(decoding_contracts.assisted_decoding_gives_the_same_answers, "llava_llama", "draft"),
    ),
    "drafts not taken back: static": (
        draft_not_taken_back,
        run(placing_contracts.generation_after_a_prefix, "llava_llama"),
    ),
    "unread token lost: session": (session_forgets_the_unread, session_test),
    "text sees vision: two-stage": (text_sees_vision, run(two_stage, *LLAVA, fp32)),
    "text sees vision: table": (text_sees_vision, with_patch(table, *LLAVA)),
    "voco sees earlier text: two-stage": (voco_sees_text, run(two_stage, *LLAVA, fp32)),
    "voco sees earlier text: table": (voco_sees_text, with_patch(table, *LLAVA)),
    "a rival sees vision: table": (voco_sees_vision, with_patch(table, "llava_llama", "rival", "sdpa")),
    "a rival sees vision: plain decoder": (
        voco_sees_vision,
        run(compressors_contracts.a_rival_is_a_plain_model_that_reads_its_embeddings, "avg_pool", "self"),
    ),
    "another's image: written": (
        image_of_another,
        run(written_from_their_own, "llava_llama", "pooled"),
    ),
    "another's image: packed": (
        image_of_another,
        run(compressors_contracts.packed_rows_are_as_alone, "pooled"),
    ),
    "markers pooled: written": (markers_pooled_too, run(written_from_their_own, "idefics3", "pooled")),
    "nothing written: written": (nothing_written, run(written_from_their_own, "llava_llama", "avg_pool")),
    "voco is blind: table": (voco_is_blind, with_patch(table, *LLAVA)),
    "blocks mix: two-stage": (blocks_mix, run(two_stage, *LLAVA, fp32)),
    "blocks mix: table": (blocks_mix, with_patch(table, *LLAVA)),
    "star everywhere: table": (vision_alone, with_patch(table, *LLAVA)),
    "star nowhere: table": (star_off, with_patch(table, "llava_llama", "star", "sdpa")),
    "window lost: table": (mask_replaced, with_patch(table, "llava_mistral", "isolated", "sdpa")),
    "image blocks lost: table": (mask_replaced, with_patch(table, "gemma3", "isolated", "sdpa")),
    "window lost: eager": (mask_replaced, with_patch(table, "llava_mistral", "isolated", "eager")),
    "slots unmapped: two-stage": (slots_unmapped, run(two_stage, *LLAVA, fp32)),
    "slots unmapped: window": (slots_unmapped, run(two_stage, "llava_mistral", "isolated", "sdpa", fp32)),
    "positions shifted: 4-D reference": (
        positions_shifted,
        run(exactness_contracts.single_pass_equals_the_plain_model_under_a_4d_mask, "sdpa"),
    ),
    "positions shifted: layout": (
        positions_shifted,
        run(layout_contracts.kinds_blocks_and_positions_equal_the_plain_reading),
    ),
    "text position off: two-stage": (text_position_off, run(two_stage, *LLAVA, fp32)),
    "rotated backwards: relocated": (
        rotated_backwards,
        run(exactness_contracts.relocated_equals_recomputed, "llava_llama"),
    ),
    "not rotated: relocated": (
        not_rotated,
        run(exactness_contracts.relocated_equals_recomputed, "qwen2_5_vl"),
    ),
    "latent not turned: relocated": (
        latent_not_turned,
        run(exactness_contracts.relocated_equals_recomputed, "kimi_k25"),
    ),
    "prefix forgotten: two-stage": (
        prefix_forgotten,
        run(two_stage, "paligemma", "isolated", "sdpa", fp32),
    ),
    "chunks from zero: two-stage": (chunks_from_zero, run(two_stage, "llama4", "isolated", "sdpa", fp32)),
    "limit forgotten: dynamic": (
        limit_forgotten,
        run(rope_contracts.past_its_limit_it_is_refused, "dynamic"),
    ),
    "limit forgotten: longrope": (
        limit_forgotten,
        run(rope_contracts.past_its_limit_it_is_refused, "longrope"),
    ),
    "slot before: two-stage": (slot_before, run(two_stage, *LLAVA, fp32)),
    "padding ignored: two-stage": (padding_ignored, run(two_stage, *LLAVA, fp32)),
    "padding ignored: batched": (
        padding_ignored,
        run(exactness_contracts.batched_equals_one_by_one, "llava_llama", "isolated"),
    ),
    "hook does nothing: table": (forward_not_prepared, with_patch(table, *LLAVA)),
    "leak": (text_sees_vision, None),
    "cache changed: generation": (
        cache_written_in_place,
        run(generation_contracts.the_given_cache_is_never_changed),
    ),
    "rows not restored: detach": (
        rows_not_restored,
        run(attaching_contracts.the_token_is_added_and_taken_back, "llava_llama"),
    ),
    "another model's cache": (
        fingerprint_ignored,
        lambda patch: cache_contracts.another_models_cache_is_refused_by_name(compressed()),
    ),
    "another rule's cache": (
        fingerprint_ignored,
        lambda patch: cache_contracts.another_rules_cache_is_refused_by_name(
            compressed(), {"rule": "star"}, "rule is"
        ),
    ),
}


def compressed():
    return shared("llava_llama").compress(**inputs("llava_llama"))


@pytest.mark.parametrize("case", CASES)
def test_a_broken_version_is_caught(case, monkeypatch):
    breakage, check = CASES[case]
    if check is None:  # the leak test patches the same place itself, so the break goes underneath it
        real = interface.isolation_predicate
        with monkeypatch.context() as patch:
            breakage(patch)
            broken = interface.isolation_predicate
        assert broken is not real
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(interface, "isolation_predicate", broken)
            exactness_contracts.no_leak("llava_llama", patch)
        return
    with monkeypatch.context() as patch:
        breakage(patch)
        with pytest.raises(NOTICED):
            check(patch)


@pytest.mark.parametrize(
    ("breakage", "check"),
    [
        (
            values_as_keys,
            lambda cache, path: cache_contracts.loaded_equals_in_memory_bit_for_bit(cache, fp32, path),
        ),
        (
            checksum_ignored,
            lambda cache, path: cache_contracts.one_changed_byte_is_found(cache, path, "data"),
        ),
    ],
    ids=["values-as-keys", "checksum-ignored"],
)
def test_a_broken_file_is_caught(breakage, check, monkeypatch, tmp_path):
    cache = copy.copy(compressed())
    with monkeypatch.context() as patch:
        breakage(patch)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(cache, tmp_path)

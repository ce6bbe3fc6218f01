"""Who may read what an adapter compressed that acts on images alone: whoever reads with the same base."""

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from contracts.stages import based, staged
from harness import ROWS, attached, inputs, plain, vocabulary
from tiny import voco_id
from voco_plugin.store import VoCoCacheStore, image_key

NAME = "llava_llama"


@pytest.fixture(scope="module")
def parts():
    """A compressor, another one on the same base, a batch, the first one's blocks and the stream."""
    one, other = staged(NAME, "compress", row=True), staged(NAME, "compress", seed=1)
    batch = inputs(NAME, ROWS[:1])
    with torch.no_grad():
        return one, other, batch, one.compress(**batch), one.stream_inputs(batch)


@torch.no_grad()
def answers(model, parts):
    *_, cache, stream = parts
    return model(**stream, voco_cache=cache).logits.nan_to_num()


def test_the_blocks_name_their_compressor_and_its_reader(parts):
    one, other, batch, cache, _ = parts
    theirs = other.compress(**batch).fingerprint
    assert cache.fingerprint["adapter_stages"] == "compress" and cache.fingerprint["adapter"] != "none"
    assert cache.fingerprint["adapter"] != theirs["adapter"]
    assert cache.fingerprint["reader"] == theirs["reader"]
    with pytest.raises(ValueError, match="the adapter is another one"):  # a prompt names one compressor
        vp.VoCoCache.cat([cache, other.compress(**batch)])


def test_whoever_reads_with_the_base_reads_them_to_the_bit(parts):
    one, other, *_ = parts
    expected = answers(one, parts)
    readers = (other, based(NAME), attached(NAME))
    assert all(torch.equal(answers(reader, parts), expected) for reader in readers)


def test_so_does_a_base_whose_projector_was_never_trained(parts):
    """The reader sees no image: what stage 1 holds beside LoRA is the maker's own affair."""
    base = based(NAME)
    with torch.no_grad():
        for parameter in base.model.multi_modal_projector.parameters():
            parameter.add_(1)
        for rows in (base.get_input_embeddings(), base.get_output_embeddings()):
            rows.weight[voco_id(NAME)].add_(1)  # nothing of it is read in stage 2
    others = torch.arange(base.get_output_embeddings().weight.shape[0]) != voco_id(NAME)
    assert torch.equal(answers(base, parts)[..., others], answers(parts[0], parts)[..., others])


def test_others_do_not(parts):
    both = staged(NAME, "both")
    for reader, said in (
        (both, "adapter_stages is 'compress', not 'both'"),
        (staged(NAME, "separate"), "adapter_stages is 'compress', not 'separate'"),
        (based(NAME, block_sink="bos"), "block_sink is 'none', not 'bos'"),
    ):
        with pytest.raises(ValueError, match=said):
            answers(reader, parts)
    another = plain(NAME, seed=3)
    config = vp.VoCoConfig(num_tokens=1, token_id=voco_id(NAME), adapter_stages="compress")
    vp.attach(another, config, vocabulary=vocabulary(NAME, another, config))
    with pytest.raises(ValueError, match="the reader is another one"):
        answers(another, parts)
    theirs = both.compress(**parts[2])
    with pytest.raises(ValueError, match="adapter_stages is 'both', not 'compress'"):
        parts[0](**parts[4], voco_cache=theirs)
    separate = staged(NAME, "separate")
    with pytest.raises(ValueError, match="adapter is another one"):
        staged(NAME, "separate", seed=1)(**parts[4], voco_cache=separate.compress(**parts[2]))


@torch.no_grad()
def test_a_conversation_goes_on_in_the_base(parts):
    one, _, _, cache, stream = parts
    more = {"input_ids": inputs(NAME, [["t3"]])["input_ids"]}
    read = one.prefix_cache(**stream, voco_cache=cache)
    assert torch.equal(one(**more, prefix_cache=read).logits, based(NAME)(**more, prefix_cache=read).logits)
    with pytest.raises(ValueError, match="prefix_cache was not made by this model"):
        staged(NAME, "both")(**more, prefix_cache=read)


def test_a_store_is_read_by_the_base_and_written_by_its_compressor(parts, tmp_path):
    one, other, _, cache, _ = parts
    with VoCoCacheStore.for_model(tmp_path / "store", one) as store:
        key = image_key(picture(), store.fingerprint, 2)
        store.put(key, cache)
    for reader in (based(NAME), attached(NAME), other):
        with VoCoCacheStore.for_model(tmp_path / "store", reader, readonly=True) as store:
            assert store.key_of(picture(), 2) == key
            assert store.get(key).fingerprint["adapter"] == cache.fingerprint["adapter"]
        with pytest.raises(ValueError, match="was made otherwise"):
            VoCoCacheStore.for_model(tmp_path / "store", reader)
    with pytest.raises(ValueError, match="was made otherwise"):
        VoCoCacheStore.for_model(tmp_path / "store", staged(NAME, "both"), readonly=True)


def picture():
    from PIL import Image

    return Image.new("RGB", (4, 4))


def test_the_order_in_which_two_adapters_are_named_changes_no_fingerprint(parts):
    model = staged(NAME, "separate")
    before = model.compress(**parts[2]).fingerprint
    model.base_model.set_adapter(["read", "compress"])
    assert model.compress(**parts[2]).fingerprint == before

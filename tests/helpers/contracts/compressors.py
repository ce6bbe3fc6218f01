"""What tests/models/test_compressors.py holds; run on broken versions too."""

from __future__ import annotations

import torch

import voco_plugin as vp
from harness import attached, inputs, layout_of, plain
from voco_plugin.core.layout import TokenKind

OPTIONS = {
    "slots": {"token_init": "slots", "num_tokens": 3},
    "pooled": {"token_init": "pooled"},
    "queries": {
        "token_init": "queries",
        "num_tokens": 3,
        "compressor_options": {"hidden_size": 16, "heads": 2},
    },
    "avg_pool": {"compressor": "avg_pool"},
    "matryoshka": {"compressor": "matryoshka"},
    "token_merge": {"compressor": "token_merge"},
    "qformer": {
        "compressor": "qformer",
        "num_tokens": 3,
        "compressor_options": {"layers": 2, "hidden_size": 16, "heads": 2},
    },
    "llama_vid": {"compressor": "llama_vid", "num_tokens": 2},
    "downsample": {"compressor": "downsample", "num_tokens": 4},
    "pixel_shuffle": {
        "compressor": "pixel_shuffle",
        "num_tokens": 3,
        "compressor_options": {"num_vision": 9},
    },
}


def merged_and_written(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings before and after the blocks' were written, ``(B, N, D)`` each."""
    embeddings = vp.attachment(model).embeddings
    module, after = vp.attachment(model).family.merged_at(model)
    seen, got, write = [], [], type(embeddings).write

    def spied(places, merged):
        seen.append(merged.clone())
        seen.append(write(embeddings, places, merged))
        return seen[-1]

    embeddings.write = spied
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: got.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
        del embeddings.write
    assert len(seen) == 2, "once a forward"
    assert after or got[0] is seen[1], "the decoder gets what was written"
    return seen[0], seen[1]


def shared_like(name: str, option: str):
    return attached(name, **OPTIONS[option]).eval()


def only_voco_slots_are_written_and_from_their_own_image(name, option):
    model = attached(name, **OPTIONS[option])
    batch = inputs(name, side="left")
    before, after = merged_and_written(model, batch)
    layout, state = layout_of(model, batch), vp.attachment(model)
    expected = before.clone()
    placeholders = sorted(state.vocab.placeholders)
    for span in layout:
        ids = batch["input_ids"][span.row]
        columns = [i for i in range(span.start, span.voco) if int(ids[i]) in placeholders]
        rows = before[span.row, span.voco : span.stop]
        new = model.voco_compressor(before[span.row, columns][None], rows)
        expected[span.row, span.voco : span.stop] = new[0].detach()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=2e-5)  # sums in another order
    assert (after - before)[layout.kind == TokenKind.VOCO].abs().max() > 1e-3
    assert torch.equal(after[layout.kind != TokenKind.VOCO], before[layout.kind != TokenKind.VOCO])


def a_rival_is_a_plain_model_that_reads_its_embeddings(option, context):
    """Nothing of this package in the reference: the stock decoder on text and the rival's embeddings, with no
    vision token in sight. Under ``prefix`` it is plainly causal."""
    name = "llava_llama"
    model = attached(name, block_context=context, **OPTIONS[option]).eval()
    k = OPTIONS[option].get("num_tokens", 2)
    batch = inputs(name, [["bos", "t3", "img", f"c{k}", "t4", "img", f"c{k}", "t3"]])
    with torch.no_grad():
        logits = model(**batch).logits[0]
    _, written = merged_and_written(model, batch)
    layout = layout_of(model, batch)
    keep = layout.in_stream[0].nonzero().flatten()
    n = len(keep)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    if context == "self":  # a block sees nothing before it
        block = layout.block[0][keep]
        seen &= (block[:, None] < 0) | (block[:, None] == block[None, :])
    positions = torch.arange(n) if context == "self" else keep  # vision tokens are counted under prefix
    decoder = plain(name).eval()
    with torch.no_grad():
        hidden = decoder.model.language_model(
            inputs_embeds=written[:, keep], attention_mask=seen[None, None], position_ids=positions[None]
        ).last_hidden_state
        expected = decoder.lm_head(hidden)[0]
    assert (logits[keep] - expected).abs().max() <= 1e-5


def packed_rows_are_as_alone(option):
    name = "qwen2_5_vl" if option == "pooled" else "llava_llama"
    model = shared_like(name, option)
    talks = [["bos", "t3", "img", "c2", "t4"], ["img", "c2", "t1", "img", "c1", "t5"], ["bos", "t6"]]
    alone = inputs(name, talks)
    from voco_plugin.core.packed_rows import pack_batch

    packed = pack_batch(alone, [2, 1], pad_token_id=0)
    with torch.no_grad():
        expected, found = model(**alone).logits, model(**packed).logits
    kept = alone["attention_mask"].bool()
    assert (expected[kept] - found[packed["document_ids"] > 0]).abs().max() <= 1e-5

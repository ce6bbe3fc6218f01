"""VoCo tokens stand right after each image, all per-token tensors follow, and no block is ever cut."""

from __future__ import annotations

import functools

import pytest
import torch

import tiny
from voco_plugin.config import VoCoConfig
from voco_plugin.core.injection import insert_voco_tokens, truncate
from voco_plugin.core.layout import LayoutError, SequenceLayout, TokenVocabulary

PAD, BOS = tiny.PAD, tiny.BOS
STARTS = {"<|vision_start|>", "<img>", "<start_of_image>"}
ROWS = {
    "one image": [["bos", "t3", "img", "t5"]],
    "ragged": [["t2", "img", "t3", "img", "t1"], ["t9"], ["img"], ["t1", "img", "nl", "t30"]],
    "no image": [["t4"], ["t2"]],
}


@functools.cache
def vocab_of(name: str, bos: bool = False) -> TokenVocabulary:
    """The vocabulary, from the ids alone."""
    starts = {i for i in tiny.vision_ids(name) if _token(i) in STARTS}
    return TokenVocabulary(
        voco_id=tiny.voco_id(name),
        placeholders=frozenset({tiny.config(name).image_token_id}),
        markers=frozenset(tiny.vision_ids(name) - {tiny.config(name).image_token_id}),
        glue=frozenset(tiny.glue_ids(name)),
        starts=frozenset(starts),
        bos_id=BOS if bos else None,
    )


def _token(index: int) -> str:
    from tiny.vocab import TOKENS

    return TOKENS[index]


@functools.cache
def single_row(name: str, row: tuple, index: int):
    return tiny.make_inputs(name, [row], first_row=index)


@functools.cache
def segment_length(name: str, segment: str, alone: bool) -> int:
    if segment.startswith("img"):
        return len(tiny.image_run(name, segment.partition(":")[2], alone))
    return tiny.make_inputs(name, [[segment]])["input_ids"].shape[1]


def reference(rows, name: str, counts: list[int], bos: bool, side: str):
    """The batch written down segment by segment, without the package: ids, mask, labels, types."""
    voco, ids, labels = tiny.voco_id(name), [], []
    types = []
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        single = single_row(name, tuple(row), index)
        tokens = single["input_ids"][0].tolist()
        given = next(
            (single[k][0].tolist() for k in ("token_type_ids", "mm_token_type_ids") if k in single), None
        )
        given = given or [0] * len(tokens)
        out, lab, typ, at = [], [], [], 0
        alone = sum(str(s).split(":")[0] == "img" for s in row) == 1
        for segment in row:
            if str(segment).split(":")[0] == "img":
                length = segment_length(name, segment, alone)
                head, tail = ([BOS] if bos else []), [voco] * count
            else:
                length = segment_length(name, segment, True)
                head, tail = [], []
            piece = tokens[at : at + length]
            out += head + piece + tail
            lab += [-100] * len(head) + piece + [-100] * len(tail)
            typ += [0] * len(head) + given[at : at + length] + [0] * len(tail)
            at += length
        ids.append(out)
        labels.append(lab)
        types.append(typ)
    length = max(map(len, ids))

    def pad(values, fill):
        padded = [
            (v + [fill] * (length - len(v)) if side == "right" else [fill] * (length - len(v)) + v)
            for v in values
        ]
        return torch.tensor(padded)

    return pad(ids, PAD), pad([[1] * len(i) for i in ids], 0), pad(labels, -100), pad(types, 0)


@pytest.mark.parametrize("name", tiny.FIRST)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_insertion_equals_the_batch_written_by_hand(name: str, rows) -> None:
    for side in ("left", "right"):
        batch = tiny.make_inputs(name, rows, padding_side=side)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for bos in (False, True):
            for counts in ([1] * len(rows), [3 - i % 3 for i in range(len(rows))]):
                before = {k: v.clone() for k, v in batch.items()}
                out = insert_voco_tokens(
                    batch, vocab_of(name, bos), counts, pad_token_id=PAD, padding_side=side
                )
                ids, mask, labels, types = reference(rows, name, counts, bos, side)
                assert torch.equal(out["input_ids"], ids)
                assert torch.equal(out["attention_mask"], mask)
                assert torch.equal(out["labels"], labels)
                for key in ("token_type_ids", "mm_token_type_ids"):
                    if key in batch:
                        assert torch.equal(out[key], types)
                for key in set(batch) - {"input_ids", "attention_mask", "labels"}:
                    if not key.endswith("token_type_ids"):
                        assert out[key] is batch[key]
                assert all(torch.equal(batch[k], v) for k, v in before.items()), "the batch given was mutated"
                # what comes out is what the model's own reading of the ids accepts
                layout = SequenceLayout.from_ids(out["input_ids"], out["attention_mask"], vocab_of(name, bos))
                images = [sum(str(s).startswith("img") for s in row) for row in rows]
                assert [len(layout.row_spans(r)) for r in range(len(rows))] == images
                assert all(s.num_voco == counts[s.row] for s in layout)


@pytest.mark.parametrize("bos", [False, True])
def test_a_second_insertion_changes_nothing(bos: bool) -> None:
    vocab = vocab_of("qwen2_5_vl", bos)
    batch = tiny.make_inputs("qwen2_5_vl", ROWS["ragged"])
    once = insert_voco_tokens(batch, vocab, 2, pad_token_id=PAD, padding_side="right")
    twice = insert_voco_tokens(once, vocab, 2, pad_token_id=PAD, padding_side="right")
    assert all(torch.equal(once[k], twice[k]) for k in once)


def test_other_masks_follow_and_unknown_ones_are_refused() -> None:
    vocab = vocab_of("llava_llama")
    batch = tiny.make_inputs("llava_llama", [["t2", "img", "t2"]])
    image = batch["input_ids"] == tiny.config("llava_llama").image_token_id
    batch["completion_mask"] = batch["assistant_masks"] = torch.ones_like(batch["input_ids"])
    out = insert_voco_tokens(batch, vocab, 2, pad_token_id=PAD, padding_side="right", pad_to_multiple_of=8)
    assert out["input_ids"].shape[1] % 8 == 0
    assert out["completion_mask"][0, :15].tolist() == [1] * (2 + int(image.sum())) + [0, 0] + [1, 1]
    assert out["completion_mask"][0, 15:].sum() == out["attention_mask"][0, 15:].sum() == 0
    for key, why in (("position_ids", "counted by the backbone"), ("loss_weights", "not known")):
        with pytest.raises(ValueError, match=why):
            insert_voco_tokens(
                {**batch, key: batch["input_ids"]}, vocab, 2, pad_token_id=PAD, padding_side="right"
            )


def test_a_wrong_count_or_a_stray_token_names_sample_and_position() -> None:
    vocab = vocab_of("llava_llama")
    rows = [["t9"], ["t1", "img", "c2", "t9"]]
    batch = tiny.make_inputs("llava_llama", rows, padding_side="left")
    at = int((batch["input_ids"][1] == vocab.voco_id).nonzero()[0])
    with pytest.raises(LayoutError, match=rf"sample 1, position {at}: .* 2 VoCo .* 3 were asked"):
        insert_voco_tokens(batch, vocab, 3, pad_token_id=PAD, padding_side="left")
    kept = insert_voco_tokens(batch, vocab, [1, 2], pad_token_id=PAD, padding_side="left")
    assert torch.equal(kept["input_ids"], batch["input_ids"])
    batch = tiny.make_inputs("llava_llama", [["t3", "c1", "img", "t1"]])
    with pytest.raises(LayoutError, match="kitten, position 3: a VoCo token that follows no image"):
        insert_voco_tokens(batch, vocab, 1, pad_token_id=PAD, padding_side="right", names=["kitten"])
    for count in (0, [1, 1]):
        with pytest.raises(ValueError, match="num_tokens"):
            insert_voco_tokens(batch, vocab, count, pad_token_id=PAD, padding_side="right")


def test_neighbouring_images_are_told_apart_only_where_that_is_sure() -> None:
    def insert(name, rows, images):
        batch = tiny.make_inputs(name, rows)
        out = insert_voco_tokens(
            batch, vocab_of(name), 1, pad_token_id=PAD, padding_side="right", images_per_row=images
        )
        return out["input_ids"][0].tolist()

    voco = tiny.voco_id("llava_llama")
    image = tiny.image_run("llava_llama")
    assert insert("llava_llama", [["img", "img"]], [2]) == [*image, voco, *image, voco]
    out = insert("llava_llama", [["img", "img", "t2", "img"]], [3])
    assert [i for i, t in enumerate(out) if t == voco] == [9, 19, 31]
    # without the count, that of the pixels tells; several rows share it, and ids alone say nothing of two
    assert insert("llava_llama", [["img", "img"]], None) == [*image, voco, *image, voco]
    assert insert("llava_llama", [["img", "t1", "img"], ["img"]], None).count(voco) == 2
    with pytest.raises(LayoutError, match=r"3 images in 2 run\(s\) of vision tokens.*images_per_row"):
        insert("llava_llama", [["img", "img"], ["img"]], None)
    with pytest.raises(LayoutError, match="2 images in 1 run.*put text"):
        insert("llava_next", [["img:small", "img:big"]], None)
    ids = {"input_ids": tiny.make_inputs("llava_llama", [["img", "img"]])["input_ids"]}
    out = insert_voco_tokens(ids, vocab_of("llava_llama"), 1, pad_token_id=PAD, padding_side="right")
    assert out["input_ids"][0].tolist().count(voco) == 1
    with pytest.raises(LayoutError, match="sample 0, position 0: 2 images in 1 run.*put text"):
        insert("llava_next", [["img:small", "img:big"]], [2])  # 18 / 2 is whole, but the sizes differ
    with pytest.raises(LayoutError, match="4 images in 1 run"):
        insert("llava_llama", [["img", "img"]], [4])
    with pytest.raises(LayoutError, match="2 images in 1 run"):
        insert("idefics3", [["img:small", "img:big"]], [2])
    assert insert("idefics3", [["img", "img"]], [2]).count(voco) == 2
    # families with start markers need no help
    assert insert("qwen2_5_vl", [["img:small", "img:big"]], [2]).count(tiny.voco_id("qwen2_5_vl")) == 2


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "idefics3"])
def test_truncation_cuts_text_and_never_a_block(name: str) -> None:
    vocab = vocab_of(name)
    rows = [["t2", "img", "t6"], ["t12"]]
    for side in ("left", "right"):
        batch = tiny.make_inputs(name, rows, padding_side=side)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch = insert_voco_tokens(batch, vocab, 2, pad_token_id=PAD, padding_side=side)
        end = 2 + len(tiny.image_run(name)) + 2
        for limit in (end, end + 3):
            out = truncate(batch, vocab, limit, pad_token_id=PAD, padding_side=side)
            for row in range(2):
                real, kept = batch["attention_mask"][row].bool(), out["attention_mask"][row].bool()
                for key in ("input_ids", "labels"):
                    assert torch.equal(out[key][row][kept], batch[key][row][real][:limit])
                assert (out["labels"][row][~kept] == -100).all()
        for limit in (end - 1, end - 2, 5, 1):
            with pytest.raises(LayoutError, match=rf"sample 0: .* ends at token {end} of {end + 6}"):
                truncate(batch, vocab, limit, pad_token_id=PAD, padding_side=side)
    with pytest.raises(ValueError, match="max_length=0"):
        truncate(batch, vocab, 0, pad_token_id=PAD, padding_side="right")


@pytest.mark.parametrize("newline", ["nl", "nl2"])
@pytest.mark.parametrize(
    ("first", "second"), [("", "small"), ("small", "big"), ("big", ""), ("small", "small")]
)
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_line_break_between_two_images_does_not_join_them(name, first, second, newline) -> None:
    """Idefics 3 writes line breaks between the tiles of an image; after its last tile they are the user's."""
    from tiny.processors import processor
    from voco_plugin.models.families import vocabulary_for

    if name == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLMProcessor needs num2words")
    vocab = vocabulary_for(
        processor=processor(name), config=tiny.config(name), voco=VoCoConfig(token_id=tiny.voco_id(name))
    )
    between = [] if newline is None else [newline]
    batch = tiny.make_inputs(name, [["bos", f"img:{first}", *between, f"img:{second}", "t2"]])
    out = insert_voco_tokens(batch, vocab, 2, pad_token_id=PAD, padding_side="right")
    layout = SequenceLayout.from_ids(out["input_ids"], out["attention_mask"], vocab)
    lengths = [len(tiny.image_run(name, size)) for size in (first, second)]
    assert [(s.num_vision, s.num_voco) for s in layout] == [(n, 2) for n in lengths]

"""The collator gives TRL's batch with VoCo tokens in it, for every format, and leaves the rows it is given
alone.
"""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import tiny
from tiny import processors
from voco_plugin.config import VoCoConfig
from voco_plugin.core.layout import LayoutError, SequenceLayout
from voco_plugin.data.conversations import llava_to_messages, split_placeholders
from voco_plugin.models.families import vocabulary_for
from voco_plugin.training.collator import VoCoDataCollator, as_trl_row

VOCO = VoCoConfig(num_tokens=2, token="<unused0>")
ASK = [{"role": "user", "content": "what is it"}]
ANSWER = [{"role": "assistant", "content": "red square"}]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def typed(*parts: str) -> list[dict]:
    """A question of typed parts as Arrow gives them back, with the absent key filled."""
    content = [
        {"type": "image", "text": None} if part == "<image>" else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def llava(text: str, image) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "red square"}]
    return {"conversations": turns, "image": image}


FORMATS = {
    "messages": [
        {"messages": ASK + ANSWER, "images": [picture()]},
        {"messages": ASK + ANSWER, "images": []},
        {
            "messages": typed("first", "<image>", "then", "<image>") + ANSWER,
            "images": [picture(1), picture(2)],
        },
    ],
    "image column": [
        {"messages": ASK + ANSWER, "image": picture()},
        {"messages": ASK + ANSWER, "image": None},
    ],
    "prompt-completion": [
        {"prompt": ASK, "completion": ANSWER, "images": None},
        {"prompt": typed("<image>", "and"), "completion": ANSWER, "image": picture(1)},
    ],
    "llava": [
        llava("<image>\nwhat is it", picture()),
        llava("no image", None),
        llava("one <image> and\n<image>", [picture(1), picture(2)]),
    ],
    "no image": [{"messages": ASK + ANSWER, "images": []}, {"messages": ASK + ANSWER, "images": None}],
    "prompt, no image": [{"prompt": ASK, "completion": ANSWER, "images": []}],
}


@functools.cache
def processor_of(name: str):
    try:
        return processors.processor(name)
    except ImportError as error:
        pytest.skip(str(error))


@functools.cache
def vocab_of(name: str, sink: str = "none"):
    voco = VoCoConfig(num_tokens=2, token="<unused0>", block_sink=sink)
    return vocabulary_for(processor=processor_of(name), config=tiny.config(name), voco=voco)


def collator(name: str = "llava_llama", **options) -> VoCoDataCollator:
    return VoCoDataCollator(processor_of(name), voco=VOCO, vocab=vocab_of(name), **options)


def trl_rows(rows: list[dict]) -> list[dict]:
    """The same rows as TRL's own collator takes them, converted here by hand."""
    out = []
    for row in rows:
        row = {k: copy.copy(v) for k, v in row.items()}
        images = row.pop("images", None) or row.pop("image", None) or []
        row.pop("image", None)
        row["images"] = images if isinstance(images, list) else [images]
        if "conversations" in row:
            value = row.pop("conversations")[0]["value"]
            texts = [piece.strip("\n") for piece in value.split("<image>")]
            parts = [texts[0]] + [p for text in texts[1:] for p in ("<image>", text)]
            row["messages"] = typed(*[p for p in parts if p]) + ANSWER
        for key in ("messages", "prompt"):
            for message in row.get(key, []):
                if isinstance(message["content"], list):
                    message["content"] = [
                        {k: v for k, v in p.items() if v is not None} for p in message["content"]
                    ]
        out.append(row)
    return out


@pytest.mark.parametrize("name", [n for n in processors.NAMES if n not in ("llava_mistral", "llava_qwen2")])
@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
def test_without_its_voco_tokens_a_batch_is_trls(name: str, rows: list[dict]) -> None:
    completion_only = "prompt" in rows[0]
    before = copy.deepcopy(rows)
    out = collator(name, completion_only_loss=completion_only)(rows)
    assert rows == before, "the rows given were mutated"
    plain = DataCollatorForVisionLanguageModeling(processor_of(name), completion_only_loss=completion_only)
    expected = plain(trl_rows(before))
    vocab = vocab_of(name)
    assert set(out) == set(expected)
    images = [len(row["images"]) for row in trl_rows(before)]
    for row, count in enumerate(images):
        real, kept = expected["attention_mask"][row].bool(), out["attention_mask"][row].bool()
        voco = out["input_ids"][row] == vocab.voco_id
        assert int(voco.sum()) == 2 * count
        assert (out["labels"][row][voco] == -100).all() and (out["labels"][row][~kept] == -100).all()
        for key in ("input_ids", "labels", "token_type_ids", "mm_token_type_ids"):
            if key in out:
                assert torch.equal(out[key][row][kept & ~voco], expected[key][row][real]), key
    for key in set(out) - {"input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
        assert torch.equal(out[key], expected[key]), key
    layout = SequenceLayout.from_ids(out["input_ids"], out["attention_mask"], vocab, num_tokens=2)
    assert [len(layout.row_spans(r)) for r in range(len(rows))] == images
    markers = vocab.placeholders | vocab.markers
    for span in layout:  # right after the last vision token, its end marker included
        after = out["input_ids"][span.row, span.stop : span.stop + 1].tolist()
        assert not markers & set(after) or after[0] in vocab.starts


def test_plain_text_with_placeholders_and_the_bos_sink() -> None:
    processor = processor_of("llava_llama")
    rows = [{"text": "a <image> b", "images": [picture()]}, {"text": "c", "images": []}]
    voco = VoCoConfig(num_tokens=3, token="<unused0>", block_sink="bos")
    vocab = vocab_of("llava_llama", "bos")
    out = VoCoDataCollator(processor, voco=voco, vocab=vocab)(rows)
    text = processor.tokenizer.decode(out["input_ids"][0])
    assert text == "a <s>" + "<image>" * 9 + "<unused0>" * 3 + " b"
    bos = out["input_ids"][0] == vocab.bos_id
    assert bos.sum() == 1 and (out["labels"][0][bos] == -100).all()


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
def test_a_collator_alone_reads_the_ids_as_the_model_does(name: str) -> None:
    alone = VoCoDataCollator(processor_of(name), voco=VOCO)(copy.deepcopy(FORMATS["messages"]))
    given = collator(name)(copy.deepcopy(FORMATS["messages"]))
    assert torch.equal(alone["input_ids"], given["input_ids"])


def test_assistant_only_loss_keeps_the_answer_alone() -> None:
    out = collator(assistant_only_loss=True)(FORMATS["messages"])
    tokenizer = processor_of("llava_llama").tokenizer
    for row in range(3):
        labels = out["labels"][row]
        assert tokenizer.decode(labels[labels != -100]).strip() == "red square</s>"


def test_without_voco_the_batch_is_trls_exactly() -> None:
    out = VoCoDataCollator(processor_of("llava_llama"), voco=None)(FORMATS["llava"])
    expected = DataCollatorForVisionLanguageModeling(processor_of("llava_llama"))(trl_rows(FORMATS["llava"]))
    assert set(out) == set(expected) and all(torch.equal(out[k], expected[k]) for k in out)


def test_images_load_from_paths_bytes_and_message_parts(tmp_path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    pixels = collator()([{"messages": ASK + ANSWER, "images": [picture()]}])["pixel_values"]
    inside = [
        {"role": "user", "content": [{"type": "image", "image": str(path)}, *typed("what")[0]["content"]]}
    ]
    rows = [
        {"messages": ASK + ANSWER, "image": str(path)},
        {"messages": ASK + ANSWER, "images": [path]},
        {"messages": ASK + ANSWER, "images": [{"bytes": path.read_bytes(), "path": None}]},
        {"messages": ASK + ANSWER, "images": [{"bytes": None, "path": str(path)}]},
        {"messages": inside + ANSWER},
    ]
    out = collator()(rows)
    assert all(torch.equal(out["pixel_values"][i], pixels[0]) for i in range(5))
    assert (out["input_ids"] == vocab_of("llava_llama").voco_id).sum(1).tolist() == [2] * 5


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": ASK + ANSWER, "images": [picture()], "extra": 1, "id": "cat-7"}, None),
        (
            {"messages": typed("none") + ANSWER, "images": [picture()], "id": "cat-7"},
            "sample 1 .id 'cat-7'.*number",
        ),
        ({"messages": ASK + ANSWER, "videos": ["a.mp4"]}, "sample 1 has videos"),
        ({"messages": ASK + ANSWER, "image": "/not/there.png"}, "sample 1: image /not/there.png"),
        ({"question": "what", "image": picture()}, "sample 1 has the keys question, image; give 'messages'"),
        (
            {"prompt": ASK, "completion": ANSWER, "images": []},
            "sample 1 has 'prompt' where sample 0 has 'messages'",
        ),
        ({"conversations": [{"from": "dog", "value": "wuff"}]}, "sample 1, turn 0: \"from\" is 'dog'"),
        ({"conversations": []}, 'sample 1 has no "conversations"'),
    ],
)
def test_a_malformed_row_is_named(row: dict, why: str | None) -> None:
    rows = [{"messages": ASK + ANSWER, "images": []}, row]
    if why is None:
        assert collator()(rows)["input_ids"].shape[0] == 2
        return
    with pytest.raises(ValueError, match=why):
        collator()(rows)


def test_max_length_cuts_text_but_never_an_image() -> None:
    rows = FORMATS["messages"][:2]
    full = collator()(rows)
    end = int((full["input_ids"][0] == vocab_of("llava_llama").voco_id).nonzero()[-1]) + 1
    cut = collator(max_length=end)(rows)
    assert cut["input_ids"].shape[1] == end and torch.equal(cut["input_ids"][0], full["input_ids"][0, :end])
    with pytest.raises(
        LayoutError, match=rf"sample 0: its last image ends at token {end} .*max_length={end - 1}"
    ):
        collator(max_length=end - 1)(rows)
    for rows in (FORMATS["messages"][:2], FORMATS["prompt-completion"]):  # through the image itself
        with pytest.raises(LayoutError, match="its last image ends at token .*max_length=9"):
            collator(max_length=9)(rows)
    padded = collator(pad_to_multiple_of=64)(FORMATS["prompt-completion"])
    assert padded["input_ids"].shape[1] == 64


def test_k_from_a_range_depends_on_batch_seed_and_epoch_alone() -> None:
    batches = [
        [{"messages": ASK + [{"role": "assistant", "content": str(i)}], "images": [picture()]}]
        for i in range(40)
    ]

    def draws(c):
        return [int((c(b)["input_ids"] == c.vocab.voco_id).sum()) for b in batches]

    one = collator(num_tokens=(1, 3), seed=5)
    first = draws(one)
    assert set(first) == {1, 2, 3}
    # a second collator in the middle of the run, as after a resume, or unpickled in a worker
    other = pickle.loads(pickle.dumps(collator(num_tokens=(1, 3), seed=5)))
    assert draws(other)[20:] == first[20:]
    assert draws(collator(num_tokens=(1, 3), seed=6)) != first
    one.set_epoch(1)
    assert draws(one) != first
    one.set_epoch(0)
    assert draws(one) == first
    for wrong in ((0, 2), (3, 1), (1,), "12", (1, 2.5)):
        with pytest.raises(ValueError, match="must be two integers"):
            collator(num_tokens=wrong)


def test_workers_that_outlive_an_epoch_see_it_change() -> None:
    rows = [
        {"messages": ASK + [{"role": "assistant", "content": str(i)}], "images": [picture()]}
        for i in range(12)
    ]
    c = collator(num_tokens=(1, 4))
    loader = torch.utils.data.DataLoader(rows, 1, collate_fn=c, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        c.set_epoch(epoch)
        lengths = [batch["input_ids"].shape[1] for batch in loader]
        assert lengths == [c([row])["input_ids"].shape[1] for row in rows]


def test_llava_text_becomes_typed_parts() -> None:
    assert split_placeholders("<image>\nwhat") == [{"type": "image"}, {"type": "text", "text": "what"}]
    assert [p["type"] for p in split_placeholders("a<image><image>b")] == ["text", "image", "image", "text"]
    assert split_placeholders("") == [{"type": "text", "text": ""}]
    messages = llava_to_messages(llava("x", None))
    assert [m["role"] for m in messages] == ["user", "assistant"]
    row = {"messages": ASK, "image": picture()}
    assert as_trl_row(row)["images"][0].size == (24, 16) and set(row) == {"messages", "image"}

"""Sessions, and the one pass that they must equal."""

from __future__ import annotations

import torch
from PIL import Image

import voco_plugin as vp
from tiny import build
from tiny.processors import processor
from voco_plugin.core.layout import SequenceLayout, TokenKind
from voco_plugin.inference.prompts import ask, encode

NEW = {"max_new_tokens": 5}


def made(name: str):
    """An attached tiny model and its processor, whose tokenizer has the VoCo token."""
    tools = processor(name)
    model = build(name)
    return vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=tools), tools


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    tone = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(t.numpy()).resize((32, 32), Image.Resampling.NEAREST) for t in tone]


class Recorder:
    """What a session gives to generate, turn by turn, and what comes out."""

    def __init__(self, model, monkeypatch):
        self.turns = []
        real = model.generate

        def generate(**kwargs):
            output = real(**kwargs)
            ids, past = kwargs["input_ids"][0].tolist(), kwargs["prefix_cache"]
            before = 0 if past is None else past.get_seq_length()
            self.turns.append((ids, output.sequences[0, len(ids) :].tolist(), before))
            return output

        monkeypatch.setattr(model, "generate", generate)

    def stream(self, turn: int) -> list[int]:
        """All ids that the KV cache holds at the head of an answer, in the order in which they were read."""
        stream: list[int] = []
        for (ids, answer, _), (_, _, after) in zip(self.turns[:turn], self.turns[1:], strict=False):
            stream += ids
            stream += answer[: after - len(stream)]
            assert len(stream) == after
        return stream + self.turns[turn][0]


def in_one_pass(model, tools, stream: list[int], images, new: int):
    """Greedy tokens and logits of one masked pass over the conversation with its images."""
    vocab = vp.attachment(model).vocab
    alone = [model.insert_voco_tokens(encode(tools, [ask("")], [[image]]), num_tokens=1) for image in images]
    runs = []
    for one in alone:
        layout = SequenceLayout.from_ids(one["input_ids"], one["attention_mask"], vocab)
        runs.append(one["input_ids"][0, layout.kind[0] == TokenKind.VISION].tolist())
    ids, image, before = [], 0, None
    run = 0
    for token in stream:
        if token == vocab.voco_id:
            if run % 2 == 0:  # K = 2
                ids += runs[image]
                image += 1
            run += 1
        ids.append(token)
        before = token
    assert image == len(images) and before is not None
    more = {}
    for key in alone[0]:
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            continue
        dim = 1 if "idefics" in type(tools).__name__.lower() else 0
        more[key] = torch.cat([one[key] for one in alone], dim=dim)
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in alone[0]:
            placeholder = torch.tensor(sorted(vocab.placeholders))
            batch[key] = torch.isin(batch["input_ids"], placeholder).long()
    return model.generate(**batch, **more, max_new_tokens=new, do_sample=False, two_stage=False)[
        0, len(ids) :
    ].tolist()

"""A session answers as one pass over the whole conversation does, reads nothing twice, and forks and restores
without a difference.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import voco_plugin as vp
from tiny import build
from tiny.processors import processor
from voco_plugin.core.layout import SequenceLayout, TokenKind
from voco_plugin.inference.prompts import ask, encode

NAMES = ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3", "internvl", "idefics3"]
NEW = {"max_new_tokens": 5}


def made(name: str):
    """An attached tiny model and its processor, whose tokenizer has the VoCo token."""
    tools = processor(name)
    model = build(name)
    return vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=tools), tools


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return made(request.param)


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


def test_every_answer_is_that_of_one_pass(pair, monkeypatch):
    model, tools = pair
    images = pictures(3)
    with monkeypatch.context() as patch:
        recorder = Recorder(model, patch)
        session = vp.VoCoSession(model, tools, system="Be brief.")
        session.add(*images[:2])
        session.ask("What is this?", **NEW)
        session.ask("And which colour?", **NEW)
        session.add(images[2])
        session.ask("Now?", **NEW)
    shown = [images[:2], images[:2], images]
    for turn, (ids, answer, _) in enumerate(recorder.turns):
        expected = in_one_pass(model, tools, recorder.stream(turn), shown[turn], len(answer))
        assert answer == expected, f"turn {turn}"
        assert len(ids) < 60  # a later turn is not the whole conversation
    assert session.num_images == 3
    assert [m["role"] for m in session.messages] == ["system", *["user", "assistant"] * 3]


def test_nothing_is_read_twice(monkeypatch):
    """The text model runs over each turn's tokens once, and the vision tower over each image once."""
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools).add(*pictures(1))
    seen = []
    text = model.get_decoder()
    handle = text.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    session.ask("What is this?", **NEW)
    seen.clear()
    slots = session.num_slots
    session.ask("Sure?", **NEW)
    handle.remove()
    assert sum(seen) == session.num_slots - slots and seen[0] < slots


def test_a_session_is_its_own_prompt(monkeypatch):
    """The ids read turn by turn are those of the chat template on the whole conversation."""
    model, tools = made("qwen2_5_vl")
    with monkeypatch.context() as patch:
        recorder = Recorder(model, patch)
        session = vp.VoCoSession(model, tools).add(*pictures(1))
        session.ask("What is this?", **NEW)
        session.ask("Sure?", **NEW)
    read = tools.tokenizer.decode(recorder.stream(1))
    whole = tools.apply_chat_template([session.messages[:3]], add_generation_prompt=True)[0]
    shown = whole.replace("<|vision_start|><|image_pad|><|vision_end|>", "<voco><voco>")
    assert "<voco><voco>" in shown and "".join(read.split()) == "".join(shown.split())


def test_a_fork_leaves_its_origin_alone(pair):
    model, tools = pair
    session = vp.VoCoSession(model, tools).add(*pictures(2))
    session.ask("What is this?", **NEW)
    other = session.fork()
    assert other._past is session._past  # nothing is copied
    first = session.ask("Which colour?", **NEW)
    other.add(*pictures(1)).ask("Something else entirely?", **NEW)
    again = vp.VoCoSession(model, tools).add(*pictures(2))
    again.ask("What is this?", **NEW)
    assert again.ask("Which colour?", **NEW) == first
    assert len(session.messages) == 4 and session.num_images == 2 and other.num_images == 3


def test_a_restored_session_goes_on_bit_for_bit(pair, tmp_path):
    model, tools = pair
    session = vp.VoCoSession(model, tools).add(*pictures(1))
    session.ask("What is this?", **NEW)
    session.add(pictures(2)[1])
    session.save(tmp_path / "talk.safetensors")
    restored = vp.VoCoSession.load(tmp_path / "talk.safetensors", model, tools)
    assert restored.messages == session.messages and restored.num_images == 2
    for mine, its in zip(session._past.layers, restored._past.layers, strict=True):
        assert torch.equal(mine.keys, its.keys) and torch.equal(mine.values, its.values)
    a, b = (s.ask("And now?", **NEW, output_logits=True) for s in (session, restored))
    assert a == b
    assert torch.equal(session._past.layers[-1].keys, restored._past.layers[-1].keys)
    fresh = vp.VoCoSession(model, tools)
    fresh.save(tmp_path / "fresh.safetensors")
    assert vp.VoCoSession.load(tmp_path / "fresh.safetensors", model, tools).num_slots == 0


def test_a_changed_or_foreign_session_file_is_refused(tmp_path):
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools).add(*pictures(1))
    session.ask("What is this?", **NEW)
    path = tmp_path / "talk.safetensors"
    session.save(path)
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (60,), generator=draw).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(vp.VoCoCacheError):
            vp.VoCoSession.load(path, model, tools)
    path.write_bytes(whole[:-7])
    with pytest.raises(vp.VoCoCacheError, match="truncated"):
        vp.VoCoSession.load(path, model, tools)
    path.write_bytes(whole)
    with pytest.raises(vp.VoCoCacheError, match="session-1"):
        vp.VoCoCache.load(path)
    vp.VoCoCache().save(tmp_path / "cache.safetensors")
    with pytest.raises(vp.VoCoCacheError, match="not a session"):
        vp.VoCoSession.load(tmp_path / "cache.safetensors", model, tools)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    with pytest.raises(vp.VoCoCacheError, match="not made by this model under this rule: model is"):
        vp.VoCoSession.load(path, model, tools)


def test_a_store_is_asked_before_an_image_is_compressed(tmp_path, monkeypatch):
    model, tools = made("llava_llama")
    images = pictures(2)
    with vp.VoCoCacheStore.for_model(tmp_path / "store", model) as store:
        first = vp.VoCoSession(model, tools, store=store).add(*images)
        answer = first.ask("What is this?", **NEW)
        assert len(store) == 2
        monkeypatch.setattr(model, "compress", lambda **kwargs: pytest.fail("compressed again"))
        assert vp.VoCoSession(model, tools, store=store).add(*images).ask("What is this?", **NEW) == answer


def test_options_a_session_cannot_keep_are_refused():
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools).add(*pictures(1))
    with pytest.raises(ValueError, match="num_beams=3: a session goes on from one answer"):
        session.ask("What?", num_beams=3)
    with pytest.raises(ValueError, match="cache_implementation='static' cannot grow"):
        session.ask("What?", cache_implementation="static")
    with pytest.raises(ValueError, match="needs a model with VoCo attached"):
        vp.VoCoSession(build("llava_llama"), tools)
    cache = vp.VoCoCache.stack([vp.VoCoCache(session._waiting[0].blocks)] * 2)
    with pytest.raises(ValueError, match="holds 2 rows"):
        session.add(cache)
    assert session.messages == [] and session.num_images == 1  # nothing happened


def test_assisted_answers_are_the_same():
    model, tools = made("llava_llama")
    plain = vp.VoCoSession(model, tools).add(*pictures(1))
    helped = vp.VoCoSession(model, tools).add(*pictures(1))
    for question in ("What is this?", "Sure?", "Why?"):
        expected = plain.ask(question, max_new_tokens=9)
        assert helped.ask(question, max_new_tokens=9, prompt_lookup_num_tokens=3) == expected
        assert helped.num_slots + len(helped._unread) == plain.num_slots + len(plain._unread)

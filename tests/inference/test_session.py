"""A session answers as one pass over the whole conversation does, reads nothing twice, and forks and restores
without a difference.
"""

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from contracts import session
from sessions import NEW, Recorder, in_one_pass, made, pictures
from tiny import build

NAMES = ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3", "internvl", "idefics3"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return made(request.param)


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
    session.a_session_is_its_own_prompt(monkeypatch)


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
    with pytest.raises(vp.VoCoCacheError, match="load the model that made it: the model is another one"):
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

"""A chat answers as a session does, counts what it keeps, and what fails leaves it as it was."""

from __future__ import annotations

import threading

import pytest
from PIL import Image

import voco_plugin as vp
from sessions import made, pictures
from voco_plugin.data.images import BadImageError
from voco_plugin.serving.page_words import added_line, answered_line, costs_table, read_table
from voco_plugin.serving.picture_chat import Answered, PictureChat
from voco_plugin.video.errors import BadVideoError

NAMES = ["llava_llama", "qwen2_5_vl", "gemma3", "internvl"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return made(request.param)


def whole(chat: PictureChat, question: str) -> str:
    list(chat.ask(question))
    return chat.last.text


def test_it_answers_as_a_session(pair):
    model, tools = pair
    chat = PictureChat(model, tools, max_new_tokens=6)
    session = vp.VoCoSession(model, tools)
    first, second = pictures(2)
    chat.show(first), session.add(first)
    assert whole(chat, "What is this?") == session.ask("What is this?", max_new_tokens=6)
    chat.show(second), session.add(second)
    assert whole(chat, "And now?") == session.ask("And now?", max_new_tokens=6)
    assert chat.session.messages == session.messages and chat.last.slots == session.num_slots
    assert [name for name, _ in chat.turns] == ["What is this?", "And now?"]
    assert chat.read_by_answer() == [
        ("image 1", 2), ("image 2", 2), ("text", session.num_slots - 4),
    ]  # fmt: skip


def test_bytes_are_those_of_the_cache_and_of_every_vision_token(pair):
    model, tools = pair
    chat = PictureChat(model, tools, num_tokens=3)
    added = chat.show(pictures(1)[0], "a.png")
    (cache,) = chat.session._waiting
    assert added.nbytes == cache.nbytes and added.num_tokens == 3 and added.blocks == 1
    assert added.vision_tokens == cache.blocks[0].num_vision
    assert added.vision_nbytes * 3 == added.nbytes * added.vision_tokens
    assert "a.png" in added_line(added) and f"{added.vision_tokens} vision tokens → 3" in added_line(added)


def test_a_closed_answer_stays_as_far_as_it_came(pair):
    model, tools = pair
    chat = PictureChat(model, tools, max_new_tokens=300)
    chat.show(pictures(1)[0])
    growing = chat.ask("What is this?")
    next(growing, None)
    growing.close()
    assert chat.lock.acquire(blocking=False), "the next one waits for ever"
    chat.lock.release()
    assert len(chat.turns) == 1
    chat.max_new_tokens = 3
    whole(chat, "And?")
    assert len(chat.turns) == 2


def test_what_fails_leaves_the_chat_as_it_was(monkeypatch):
    model, tools = made("llava_llama")
    chat = PictureChat(model, tools, max_new_tokens=4)
    chat.show(pictures(1)[0])
    answer = whole(chat, "What is this?")
    with pytest.raises(ValueError, match="the question is empty"):
        list(chat.ask("  "))
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            list(chat.ask("Which colour?"))
    with pytest.raises((BadImageError, ValueError)):
        chat.show(Image.new("RGB", (0, 3)))
    assert chat.turns == [("What is this?", answer)] and len(chat.added) == 1
    assert not chat.lock.locked()
    again = PictureChat(model, tools, max_new_tokens=4)
    again.show(pictures(1)[0])
    assert whole(again, "What is this?") == answer
    assert whole(again, "Which colour?") == whole(chat, "Which colour?")


def test_uncompressed_is_the_plain_model_on_the_same_conversation(bases):
    model, tools = vp.load(bases("llava_llama"), voco=vp.VoCoConfig(num_tokens=2))
    plain = vp.detach(vp.load(bases("llava_llama"), voco=vp.VoCoConfig(num_tokens=2))[0])
    chat = PictureChat(model, tools, max_new_tokens=5)
    with pytest.raises(ValueError, match="ask a question first"):
        list(chat.uncompressed(lambda: plain))
    image = pictures(1)[0]
    chat.show(image)
    first = whole(chat, "What is this?")
    whole(chat, "Which colour?")
    *_, found = chat.uncompressed(lambda: plain)
    assert isinstance(found, Answered)
    (expected,) = vp.answer(
        plain, tools, ["Which colour?"], images=[[image]], before=[[("What is this?", first)]],
        max_new_tokens=5,
    )  # fmt: skip
    assert found.text == expected
    assert found.slots > chat.last.slots - 10 and found.first_token_seconds <= found.seconds
    chat.show(image)
    whole(chat, "And now?")
    with pytest.raises(ValueError, match="only images shown before the first question"):
        list(chat.uncompressed(lambda: plain))


def test_a_video_is_a_series_of_blocks(tmp_path):
    model, tools = made("llava_llama")
    for number, image in enumerate(pictures(5)):
        image.save(tmp_path / f"{number}.png")
    chat = PictureChat(model, tools, num_tokens=1, max_new_tokens=4)
    added = chat.watch(tmp_path, frames=4, name="clip")
    assert added.blocks == added.num_tokens == 4 and added.nbytes == chat.session.nbytes
    session = vp.VoCoSession(model, tools, num_tokens=1)
    session.watch(tmp_path, count=4).run()
    assert whole(chat, "What happens?") == session.ask("What happens?", max_new_tokens=4)
    with pytest.raises(ValueError, match="video"):
        chat.show(pictures(1)[0])
    with pytest.raises(ValueError, match="only images"):
        list(chat.uncompressed(lambda: model))
    assert chat.draw_mask(tmp_path / "mask.png") is None
    with pytest.raises(BadVideoError, match="does not exist"):
        chat.watch(tmp_path / "none.mp4", frames=2)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(BadVideoError):
        chat.watch(tmp_path, frames=5)
    assert chat.added == [] and chat.session.num_images == 0  # no half-read video is asked about
    chat.show(pictures(1)[0])


def test_two_chats_share_a_model():
    model, tools = made("llava_llama")
    lock = threading.Lock()
    chats = [PictureChat(model, tools, max_new_tokens=8, lock=lock) for _ in range(2)]
    alone = []
    for image, chat in zip(pictures(2), chats, strict=True):
        chat.show(image)
        one = PictureChat(model, tools, max_new_tokens=8)
        one.show(image)
        alone.append(whole(one, "What is this?"))
    threads = [threading.Thread(target=whole, args=(chat, "What is this?")) for chat in chats]
    [t.start() for t in threads], [t.join() for t in threads]
    assert [chat.last.text for chat in chats] == alone


def test_the_mask_is_that_of_the_rule(tmp_path):
    model, tools = made("llava_llama")
    chat = PictureChat(model, tools)
    assert chat.draw_mask(tmp_path / "none.png") is None
    chat.show(pictures(1)[0])
    with Image.open(chat.draw_mask(tmp_path / "mask.png")) as drawn:
        assert drawn.size[0] > 200
    chat.show(Image.new("RGB", (32, 32)))
    assert chat.draw_mask(tmp_path / "two.png").is_file()


def test_tables_say_what_was_measured():
    model, tools = made("llava_llama")
    chat = PictureChat(model, tools, max_new_tokens=3)
    assert costs_table([]) == "" and read_table([]) == ""
    added = chat.show(pictures(1)[0])
    assert f"| tokens of the image | 2 | {added.vision_tokens} |" in costs_table(chat.added)
    odd = Answered("a|b\nc", 0.0123, 12.34, 9)
    table = costs_table(chat.added, odd, Answered("", None, 0.5, 30))
    assert "| answer | a\\|b c | (empty) |" in table and "| first token after | 12 ms |  |" in table
    assert "| whole answer after | 12.3 s | 500 ms |" in table
    assert answered_line(Answered("", None, 1.0)) == "(empty)   [first token none]"

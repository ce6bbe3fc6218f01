"""A session that watches answers as one pass over the frames kept at that moment does, at bounded memory,
whoever feeds it.
"""

from __future__ import annotations

import gc
import re
import threading
import time

import pytest
import torch

import voco_plugin as vp
from video_harness import Turns, frames, made, one_pass
from voco_plugin.inference.streaming.compress_frames import compress_video
from voco_plugin.inference.streaming.stream import VideoStream
from voco_plugin.video.frames import Frame, Segment, segments

NEW = {"max_new_tokens": 4}


@torch.no_grad()
def difference(model, tools, stream, new, logits, shown, frames_as="auto") -> float:
    """Of an answer's logits and those of one masked pass over its prompt and itself, whole."""
    whole = one_pass(model, tools, [*stream, *new], shown, frames_as)
    own = model(**whole).logits[0, -len(new) - 1 : -1]
    return float((own - logits).abs().max())


@pytest.mark.parametrize("time_text", [False, True], ids=["plain", "times"])
@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "gemma3", "qwen2_5_vl", "internvl"])
def test_every_answer_is_one_pass_over_the_frames_kept(name, time_text, monkeypatch):
    model, tools = made(name)
    shown = frames(9)
    turns = Turns(model, monkeypatch)
    session = vp.VoCoSession(model, tools, system="Be brief.")
    watching = session.watch(time_text=time_text, budget=4)
    kept = []
    for frame in shown:
        watching.feed(frame)
        if frame.index in (2, 5, 8):
            session.ask("What is this?", **NEW)
            kept.append([k.index for k in watching.kept])
    assert kept == [[0, 1, 2], [0, 2, 4, 5], [0, 4, 7, 8]]
    for turn, indices in enumerate(kept):
        segments_kept = [Segment((shown[i],)) for i in indices]
        stream, new = turns.ids[turn], turns.new[turn]
        assert difference(model, tools, stream, new, turns.logits[turn], segments_kept) <= 1e-4
        text = tools.tokenizer.decode(stream)
        assert re.findall(r"<[\d.]+s>", text) == [f"<{i / 2:.1f}s>" for i in indices] * time_text
    assert [m["role"] for m in session.messages] == ["system", *["user", "assistant"] * 3]
    assert session.num_images == 4 and session.num_slots == 0  # the video is in no KV cache


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_next_video", "llava_onevision"])
def test_segments_of_two_frames(name, monkeypatch):
    model, tools = made(name)
    shown = frames(7)
    turns = Turns(model, monkeypatch)
    session = vp.VoCoSession(model, tools)
    watching = session.watch(iter(shown), frames_per_block=2, time_text=True, budget=3)
    watching.run(lambda s: session.ask("What is this?", **NEW) if s.frames[0].index == 4 else None)
    assert watching.frames_seen == 7 and watching.blocks_seen == 4 and watching.join()
    pairs = list(segments(shown, 2))[:3]
    assert difference(model, tools, turns.ids[0], turns.new[0], turns.logits[0], pairs) <= 1e-4


def test_after_a_conversation_and_back_into_one(monkeypatch):
    """[image, turn] from the KV cache, then the video, read for good by the question after its close."""
    model, tools = made("llava_llama")
    shown, (photo, later) = frames(5), frames(2, seed=9)
    turns = Turns(model, monkeypatch)
    session = vp.VoCoSession(model, tools).add(photo.image)
    session.ask("What is this?", **NEW)
    slots, before = session.num_slots, session._past
    with session.watch(time_text=True, budget=3) as watching:
        for frame in shown:
            watching.feed(frame)
        session.ask("What is this?", **NEW)
        session.add(later.image).ask("And this?", **NEW)
        assert session.num_slots == slots and session._past is before
        assert turns.prefixes[2] is before and session.num_images == 1 + 3 + 1
    for message in ("forked", "saved"):
        with pytest.raises(ValueError, match=f"not {message} while it watches"):
            session.fork() if message == "forked" else session.save("x")
    session.ask("Now?", **NEW)
    assert session._video is None and session.num_slots > slots
    session.ask("Sure?", **NEW)
    base = [*turns.ids[0], *turns.new[0][: slots - len(turns.ids[0])]]
    kept = [Segment((shown[k.index],)) for k in watching.kept]
    alone = [Segment((f,)) for f in (photo, later)]
    everything = [alone[0], *kept, alone[1]]
    for turn, blocks in ((1, everything[:-1]), (2, everything), (3, everything)):
        stream = [*base, *turns.ids[turn]]
        assert difference(model, tools, stream, turns.new[turn], turns.logits[turn], blocks) <= 1e-4
    after = [*base, *turns.ids[3], *turns.new[3]][: turns.prefixes[4].get_seq_length()]
    stream = [*after, *turns.ids[4]]
    assert len(turns.ids[4]) < len(turns.ids[3])  # only the new turn
    assert difference(model, tools, stream, turns.new[4], turns.logits[4], everything) <= 1e-4
    assert session.num_images == 5 and len(session.messages) == 10
    session.fork()


@pytest.mark.parametrize("policy", ["uniform", "average"])
def test_memory_is_bounded_over_an_endless_stream(policy):
    model, tools = made("llava_llama")
    few = frames(6)
    session = vp.VoCoSession(model, tools)
    watching = session.watch(budget=5, policy=policy, time_text=True)
    held = set()
    for number in range(24):
        watching.feed(Frame(few[number % 6].image, float(number), number))
        if number >= 5:
            held.add(watching.nbytes)
        if number in (12, 23):
            session.ask("What?", **NEW)
    assert len(held) == 1 and len(watching.kept) == 5 and len(watching._known) <= 4
    gc.collect()
    ours = {id(b) for k in watching.kept for b in k.cache.blocks}
    model_of = watching.kept[0].cache.fingerprint
    alive = [o for o in gc.get_objects() if type(o) is vp.VoCoCache and o.fingerprint == model_of]
    assert len({id(b) for c in alive for b in c.blocks} - ours) <= 1  # the last one that was made
    report = watching.report()
    assert report["blocks"] == 24 and report["dropped"] + report["merged"] == 19
    assert report["exact"] == (policy != "average")


def test_a_report_says_what_was_lost():
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools)
    watching = session.watch(budget=3)
    assert watching.report()["text"] == "no frame seen yet"
    for frame in frames(3):
        watching.feed(frame)
    assert watching.report()["text"].endswith("policy uniform, budget 3 blocks: nothing lost")
    for frame in frames(9)[3:]:
        watching.feed(frame)
    text = watching.report()["text"]
    assert "9 frame(s) seen as 9 block(s), 3 kept (6 VoCo tokens, 0.0 to 4.0 s)" in text
    assert "6 dropped, nothing of them is left; at most" in text and repr(watching) == f"VideoStream({text})"


# -- threads
# ------------------------------------------------------------------------------------------------------------


def test_a_thread_reads_while_questions_are_asked(monkeypatch):
    """Nothing is lost or out of order, and each answer is that of the blocks kept when it was asked."""
    model, tools = made("llava_llama")
    shown = frames(40)
    session = vp.VoCoSession(model, tools)
    asked = []
    real = session._answered

    def answered(turns, blocks, *args, **kwargs):
        found = real(turns, blocks, *args, **kwargs)
        asked.append((len(turns), blocks, found[0]))
        return found

    monkeypatch.setattr(session, "_answered", answered)
    answers = []
    with session.watch(iter(shown), budget=8) as watching:
        for number in range(1, 9):
            assert watching.wait(blocks=4 * number, timeout=60)
            answers.append(watching.ask("What is this?", remember=False, **NEW))
        assert watching.join(timeout=60)
    assert watching.blocks_seen == 40 and [k.index for k in watching.kept][-1] == 39
    assert [a for _, _, a in asked] == answers and len(asked) == 8
    seen = [len(blocks) for _, blocks, _ in asked]
    assert seen == sorted(seen) and seen[-1] == 8
    for _, blocks, answer in asked:
        assert vp.VoCoSession(model, tools).add(blocks).ask("What is this?", **NEW) == answer
    alone = list(compress_video(model, tools, [shown[k.index] for k in watching.kept], batch_size=1))
    for kept, cache in zip(watching.kept, alone, strict=True):
        assert torch.equal(kept.cache.blocks[0].keys[0], cache.blocks[0].keys[0])


def endless():
    number = 0
    few = frames(4)
    while True:
        yield type(few[0])(few[number % 4].image, float(number), number)
        number += 1


def test_a_fast_source_does_not_keep_questions_waiting():
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools)
    before = threading.active_count()
    with session.watch(endless(), budget=4) as watching:
        watching.wait(timeout=60)
        start = time.monotonic()
        for _ in range(3):
            session.ask("What?", **NEW)
        assert time.monotonic() - start < 30
        seen = watching.blocks_seen
        assert watching.wait(blocks=seen + 3, timeout=60)  # and it reads on
    assert threading.active_count() == before and watching.closed


def test_a_question_that_waits_goes_first():
    """While one waits, the thread that feeds holds no lock that it needs."""
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools)
    watching = session.watch()
    first, second = frames(2)
    watching.feed(first)
    answers: list[str] = []
    with watching._model_lock:  # as another session's question would
        asker = threading.Thread(target=lambda: answers.append(session.ask("What?", **NEW)))
        asker.start()
        while not watching._asking:
            time.sleep(0.01)
        feeder = threading.Thread(target=watching.feed, args=(second,))
        feeder.start()
        time.sleep(0.3)
        assert watching._feeding.acquire(blocking=False)
        watching._feeding.release()
        assert watching.blocks_seen == 1 and not answers
    asker.join(60)
    feeder.join(60)
    assert len(answers) == 1 and watching.blocks_seen == 2


def test_two_sessions_of_one_model():
    """Two threads, each with a video of its own: neither disturbs the other."""
    model, tools = made("llava_llama")
    shown = frames(6)
    sessions = [vp.VoCoSession(model, tools) for _ in range(2)]
    watchings = [s.watch(budget=6) for s in sessions]
    alone = vp.VoCoSession(model, tools)
    watched = alone.watch(budget=6)
    for frame in shown:
        watched.feed(frame)
    expected = watched.ask("What is this?", remember=False, **NEW)
    answers: list[str] = []

    def use(watching: VideoStream) -> None:
        for frame in shown:
            watching.feed(frame)
        answers.append(watching.ask("What is this?", remember=False, **NEW))

    threads = [threading.Thread(target=use, args=(w,)) for w in watchings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [expected] * 2


def test_what_stops_the_thread_is_told():
    model, tools = made("llava_llama")

    def broken():
        yield frames(1)[0]
        raise OSError("the camera is gone")

    session = vp.VoCoSession(model, tools)
    watching = session.watch(broken()).start()
    with pytest.raises(OSError, match="camera is gone"):
        watching.join(60)
    session.ask("What was seen?", **NEW)  # told once; what was seen stays
    with (
        pytest.raises(OSError, match="camera is gone"),
        vp.VoCoSession(model, tools).watch(broken()) as other,
    ):
        other.wait(blocks=2, timeout=60)


# -- what else it takes
# ------------------------------------------------------------------------------------------------------------


def test_frames_a_second_of_frames_given():
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools)
    watching = session.watch(fps=3)
    for frame in frames(40, rate=10.0):
        watching.feed(frame)
    times = [k.time for k in watching.kept]
    assert len(times) == 12 and times[:5] == [0.0, 0.4, 0.7, 1.0, 1.4]


def test_blocks_that_are_compressed_already():
    model, tools = made("llava_llama")
    shown = frames(4)
    caches = list(compress_video(model, tools, shown))
    sessions = [vp.VoCoSession(model, tools) for _ in range(2)]
    one, other = (s.watch(time_text=True) for s in sessions)
    for frame, cache in zip(shown, caches, strict=True):
        one.add(cache, frame.time)
        other.feed(frame)
    a, b = (s.ask("What is this?", **NEW) for s in sessions)
    assert a == b and one.report() == other.report()
    with pytest.raises(ValueError, match="one block, not 2"):
        one.add(vp.VoCoCache.cat(caches[:2]), 9.0)


def test_earlier_questions_are_read_again_as_far_as_history_goes(monkeypatch):
    model, tools = made("llava_llama")
    turns = Turns(model, monkeypatch)
    session = vp.VoCoSession(model, tools)
    watching = session.watch(history=1)
    watching.feed(frames(1)[0])
    for question in ("Red?", "Blue?", "Green?"):
        session.ask(question, **NEW)
    watching.ask("Square?", remember=False, **NEW)
    session.ask("Circle?", **NEW)
    read = [tools.tokenizer.decode(ids) for ids in turns.ids]
    words = ("Red?", "Blue?", "Green?", "Square?", "Circle?")
    assert [[w for w in words if w in text] for text in read] == [
        ["Red?"], ["Red?", "Blue?"], ["Blue?", "Green?"], ["Green?", "Square?"], ["Green?", "Circle?"],
    ]  # fmt: skip
    assert len(session.messages) == 8
    watching.close()
    session.ask("Shape?", **NEW)
    assert len(session.messages) == 10 and session.num_images == 1


def test_a_batch_does_not_keep_a_question_waiting():
    model, tools = made("llava_llama")
    session = vp.VoCoSession(model, tools)
    watching = session.watch(batch_size=4)
    for frame in frames(3):
        watching.feed(frame)
    assert watching.blocks_seen == 0
    session.ask("What?", **NEW)
    assert watching.blocks_seen == 3


def test_what_a_user_gets_wrong():
    model, tools = made("llava_llama")
    first, second = frames(2)
    session = vp.VoCoSession(model, tools)
    for options, message in (
        ({"policy": "uniform"}, "needs a budget"),
        ({"budget": 4, "policy": "windw"}, "did you mean 'window'"),
        ({"budget": "many"}, "neither a number"),
        ({"fps": 0}, "fps=0"),
        ({"frames_per_block": 2}, "takes no videos"),
        ({"history": -1}, "history=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"count": 8}, "count: how a file is read"),
    ):
        with pytest.raises(ValueError, match=message):
            session.watch(**options)
    assert session._video is None
    watching = session.watch()
    with pytest.raises(ValueError, match="watches a video already"):
        session.watch()
    with pytest.raises(ValueError, match="no frame has been seen yet"):
        session.ask("What?", **NEW)
    with pytest.raises(ValueError, match="no source to read"):
        watching.run()
    watching.feed(second)
    with pytest.raises(ValueError, match="0 s comes after one at 0.5 s"):
        watching.feed(first)
    with pytest.raises(ValueError, match="use 1, or fork it"):
        session.ask("What?", num_beams=2)
    watching.close()
    with pytest.raises(ValueError, match="is closed"):
        watching.feed(second)
    empty = vp.VoCoSession(model, tools)
    empty.watch().close()  # no video to go on with
    assert empty._video is None and empty.ask("Hi?", **NEW) is not None


def test_a_file_is_read_by_read_video(monkeypatch):
    seen = {}

    def read_video(source, **options):
        seen.update(source=source, **options)
        return iter(frames(3))

    monkeypatch.setattr("voco_plugin.video.reading.read_video", read_video)
    model, tools = made("llava_llama")
    for source in ("clip.mp4", 0, ["a.png", "b.png"]):
        session = vp.VoCoSession(model, tools)
        assert sum(1 for _ in session.watch(source, fps=2, max_frames=9)) == 3
        assert seen == {"source": source, "fps": 2, "max_frames": 9}

"""What tests/inference/test_session.py holds; run on broken versions too."""

from __future__ import annotations

import voco_plugin as vp
from sessions import NEW, Recorder, made, pictures


def a_session_is_its_own_prompt(monkeypatch):
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

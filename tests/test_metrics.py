"""Scores and ratios: the paper's own numbers, exact matching, and one question per answered turn."""

from __future__ import annotations

import pytest

from voco_plugin.benchmark import interleaved_medians
from voco_plugin.metrics import Question, questions_of, raw_ratio, retention, score


def test_retention_of_the_papers_table_1_at_one_token() -> None:
    """Upper bound, lower bound and VoCo-LLaMA of Table 1, GQA: (57.0 - 37.7) / (61.1 - 37.7) = 82.5 %."""
    assert retention(57.0, 37.7, 61.1) == pytest.approx(0.825, abs=5e-4)
    assert raw_ratio(57.0, 61.1) == pytest.approx(0.933, abs=5e-4)


def test_ratios_refuse_bounds_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="upper > lower"):
        retention(0.5, 0.6, 0.6)
    with pytest.raises(ValueError, match="positive upper"):
        raw_ratio(0.5, 0.0)


def test_accuracy_is_exact_match_up_to_case_space_and_full_stop() -> None:
    asked = [
        Question(0, "q", "red circle", "object"),
        Question(0, "q", "2", "count"),
        Question(1, "q", "3", "count"),
    ]
    found = score(asked, [" Red  circle. ", "2", "33"])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.by_type == {"object": 1.0, "count": 0.5} and found.counts == {"object": 1, "count": 2}
    assert found.num_questions == 3


def test_score_wants_one_answer_per_question() -> None:
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        score([Question(0, "q", "a")] * 2, ["a"])
    with pytest.raises(ValueError, match="0 answers"):
        score([], [])


def test_each_answered_turn_is_a_question_and_captions_are_left_out() -> None:
    def turn(role: str, *parts: str) -> dict:
        kinds = [
            {"type": "image", "text": None} if p == "<image>" else {"type": "text", "text": p} for p in parts
        ]
        return {"role": role, "content": kinds}

    messages = [
        {"role": "system", "content": "be brief"},
        turn("user", "<image>", "what is it?"), turn("assistant", "cat"),
        turn("user", "where?"), turn("assistant", "there"),
        turn("user", "Describe the image."), turn("assistant", "a cat"),
        turn("user", "unanswered"),
    ]  # fmt: skip
    rows = [{"messages": messages, "types": ["object", "relation", "describe"]}, {"messages": messages[1:3]}]
    assert questions_of(rows) == [
        Question(0, "what is it?", "cat", "object"),
        Question(0, "where?", "there", "relation"),
        Question(1, "what is it?", "cat", "all"),
    ]


def test_medians_are_of_alternating_calls_and_leave_set_up_out() -> None:
    calls: list[str] = []

    def way(name: str):
        def set_up():
            calls.append(f"set up {name}")
            return lambda: calls.append(name)

        return set_up

    found = interleaved_medians({"a": way("a"), "b": way("b")}, repeats=4, warm_up=1)
    timed = [c for c in calls if not c.startswith("set up")]
    assert set(found) == {"a", "b"} and len(timed) == 10
    assert all(set(timed[i : i + 2]) == {"a", "b"} for i in range(0, 10, 2))

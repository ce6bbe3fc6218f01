"""The judge against a local server that answers, fails, stalls, and talks nonsense."""

from __future__ import annotations

import json
import time

import pytest

from judge_server import NO, YES, Server
from voco_plugin.evaluation.judge import PROMPT, SYSTEM, Judge, JudgeError, Verdict, read_verdict, summary


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def judge_of(server: Server, **options) -> Judge:
    return Judge(server.url, "tiny", **{"wait": 0.01, "timeout": 5.0, "workers": 1, **options})


def test_verdicts_come_back_in_order_and_the_prompt_is_the_stated_one(server):
    server.script = lambda number, text: YES if "grade: dog\n" in text else NO
    judge = judge_of(server, key="secret", workers=3)
    found = judge.judge(["what?"] * 4, ["a dog"] * 4, ["cat", "dog", "cat", "hound"])
    assert found == [Verdict(False, 1), Verdict(True, 5), Verdict(False, 1), Verdict(False, 1)]
    assert len(server.seen) == 3, "what is asked twice is judged once"
    request = next(body for body in server.seen if "grade: dog\n" in body["messages"][1]["content"])
    assert request["path"] == "/v1/chat/completions" and request["model"] == "tiny"
    assert request["temperature"] == 0
    assert [message["content"] for message in request["messages"]] == [
        SYSTEM, PROMPT.format(question="what?", truth="a dog", answer="dog"),
    ]  # fmt: skip
    assert set(server.keys) == {"Bearer secret"}


def test_a_failing_endpoint_is_tried_again_then_is_an_error(server):
    server.script = lambda number, text: 503 if number < 2 else YES
    assert judge_of(server).judge(["q"], ["t"], ["a"]) == [Verdict(True, 5)]
    assert len(server.seen) == 3
    server.script = lambda number, text: 429
    with pytest.raises(JudgeError, match="failed 3 times, last: HTTP 429 .*busy"):
        judge_of(server, retries=2).judge(["q"], ["t"], ["a"])


def test_an_endpoint_that_refuses_is_not_asked_again(server):
    server.script = lambda number, text: 404
    with pytest.raises(JudgeError, match="refuses: HTTP 404 .*no such model"):
        judge_of(server).judge(["q"], ["t"], ["a"])
    assert len(server.seen) == 1


def test_an_endpoint_that_stalls_is_given_up_after_the_timeout(server):
    server.script = lambda number, text: 1.5 if number == 0 else YES
    start = time.monotonic()
    assert judge_of(server, timeout=0.3).judge(["q"], ["t"], ["a"]) == [Verdict(True, 5)]
    assert time.monotonic() - start < 1.4
    server.script = lambda number, text: 1.5
    with pytest.raises(JudgeError, match="failed 2 times, last: timed out"):
        judge_of(server, timeout=0.2, retries=1).judge(["q"], ["t"], ["a"])


def test_nobody_at_home_is_an_error():
    with pytest.raises(JudgeError, match="failed 2 times, last: .*refused"):
        Judge("http://127.0.0.1:9/v1", "m", retries=1, wait=0.01).judge(["q"], ["t"], ["a"])
    with pytest.raises(ValueError, match="give http://host:port/v1"):
        Judge("localhost:8000", "m")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {}}]}'])
def test_a_body_that_is_no_completion_is_tried_again(server, body):
    server.script = lambda number, text: body if number == 0 else NO
    assert judge_of(server).judge(["q"], ["t"], ["a"]) == [Verdict(False, 1)]


def test_nonsense_is_asked_for_again_then_counted_as_not_judged(server):
    server.script = lambda number, text: "I cannot say." if "grade: odd" in text else YES
    judge = judge_of(server, retries=2)
    found = judge.judge(["q", "q"], ["t", "t"], ["odd", "even"])
    assert found == [None, Verdict(True, 5)]
    assert len(server.seen) == 3 + 1
    told = summary(judge, found, ["first", "where"])
    assert (told["accuracy"], told["score"], told["judged"], told["not_judged"]) == (1.0, 5.0, 1, 1)
    assert list(told["by_type"]) == ["where"] and told["prompt"] == PROMPT and told["system"] == SYSTEM
    with pytest.raises(JudgeError, match="no reply that is a verdict"):
        summary(judge, [None], ["first"])


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (YES, Verdict(True, 5)),
        ("```json\n{'pred': 'no', 'score': 2}\n```", Verdict(False, 2)),
        ('Sure: {"score": 4.5, "correct": true}', Verdict(True, 4.5)),
        ('{"correct": "yes", "score": 7}', None),
        ('{"correct": "maybe", "score": 3}', None),
        ('{"correct": "yes"}', None),
        ("", None),
    ],
)
def test_what_counts_as_a_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_a_crash_costs_nothing(server, tmp_path):
    """What was judged before the endpoint broke down is not asked for again, half a line or not."""
    file = tmp_path / "kept" / "verdicts.jsonl"
    asked = (["q"] * 4, ["t"] * 4, ["a", "b", "c", "d"])
    server.script = lambda number, text: YES if number < 2 else 500
    with pytest.raises(JudgeError, match="verdicts.jsonl: run again to go on"):
        judge_of(server, cache=file, retries=0).judge(*asked)
    assert len(file.read_text().splitlines()) == 2
    with file.open("a") as stream:
        stream.write('{"key": "cut o')
    before = len(server.seen)
    server.script = lambda number, text: NO
    found = judge_of(server, cache=file).judge(*asked)
    assert len(server.seen) - before == 2
    assert found == [Verdict(True, 5), Verdict(True, 5), Verdict(False, 1), Verdict(False, 1)]
    assert [json.loads(line)["answer"] for line in file.read_text().splitlines()] == ["a", "b", "c", "d"]
    seen = len(server.seen)
    assert judge_of(server, cache=file).judge(*asked) == found and len(server.seen) == seen
    other = Judge(server.url, "another", cache=file, wait=0.01)
    other.judge(["q"], ["t"], ["a"])
    assert len(server.seen) == seen + 1, "another judge's verdict is its own"


def test_a_file_that_is_no_cache_is_named(server, tmp_path):
    for text, where in (
        ("buy milk\n", "notes.txt, line 1, is no"),
        ("buy milk", "notes.txt ends in what is no"),
    ):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(ValueError, match=where):
            judge_of(server, cache=tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == text

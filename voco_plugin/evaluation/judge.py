"""A language model as judge of open answers, behind any endpoint that speaks OpenAI's chat completions.

Published figures of open-ended video question answering come from such a judge: it reads question, reference
answer and the model's answer, and says whether they agree (yes or no) and how well (0 to 5). The text it
reads here is :data:`SYSTEM` and :data:`PROMPT`, our own; figures judged by another text or another judge are
not comparable, so both are part of every result.

    verdicts are kept in a file of JSON lines as they come: a run that ends early goes on where it was
    a request that fails or stalls is repeated, each time after twice the wait; then it is an error
    a reply that is not a verdict is asked for again; then the answer counts as not judged, and is counted
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

SYSTEM = (
    "You grade answers to questions about videos. You see a question, the reference answer, and an answer to "
    "grade. Judge by meaning: synonyms, paraphrases and longer answers that say the same are right; answers "
    "that contradict the reference, or leave out what was asked, are wrong."
)
PROMPT = (
    "Question: {question}\nReference answer: {truth}\nAnswer to grade: {answer}\n\n"
    "Does the answer agree with the reference? Give also a whole number from 0 (unrelated) to 5 (the same "
    'meaning). Reply with one JSON object and nothing else, like {{"correct": "no", "score": 2}}.'
)
KEY_VARIABLE = "VOCO_JUDGE_API_KEY"

_MAX_REPLY = 1 << 20
_BEGIN = b'{"key": "'
_RETRIED = (408, 409, 425, 429)
_CORRECT = re.compile(r"""["']?(?:correct|pred)["']?\s*:\s*["']?(yes|no|true|false)\b""", re.IGNORECASE)
_SCORE = re.compile(r"""["']?score["']?\s*:\s*["']?(\d+(?:\.\d+)?)""", re.IGNORECASE)


class JudgeError(ValueError):
    """The judge cannot be reached, or refuses. The message says where, why, and what is kept."""


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and how good it is, 0…5."""

    right: bool
    score: float


def read_verdict(reply: str) -> Verdict | None:
    """The verdict in a judge's reply; ``None`` where it holds none, or a score outside 0…5."""
    right, score = _CORRECT.search(reply), _SCORE.search(reply)
    if right is None or score is None or not 0 <= float(score[1]) <= 5:
        return None
    return Verdict(right[1].lower() in ("yes", "true"), float(score[1]))


class Judge:
    """Asks a judge, and remembers.

    Args:
        url: of the endpoint, as ``http://host:8000/v1`` (or the whole ``…/chat/completions``).
        model: what the endpoint calls its model.
        cache: file of the verdicts so far; ``None`` keeps none.
        key: sent as bearer token.
        timeout: seconds the endpoint may be silent, and its reply may take.
        retries: how often a request, or an unreadable reply, is tried again.
        wait: seconds before the first repetition; doubled each time.
        workers: requests at a time.

    Raises:
        ValueError: the url is none of http, or the cache file is not one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: str | Path | None = None,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        wait: float = 1.0,
        workers: int = 4,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge url {url!r} is none: give http://host:port/v1")
        end = "/chat/completions"
        self.url = url.rstrip("/").removesuffix(end) + end
        self.model, self.timeout, self.retries, self.wait, self.workers = (
            model,
            timeout,
            retries,
            wait,
            workers,
        )
        self._key = key
        self._lock = threading.Lock()
        self.cache = None if cache is None else Path(cache)
        self._known = {} if self.cache is None else _read_cache(self.cache)

    def judge(
        self,
        questions: Sequence[str],
        truths: Sequence[str],
        answers: Sequence[str],
        tick: Callable[[int], Any] | None = None,
    ) -> list[Verdict | None]:
        """A verdict for each answer; ``None`` where the judge said nothing that is one.

        Args:
            tick: called with the number of answers just judged.

        Raises:
            JudgeError: the endpoint fails, stalls or refuses. What is judged by then is in the cache file.
        """
        found: list[Verdict | None] = [None] * len(questions)
        places: dict[str, list[int]] = {}
        for place, asked in enumerate(zip(questions, truths, answers, strict=True)):
            places.setdefault(self._name(*asked), []).append(place)
        with ThreadPoolExecutor(self.workers) as pool:
            work = {}
            for name, same in places.items():
                if name in self._known:
                    _give(found, same, self._known[name], tick)
                else:
                    first = same[0]
                    task = (name, questions[first], truths[first], answers[first])
                    work[pool.submit(self._ask, *task)] = same
            try:
                for done in as_completed(work):
                    _give(found, work[done], done.result(), tick)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _name(self, question: str, truth: str, answer: str) -> str:
        """The same judge, text, question, reference and answer have one name."""
        parts = [self.url, self.model, SYSTEM, PROMPT, question, truth, answer]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _ask(self, name: str, question: str, truth: str, answer: str) -> Verdict | None:
        text = PROMPT.format(question=question, truth=truth, answer=answer)
        for _ in range(self.retries + 1):
            reply = self._reply(text)
            verdict = read_verdict(reply)
            if verdict is not None:
                self._keep(name, verdict, question, truth, answer)
                return verdict
        return None

    def _keep(self, name: str, verdict: Verdict, question: str, truth: str, answer: str) -> None:
        line = {
            "key": name, "correct": verdict.right, "score": verdict.score, "model": self.model,
            "question": question, "truth": truth, "answer": answer,
        }  # fmt: skip
        with self._lock:
            self._known[name] = verdict
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _reply(self, text: str) -> str:
        """The text of the judge's reply, after as many tries as it may take."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                return self._request(text)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}: {_excerpt(error)}"
                if error.code < 500 and error.code not in _RETRIED:
                    raise JudgeError(
                        f"judge {self.url} refuses: {problem}; check url, model and key."
                    ) from None
            except (OSError, HTTPException) as error:  # unreachable, cut off, or too slow
                problem = str(getattr(error, "reason", "") or error) or type(error).__name__
            except (KeyError, IndexError, TypeError, ValueError):
                problem = "the reply is not that of a chat completion"
        kept = "" if self.cache is None else f" What was judged is kept in {self.cache}: run again to go on."
        raise JudgeError(f"judge {self.url} failed {self.retries + 1} times, last: {problem}.{kept}")

    def _request(self, text: str) -> str:
        body = {
            "model": self.model, "temperature": 0, "max_tokens": 64,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        }  # fmt: skip
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        end = time.monotonic() + self.timeout
        data = b""
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            while chunk := response.read1(1 << 16):
                data += chunk
                if time.monotonic() > end or len(data) > _MAX_REPLY:
                    raise TimeoutError(f"the reply took more than {self.timeout} s or {_MAX_REPLY} bytes")
        content = json.loads(data)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError(content)
        return content


def _give(found: list[Any], places: list[int], verdict: Verdict | None, tick: Any) -> None:
    for place in places:
        found[place] = verdict
    if tick is not None:
        tick(len(places))


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(200).decode("utf-8", "replace")
    except OSError:
        return ""


def _read_cache(path: Path) -> dict[str, Verdict]:
    """The verdicts of a cache file; a last line cut off by a crash is not counted, and taken out."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    cut_off = data[len(whole) :]
    known = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            known[entry["key"]] = Verdict(bool(entry["correct"]), float(entry["score"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no verdict of a judge: give another file") from None
    if cut_off:
        if cut_off[: len(_BEGIN)] != _BEGIN[: len(cut_off)]:
            raise ValueError(f"{path} ends in what is no verdict of a judge: give another file")
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return known


def summary(judge: Judge, verdicts: Sequence[Verdict | None], types: Sequence[str]) -> dict[str, Any]:
    """What goes into a result: accuracy and mean score over the judged answers, per type, and how they came.

    Raises:
        JudgeError: no reply was a verdict.
    """
    judged = [(kind, v) for kind, v in zip(types, verdicts, strict=True) if v is not None]
    if not judged:
        raise JudgeError(f"judge {judge.url} gave no reply that is a verdict; try another model.")

    def means(of: list[Verdict]) -> dict[str, float]:
        return {"accuracy": sum(v.right for v in of) / len(of), "score": sum(v.score for v in of) / len(of)}

    kinds = sorted({kind for kind, _ in judged})
    return {
        **means([v for _, v in judged]),
        "by_type": {kind: means([v for k, v in judged if k == kind]) for kind in kinds},
        "judged": len(judged), "not_judged": len(verdicts) - len(judged), "model": judge.model,
        "url": judge.url, "system": SYSTEM, "prompt": PROMPT,
    }  # fmt: skip

"""The annotation files of MSVD-QA, MSRVTT-QA and ActivityNet-QA, as published → one row per video.

    msvd         test_qa.json          [{"id": 0, "video_id": 1, "question": "what …?", "answer": "dog"}, …]
                 youtube_mapping.txt   -4wsuPCjDBc_5_15 vid1           (optional; train_qa, val_qa likewise)
    msrvtt       test_qa.json          as msvd's, and "category_id"; video 7010 is video7010.mp4
    activitynet  test_q.json           [{"video_name": "1QIUV7WYKXg", "question_id": "v_1QIUV7WYKXg_3",
                                         "question": "is …"}, …]
                 test_a.json           [{"question_id": …, "answer": "yes", "type": 3}, …]

Types are ActivityNet-QA's own nine; of the other two sets the question word, as their papers report it.
The video of MSVD number 1 is ``vid1.*``, or what the mapping calls it; of ActivityNet ``v_NAME.*`` or
``NAME.*``. Xu et al. 2017 (MSVD-QA, MSRVTT-QA), Yu et al. 2019 (ActivityNet-QA).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTIVITYNET_TYPES = (
    "motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other",
)  # fmt: skip
QUESTION_WORDS = ("what", "who", "how", "when", "where")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".gif")
FORMATS = ("msvd", "msrvtt", "activitynet")


@dataclass(frozen=True)
class VideoItem:
    """One question: ``names`` are the file names, without suffix, that its video may have."""

    id: str
    names: tuple[str, ...]
    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class VideoRow:
    """A video file and all that is asked about it."""

    path: Path
    items: tuple[VideoItem, ...]


def read_video_qa(
    path: str | Path, kind: str, *, answers: str | Path | None = None, mapping: str | Path | None = None
) -> list[VideoItem]:
    """The questions of one annotation file, in its order.

    Args:
        kind: a name of :data:`FORMATS`.
        answers: of ActivityNet-QA the file of answers; default: the name of the questions' with ``_a`` for
            ``_q``.
        mapping: of MSVD-QA ``youtube_mapping.txt``, where the videos have the names of the original set.

    Raises:
        ValueError: a file or a field is missing or of another format; the message says which record.
    """
    if kind not in FORMATS:
        near = difflib.get_close_matches(str(kind), FORMATS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"kind={kind!r} is not known{hint}: give one of {', '.join(FORMATS)}")
    if mapping is not None and kind != "msvd":
        raise ValueError(f"mapping={str(mapping)!r} goes with msvd, not with {kind}: leave it out")
    if answers is not None and kind != "activitynet":
        raise ValueError(f"answers={str(answers)!r} goes with activitynet, not with {kind}: leave it out")
    if kind == "activitynet":
        return _activitynet(Path(path), _answers_of(Path(path)) if answers is None else Path(answers))
    called = {} if mapping is None else _mapping(Path(mapping))
    found = []
    for where, record in _records(Path(path)):
        number = _field(record, "video_id", int, where)
        name = f"vid{number}" if kind == "msvd" else f"video{number}"
        question = _field(record, "question", str, where)
        if called and name not in called:
            raise ValueError(f"{where}: {name} is not in {mapping}: give the mapping of this set")
        names = (called[name], name) if name in called else (name,)
        word = question.split()[0].lower() if question.split() else ""
        found.append(
            VideoItem(
                str(_field(record, "id", int, where)), names, question, _answer(record, where),
                word if word in QUESTION_WORDS else "other",
            )
        )  # fmt: skip
    return found


def video_rows(items: Sequence[VideoItem], folder: str | Path, *, missing: bool = False) -> list[VideoRow]:
    """The questions put together by video, in the order of each video's first; files are found in `folder`.

    Args:
        missing: whether a video that is not there keeps its row, to be found missing when it is read.

    Raises:
        ValueError: a video is not there; the message says under which names it was looked for.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: give the one that holds the videos")
    files = {file.stem: file for file in sorted(root.rglob("*")) if file.suffix.lower() in VIDEO_SUFFIXES}
    together: dict[tuple[str, ...], list[VideoItem]] = {}
    for item in items:
        together.setdefault(item.names, []).append(item)
    rows = []
    for names, asked in together.items():
        path = next((files[name] for name in names if name in files), None)
        if path is None and not missing:
            raise ValueError(
                f"question {asked[0].id}: no video {' or '.join(names)} in {root} "
                f"({', '.join(VIDEO_SUFFIXES)}): give the folder with the set's videos"
            )
        rows.append(VideoRow(path or root / f"{names[0]}.mp4", tuple(asked)))
    return rows


def _activitynet(questions: Path, answers: Path) -> list[VideoItem]:
    given = {}
    for where, record in _records(answers):
        number = _field(record, "type", int, where)
        if not 0 <= number < len(ACTIVITYNET_TYPES):
            raise ValueError(f"{where}: type {number} is none of 0…{len(ACTIVITYNET_TYPES) - 1}")
        given[_field(record, "question_id", str, where)] = (_answer(record, where), ACTIVITYNET_TYPES[number])
    found = []
    for where, record in _records(questions):
        name, key = _field(record, "video_name", str, where), _field(record, "question_id", str, where)
        if key not in given:
            raise ValueError(f"{where}: question {key!r} has no answer in {answers}: give its split's")
        names = (f"v_{name}", name)
        found.append(VideoItem(key, names, _field(record, "question", str, where), *given[key]))
    return found


def _answers_of(questions: Path) -> Path:
    if not questions.stem.endswith("_q"):
        raise ValueError(f"{questions} is not named …_q.json: name its file of answers too")
    return questions.with_name(questions.stem.removesuffix("_q") + "_a.json")


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a JSON list, each with what an error calls it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the annotation file")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, list) or not value or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{path} holds no list of records: give the annotation file of the set")
    return [(f"{path}, record {number}", record) for number, record in enumerate(value)]


def _field(record: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {name!r} is {value!r}, not a {kind.__name__}: is this the right format?")
    return value


def _answer(record: dict[str, Any], where: str) -> str:
    """The answer as text; a number written as one counts."""
    value = record.get("answer")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: 'answer' is {value!r}, not a text: is this the right format?")
    return str(value)


def _mapping(path: Path) -> dict[str, str]:
    """``vid1`` → ``-4wsuPCjDBc_5_15``."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give youtube_mapping.txt")
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = line.split()
        if words and (len(words) != 2 or not re.fullmatch(r"vid\d+", words[1])):
            raise ValueError(f"{path}, line {number}: {line!r} is not a name and vidN")
        if words:
            found[words[1]] = words[0]
    return found


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
MATCH = "exact after lower case, no punctuation, no articles, number words to ten as figures"
"""How :func:`same_answer` judges, for results."""


def normalise_answer(text: str) -> str:
    """Lower case; punctuation, articles and outer space gone; *zero* … *ten* as figures (as VQA does)."""
    words = _ARTICLES.sub(" ", re.sub(r"[^\w\s]", " ", text.lower().replace("'", "")))
    return " ".join(_NUMBERS.get(word, word) for word in words.split())


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normalise_answer(given) == normalise_answer(truth)

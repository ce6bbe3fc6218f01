"""MSVD-QA, MSRVTT-QA and ActivityNet-QA as published; rows whose frames come from video files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from voco_plugin.data.images import BadImageError
from voco_plugin.evaluation.frame_order import row_times
from voco_plugin.evaluation.metrics import Question, questions_of, score
from voco_plugin.evaluation.video_qa import normalise_answer, read_video_qa, same_answer, video_rows
from voco_plugin.evaluation.video_rows import VideoDataset

# as in the published files: key order, integers and all
MSVD = (
    '[{"answer": "someone", "id": 30933, "question": "who pours liquid from a plastic container into a '
    'ziploc bag containing meat pieces?", "video_id": 1301}, {"answer": "dog", "id": 30934, "question": '
    '"what is chewing on a nut?", "video_id": 1302}, {"answer": "season", "id": 30935, "question": '
    '"what does someone do to meat?", "video_id": 1301}]'
)
MAPPING = "-4wsuPCjDBc_5_15 vid1301\n-7KMZQEsJW4_205_208 vid1302\n"
MSRVTT = (
    '[{"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting on?", '
    '"video_id": 7010}, {"answer": "two", "category_id": 14, "id": 158582, "question": "how many are there?",'
    ' "video_id": 7010}, {"answer": "show", "category_id": 14, "id": 158583, "question": "is it so?", '
    '"video_id": 7011}]'
)
ACTIVITYNET_Q = (
    '[{"question": "is the athlete wearing trousers", "video_name": "1QIUV7WYKXg", "question_id": '
    '"v_1QIUV7WYKXg_3"}, {"question": "what is behind the person", "video_name": "1QIUV7WYKXg", '
    '"question_id": "v_1QIUV7WYKXg_4"}, {"question": "what happens after the jump", "video_name": '
    '"G8dCenteoT0", "question_id": "v_G8dCenteoT0_1"}]'
)
ACTIVITYNET_A = (
    '[{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}, {"answer": "wall", "type": 1, '
    '"question_id": "v_1QIUV7WYKXg_4"}, {"answer": "run away", "type": 2, "question_id": "v_G8dCenteoT0_1"}]'
)


@pytest.fixture
def sets(tmp_path) -> Path:
    for name, text in (
        ("msvd_qa.json", MSVD), ("youtube_mapping.txt", MAPPING), ("msrvtt_qa.json", MSRVTT),
        ("test_q.json", ACTIVITYNET_Q), ("test_a.json", ACTIVITYNET_A),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    videos = tmp_path / "videos"
    (videos / "more").mkdir(parents=True)
    for name in (
        "vid1301.avi", "vid1302.avi", "-4wsuPCjDBc_5_15.avi", "-7KMZQEsJW4_205_208.avi", "video7010.mp4",
        "more/video7011.mp4", "v_1QIUV7WYKXg.mkv", "G8dCenteoT0.webm", "notes.txt",
    ):  # fmt: skip
        (videos / name).write_bytes(b"video")
    return tmp_path


def test_msvd_with_and_without_its_mapping(sets):
    items = read_video_qa(sets / "msvd_qa.json", "msvd")
    assert [(i.id, i.names, i.answer, i.type) for i in items] == [
        ("30933", ("vid1301",), "someone", "who"),
        ("30934", ("vid1302",), "dog", "what"),
        ("30935", ("vid1301",), "season", "what"),
    ]
    rows = video_rows(items, sets / "videos")
    assert [(row.path.name, len(row.items)) for row in rows] == [("vid1301.avi", 2), ("vid1302.avi", 1)]
    items = read_video_qa(sets / "msvd_qa.json", "msvd", mapping=sets / "youtube_mapping.txt")
    assert [row.path.name for row in video_rows(items, sets / "videos")] == [
        "-4wsuPCjDBc_5_15.avi", "-7KMZQEsJW4_205_208.avi",
    ]  # fmt: skip


def test_msrvtt(sets):
    items = read_video_qa(sets / "msrvtt_qa.json", "msrvtt")
    assert [(i.answer, i.type) for i in items] == [("couch", "what"), ("two", "how"), ("show", "other")]
    rows = video_rows(items, sets / "videos")
    assert [(row.path.name, [i.id for i in row.items]) for row in rows] == [
        ("video7010.mp4", ["158581", "158582"]), ("video7011.mp4", ["158583"]),
    ]  # fmt: skip


def test_activitynet_joins_questions_and_answers(sets):
    items = read_video_qa(sets / "test_q.json", "activitynet")
    assert [(i.id, i.answer, i.type) for i in items] == [
        ("v_1QIUV7WYKXg_3", "yes", "yes/no"),
        ("v_1QIUV7WYKXg_4", "wall", "spatial"),
        ("v_G8dCenteoT0_1", "run away", "temporal"),
    ]
    assert read_video_qa(sets / "test_q.json", "activitynet", answers=sets / "test_a.json") == items
    names = [row.path.name for row in video_rows(items, sets / "videos")]
    assert names == ["v_1QIUV7WYKXg.mkv", "G8dCenteoT0.webm"]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("msvd", '[{"id": 1, "question": "q", "answer": "a"}]', "record 0: 'video_id' is None, not a int"),
        ("msvd", '[{"id": 1, "video_id": 2, "answer": "a"}]', "record 0: 'question' is None, not a str"),
        ("msvd", '[{"id": 1, "video_id": 2, "question": "q"}]', "'answer' is None, not a text"),
        ("msrvtt", '{"id": 1}', "holds no list of records"),
        ("msrvtt", "[]", "holds no list of records"),
        ("msrvtt", "[{", "is not valid JSON"),
        ("activitynet", ACTIVITYNET_Q.replace("_4", "_9"), "question 'v_1QIUV7WYKXg_9' has no answer"),
        ("msdv", "[]", "did you mean 'msvd'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(sets, kind, text, message):
    (sets / "test_q.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_video_qa(sets / "test_q.json", kind)


def test_what_is_missing_is_named(sets):
    with pytest.raises(ValueError, match="no.json does not exist"):
        read_video_qa(sets / "no.json", "msvd")
    with pytest.raises(ValueError, match="mapping=.* goes with msvd"):
        read_video_qa(sets / "msrvtt_qa.json", "msrvtt", mapping=sets / "youtube_mapping.txt")
    with pytest.raises(ValueError, match="answers=.* goes with activitynet"):
        read_video_qa(sets / "msrvtt_qa.json", "msrvtt", answers=sets / "test_a.json")
    with pytest.raises(ValueError, match="is not named …_q.json"):
        read_video_qa(sets / "test_a.json", "activitynet")
    (sets / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1301\n")
    with pytest.raises(ValueError, match="record 1: vid1302 is not in"):
        read_video_qa(sets / "msvd_qa.json", "msvd", mapping=sets / "youtube_mapping.txt")
    items = read_video_qa(sets / "test_q.json", "activitynet")
    (sets / "videos" / "G8dCenteoT0.webm").unlink()
    with pytest.raises(ValueError, match="v_G8dCenteoT0_1: no video v_G8dCenteoT0 or G8dCenteoT0 in"):
        video_rows(items, sets / "videos")
    kept = video_rows(items, sets / "videos", missing=True)
    assert [row.path.is_file() for row in kept] == [True, False]
    with pytest.raises(ValueError, match="is no folder"):
        video_rows(items, sets / "nowhere")


def test_answers_match_once_normalised():
    assert normalise_answer(" The two  dogs' ball. ") == "2 dogs ball"
    for given, truth in (("A dog.", "dog"), ("two", "2"), ("Run away!", "run away"), ("YES", "yes")):
        assert same_answer(given, truth)
    for given, truth in (("a big dog", "dog"), ("dogs", "dog"), ("", "a dog"), ("theatre", "atre")):
        assert not same_answer(given, truth)
    questions = [Question(0, "q", "dog", "what"), Question(0, "q", "2", "how")]
    assert score(questions, ["The dog", "two"]).accuracy == 0.0
    assert score(questions, ["The dog", "two"], match=same_answer).by_type == {"how": 1.0, "what": 1.0}


@pytest.fixture
def reader(monkeypatch):
    """In the place of `voco_plugin.video.reading`: frames of one shade a second; counts what it decodes."""
    module = ModuleType("voco_plugin.video.reading")
    module.calls = []

    def read_video(source, *, count=None, fps=None):
        module.calls.append((Path(source).name, count, fps))
        if Path(source).read_bytes() != b"video":
            raise ValueError("truncated after 0 frames")
        for number in range(count or int(4 * fps)):
            yield SimpleNamespace(
                image=Image.new("RGB", (8, 8), (number,) * 3), time=number / 2, index=number
            )

    module.read_video = read_video
    monkeypatch.setitem(sys.modules, "voco_plugin.video.reading", module)
    return module


def test_a_row_is_a_video_with_its_frames_and_questions(sets, reader):
    rows = video_rows(read_video_qa(sets / "msrvtt_qa.json", "msrvtt"), sets / "videos")
    dataset = VideoDataset(rows, count=3, times=True)
    plain = dataset.remove_columns(["images", "times"])
    assert questions_of(plain) == [
        Question(0, "what are three people sitting on?", "couch", "what"),
        Question(0, "how many are there?", "two", "how"),
        Question(1, "is it so?", "show", "other"),
    ]
    assert reader.calls == [], "no video is opened to see what is asked"
    row = dataset[0]
    assert [image.getpixel((0, 0))[0] for image in row["images"]] == [0, 1, 2]
    assert row_times(row, 3) == ["<0.0s>", "<0.5s>", "<1.0s>"]
    light = dataset.remove_columns("images")[0]
    assert "images" not in light and light["times"] == row["times"]
    assert reader.calls == [("video7010.mp4", 3, None)], "its times are known by now"
    assert dataset.select([1]).remove_columns("images")[0]["times"] == row["times"]
    assert reader.calls[-1] == ("video7011.mp4", 3, None)
    untimed = VideoDataset(rows, fps=0.5)
    assert row_times(untimed[1], 2) == [None, None]
    with pytest.raises(ValueError, match="give one of them"):
        VideoDataset(rows, fps=0.5, count=2)


def test_a_broken_or_missing_video_is_named(sets, reader):
    rows = video_rows(read_video_qa(sets / "msrvtt_qa.json", "msrvtt"), sets / "videos")
    rows[0].path.write_bytes(b"vid")
    rows[1].path.unlink()
    dataset = VideoDataset(rows, count=2)
    with pytest.raises(BadImageError, match="video .*video7010.mp4 cannot be read: truncated after 0 frames"):
        dataset[0]
    with pytest.raises(BadImageError, match="video .*video7011.mp4 does not exist"):
        dataset[1]

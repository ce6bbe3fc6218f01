"""`voco eval` of videos: frames all, single, shuffled; pictures compressed once; published sets; judge."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "sklearn", reason="gridworld draws scikit-learn's digits: pip install 'voco_plugin[quickstart]'"
)

import voco_plugin as vp
from judge_server import Server
from loud_vlm import save_loud_vlm
from voco_plugin.cli import main
from voco_plugin.data.lazy_images import undecoded
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation import metrics
from voco_plugin.evaluation.frame_order import frame_order, picture_key, row_times, shown_times
from voco_plugin.evaluation.metrics import Question, compress_rows, evaluate, questions_of
from voco_plugin.gridworld.video_dataset import VideoWorld, write_gridworld_video
from voco_plugin.inference import answering, prompts
from voco_plugin.inference.answering import prompt
from voco_plugin.inference.prompts import ask


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A set of videos, one of them of more frames, and a tiny random VLM that reads its words."""
    folder = tmp_path_factory.mktemp("videos")
    world = VideoWorld(num_train=2, num_test=3, num_frames=(6, 9), num_questions=3, hf=False)
    write_gridworld_video(folder / "set", world)
    save_loud_vlm(folder / "base", question_set="words", video=True)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def loaded(here):
    model, processor = vp.load("base", vp.VoCoConfig(num_tokens=2))
    data = load_vision_dataset("set/test.json", image_folder="set/images")
    return model.eval(), processor, undecoded(data)


def test_orders_are_the_middle_frame_or_a_permutation_of_its_own_for_each_video():
    assert frame_order(5) == [0, 1, 2, 3, 4] and frame_order(0, "single") == []
    assert [frame_order(n, "single") for n in (1, 2, 8, 9)] == [[0], [1], [4], [4]]
    shuffled = [frame_order(8, "shuffled", seed, row) for seed in (0, 1) for row in (0, 1)]
    assert all(sorted(order) == list(range(8)) for order in shuffled)
    assert len({tuple(order) for order in shuffled}) == 4
    assert frame_order(8, "shuffled", 1, 1) == shuffled[3]
    times = ["<0.0s>", "<1.0s>", "<2.0s>"]
    assert shown_times(times, "shuffled") == times == shown_times(times, "all")
    assert shown_times(times, "single") == ["<1.0s>"]
    with pytest.raises(ValueError, match="frames='some' is not known"):
        frame_order(3, "some")


def test_time_texts_belong_to_the_frames_and_not_to_the_question(loaded):
    _, processor, data = loaded
    questions = questions_of(data.remove_columns("images"))
    assert [q.row for q in questions] == [0] * 3 + [1] * 3 + [2] * 3
    assert not any("<image>" in q.text or q.text.startswith("<") for q in questions)
    times = row_times(data[0], 6)
    assert times == [f"<{second}.0s>" for second in range(6)]
    asked = ask(questions[0].text, 6, times)
    written = [{k: v for k, v in part.items() if v is not None} for part in data[0]["messages"][0]["content"]]
    assert asked == [{"role": "user", "content": written}], "the prompt is the row's own first turn"
    said = [{"type": "text", "text": "<1.0s> is a time?"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "yes"}]}
    assert questions_of([row]) == [Question(0, "<1.0s> is a time?", "yes")]
    assert row_times(row, 1) == [None]
    with pytest.raises(ValueError, match="2 times for 3 images"):
        ask("q", 3, times[:2])


def test_each_different_picture_is_compressed_once_and_its_block_shared(loaded, monkeypatch):
    model, processor, data = loaded
    questions = questions_of(data.remove_columns("images"))
    seen, real = [], answering.compress_images

    def counted(model, processor, images, **more):
        return real(model, processor, (seen.append(picture_key(i)) or i for i in images), **more)

    monkeypatch.setattr(answering, "compress_images", counted)
    caches = compress_rows(model, processor, data, questions)
    names = [[image["path"] for image in row["images"]] for row in data]
    assert len(seen) == len({name for row in names for name in row}) < sum(map(len, names))
    assert len(set(seen)) == len(seen)
    for row, cache in caches.items():
        assert len(cache) == len(names[row])
        for i, name in enumerate(names[row]):
            assert cache.blocks[i] is cache.blocks[names[row].index(name)], "one block for one picture"


def shown_to(model, loaded, monkeypatch, **more):
    """What `answer` is given by `evaluate`: per question (times, blocks or images)."""
    got = []

    def answer(model, processor, texts, *, times=None, caches=None, images=None, **_):
        got.extend(zip(times, caches or images, strict=True))
        return ["b1"] * len(texts)

    _, processor, data = loaded
    monkeypatch.setattr(answering, "answer", answer)
    found = evaluate(model, processor, data, questions_of(data.remove_columns("images")), **more)
    monkeypatch.undo()
    return found, got


@pytest.mark.parametrize("frames", ["all", "single", "shuffled"])
def test_shuffled_blocks_are_shuffled_pixels(loaded, monkeypatch, frames):
    """Blocks put in another order answer as the single pass over the frames in that order: logits."""
    model, processor, data = loaded
    questions = questions_of(data.remove_columns("images"))
    _, blocks = shown_to(model, loaded, monkeypatch, mode="cache", frames=frames, seed=3, batch_size=2)
    _, pixels = shown_to(model, loaded, monkeypatch, mode="images", frames=frames, seed=3, batch_size=2)
    assert [times for times, _ in blocks] == [times for times, _ in pixels]
    for number in (0, 4, 8):
        row = questions[number].row
        count = len(data[row]["images"])
        order = frame_order(count, frames, 3, row)
        times, images = pixels[number]
        every = [f"<{second}.0s>" for second in range(count)]
        assert times == ([every[count // 2]] if frames == "single" else every)
        own = metrics.images_of(data[row])
        assert [image.tobytes() for image in images] == [own[i].tobytes() for i in order]
        text = [questions[number].text]
        with torch.no_grad():
            single = model(**prompt(model, processor, text, [images], None, [times])).logits[0, -1]
            cached = model(**prompt(model, processor, text, None, [blocks[number][1]], [times])).logits[0, -1]
            plain = model(**prompt(model, processor, text, [own], None, [every])).logits[0, -1]
        assert (single - cached).abs().max() < 1e-4
        if frames != "all":
            assert (single - plain).abs().max() > 1e-3, "the model sees another thing"


def test_a_batch_opens_no_more_videos_than_it_asks_about(loaded, monkeypatch):
    model, _, data = loaded
    opened = []
    real = metrics.images_of
    monkeypatch.setattr(metrics, "images_of", lambda row: opened.append(row["id"]) or real(row))
    monkeypatch.setattr(answering, "answer", lambda model, processor, texts, **_: ["b1"] * len(texts))
    questions = questions_of(data.remove_columns("images"))
    evaluate(model, loaded[1], data, questions, mode="images", batch_size=2)
    assert opened == [row["id"] for row in data.remove_columns("images")], "once, though batches cut rows"
    with pytest.raises(ValueError, match="frames='half' is not known"):
        evaluate(model, loaded[1], data, questions, frames="half")


def test_a_template_that_writes_images_first_takes_no_times(loaded):
    _, processor, _ = loaded
    prompts.check_times(processor)

    class ImagesFirst:
        chat_template = "as LLaVA-1.5's"

        def apply_chat_template(self, batch, **_):
            parts = [sorted(talk[0]["content"], key=lambda part: part["type"]) for talk in batch]
            return ["".join(part.get("text", "<image>\n") for part in row) for row in parts]

    with pytest.raises(ValueError, match="writes all images before all text"):
        prompts.check_times(ImagesFirst())


DATA = ["--data", "set/test.json", "--image-folder", "set/images", "--max-new-tokens", "2"]


def test_eval_reports_the_orders_beside_each_other(here, capsys, monkeypatch):
    calls, real = [], metrics.compress_rows
    monkeypatch.setattr(metrics, "compress_rows", lambda *a, **k: calls.append(1) or real(*a, **k))
    asked = ["eval", "base", *DATA, "--num-tokens", "2", "--mode", "voco", "--mode", "blind"]
    assert main([*asked, "--frames", "all,single,shuffled", "--out", "scores.json"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[:2] for line in told.splitlines()[2:6]] == [
        ["voco", "all"], ["voco", "single"], ["voco", "shuffled"], ["blind", "-"],
    ]  # fmt: skip
    assert len(calls) == 1, "compressed once for all orders"
    found = json.loads(Path("scores.json").read_text())
    assert list(found["scores"]) == ["voco", "voco frames=single", "voco frames=shuffled", "blind"]
    for entry in found["scores"].values():
        assert set(entry["by_frames"]) == {"6", "9"} and entry["num_tokens"] in (2, None)
    assert told.splitlines()[7].split() == ["frames", "6", "9"]
    assert main([*asked, "--json", "--frames", "shuffled", "--shuffle-seed", "0", "--out", "one.json"]) == 0
    one = json.loads(Path("one.json").read_text())["scores"]
    assert one["voco frames=shuffled"]["answers"] == found["scores"]["voco frames=shuffled"]["answers"]


def test_eval_refuses_orders_of_images_and_options_without_their_set(here, capsys):
    assert main(["gridworld", "images", "--num-train", "2", "--num-test", "2", "--level", "study"]) == 0
    capsys.readouterr()
    images = ["--data", "images/test.json", "--num-tokens", "1"]
    for options, message in (
        ([*images, "--frames", "single"], "no row of images/test.json has more than one image"),
        ([*images, "--frames", "first"], "frames='first' is not known"),
        ([*images, "--fps", "2"], "--fps goes with --video-qa"),
        ([*images, "--video-qa", "msvd"], "needs --videos FOLDER"),
        ([*images, "--judge", "http://localhost"], "go together"),
    ):
        assert main(["eval", "base", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def published(here, monkeypatch):
    """MSVD-QA of two videos, their frames those of the set; one file is broken."""
    module = ModuleType("voco_plugin.video.reading")

    def read_video(source, *, count=None, fps=None):
        if "vid3" in str(source):
            raise ValueError("moov atom not found")
        row = load_vision_dataset(here / "set/test.json", image_folder=here / "set/images")[int(source[-5])]
        for number, image in enumerate(row["images"][:count]):
            yield SimpleNamespace(image=image, time=number / 2, index=number)

    module.read_video = read_video
    monkeypatch.setitem(sys.modules, "voco_plugin.video.reading", module)
    (here / "clips").mkdir(exist_ok=True)
    records = []
    for number, (question, answer) in enumerate([("what is it?", "a b1"), ("who is it?", "man")] * 2):
        video = 1 + number // 2
        (here / "clips" / f"vid{video}.avi").write_bytes(b"")
        records.append({"id": number, "video_id": video, "question": question, "answer": answer})
    (here / "test_qa.json").write_text(json.dumps(records))
    return ["eval", "base", "--data", "test_qa.json", "--video-qa", "msvd", "--videos", "clips",
            "--num-tokens", "2", "--max-new-tokens", "2"]  # fmt: skip


def test_eval_reads_a_published_set_and_asks_the_judge(published, here, capsys, monkeypatch):
    server = Server()
    server.script = lambda number, text: json.dumps(
        {"correct": "yes" if "who is" in text else "no", "score": 3}
    )
    monkeypatch.setenv("VOCO_JUDGE_API_KEY", "secret")
    try:
        judge = ["--judge", server.url, "--judge-model", "tiny", "--judge-cache", "kept.jsonl"]
        more = [*judge, "--frames", "all,single", "--num-frames", "4", "--time-text", "--out", "qa.json"]
        assert main([*published, *more]) == 0
        told = capsys.readouterr().out
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert set(server.keys) == {"Bearer secret"}
    found = json.loads(Path("qa.json").read_text())
    assert found["types"] == ["what", "who"] * 2 and "number words" in found["match"]
    assert list(found["scores"]) == ["voco", "voco frames=single"]
    for entry in found["scores"].values():
        judged = entry["judge"]
        assert judged["accuracy"] == 0.5 and judged["score"] == 3.0 and judged["judged"] == 4
        assert judged["by_type"]["who"]["accuracy"] == 1.0 and judged["verdicts"][1] == [1, 3.0]
        assert "secret" not in json.dumps(entry) and judged["prompt"].startswith("Question:")
    assert "not judged" in told and Path("kept.jsonl").is_file()


def test_a_video_that_cannot_be_read_is_an_error_or_left_out(published, here, capsys):
    records = json.loads(Path("test_qa.json").read_text())
    records.append({"id": 9, "video_id": 3, "question": "what?", "answer": "dog"})
    Path("test_qa.json").write_text(json.dumps(records))
    Path("clips/vid3.avi").write_bytes(b"")
    assert main(published) == 2
    assert "vid3.avi cannot be read: moov atom not found" in capsys.readouterr().err
    assert main([*published, "--on-bad-sample", "skip", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["questions"] == 4 and found["skipped_samples"] == 1 and "vid3.avi" in out.err

"""`voco eval --turns` and `--text-before`: what is asked, a cache against one pass, studies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "sklearn", reason="gridworld draws scikit-learn's digits: pip install 'voco_plugin[quickstart]'"
)

import voco_plugin as vp
from loud_vlm import save_loud_vlm
from studies import journal, planner, prepare, run
from voco_plugin.cli import main
from voco_plugin.data.lazy_images import undecoded
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation.metrics import Question, compress_rows, evaluate, images_of, questions_of
from voco_plugin.evaluation.text_before import content_of, read_text_before
from voco_plugin.gridworld.dataset import write_gridworld
from voco_plugin.inference import answering
from voco_plugin.inference.answering import prompt
from voco_plugin.inference.prompts import ask, render

TEXT = "what is there ? how many are red ?"
DATA = ["--data", "set/test.json", "--image-folder", "set/images"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    write_gridworld(folder / "set", num_train=1, num_test=2)
    save_loud_vlm(folder / "base")
    (folder / "text.txt").write_text(f"{TEXT}\n")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def loaded(here):
    model, processor = vp.load("base", vp.VoCoConfig(num_tokens=2))
    data = undecoded(load_vision_dataset("set/test.json", image_folder="set/images"))
    return model.eval(), processor, data, questions_of(data.remove_columns("images"), turns=True)


def said(role, text, images=0):
    return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


TALK = [
    said("user", "what?", images=1), said("assistant", "a cat"), said("user", "Describe it."),
    said("assistant", "red"), said("user", "where?"), said("assistant", "here"), said("user", "and?"),
]  # fmt: skip


# -- what is asked


def test_a_question_in_turns_comes_after_those_before_it_and_their_answers():
    first, last = questions_of([{"messages": TALK, "types": ["x", "describe", "y"]}], turns=True)
    assert first == Question(0, "what?", "a cat", "x") and first.turn == 1
    before = (("what?", "a cat"), ("Describe it.", "red"))
    assert last == Question(0, "where?", "here", "y", before) and last.turn == 3
    assert [q.turn for q in questions_of([{"messages": TALK}])] == [1, 1, 1], "asked alone"
    assert ask(last.text, 1, before=last.before) == TALK[:5]
    front = ask(last.text, 1, ["<1.0s>"], before=before, text_before="A cat is an animal.")
    parts = [part.get("text", part["type"]) for part in front[0]["content"]]
    assert parts == ["A cat is an animal.", "<1.0s>", "image", "what?"] and front[1:] == TALK[1:5]
    assert ask("where?", 0, text_before="A cat.") == [said("user", "A cat.\nwhere?")]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([*TALK[:2], said("user", "what?", images=1), TALK[1]], "row 1 shows an image in turn 2"),
        ([TALK[0], TALK[0], TALK[1]], "row 1 has two questions in a row"),
        ([TALK[0], TALK[1], TALK[1]], "row 1 has an answer without a question"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, says):
    rows = [{"messages": TALK}, {"messages": messages}]
    questions_of(rows)  # asked alone, as ever
    with pytest.raises(ValueError, match=says):
        questions_of(rows, turns=True)


def test_a_text_is_given_as_it_is_or_as_a_file(here):
    assert read_text_before("text.txt") == read_text_before(f" {TEXT} ") == content_of("text.txt") == TEXT
    assert read_text_before("word " * 2000) == ("word " * 2000).strip()
    assert content_of("gone.txt") == "gone.txt"
    for gone in ("gone.txt", "notes/gone"):
        with pytest.raises(FileNotFoundError, match=f"{gone} is no file"):
            read_text_before(gone)
    with pytest.raises(ValueError, match="has no text"):
        read_text_before(" ")


# -- what is answered


@pytest.mark.parametrize("text", [None, TEXT])
@pytest.mark.parametrize("config", [{}, {"positions": "sequential"}])
def test_a_cache_answers_a_conversation_as_one_pass_does(loaded, config, text):
    _, processor, data, questions = loaded
    model, _ = vp.load("base", vp.VoCoConfig(num_tokens=2, **config))
    model.eval()
    asked = [questions[i] for i in (0, 3, 6, 9)]  # of other turns: padded to one length
    assert len({q.turn for q in asked}) > 1
    caches = compress_rows(model, processor, data, asked)
    given = ([q.text for q in asked], None, None, [q.before for q in asked], text)
    texts, _, _, before, _ = given
    with torch.no_grad():
        images = [images_of(data[q.row]) for q in asked]
        one = model(**prompt(model, processor, texts, images, None, None, before, text)).logits[:, -1]
        held = [caches[q.row] for q in asked]
        two = model(**prompt(model, processor, texts, None, held, None, before, text)).logits[:, -1]
        alone = model(**prompt(model, processor, texts, images)).logits[:, -1]
    assert (one - two).abs().max() <= 1e-4
    assert (one - alone).abs().max() > 1e-2, "what stands before is read"


@pytest.mark.parametrize("mode", ["cache", "images", "blind"])
def test_every_mode_puts_the_turns_and_the_text_into_its_prompt(loaded, mode, monkeypatch):
    model, processor, data, questions = loaded
    seen, real = [], answering.prompt

    def spied(*given):
        made = real(*given)
        seen.extend(
            row[keep] for row, keep in zip(made["input_ids"], made["attention_mask"].bool(), strict=True)
        )
        return made

    monkeypatch.setattr(answering, "prompt", spied)
    found = evaluate(
        model, processor, data, questions[:4], mode=mode, max_new_tokens=2, batch_size=3, text_before=TEXT
    )
    assert len(found.answers) == len(seen) == 4
    places = 0 if mode == "blind" else 1
    vocab = vp.attachment(model).vocab
    special = [vocab.voco_id, *vocab.placeholders]
    for question, ids in zip(questions, seen, strict=False):
        (text,) = render(processor, [ask(question.text, places, before=question.before, text_before=TEXT)])
        plain = processor.tokenizer(text.replace("<image>", ""), add_special_tokens=False)["input_ids"]
        got = [i for i in ids.tolist() if i not in special]
        assert got[-len(plain) :] == plain


def test_a_text_that_would_not_stand_before_the_image_is_refused(loaded):
    model, processor, data, questions = loaded
    with pytest.raises(ValueError, match="holds '<image>', which is read as an image"):
        evaluate(model, processor, data, questions[:1], text_before="an <image> here")
    own = processor.chat_template
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}"
        "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    try:
        with pytest.raises(ValueError, match="writes all images before all text, so no text stands before"):
            evaluate(model, processor, data, questions[:1], text_before=TEXT)
    finally:
        processor.chat_template = own


# -- the command


def test_eval_tells_accuracy_by_turn(loaded, capsys):
    _, _, _, questions = loaded
    modes = [word for mode in ("voco", "single", "base", "blind") for word in ("--mode", mode)]
    words = ["eval", "base", *DATA, *modes, "--max-new-tokens", "1", "--turns", "--text-before", "text.txt"]
    assert main([*words, "--out", "r.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(Path("r.json").read_text())
    assert result["turns"] == [q.turn for q in questions] and result["text_before"] == TEXT
    numbers = sorted(set(result["turns"]))
    assert next(line for line in lines if line.startswith("turn")).split() == ["turn", *map(str, numbers)]
    assert result["scores"]["voco"]["answers"] == result["scores"]["single"]["answers"]
    for entry in result["scores"].values():
        for number in numbers:
            right = [int(c) for c, t in zip(entry["correct"], result["turns"], strict=True) if t == number]
            assert entry["by_turn"][str(number)] == sum(right) / len(right)
    assert main(["eval", "base", *DATA, "--max-new-tokens", "1", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert not {"turns", "text_before"} & set(alone) and "by_turn" not in alone["scores"]["voco"]
    assert main(["eval", "base", *DATA, "--text-before", "gone.txt"]) == 2
    assert "gone.txt is no file" in capsys.readouterr().err


# -- studies


def test_a_study_reads_sets_in_turns_and_keeps_the_keys_of_those_without(tmp_path, monkeypatch):
    folder = prepare(tmp_path, monkeypatch)
    (folder / "front.txt").write_text("some text")
    keys = {r.name: [reading.key for reading in r.readings] for r in planner(folder, curve=[2]).runs({})}
    assert keys["upper-k1-s0"] == ["8359989173254697", "6d8539cc701570d6"], "as before there were turns"

    def readings(**more):
        sets = {"test": {"data": "test.json"}, "talk": {"data": "test.json", **more}}
        return planner(folder, eval_data=sets).runs({})[2].readings

    plain, talk = readings(turns=True)
    assert plain.key == readings()[1].key and talk.key != plain.key
    assert "--turns" in talk.words and not any("text-before" in word for word in talk.words)
    assert talk.words[talk.words.index("--turns") + 1] == "--batch-size"
    assert readings(turns=False)[1].key == plain.key
    front = readings(text_before="front.txt")[1]
    assert "--text-before=front.txt" in front.words
    assert front.key == readings(text_before="some text")[1].key, "a file counts by what it holds"
    (folder / "front.txt").write_text("another text")
    assert readings(text_before="front.txt")[1].key not in (front.key, talk.key, plain.key)
    few = readings(limit=3)[1]
    assert (
        "--limit=3" in few.words and few.key != plain.key and readings(limit=None)[1].key == readings()[1].key
    )
    for wrong, message in (
        ({"turns": "yes"}, "turns='yes' must be true or false"),
        ({"limit": 0}, "limit=0 must"),
    ):
        with pytest.raises(ValueError, match=rf"eval_data\.talk: {message}"):
            readings(**wrong)


def test_a_study_tells_accuracy_by_turn(tmp_path, monkeypatch):
    folder = prepare(tmp_path, monkeypatch)
    sets = {
        "alone": {"data": "test.json"},
        "talk": {"data": "test.json", "turns": True, "text_before": "a b"},
    }
    plan = planner(folder, eval_data=sets, seeds=[0], num_tokens=[1])
    run(folder, plan)
    asked = json.loads((folder / "results" / "questions.json").read_text())
    assert asked["talk"]["turns"] == [1, 2, 3, 4] * 10 and "turns" not in asked["alone"]
    assert journal(folder)
    from voco_plugin.evaluation.study.results import write_results

    found = write_results(folder / "results", "s", plan.study, plan.runs({}), command="c", definition={})
    (voco,) = [one for one in found["by_turn"]["talk"] if one["method"] == "voco"]
    record = json.loads((folder / "results" / "runs" / "voco-k1-s0.json").read_text())
    correct = next(entry["correct"] for entry in record["scores"] if entry["set"] == "talk")
    assert voco["accuracy"] == {turn: correct[turn - 1 :: 4].count("1") / 10 for turn in (1, 2, 3, 4)}
    page = (folder / "results" / "tables.md").read_text()
    assert "By turn: talk" in page and "By turn: alone" not in page
    assert "each asked alone or after the turns of its conversation before it (those of talk)" in page
    assert "with a text before the image in talk" in page

"""The gridworld says what is in its images: answers re-derived another way, splits, balance, determinism."""

import colorsys
import filecmp
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip(
    "sklearn", reason="gridworld draws scikit-learn's digits: pip install 'voco_plugin[quickstart]'"
)

from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.gridworld.dataset import write_gridworld
from voco_plugin.gridworld.questions import Turn, blind_accuracy

TYPES = {"object", "colour", "count", "exists", "relation", "sum"}
STUDY_TYPES = TYPES | {"only", "cell", "count_in"}
HUES = {"red": 0, "orange": 30, "yellow": 51, "green": 128, "blue": 224, "purple": 281}
WORLDS = {"quickstart": {}, "grid3": {"grid": 3}, "study": {"level": "study"}}
WORLDS["large"] = {"level": "large"}
WORLDS["words"] = WORLDS["large"] | {"question_set": "words"}
WORLDS["boxes"] = WORLDS["study"] | {"boxes": True}
WORLDS["words_boxes"] = WORLDS["words"] | {"boxes": True}


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / request.param
    meta = write_gridworld(out, num_train=120, num_test=60, seed=3, **WORLDS[request.param])
    return out, meta


def types_of(out: Path) -> set[str]:
    short = STUDY_TYPES if "level" in WORLDS[out.name] else TYPES
    return short | ({"rec", "reg"} if "boxes" in out.name else set())


def read(out: Path, split: str) -> list[dict]:
    return json.loads((out / f"{split}.json").read_text())


def scenes(out: Path) -> dict:
    return json.loads((out / "scenes.json").read_text())


def turns(row: dict) -> list[tuple[str, str]]:
    talk = row["conversations"]
    assert [t["from"] for t in talk] == ["human", "gpt"] * (len(talk) // 2)
    return [(talk[i]["value"].replace("<image>\n", ""), talk[i + 1]["value"]) for i in range(0, len(talk), 2)]


def words(cell: dict) -> str:
    return f"digit {cell['digit']}" if "digit" in cell else cell["color"] + " " + cell["shape"]


def place(name: str) -> tuple[int, int]:
    """(column, row) of a cell name."""
    return "abcdefghi".index(name[0]), int(name[1:]) - 1


def short_answer(question: str, contents: dict[str, str]) -> str | None:
    """Answers a question of one of the sets with answers of one word; None where it is none."""
    if match := re.fullmatch(r"Colour of (?:the )?(\w+)", question):
        (found,) = [text for text in contents.values() if text.endswith(match[1])]
        return found.split()[0]
    if match := re.fullmatch(r"Object at (\w\d)", question):
        return contents[match[1]].split()[1]
    if match := re.fullmatch(r"Colour at (\w\d)", question):
        assert not contents[match[1]].startswith("digit")
        return contents[match[1]].split()[0]
    if match := re.fullmatch(r"Cell of (?:the )?(.+)", question):
        (found,) = [cell for cell, text in contents.items() if text.split()[1] == match[1]]
        return found
    if match := re.fullmatch(r"Any (.+)", question):
        return "yes" if any(match[1] in text.split() for text in contents.values()) else "no"
    if match := re.fullmatch(r"(?:How many|Count) (\w+)(?: shapes)?(?: in (row|column) (\w))?", question):
        at = {"row": 1, "column": 0}.get(match[2])
        inside = [text for cell, text in contents.items() if at is None or cell[at] == match[3]]
        return str(sum(match[1].removesuffix("s") in text.split() for text in inside))
    if match := re.fullmatch(r"Is (?:the )?(.+) (left of|above) (?:the )?(.+)", question):
        axis = 0 if match[2] == "left of" else 1
        called = {cell: text.split()[1] for cell, text in contents.items()}
        spots = [[place(cell)[axis] for cell, word in called.items() if word == match[k]] for k in (1, 3)]
        assert [len(spot) for spot in spots] == [1, 1] and spots[0] != spots[1], "the question has one answer"
        return "yes" if spots[0] < spots[1] else "no"
    if match := re.fullmatch(r"Sum of (\w\d) and (\w\d)", question):
        return str(sum(int(contents[match[k]].removeprefix("digit ")) for k in (1, 2)))
    return None


def box_answer(question: str, scene: dict) -> str | None:
    """Answers a question about a box; None where it is none."""
    text = {
        cell: "[" + ",".join(f"{int(99 * edge / scene['side'] + 0.5):02d}" for edge in value["box"]) + "]"
        for cell, value in scene["cells"].items()
    }
    if match := re.fullmatch(r"Where is (?:the )?(.+)", question):
        (cell,) = [cell for cell, value in scene["cells"].items() if words(value) == match[1]]
        return text[cell]
    if match := re.fullmatch(r"What is in (\[.+\])", question):
        (cell,) = [cell for cell, said in text.items() if said == match[1]]
        return words(scene["cells"][cell])
    return None


def answer(question: str, scene: dict) -> str:
    """Answers a question from the scene file alone, by parsing its English."""
    cells = scene["cells"]
    if "side" in scene and (boxed := box_answer(question.removesuffix("?"), scene)):
        return boxed
    contents = {cell: words(value) for cell, value in cells.items()}
    if match := re.fullmatch(r"What is at (\w\d)\?", question):
        return contents[match[1]]
    if match := re.fullmatch(r"What colour is the shape at (\w\d)\?", question):
        return contents[match[1]].split()[0]
    if short := short_answer(question.removesuffix("?"), contents):
        return short
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        return str(sum(text.endswith(match[1].removesuffix("s")) for text in contents.values()))
    if match := re.fullmatch(r"How many (\w+) shapes are there\?", question):
        return str(sum(text.startswith(match[1]) for text in contents.values()))
    if match := re.fullmatch(r"Is there a (.+)\?", question):
        return "yes" if match[1] in contents.values() else "no"
    if match := re.fullmatch(r"Which is (further left|higher), the (.+) or the (.+)\?", question):
        axis = 0 if match[1] == "further left" else 1
        where = {text: place(cell)[axis] for cell, text in contents.items() if text in (match[2], match[3])}
        assert len(where) == 2 and len(set(where.values())) == 2, "the question has one answer"
        return min(where, key=where.__getitem__)
    if match := re.fullmatch(r"What is the sum of the digits at (\w\d) and (\w\d)\?", question):
        return str(sum(int(contents[match[k]].removeprefix("digit ")) for k in (1, 2)))
    assert question == "Describe the image."
    in_order = sorted(contents, key=lambda cell: place(cell)[::-1])
    return ", ".join(f"{cell} {contents[cell]}" for cell in in_order)


def test_every_answer_follows_from_the_scene(world):
    out, _ = world
    truth = scenes(out)
    for split in ("train", "test"):
        for row in read(out, split):
            for question, given in turns(row):
                assert given == answer(question, truth[row["id"]]), (row["id"], question)


def test_pixels_show_the_scene(world):
    """The brightest hue of each cell is that of the shape the scene file names; digits are grey."""
    out, meta = world
    pixels = meta["settings"]["cell_pixels"]
    for row in load_vision_dataset(out / "test.json"):
        image = np.asarray(row["images"][0].convert("RGB")).astype(int)
        for name, cell in scenes(out)[row["id"]]["cells"].items():
            column, line = place(name)
            patch = image[line * pixels : (line + 1) * pixels, column * pixels : (column + 1) * pixels]
            if "digit" in cell:
                assert np.ptp(patch.reshape(-1, 3), axis=1).max() <= 2
                continue
            dots = patch.reshape(-1, 3)
            red, green, blue = dots[np.ptp(dots, axis=1).argmax()] / 255
            degrees = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
            seen = min(HUES, key=lambda name: abs((degrees - HUES[name] + 180) % 360 - 180))
            assert seen == cell["color"]


def test_types_label_each_turn_and_each_type_occurs(world):
    out, _ = world
    for split in ("train", "test"):
        counts = Counter()
        for row in read(out, split):
            assert len(row["types"]) == len(turns(row))
            assert len({question for question, _ in turns(row)}) == len(turns(row)), "no question twice"
            counts.update(row["types"])
        types = types_of(out)
        assert set(counts) == (types | {"describe"} if split == "train" else types)
    assert all(
        row["types"][-1] == "describe" and "describe" not in row["types"][:-1] for row in read(out, "train")
    )


def test_splits_share_no_digit_and_no_combination(world):
    out, _ = world
    samples, combinations = {"train": set(), "test": set()}, {"train": set(), "test": set()}
    for row_id, scene in scenes(out).items():
        split = row_id.split("-")[0]
        samples[split] |= {cell["sample"] for cell in scene["cells"].values() if "sample" in cell}
        combinations[split].add(tuple(words(cell) for cell in scene["cells"].values()))
    assert samples["train"] and samples["test"]
    assert not samples["train"] & samples["test"]
    assert not combinations["train"] & combinations["test"]


def test_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        write_gridworld(tmp_path / name, num_train=6, num_test=4, seed=seed)
    files = sorted(str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(
        str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*") if p.is_file()
    )
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", files, shallow=False)[0] == files
    assert read(tmp_path / "one", "train") != read(tmp_path / "three", "train")


def test_an_image_does_not_depend_on_how_many_are_written(tmp_path):
    write_gridworld(tmp_path / "few", num_train=3, num_test=2)
    write_gridworld(tmp_path / "many", num_train=9, num_test=5)
    assert read(tmp_path / "many", "train")[:3] == read(tmp_path / "few", "train")
    name = "images/train/000002.png"
    assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_answers_are_balanced_so_that_a_blind_guesser_is_weak(tmp_path):
    meta = write_gridworld(tmp_path, num_train=600, num_test=200)
    yes = Counter(a for row in read(tmp_path, "train") for q, a in turns(row) if q.startswith("Is there"))
    assert 0.42 < yes["yes"] / (yes["yes"] + yes["no"]) < 0.58
    first = [
        f"the {a} or" in q for row in read(tmp_path, "train") for q, a in turns(row) if q.startswith("Which")
    ]
    assert 0.42 < np.mean(first) < 0.58
    blind = meta["blind_accuracy"]
    assert blind["all"] < 0.40
    assert (
        blind["object"] < 0.15 and blind["sum"] < 0.25 and blind["exists"] < 0.65 and blind["relation"] < 0.65
    )


def test_blind_accuracy_takes_the_commonest_answer_to_the_same_question():
    train = [Turn("count", "How many?", a) for a in "0110"] + [Turn("count", "And now?", a) for a in "2223"]
    test = [Turn("count", "How many?", "0"), Turn("count", "And now?", "2"), Turn("count", "Unseen?", "2")]
    assert blind_accuracy(train, test) == {"all": 1.0, "count": 1.0}
    assert blind_accuracy(train, [Turn("count", "How many?", "1")])["all"] == 0.0


def test_both_formats_hold_the_same_conversations(world):
    out, _ = world
    for split in ("train", "test"):
        llava = load_vision_dataset(out / f"{split}.json", image_folder=out / "images")
        saved = load_vision_dataset(out / "hf", split=split)
        assert len(llava) == len(saved) and llava.features == saved.features
        for left, right in zip(llava, saved, strict=True):
            assert left["images"][0].tobytes() == right["images"][0].tobytes()
            assert {k: v for k, v in left.items() if k != "images"} == {
                k: v for k, v in right.items() if k != "images"
            }


@pytest.mark.parametrize(
    "settings, message",
    [({"grid": 1}, "grid=1"), ({"num_colors": 9}, "num_colors=9"), ({"num_train": 0}, "num_train=0")],
)
def test_settings_out_of_range_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_gridworld(tmp_path / "out", **{"num_train": 2, "num_test": 2, **settings})


def test_more_questions_than_a_scene_allows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="ask fewer"):
        write_gridworld(tmp_path / "out", num_train=2, num_test=2, num_questions=64)


def test_only_an_earlier_gridworld_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no gridworld"):
        write_gridworld(tmp_path / "mine", num_train=2, num_test=2, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    write_gridworld(tmp_path / "set", num_train=3, num_test=2)
    with pytest.raises(ValueError, match="overwrite=True"):
        write_gridworld(tmp_path / "set", num_train=2, num_test=2)
    write_gridworld(tmp_path / "set", num_train=2, num_test=2, overwrite=True)
    assert (
        len(read(tmp_path / "set", "train"))
        == len(list((tmp_path / "set" / "images" / "train").iterdir()))
        == 2
    )


def test_missing_scikit_learn_names_the_extra(monkeypatch, tmp_path):
    from voco_plugin.gridworld import scenes as gridworld_scenes

    gridworld_scenes.digit_images.cache_clear()
    gridworld_scenes.digit_samples.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"voco_plugin\[quickstart\]"):
        write_gridworld(tmp_path / "out", num_train=1, num_test=1)


def test_the_tiny_vlm_is_an_ordinary_checkpoint_that_reads_gridworld(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from voco_plugin.cli import main

    command = ["gridworld", str(tmp_path / "world"), "--num-train", "2", "--num-test", "2"]
    untrained = ["--tower-steps", "0", "--align-steps", "0"]
    assert main([*command, "--model", str(tmp_path / "vlm"), *untrained]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    row = load_vision_dataset(tmp_path / "world" / "train.json")[0]
    content = [{"type": "image", "image": row["images"][0]}, row["messages"][0]["content"][1]]
    messages = [{"role": "user", "content": content}, *row["messages"][1:]]
    batch = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    answers = batch["input_ids"][0][torch.as_tensor(batch.pop("assistant_masks"))[0] == 1]
    given = [m["content"][0]["text"] for m in row["messages"] if m["role"] == "assistant"]
    assert processor.tokenizer.decode(answers).split("</s>")[:-1] == [" " + text for text in given]
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    assert (batch["input_ids"] != processor.tokenizer.unk_token_id).all()
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_questions_of_the_short_sets_take_one_word_for_an_answer_and_ask_the_same(tmp_path):
    from voco_plugin.gridworld.tiny_processor import build_tokenizer

    rows = {}
    for name in ("words", "terse"):
        write_gridworld(tmp_path / name, num_train=20, num_test=5, level="large", question_set=name)
        rows[name] = read(tmp_path / name, "train")
        tokenizer = build_tokenizer(name)
        for question, given in (turn for row in rows[name] for turn in turns(row)[:-1]):
            assert len(tokenizer(" " + given)["input_ids"]) == 1
            words = re.findall(r"[^ ?]+|[?]", question)
            assert len(tokenizer(" " + question)["input_ids"]) == len(words), "every word is one token"
    for left, right in zip(rows["words"], rows["terse"], strict=True):
        assert left["types"] == right["types"]
        assert [given for _, given in turns(left)] == [given for _, given in turns(right)]


@pytest.mark.parametrize("level", ["study", "large"])
def test_the_study_worlds_are_balanced_so_that_a_blind_guesser_is_weak(tmp_path, level):
    blind = write_gridworld(tmp_path, num_train=600, num_test=200, level=level)["blind_accuracy"]
    assert blind["all"] < 0.42
    assert all(blind[kind] < 0.3 for kind in ("only", "object", "colour", "cell", "sum"))
    assert all(blind[kind] < 0.6 for kind in ("exists", "relation", "count", "count_in"))
    given = Counter((q.split()[0], a) for row in read(tmp_path, "train") for q, a in turns(row))
    for word in ("Any", "Is"):
        assert 0.42 < given[word, "yes"] / (given[word, "yes"] + given[word, "no"]) < 0.58


def test_a_level_names_settings_and_each_can_be_overridden(tmp_path):
    meta = write_gridworld(tmp_path / "a", num_train=2, num_test=2, level="large", grid=4, caption=False)
    assert meta["settings"] | {"seed": 0} == {
        "num_train": 2, "num_test": 2, "seed": 0, "grid": 4, "num_colors": 6, "num_questions": 12,
        "cell_pixels": 16, "question_set": "terse", "caption": False, "boxes": False,
    }  # fmt: skip
    assert "describe" not in {kind for row in read(tmp_path / "a", "train") for kind in row["types"]}
    with pytest.raises(ValueError, match=r"level='studi' is not known \(did you mean 'study'\?\)"):
        write_gridworld(tmp_path / "b", level="studi")
    with pytest.raises(ValueError, match="question_set='word' is not known"):
        write_gridworld(tmp_path / "b", question_set="word")


def test_every_word_of_the_world_is_one_token():
    from voco_plugin.gridworld.tiny_processor import build_tokenizer

    tokenizer = build_tokenizer()
    text = " USER: ASSISTANT: purple triangle digit 7 18 a1 c3 yes no further left higher Describe colour"
    assert len(tokenizer(text)["input_ids"]) == len(text.split())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tower_learns_what_and_where():
    from voco_plugin.gridworld.tiny_tower import pretrain_tower
    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm

    model, processor = build_tiny_vlm(
        image_size=24, patch_size=12, vision_width=64, vision_layers=2, text_layers=1
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    figures = pretrain_tower(model, processor, cell_pixels=12, num_images=1500, steps=120)
    assert figures["position_accuracy"] > 0.9
    assert figures["cell_accuracy"] > 0.25, "well above one class in 22"
    moved = {
        name.split(".")[1] for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == {"vision_tower"} and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_alignment_brings_the_projector_nearer_to_the_words():
    from voco_plugin.gridworld.tiny_align import align_projector
    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm

    errors = []
    for steps in (1, 60):
        model, processor = build_tiny_vlm(image_size=24, patch_size=12, text_layers=1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = align_projector(model, processor, cell_pixels=12, num_images=300, steps=steps)
        errors.append(found["alignment_error"])
        moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        assert moved and all("projector" in name for name in moved), "tower and LLM stay as they are"
    assert errors[1] < 0.7 * errors[0]

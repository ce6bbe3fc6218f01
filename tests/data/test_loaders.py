"""Every source gives TRL's vision format, images where their placeholders stand; bad records are named."""

import json

import pytest
from PIL import Image

from voco_plugin.data.llava_format import split_placeholders, vision_features
from voco_plugin.data.loaders import load_vision_dataset


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "text": None}


def picture(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


def record(question="<image>\nWhat?", answer="this", **fields):
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }


def write(path, records):
    body = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(body)
    return path


@pytest.mark.parametrize(
    "value, parts",
    [
        ("plain", [text("plain")]),
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("Is <image> like <image>?", [text("Is "), IMAGE, text(" like "), IMAGE, text("?")]),
        ("<image>\n<image>\nBoth?", [IMAGE, IMAGE, text("Both?")]),
        ("<image>\n\nTwo lines", [IMAGE, text("\nTwo lines")]),
        ("", [text("")]),
    ],
)
def test_placeholders_become_parts_in_order(value, parts):
    assert split_placeholders(value) == parts


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_files_with_one_several_and_no_images_load(tmp_path, suffix):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, shade=ord(name[0]))
    source = write(
        tmp_path / f"set{suffix}",
        [
            record(id="one", image="a.png"),
            record("Which of <image> and <image>?", id="two", image=["b.png", "a.png"]),
            record("Hello", id="none"),
        ],
    )
    rows = load_vision_dataset(source)
    assert rows["id"] == ["one", "two", "none"]
    assert rows[0]["messages"] == [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("this")]},
    ]
    assert [image.getpixel((0, 0))[0] for image in rows[1]["images"]] == [ord("b"), ord("a")]
    assert rows[2]["images"] == [] and rows[2]["messages"][0]["content"] == [text("Hello")]


def test_images_are_found_beside_the_file_in_images_or_in_the_given_folder(tmp_path):
    picture(tmp_path / "beside" / "x.png")
    picture(tmp_path / "under" / "images" / "x.png")
    picture(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "far").mkdir()
    for folder, given in (("beside", None), ("under", None), ("far", tmp_path / "elsewhere")):
        source = write(tmp_path / folder / "set.json", [record(image="x.png")])
        assert load_vision_dataset(source, image_folder=given)[0]["images"][0].size == (4, 4)


def test_images_are_decoded_only_when_a_row_is_read(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    rows = load_vision_dataset(
        write(tmp_path / "set.json", [record(image="good.png"), record(image="bad.png")])
    )
    assert rows[0]["images"][0].size == (4, 4)
    with pytest.raises(OSError):
        rows[1]


@pytest.mark.parametrize(
    "bad, message",
    [
        (record(id="s7", image="gone.png"), r"'s7'.*'gone\.png'.*image_folder"),
        (record(image="gone.png"), r"index 1.*gone\.png"),
        ({"id": "s7", "image": "a.png"}, r"'s7'.*conversations"),
        ("a string", r"index 1.*conversations"),
        (record("no placeholder", id="s7", image="a.png"), r"'s7'.*1 image\(s\) and 0 <image>"),
        (record("<image><image>", id="s7", image="a.png"), r"'s7'.*1 image\(s\) and 2 <image>"),
        (record(id="s7"), r"'s7'.*0 image\(s\) and 1 <image>"),
        (record(id="s7", image=3), r"'s7'.*\"image\" is 3"),
        ({"id": "s7", "conversations": [{"from": "robot", "value": "x"}]}, r"'s7'.*turn 0.*'robot'"),
        ({"id": "s7", "conversations": [{"from": "human"}]}, r"'s7'.*turn 0.*\"value\" is None"),
    ],
)
def test_a_malformed_record_is_named_with_the_fix(tmp_path, bad, message):
    picture(tmp_path / "a.png")
    source = write(tmp_path / "set.json", [record(id="fine", image="a.png"), bad])
    with pytest.raises(ValueError, match=message):
        load_vision_dataset(source)


@pytest.mark.parametrize(
    "name, body, message",
    [
        ("set.json", '{"id": 1}\n{"id": 2}', "not valid JSON.*jsonl"),
        ("set.json", '{"id": 1}', "a list of records"),
        ("set.json", "[]", "no records"),
        ("set.jsonl", '{"id": 1}\n{oops', "line 2"),
        ("set.txt", "x", "cannot read '.txt'"),
    ],
)
def test_a_file_in_no_known_format_says_so(tmp_path, name, body, message):
    (tmp_path / name).write_text(body)
    with pytest.raises(ValueError, match=message):
        load_vision_dataset(tmp_path / name)


def test_a_path_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_vision_dataset(tmp_path / "nowhere.json")


def test_a_folder_of_llava_files_asks_for_one_of_them(tmp_path):
    write(tmp_path / "train.json", [record("Hello")])
    with pytest.raises(ValueError, match="name one of these files"):
        load_vision_dataset(tmp_path)


def saved(tmp_path, splits=("train", "test")):
    from datasets import Dataset, DatasetDict

    picture(tmp_path / "a.png")
    row = {
        "messages": [{"role": "user", "content": [IMAGE, text("What?")]}],
        "images": [str(tmp_path / "a.png")],
    }
    data = Dataset.from_list([row, {**row, "images": []}], features=vision_features())
    DatasetDict({split: data for split in splits}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_folder_loads_by_split(tmp_path):
    folder = saved(tmp_path)
    assert load_vision_dataset(folder)[0]["images"][0].size == (4, 4)
    assert len(load_vision_dataset(folder, split="test")) == 2
    with pytest.raises(ValueError, match="no split 'val'.*train, test"):
        load_vision_dataset(folder, split="val")


def test_without_a_split_the_only_one_is_taken_and_others_are_asked_for(tmp_path):
    assert len(load_vision_dataset(saved(tmp_path / "x", splits=("val",)))) == 2
    with pytest.raises(ValueError, match="one of a, b"):
        load_vision_dataset(saved(tmp_path / "y", splits=("a", "b")))


def test_parquet_loads_as_a_file_and_as_a_folder(tmp_path):
    rows = load_vision_dataset(saved(tmp_path))
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    for source in (tmp_path / "parquet" / "train.parquet", tmp_path / "parquet"):
        again = load_vision_dataset(source)
        assert again[0]["messages"] == rows[0]["messages"]
        assert again[0]["images"][0].size == (4, 4) and again[1]["images"] == []


def test_text_content_becomes_parts_with_images_where_they_stand_or_first(tmp_path):
    from datasets import Dataset, Features, Image, List, Value

    picture(tmp_path / "a.png")
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    )
    talks = ["Look: <image>\nWhat?", "What?", "Hello"]
    images = [[str(tmp_path / "a.png")], [str(tmp_path / "a.png")], []]
    rows = [
        {"messages": [{"role": "user", "content": t}], "images": i}
        for t, i in zip(talks, images, strict=True)
    ]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    contents = [row["messages"][0]["content"] for row in load_vision_dataset(tmp_path / "saved")]
    assert contents == [[text("Look: "), IMAGE, text("What?")], [IMAGE, text("What?")], [text("Hello")]]
    assert load_vision_dataset(tmp_path / "saved")[0]["images"][0].size == (4, 4)


def test_a_dataset_in_neither_format_names_its_columns(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"question": ["What?"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="columns question.*messages"):
        load_vision_dataset(tmp_path / "saved")


def test_a_setting_that_is_ignored_warns(tmp_path):
    source = write(tmp_path / "set.json", [record("Hello")])
    with pytest.warns(UserWarning, match="split='train' is ignored"):
        load_vision_dataset(source, split="train")
    with pytest.warns(UserWarning, match="image_folder is ignored"):
        load_vision_dataset(saved(tmp_path), image_folder=tmp_path)

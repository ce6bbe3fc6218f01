"""Drawings out of iconify packages: which icon a name gets, how it is painted, what its record says."""

from __future__ import annotations

import json
import sys

import pytest

from drawing_packages import drawing, icon, write_icons, write_package
from voco_plugin.cli import main
from voco_plugin.gridworld.pictures.drawings import open_vendor
from voco_plugin.gridworld.pictures.icon_collections import read_collection
from voco_plugin.gridworld.pictures.picture_dataset import open_sources, write_pictures
from voco_plugin.gridworld.pictures.vocabulary import NAMES

BY_TEXT = {name.text: name for name in NAMES}


def colors(folder) -> dict[str, str]:
    """Text of each drawn name → the colour of its bar."""
    svgs, _ = read_collection(folder)
    return {text: svgs[name.code].split('fill="')[1].split('"')[0]
            for text, name in BY_TEXT.items() if name.code in svgs}  # fmt: skip


def test_a_name_gets_the_icon_of_its_character(tmp_path) -> None:
    icons = {
        "dog-face": icon("red"), "dog": icon("blue"),  # U+1F436 is the face
        "cat": icon("lime"),  # a collection without the face
        "redapple": icon("gold"),  # no hyphens
        "glowing": icon("pink"), "light-bulb": icon("gray"),  # chars.json comes first
        "doughnut-2": icon("navy"), "doughnut-1": icon("teal"),
        "chipmunk": icon("tan"), "nothing-known": icon("black"),
    }  # fmt: skip
    folder = write_icons(tmp_path / "x", icons, chars={"1f4a1": "glowing", "1f43f": "chipmunk"})
    assert colors(folder) == {
        "dog": "red", "cat": "lime", "apple": "gold", "light bulb": "pink", "doughnut": "teal",
        "chipmunk": "tan",
    }  # fmt: skip


def test_aliases_are_followed_and_turned_ones_are_not(tmp_path) -> None:
    icons = {"bear-face": icon("red")}
    aliases = {
        "bear": {"parent": "grizzly"}, "grizzly": {"parent": "bear-face"},
        "lion": {"parent": "bear-face", "hFlip": True},
        "wolf": {"parent": "fox"}, "fox": {"parent": "wolf"}, "zebra": {"parent": "gone"},
    }  # fmt: skip
    assert colors(write_icons(tmp_path / "x", icons, aliases=aliases)) == {"bear": "red"}
    del icons["bear-face"]
    icons["grizzly-bear"] = icon("blue")
    assert colors(write_icons(tmp_path / "y", icons, aliases={"bear": {"parent": "grizzly-bear"}})) == {
        "bear": "blue"
    }


@pytest.mark.parametrize(
    ("prefix", "key", "text"),
    [("streamline-emojis", "turkey", "turkey"), ("noto-v1", "cricket", "grasshopper"),
     ("emojione", "cricket", "grasshopper"), ("fxemoji", "keyboard", "keyboard")],
)  # fmt: skip
def test_an_icon_that_shows_another_thing_is_not_taken(tmp_path, prefix: str, key: str, text: str) -> None:
    """A flag, a bat and a piano under the name of a bird, an insect and a computer's keyboard."""
    assert text in colors(write_icons(tmp_path / "x", {key: icon("red")}))
    assert text not in colors(write_icons(tmp_path / "y", {key: icon("red")}, prefix=prefix))


def test_icons_are_painted_by_their_own_box(tmp_path) -> None:
    pytest.importorskip("resvg_py", reason="SVG drawings need resvg-py")
    icons = {"red-apple": icon("#f00"), "banana": icon("#f00", left=-4, width=48, height=48)}
    vendor = open_vendor(f"fake={write_icons(tmp_path / 'x', icons)}")
    apple = vendor.draw(BY_TEXT["apple"])
    # 144 pixels for 32 units: a bar of 24 x 8 in the middle of its square
    assert apple.size == (108, 108) and apple.getbbox() == (0, 36, 108, 72)
    assert apple.getpixel((54, 54)) == (255, 0, 0, 255)
    assert vendor.draw(BY_TEXT["banana"]).size == (72, 72), "144 pixels for 48 units"
    with pytest.raises(ValueError, match="has no drawing of dog"):
        vendor.draw(BY_TEXT["dog"])


def test_its_record_has_author_and_licence(tmp_path) -> None:
    pytest.importorskip("resvg_py", reason="SVG drawings need resvg-py")
    vendor = open_vendor(f"fake={write_icons(tmp_path / 'x', {'banana': icon('red')})}")
    said = "Fake Emoji, A. Drawer https://example.org/drawer, CC BY 4.0"
    assert vendor.record() == {
        "package": "@iconify-json/fake",
        "version": "1.2.0",
        "artwork": said,
        "names": 1,
    }
    bare = open_vendor(f"fake={write_icons(tmp_path / 'y', {'banana': icon('red')}, info=None)}")
    assert bare.licence == "see the package (CC-BY-4.0)"


def test_a_name_that_one_vendor_lacks_is_drawn_by_the_others(tmp_path) -> None:
    """Two names of the icons among many of the PNG package: both in the set, each by who draws it."""
    pytest.importorskip("resvg_py", reason="SVG drawings need resvg-py")
    icons = write_icons(tmp_path / "icons", {"banana": icon("red"), "red-apple": icon("red")})
    whole, unseen = (write_package(tmp_path / label, label) for label in ("whole", "unseen"))
    sources = open_sources([f"icons={icons}", f"whole={whole}"], f"unseen={unseen}")
    write_pictures(tmp_path / "set", sources, num_train=80, num_test=10)
    drawn: dict[str, set[str]] = {}
    for key, scene in json.loads((tmp_path / "set" / "scenes.json").read_text()).items():
        for thing in scene["places"].values():
            if not key.startswith("test_drawings"):
                drawn.setdefault(thing["name"], set()).add(thing["vendor"])
    assert drawn["banana"] == drawn["apple"] == {"icons", "whole"}
    assert len(drawn) > 30 and all(v == {"whole"} for k, v in drawn.items() if k not in ("banana", "apple"))
    text = (tmp_path / "set" / "ATTRIBUTION.md").read_text()
    assert "A. Drawer https://example.org/drawer, CC BY 4.0" in text


def test_an_unseen_vendor_that_lacks_names_shows_those_it_has(tmp_path) -> None:
    whole = write_package(tmp_path / "whole", "whole")
    few = ["apple", "banana", "cookie", "guitar"]
    unseen = write_package(tmp_path / "few", "few", few)
    sources = open_sources([f"whole={whole}"], f"few={unseen}")
    assert {name.text for name in sources.of_split("test_drawings")[0]} <= set(few)
    assert len(sources.known()) > 30
    out = tmp_path / "set"
    write_pictures(out, sources, num_train=5, num_test=10)
    shown = {thing["name"] for key, scene in json.loads((out / "scenes.json").read_text()).items()
             for thing in scene["places"].values() if key.startswith("test_drawings")}  # fmt: skip
    assert shown and shown <= set(few)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "icons.json holds no JSON object"),
        ("[]", "icons.json holds no JSON object"),
        ('{"prefix": "x"}', 'is no collection of icons: it has no "icons"'),
        ('{"icons": {"arrow": {"body": "<g/>"}}}', "has icons, none of a thing that is named here"),
        ('{"icons": {"banana": {}}}', "banana has no body"),
    ],
)
def test_what_is_no_collection_is_one_line(content: str, message: str, tmp_path, capsys) -> None:
    folder = write_icons(tmp_path / "x", {})
    (folder / "icons.json").write_text(content)
    whole = write_package(tmp_path / "whole", "whole")
    given = ["pictures", str(tmp_path / "out"), "--draw", f"x={folder}", "--unseen", f"whole={whole}"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_icon_that_cannot_be_painted_is_named(tmp_path) -> None:
    pytest.importorskip("resvg_py", reason="SVG drawings need resvg-py")
    folder = write_icons(tmp_path / "x", {"banana": {"body": "<path"}})
    with pytest.raises(ValueError, match="banana is no SVG that can be painted"):
        open_vendor(f"x={folder}").draw(BY_TEXT["banana"])


def test_icons_without_their_reader_say_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="pip install resvg-py"):
        open_vendor(f"x={write_icons(tmp_path / 'x', {'banana': icon('red')})}")


def test_a_packages_own_drawing_goes_before_the_icon(tmp_path) -> None:
    """A folder that holds PNG files and icons: the files are what the older readers took."""
    pytest.importorskip("resvg_py", reason="SVG drawings need resvg-py")
    folder = write_icons(tmp_path / "x", {"banana": icon("red")})
    images = folder / "img" / "x" / "64"
    images.mkdir(parents=True)
    drawing("banana", "one").save(images / "1f34c.png")
    assert open_vendor(f"x={folder}").draw(BY_TEXT["banana"]).width < 64

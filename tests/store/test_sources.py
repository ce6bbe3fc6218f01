"""Sources of images: every kind gives the same pictures under stable names, opening none before its turn."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import pickle
import re
import tarfile
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, List
from PIL import Image as PILImage

from voco_plugin.cli.inputs import find_images
from voco_plugin.data.images import BadImageError, open_image
from voco_plugin.data.lazy_images import undecoded
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.store.sources.image_items import ImageItem
from voco_plugin.store.sources.image_sources import expand, image_source
from voco_plugin.store.sources.tar_images import TarImages

COUNT = 5


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (9, 11, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    out = io.BytesIO()
    PILImage.fromarray(pixels(number)).save(out, "png")
    return out.getvalue()


def write_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for number in range(COUNT):
            for suffix, data in (("png", png(number)), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same five pictures in every form."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "photos" / "more").mkdir(parents=True)
    for number in range(COUNT):
        (folder / "photos" / ("more" if number > 2 else "") / f"{number}.png").write_bytes(png(number))
    (folder / "photos" / ".hidden.png").write_bytes(b"no image")
    (folder / "photos" / ".thumbnails").mkdir()
    (folder / "photos" / ".thumbnails" / "0.png").write_bytes(png(9))
    (folder / "photos" / "notes.txt").write_text("no image")
    write_tar(folder / "a.tar")
    write_tar(folder / "a.tar.gz", "w:gz")
    records = [{"bytes": png(number), "path": None} for number in range(COUNT)]
    single = Dataset.from_dict({"image": records, "n": list(range(COUNT))}).cast_column("image", Image())
    single.save_to_disk(str(folder / "single"))
    DatasetDict({"train": single, "test": single.select([4])}).save_to_disk(str(folder / "splits"))
    single.to_parquet(str(folder / "table.parquet"))
    rows = [records[:2], [], None, [records[2], None, records[3]], records[4:]]
    Dataset.from_dict({"images": rows}).cast_column("images", List(Image())).save_to_disk(
        str(folder / "lists")
    )
    names = [f"{'more/' if number > 2 else ''}{number}.png" for number in range(COUNT)]
    talk = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    llava = [{"id": n, "image": n, "conversations": talk} for n in names + names[:2]]
    (folder / "llava.json").write_text(json.dumps([*llava, {"id": "text", "conversations": talk[1:]}]))
    (folder / "lines.jsonl").write_text("\n".join(json.dumps({"file": f"photos/{n}"}) for n in names))
    return folder


CASES = {
    "folder": ("photos", {}, True),
    "glob": ("photos/**/[0-9].png", {}, True),
    "tar": ("a.tar", {}, True),
    "tar pattern": ("[a-b].tar", {}, True),
    "tar.gz": ("a.tar.gz", {}, False),
    "saved dataset": ("single", {}, True),
    "saved lists": ("lists", {}, True),
    "split": ("splits", {"split": "train"}, True),
    "parquet": ("table.parquet", {}, True),
    "parquet stream": ("table.parquet", {"streaming": True}, False),
    "saved stream": ("lists", {"streaming": True}, False),
    "llava": ("llava.json", {"image_folder": "photos"}, True),
    "jsonl": ("lines.jsonl", {"image_column": "file"}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_every_source_gives_the_same_pictures_under_names_of_their_own(case, place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    name, options, random_access = CASES[case]
    source = image_source(name, **options)
    assert source.random_access is random_access
    items = list(source)
    assert len({item.name for item in items}) == len(items) == COUNT
    shown = sorted(items, key=lambda item: Path(item.name).name) if case == "glob" else items
    for number, item in enumerate(shown):
        assert (np.asarray(item.open()) == pixels(number)).all()
    again = [item.name for item in image_source(name, **options)]
    assert again == [item.name for item in items]
    if random_access:
        assert len(source) == COUNT and source[3].name == items[3].name
        assert all(item.stamp is not None for item in items)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_shares_hold_every_image_exactly_once(case, world, place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    name, options, random_access = CASES[case]
    source = image_source(name, **options)
    shares = [[item.name for item in source.share(rank, world)] for rank in range(world)]
    assert sorted(sum(shares, [])) == sorted(item.name for item in source)
    lengths = [source.share_length(rank, world) for rank in range(world)]
    assert lengths == ([len(share) for share in shares] if random_access else [None] * world)


@pytest.mark.parametrize("case", CASES)
def test_finding_the_images_decodes_none_and_unpacks_nothing(case, place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(PILImage, "open", refuse)
    name, options, _ = CASES[case]
    assert len(list(image_source(name, **options))) == COUNT
    assert sorted(place.rglob("*")) == before


def test_rows_of_a_selected_and_shuffled_dataset_keep_their_order(place) -> None:
    rows = [[{"bytes": png(0), "path": None}], [], [{"bytes": png(n), "path": None} for n in (1, 2)]]
    data = Dataset.from_dict({"images": rows}).cast_column("images", List(Image())).select([2, 1, 0])
    found = [np.asarray(item.open()) for item in image_source(data)]
    assert [(a == pixels(n)).all() for a, n in zip(found, (1, 2, 0), strict=True)] == [True] * 3


def test_a_table_whose_images_are_bytes_reads_none_of_them_to_name_them(place, monkeypatch) -> None:
    source = image_source(place / "single")
    monkeypatch.setattr(type(source), "_value", lambda *_: pytest.fail("a row was read"))
    assert [item.name.rsplit("/", 1)[1] for item in source] == list("01234")


def test_a_column_of_paths_starts_beside_its_table(place) -> None:
    table = place / "paths.csv"
    table.write_text("image\nphotos/0.png\nphotos/1.png\n")
    assert [(np.asarray(i.open()) == pixels(n)).all() for n, i in enumerate(image_source(table))] == [
        True
    ] * 2


def test_sources_are_joined_in_order(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    joined = image_source(["photos/0.png", "a.tar", "photos/1.png", "photos/0.png"])
    assert [i.name for i in joined] == ["photos/0.png", *(f"a.tar/{n:03d}.png" for n in range(5)),
                                        "photos/1.png", "photos/0.png"]  # fmt: skip
    assert [joined[i].name for i in range(len(joined))] == [i.name for i in joined]
    with pytest.raises(IndexError):
        joined[len(joined)]
    files = image_source(["photos/0.png", "photos", "photos/0.png"])
    assert len(files) == COUNT  # files that come twice are one image
    assert not image_source(["a.tar.gz", "a.tar"]).random_access


def test_sources_with_random_access_travel_to_other_processes(place) -> None:
    for name in ("photos", "a.tar", "lists"):
        source = pickle.loads(pickle.dumps(image_source(place / name)))
        assert (np.asarray(source[4].open()) == pixels(4)).all()


def test_a_tar_of_an_object_store_is_read_in_order(place) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/shards/b.tar", (place / "a.tar").read_bytes())
    items = list(image_source("memory://shards/b.tar"))
    assert [item.name for item in items] == [f"memory://shards/b.tar/{n:03d}.png" for n in range(COUNT)]
    assert all((np.asarray(item.open()) == pixels(n)).all() for n, item in enumerate(items))


def test_stamps_change_with_the_file(place, tmp_path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(0))
    first = image_source(path)[0].stamp
    path.write_bytes(png(1))
    os.utime(path, ns=(1, 1))
    assert first is not None and image_source(path)[0].stamp not in (None, first)
    tar = write_tar(tmp_path / "x.tar")
    before = TarImages(str(tar))[0].stamp
    os.utime(tar, ns=(1, 1))
    assert TarImages(str(tar))[0].stamp != before


def test_patterns() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expand("s3://b/{0..1}*.tar") == ["s3://b/0*.tar", "s3://b/1*.tar"]
    with pytest.raises(ValueError, match="stands for"):
        expand("{0..99999999999}")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("damage", ["header", "cut in a header", "cut in an image", "no tar", "empty"])
def test_a_damaged_tar_is_an_error_and_never_a_shorter_source(suffix, damage, tmp_path) -> None:
    whole = write_tar(tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        header = [member.offset for member in tar][4]
    spoiled = {
        "header": whole[: header + 5] + b"?" + whole[header + 6 :],
        "cut in a header": whole[: header + 100],
        "cut in an image": whole[: header + 600],
        "no tar": b"no tar at all" * 100,
        "empty": b"",
    }[damage]
    path = tmp_path / f"bad.{suffix}"  # the stream reads an uncompressed one just as well
    path.write_bytes(spoiled)
    with pytest.raises(ValueError, match=r"bad\.tar.* (is no tar file|holds no image)"):
        list(image_source(path))


def test_an_image_that_cannot_be_read_is_named_when_it_is_opened(place, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"a\.png.* no image that Pillow knows"):
        image_source(tmp_path / "a.png")[0].open()
    with pytest.raises(BadImageError, match=r"gone\.png.* does not exist"):
        image_source(tmp_path / "gone.png", missing=True)[0].open()
    data = Dataset.from_dict({"image": [{"bytes": b"", "path": None}]}).cast_column("image", Image())
    with pytest.raises(BadImageError, match=r"^dataset/0: image .* is empty"):
        image_source(data)[0].open()
    tar = write_tar(tmp_path / "x.tar")
    item = TarImages(str(tar))[4]
    os.truncate(tar, 1024)
    with pytest.raises(BadImageError, match=r"x\.tar/004\.png: .*too early"):
        item.open()
    with pytest.raises(BadImageError, match="^odd: "):
        ImageItem("odd", lambda: 3).open()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p / "gone.png", FileNotFoundError, "gone.png does not exist"),
        (lambda p: p / "gone.json", FileNotFoundError, "gone.json does not exist"),
        (lambda p: p / "gone.tar", FileNotFoundError, "gone.tar does not exist"),
        (lambda p: p / "gone.tgz", FileNotFoundError, "gone.tgz does not exist"),
        (lambda p: p / "gone.parquet", FileNotFoundError, "gone.parquet does not exist"),
        (lambda p: p / "*.nothing", FileNotFoundError, "nothing matches"),
        (lambda p: p / "a" / "b" / "c", FileNotFoundError, "does not exist"),
        (lambda p: p, ValueError, "holds no image"),
        (lambda p: (p / "x.json").write_text("[1]") and p / "x.json", ValueError, "index 0 is a int"),
        (lambda p: (p / "x.json").write_text('[{"a": 1}]') and p / "x.json", ValueError, "names no image"),
        (lambda p: (p / "x.json").write_text("{") and p / "x.json", ValueError, "not valid JSON"),
        (lambda p: Dataset.from_dict({"a": [1]}), ValueError, "no column known to hold images among a"),
        (lambda p: 3, TypeError, "from a int"),
    ],
)
def test_what_is_no_source_is_an_error_that_names_it(make, error, message, tmp_path) -> None:
    with pytest.raises(error, match=message):
        image_source(make(tmp_path))


def test_columns_are_chosen_or_asked_for(place) -> None:
    records = [{"bytes": png(0), "path": None}]
    data = Dataset.from_dict({"left": records, "right": records})
    data = data.cast_column("left", Image()).cast_column("right", Image())
    with pytest.raises(ValueError, match=r"several columns of images \(left, right\)"):
        image_source(data)
    assert len(image_source(data, image_column="right")) == 1
    with pytest.raises(ValueError, match="no column 'rigt' .did you mean 'right'"):
        image_source(data, image_column="rigt")
    with pytest.raises(ValueError, match="no split 'tset'"):
        image_source(place / "splits", split="tset")


# -- what was left out without a word


def _png(shade: int) -> bytes:
    stream = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def linked_tar(path: Path) -> Path:
    """Files, hidden ones, and links: hard, symbolic (beside it, from another folder, of a link), and to
    nowhere.
    """
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in (("blobs/ab12", _png(10)), ("a/one.png", _png(20)), ("a/._one.png", b"mac")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in (
            ("a/hard.png", tarfile.LNKTYPE, "a/one.png"),
            ("a/soft.png", tarfile.SYMTYPE, "../blobs/ab12"),
            ("b/chain.png", tarfile.SYMTYPE, "../a/soft.png"),
            ("b/lost.png", tarfile.SYMTYPE, "gone.png"),
            ("b/ring.png", tarfile.SYMTYPE, "ring.png"),
            ("b/.hidden.png", tarfile.SYMTYPE, "../a/one.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def test_links_of_a_tar_are_the_images_they_lead_to(tmp_path):
    source = image_source(linked_tar(tmp_path / "x.tar"))
    names = [item.name.split("x.tar/")[1] for item in source]
    assert names == ["a/one.png", "a/hard.png", "a/soft.png", "b/chain.png", "b/lost.png", "b/ring.png"]
    shades = [item.open().getpixel((0, 0))[0] for item in list(source)[:4]]
    assert shades == [20, 20, 10, 10]
    for item, target in zip(list(source)[4:], ("b/gone.png", "b/ring.png"), strict=True):
        with pytest.raises(BadImageError, match=f"a link to {target}, which the archive does not hold"):
            item.open()


def test_where_a_tar_is_read_in_order_its_links_are_named(tmp_path):
    source = image_source(linked_tar(tmp_path / "x.tar.gz"))
    items = list(source)
    assert len(items) == 6 and items[0].open().getpixel((0, 0))[0] == 20
    for item in items[1:]:
        with pytest.raises(BadImageError, match="is read in order"):
            item.open()


def test_a_folder_shows_linked_folders_once_and_every_suffix(tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    (whole / "sub").mkdir(parents=True)
    other.mkdir()
    for name in ("a.jfif", "b.jpe"):
        PILImage.new("RGB", (8, 8)).save(whole / name, "JPEG")
    PILImage.new("RGB", (8, 8)).save(other / "c.png")
    PILImage.new("RGB", (8, 8)).save(whole / "d.jp2")
    (whole / "linked").symlink_to(other)
    (whole / "sub" / "up").symlink_to(whole)  # a ring
    (whole / "twice").symlink_to(other)
    names = [Path(item.name).relative_to(whole).as_posix() for item in image_source(whole)]
    assert names == ["a.jfif", "b.jpe", "d.jp2", "linked/c.png"]
    assert all(item.open().size == (8, 8) for item in image_source(whole))


@pytest.fixture
def site(place):
    """The address of a server that gives a picture for every path that names one, whatever its query."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            found = re.search(r"(\d)", self.path)
            body = (place / "a.tar.gz").read_bytes() if ".tar.gz" in self.path else png(int(found[1]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_is_what_its_path_says_whatever_follows(site):
    urls = [
        f"{site}/0.png?x=1",
        f"{site}/1.PNG#top",
        f"{site}/image?id=2",
        f"HTTP{site[4:]}/{{3,4}}.jpg?w=[5]",
    ]
    found = list(image_source(urls))
    assert [item.name for item in found[:3]] == urls[:3] and len(found) == COUNT
    for number, item in enumerate(found):
        assert (np.asarray(item.open()) == pixels(number)).all()
    (first, *_) = find_images([urls[0]])
    assert first == urls[0]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://x.org/a.json?x=1", "read from this disk: download it first"),
        ("https://x.org/a.parquet", "read from this disk: download it first"),
        ("https://x.org/a.mp4?x=1", "is a video"),
        ("ftp://x.org/a", "is no URL of an image"),
    ],
)
def test_a_url_of_something_else_says_what_to_do(url, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        image_source(url)
    with pytest.raises(BadImageError, match="only http.s. and data: are opened"):
        open_image("s3://bucket/a.png")


def test_images_that_a_json_file_holds_itself_are_read(site, tmp_path):
    written = [base64.b64encode(png(number)).decode() for number in range(COUNT)]
    talk = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    long = base64.b64encode(png(3) + bytes(2000)).decode()
    images = [
        f"data:image/png;base64,{written[0]}",
        f"DATA:image/png,{quote(png(1))}",
        f"{site}/2.png?x=1",
        long,
    ]
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps([{"id": n, "image": name, "conversations": talk} for n, name in enumerate(images)])
    )
    found = list(image_source(str(file)))
    assert [item.name for item in found] == [f"{file}/0", f"{file}/1", images[2], f"{file}/3"]
    assert all(item.stamp for item in found if item.name != images[2])
    rows = undecoded(load_vision_dataset(str(file)))
    for number, item in enumerate(found):
        assert (np.asarray(item.open()) == pixels(number)).all()
        assert (np.asarray(open_image(rows[number]["images"][0])) == pixels(number)).all()
    (one,) = image_source(images[0])
    assert len(one.name) < 30 and (np.asarray(one.open()) == pixels(0)).all()
    with pytest.raises(ValueError, match="needs a comma"):
        open_image("data:image/png")

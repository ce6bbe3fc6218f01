"""Every kind of image a folder may hold: odd ones train and compress as what they show, bad ones are named
and raise, or are skipped and counted.
"""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import base64
import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage

import voco_plugin as vp
from test_cli import error_of, here, out_of, world  # noqa: F401
from test_training import LORA, bases, losses, trainer  # noqa: F401
from tiny import processors
from voco_plugin.cli import main
from voco_plugin.collator import VoCoDataCollator
from voco_plugin.data.undecoded import name_rows, undecoded
from voco_plugin.images import BadImageError, find_refused, open_image

RED, SIZE = (200, 30, 40), (24, 16)


def two_halves(mode: str = "RGB") -> PILImage.Image:
    """Left half red, right half black."""
    image = PILImage.new("RGB", SIZE, RED)
    image.paste((0, 0, 0), (12, 0, 24, 16))
    return image if mode == "RGB" else image.convert(mode)


def write_odd(folder: Path) -> dict[str, tuple[Path, tuple[int, int], dict]]:
    """Good but odd files: name → (path, size as RGB, pixels that are known, within 3)."""
    made = {}

    def add(name: str, image: PILImage.Image, size: tuple, pixels: dict, **save) -> None:
        path = folder / name
        image.save(path, **save)
        made[name] = (path, size, pixels)

    halves = {(2, 2): RED, (20, 2): (0, 0, 0)}
    add("tiny.png", PILImage.new("RGB", (1, 1), RED), (1, 1), {(0, 0): RED})
    add("cmyk.tif", two_halves("CMYK"), SIZE, halves)
    ramp = np.zeros((16, 24), dtype=np.uint16)
    ramp[:, 8:16], ramp[:, 16:] = 32896, 65535
    grey = {(2, 2): (0, 0, 0), (10, 2): (128, 128, 128), (20, 2): (255, 255, 255)}
    add("grey16.png", PILImage.fromarray(ramp), SIZE, grey)
    add("grey16.tif", PILImage.fromarray(ramp), SIZE, grey)
    dark = PILImage.fromarray((ramp // 257).astype(np.int32))
    add("int32.tif", dark, SIZE, grey)
    frames = [two_halves(), PILImage.new("RGB", SIZE, (0, 0, 255))]
    add("moving.gif", frames[0], SIZE, halves, save_all=True, append_images=frames[1:], duration=40)
    add("moving.png", frames[0], SIZE, halves, save_all=True, append_images=frames[1:], duration=40)
    add("moving.webp", frames[0], SIZE, halves, save_all=True, append_images=frames[1:], lossless=True)
    add("palette.png", two_halves().quantize(4), SIZE, halves)
    clear = two_halves().quantize(4)
    ink = clear.getpixel((20, 2))  # the black half is the transparent colour: white shows through
    add("clear.png", clear, SIZE, {(2, 2): RED, (20, 2): (255, 255, 255)}, transparency=ink)
    alpha = two_halves("RGBA")
    alpha.putalpha(PILImage.linear_gradient("L").resize(SIZE).point(lambda v: 255 if v > 127 else 128))
    half = tuple((c * 128 + 255 * 127) // 255 for c in RED)
    add("alpha.png", alpha, SIZE, {(2, 14): RED, (2, 1): half})
    add("bit.png", PILImage.new("1", SIZE, 1), SIZE, {(3, 3): (255, 255, 255)})
    exif = PILImage.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: the left half belongs on top
    add("turned.png", two_halves(), (16, 24), {(2, 2): RED, (2, 20): (0, 0, 0)}, exif=exif)
    return made


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x\x9c\x03\x00") + chunk(b"IEND", b"")
    )


def write_bad(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that no image can be had from: name → (path, a piece of the reason)."""
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = {kind: io.BytesIO() for kind in ("PNG", "JPEG")}
    for kind, stream in whole.items():
        noise.save(stream, kind)
    png, jpeg = (stream.getvalue() for stream in whole.values())
    limit = PILImage.MAX_IMAGE_PIXELS
    side = int((1.5 * limit) ** 0.5)  # Pillow only warns here
    bodies = {
        "empty.png": (b"", "the file is empty"),
        "text.jpg": (b"this is no image", "no image that Pillow knows"),
        "short.png": (png[: len(png) // 2], "truncated|broken|unrecognized"),
        "short.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "flipped.png": (png[:60] + bytes(200) + png[260:], "."),
        "large.png": (png_of(side, side), f"more than {limit} pixels.*MAX_IMAGE_PIXELS"),
        "bomb.png": (png_of(60000, 60000), "exceeds limit|more than"),
    }
    made = {}
    for name, (body, why) in bodies.items():
        (folder / name).write_bytes(body)
        made[name] = (folder / name, why)
    made["missing.png"] = (folder / "missing.png", "does not exist")
    PILImage.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(folder / "float.tif")
    made["float.tif"] = (folder / "float.tif", "floating point")
    return made


ODD = (
    *("tiny.png", "cmyk.tif", "grey16.png", "grey16.tif", "int32.tif", "moving.gif", "moving.png"),
    *("moving.webp", "palette.png", "clear.png", "alpha.png", "bit.png", "turned.png"),
)
BAD = (
    *("empty.png", "text.jpg", "short.png", "short.jpg", "flipped.png", "large.png", "bomb.png"),
    *("missing.png", "float.tif"),
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    made = write_odd(tmp_path_factory.mktemp("odd"))
    assert tuple(made) == ODD
    return made


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    made = write_bad(tmp_path_factory.mktemp("bad"))
    assert tuple(made) == BAD
    return made


def talk(answer: str = "red") -> list[dict]:
    image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
    said = [{"type": "text", "text": answer}]
    return [{"role": "user", "content": [image, ask]}, {"role": "assistant", "content": said}]


def rows_of(paths, with_id: bool = True, embed: bool = False) -> Dataset:
    images = [
        [{"bytes": Path(p).read_bytes(), "path": None} if embed else {"bytes": None, "path": str(p)}]
        for p in paths
    ]
    columns = {"messages": [talk() for _ in paths], "images": images}
    if with_id:
        columns["id"] = [f"row-{i}" for i in range(len(paths))]
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def collator(name: str = "llava_llama", **options) -> VoCoDataCollator:
    processor = processors.processor(name)
    processor.tokenizer.add_tokens(["<voco>"], special_tokens=True)
    return VoCoDataCollator(processor=processor, voco=vp.VoCoConfig(num_tokens=2), **options)


# -- the opener


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_opens_as_what_it_shows(name: str, odd) -> None:
    path, size, pixels = odd[name]
    body = path.read_bytes()
    with PILImage.open(path) as opened:
        sources = [
            path,
            str(path),
            body,
            {"bytes": body, "path": None},
            {"bytes": None, "path": str(path)},
            opened,
        ]
        sources += [
            base64.b64encode(body).decode(),
            "data:image/png;base64," + base64.b64encode(body).decode(),
        ]
        images = [open_image(source) for source in sources]
    for image in images:
        assert image.mode == "RGB" and image.size == size
        for place, colour in pixels.items():
            got = image.getpixel(place)
            assert max(abs(a - b) for a, b in zip(got, colour, strict=True)) <= 3, (place, got, colour)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_with_the_sample_and_the_reason(name: str, bad) -> None:
    path, why = bad[name]
    with pytest.raises(
        BadImageError, match=f"^sample 3: image {re.escape(str(path))} cannot be read: .*({why})"
    ):
        open_image(path, "sample 3")


def test_a_limit_that_is_raised_is_raised(bad, monkeypatch) -> None:
    path, _ = bad["large.png"]
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImageError, match="truncated"):  # read now, and found to hold no pixels
        open_image(path)


def test_an_image_in_memory_is_left_as_it_is() -> None:
    image = two_halves("RGBA")
    image.getexif()[0x0112] = 6
    turned = open_image(image)
    assert turned.size == (16, 24) and image.size == SIZE and image.mode == "RGBA"
    assert image.getexif()[0x0112] == 6


# -- processors


@pytest.mark.parametrize("name", [n for n in processors.NAMES if n != "smolvlm"])
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (1, 40)])
def test_an_image_of_few_pixels_has_the_colour_of_a_large_one(name: str, size) -> None:
    image_processor = processors.processor(name).image_processor
    small, large = (
        image_processor(images=[[PILImage.new("RGB", s, RED)]], return_tensors="pt")["pixel_values"]
        for s in (size, (40, 40))
    )
    small, large = (v[:1] if v.dim() == 2 else v.flatten(0, -4)[:1] for v in (small, large))
    torch.testing.assert_close(small, large, atol=1e-5, rtol=0)
    rows = [{"messages": talk(), "images": [PILImage.new("RGB", size, RED)]}]
    assert int((collator(name)(rows)["labels"] != -100).sum()) > 0


def test_an_image_the_processor_refuses_is_named(caplog) -> None:
    thin = PILImage.new("RGB", (900, 1), RED)
    rows = [{"messages": talk(), "images": [i], "id": n} for n, i in (("a", two_halves()), ("b", thin))]
    with pytest.raises(BadImageError, match=r"sample 1 \(id 'b'\): image 0 cannot be used.*900x1.*ratio"):
        collator("qwen2_5_vl")(rows)
    with caplog.at_level("WARNING"):
        batch = collator("qwen2_5_vl", on_bad_sample="skip", count_skipped=True)(rows)
    alone = collator("qwen2_5_vl")([rows[0], rows[0]])
    assert batch.pop("skipped_samples").tolist() == [0, 1]
    assert all(torch.equal(batch[k], alone[k]) for k in alone)
    assert "id 'b'" in caplog.text and "id 'a'" in caplog.text
    assert find_refused(processors.processor("qwen2_5_vl").image_processor, [two_halves()]) == {}


def test_a_fault_of_the_code_is_no_bad_sample(monkeypatch) -> None:
    made = collator("qwen2_5_vl", on_bad_sample="skip")
    monkeypatch.setattr(VoCoDataCollator, "_collate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made([{"messages": talk(), "images": [two_halves()]}])


# -- the collator


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("embed", [False, True])
def test_a_bad_sample_raises_or_another_row_takes_its_place(name, embed, odd, bad, caplog) -> None:
    path, why = bad[name]
    if embed and name == "missing.png":
        pytest.skip("a missing file has no bytes")
    good = [odd[n][0] for n in ("cmyk.tif", "palette.png", "turned.png", "alpha.png")]
    rows = undecoded(rows_of([good[0], path, *good[1:]], embed=embed))
    batch = [rows[0], rows[1]]
    with pytest.raises(
        BadImageError,
        match=rf"sample 1 \(id 'row-1'\): image .*({'is empty' if embed and name == 'empty.png' else why})",
    ):
        collator()(batch)
    with caplog.at_level("WARNING"):
        made = collator(on_bad_sample="skip", pool=rows, count_skipped=True)
        found = made(batch)
        again = made(batch)
    assert found.pop("skipped_samples").tolist() == [0, 1] == again.pop("skipped_samples").tolist()
    (line,) = {r.message for r in caplog.records if "Skipped" in r.message}
    other = int(re.search(r"Skipped; row (\d)", line)[1])
    assert other != 1 and "id 'row-1'" in line
    assert embed or str(path) in line
    wanted = collator()([rows[0], rows[other]])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) and torch.equal(again[k], wanted[k]) for k in wanted)


def test_a_data_set_of_bad_images_raises_in_spite_of_skip(bad) -> None:
    rows = undecoded(rows_of([bad["text.jpg"][0], bad["empty.png"][0]]))
    with pytest.raises(BadImageError, match=r"row-0.*16 rows drawn are bad too"):
        collator(on_bad_sample="skip", pool=rows)([rows[0]])
    with pytest.raises(BadImageError, match="every other row of its batch"):
        collator(on_bad_sample="skip")([rows[0], rows[1]])


def test_a_fault_of_format_raises_in_spite_of_skip() -> None:
    rows = [{"messages": talk(), "images": []}]
    with pytest.raises(ValueError, match="placeholder"):
        collator(on_bad_sample="skip", pool=rows)(rows)


def test_an_unknown_value_is_refused(tmp_path) -> None:
    for make in (
        lambda: collator(on_bad_sample="ignore"),
        lambda: vp.VoCoSFTConfig(str(tmp_path), on_bad_sample="x"),
    ):
        with pytest.raises(ValueError, match="use raise or skip"):
            make()


# -- the trainer


def test_undecoded_rows_hold_what_is_stored_and_nothing_is_copied(odd) -> None:
    rows = rows_of([path for path, *_ in odd.values()], with_id=False)
    plain = name_rows(undecoded(rows))
    assert plain[3]["images"] == [{"bytes": None, "path": str(odd[ODD[3]][0])}] and plain[3]["row"] == 3
    assert isinstance(rows[0]["images"][0], PILImage.Image), "the caller's data set decodes as before"
    assert plain.features["images"] == List(Image(decode=False))
    assert not undecoded(rows).cache_files
    single = Dataset.from_dict({"image": [str(odd[ODD[0]][0])]}).cast_column("image", Image())
    assert undecoded(single)[0]["image"]["path"] == str(odd[ODD[0]][0])
    assert isinstance(undecoded(single.cast_column("image", Image(mode="L")))[0]["image"], PILImage.Image)


@pytest.mark.parametrize("streamed", [False, True])
def test_every_odd_image_trains(streamed, odd, bases, tmp_path) -> None:
    rows = rows_of([path for path, *_ in odd.values()])
    options = {"max_steps": len(ODD), "per_device_train_batch_size": 1}
    made = trainer(
        bases("llava_llama"), tmp_path, rows.to_iterable_dataset() if streamed else rows, **options
    )
    made.train()
    assert len(losses(made)) == len(ODD) and all(np.isfinite(losses(made)))


def test_training_names_the_bad_row(odd, bad, bases, tmp_path) -> None:
    path = bad["short.jpg"][0]
    rows = rows_of([odd["cmyk.tif"][0], path], with_id=False)
    made = trainer(bases("llava_llama"), tmp_path, rows)
    with pytest.raises(BadImageError, match=rf"\(row 1\): image {re.escape(str(path))} cannot be read"):
        made.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_is_counted_named_and_the_same_after_a_resume(
    workers, odd, bad, bases, tmp_path, capfd
) -> None:
    good = [odd[n][0] for n in ("cmyk.tif", "palette.png", "turned.png", "alpha.png", "bit.png", "clear.png")]
    rows = rows_of([bad["empty.png"][0], *good, bad["missing.png"][0]])
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "on_bad_sample": "skip",
    }
    options |= {"dataloader_num_workers": workers, "eval_dataset": rows, "per_device_eval_batch_size": 1}
    whole = trainer(bases("llava_llama"), tmp_path / "whole", rows, **options)
    end = whole.train()
    counted = [e["skipped_samples"] for e in whole.state.log_history if "skipped_samples" in e]
    assert counted[3] == 2 and counted[-1] == 4 == end.metrics["skipped_samples"], "two a pass, two passes"
    said = capfd.readouterr().err
    assert "on_bad_sample=skip: 4 bad samples in 8 steps" in said
    assert whole.evaluate()["eval_skipped_samples"] == 2 == whole.evaluate()["eval_skipped_samples"]
    resumed = trainer(bases("llava_llama"), tmp_path / "resumed", rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    again = [e["skipped_samples"] for e in resumed.state.log_history if "skipped_samples" in e]
    assert again == counted


def test_a_llava_file_with_a_missing_image_trains_from_the_command_line(here, capsys, tmp_path) -> None:
    records = json.loads((here / "runs/gridworld/train.json").read_text())
    records[0]["image"] = "gone.png"
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records))
    short = [
        "--dataset_name",
        str(file),
        "--image_folder",
        str(here / "runs/gridworld/images"),
        "--max_steps",
        "6",
    ]
    short += [
        "--per_device_train_batch_size",
        "2",
        "--disable_tqdm",
        "true",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert "gone.png" in error_of(capsys, "train", "gridworld_voco", *short)
    report = json.loads(
        out_of(capsys, "train", "gridworld_voco", *short, "--on_bad_sample", "skip", "--json")
    )
    assert report["metrics"]["skipped_samples"] == 1


# -- voco compress, voco eval


def test_compress_takes_every_odd_image(here, capsys, odd, tmp_path) -> None:
    folder = next(iter(odd.values()))[0].parent
    out = json.loads(
        out_of(
            capsys,
            "compress",
            "runs/gridworld_voco",
            str(folder),
            "--out",
            str(tmp_path / "all.safetensors"),
            "--json",
        )
    )
    assert len(vp.VoCoCache.load(tmp_path / "all.safetensors")) == len(ODD) == len(out["images"])
    assert out["skipped_samples"] == 0 and out["skipped"] == []


@pytest.mark.parametrize("name", BAD)
def test_compress_names_a_bad_image_or_skips_and_counts_it(name, here, capsys, odd, bad, tmp_path) -> None:
    path, why = bad[name]
    images = [str(odd["cmyk.tif"][0]), str(path), str(odd["turned.png"][0])]
    start = ["compress", "runs/gridworld_voco", *images, "--out", str(tmp_path)]
    said = error_of(capsys, *start)
    assert str(path) in said and re.search(why, said)
    out = json.loads(out_of(capsys, *start, "--json", "--on-bad-sample", "skip"))
    assert out["images"] == [images[0], images[2]] and out["skipped_samples"] == 1
    assert out["skipped"][0]["image"] == str(path) and re.search(why, out["skipped"][0]["reason"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cmyk.safetensors", "turned.safetensors"]
    alone = tmp_path / "alone.safetensors"
    out_of(capsys, "compress", "runs/gridworld_voco", images[2], "--out", str(alone))
    (one,), (other,) = vp.VoCoCache.load(alone), vp.VoCoCache.load(tmp_path / "turned.safetensors")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.keys, other.keys, strict=True))


def test_compress_leaves_out_what_the_processor_refuses(here, capsys, monkeypatch, tmp_path) -> None:
    """The gridworld processor takes everything: it is made to refuse wide images, as Qwen's does."""
    from voco_plugin.cli import compress

    load = compress.load_model

    def strict(args):
        model, processor = load(args)
        kind = type(processor.image_processor)
        call = kind.__call__

        def refuse(self, images, *more, **options):
            flat = [i for entry in images for i in (entry if isinstance(entry, list) else [entry])]
            if any(i.width > 100 * i.height for i in flat):
                raise ValueError("absolute aspect ratio is too large")
            return call(self, images, *more, **options)

        monkeypatch.setattr(kind, "__call__", refuse)
        return model, processor

    monkeypatch.setattr(compress, "load_model", strict)
    names = ["a.png", "b_wide.png", "c.png"]
    for name, size in zip(names, [(30, 30), (500, 1), (40, 20)], strict=True):
        PILImage.new("RGB", size, RED).save(tmp_path / name)
    start = ["compress", "runs/gridworld_voco", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "b_wide.png" in error_of(capsys, *start)
    out = json.loads(out_of(capsys, *start, "--on-bad-sample", "skip", "--json"))
    assert [Path(p).name for p in out["images"]] == ["a.png", "c.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.safetensors", "c.safetensors"]


def test_compress_of_nothing_but_bad_images_is_an_error(here, capsys, bad, tmp_path) -> None:
    capsys.readouterr()
    start = ["compress", "runs/gridworld_voco", str(bad["empty.png"][0]), "--out", str(tmp_path / "out")]
    assert main([*start, "--on-bad-sample", "skip"]) == 2
    assert "none of the 1 images can be used" in capsys.readouterr().err


def test_eval_names_a_bad_image_or_leaves_its_questions_out(here, capsys, tmp_path) -> None:
    records = json.loads((here / "runs/gridworld/test.json").read_text())
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    asked = sum(turn["from"] == "gpt" for turn in records[1]["conversations"])
    records[1]["image"] = str(tmp_path / "half.png")
    file = tmp_path / "test.json"
    file.write_text(json.dumps(records))
    start = [
        "eval",
        "runs/gridworld_voco",
        "--data",
        str(file),
        "--image-folder",
        str(here / "runs/gridworld/images"),
    ]
    start += ["--max-new-tokens", "1"]
    said = error_of(capsys, *start)
    assert "half.png" in said and str(records[1]["id"]) in said
    whole = [
        "eval",
        "runs/gridworld_voco",
        "--data",
        "runs/gridworld/test.json",
        "--max-new-tokens",
        "1",
        "--json",
    ]
    every = json.loads(out_of(capsys, *whole))
    left = json.loads(out_of(capsys, *start, "--on-bad-sample", "skip", "--json"))
    assert left["skipped_samples"] == 1 and "half.png" in left["skipped"][0]
    assert 0 < every["questions"] - left["questions"] <= asked

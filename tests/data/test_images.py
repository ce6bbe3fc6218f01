"""The one image opener: odd images open as what they show, bad ones are named with the reason."""

from __future__ import annotations

import base64
import io
import re

import pytest
import torch
from PIL import Image as PILImage

from odd_images import BAD, ODD, RED, SIZE, collator, talk, two_halves
from tiny import processors
from voco_plugin.data.images import BadImageError, find_refused, image_size, open_image
from voco_plugin.training.collator import VoCoDataCollator

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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_the_size_in_the_head_is_that_of_the_opened_image(kind: str, orientation: int) -> None:
    exif, stream = PILImage.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    PILImage.new("RGB", (6, 4)).save(stream, kind, exif=exif)
    assert image_size(stream.getvalue()) == open_image(stream.getvalue()).size

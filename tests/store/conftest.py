"""A model, photos, and a count of what goes through the model."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
import voco_plugin as vp
from bulk_runs import COUNT
from photos import write_images
from tiny import processors
from voco_plugin.inference.answering import compress_images

NAME = "llava_llama"


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    """A tiny model with VoCo on, its processor, and the folder both load from."""
    folder = tmp_path_factory.mktemp("model")
    tiny.build(NAME).save_pretrained(folder)
    processors.processor(NAME).save_pretrained(folder)
    model, processor = vp.load(str(folder))
    return model, processor, folder


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return write_images(tmp_path / "photos")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch):
    """Images that went through the model, counted."""
    from voco_plugin.store.bulk import job as stage

    seen: list[int] = []

    def counted(model, processor, images, **options):
        images = list(images)
        seen.append(len(images))
        return compress_images(model, processor, images, **options)

    monkeypatch.setattr(stage, "compress_images", counted)
    return seen


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and distinct photos."""
    folder = tmp_path_factory.mktemp("bulk")
    tiny.build("llava_llama").save_pretrained(folder / "model")
    processors.processor("llava_llama").save_pretrained(folder / "model")
    write_images(folder / "photos", COUNT)
    return folder

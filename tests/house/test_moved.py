"""Old import paths and names still work, and say where things are now."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from voco_plugin._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_leads_to_a_module_that_is_there(old: str) -> None:
    assert importlib.util.find_spec(f"voco_plugin.{MOVED[old]}") is not None


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("cache.block", "cache.cache", ["VoCoBlock"]),
        ("cache.record", "cache.file_format", ["check_record", "BLOCK_FIELDS"]),
        ("cache.files", "cache.file_format", ["read_buffer", "VoCoCacheError"]),
        ("video.watching", "inference.streaming.stream", ["VideoStream"]),
        ("prompts", "inference.prompts", ["ask", "encode"]),
        ("answering", "inference.answering", ["answer", "compress_images", "evaluating"]),
    ],
)
def test_an_old_path_gives_the_same_module(old: str, new: str, names: list[str]) -> None:
    found = importlib.import_module(f"voco_plugin.{old}")
    assert found is importlib.import_module(f"voco_plugin.{new}")
    assert all(hasattr(found, name) for name in names)


def test_a_renamed_class_is_found_under_its_old_name_with_a_warning() -> None:
    from voco_plugin.inference.streaming import stream

    with pytest.warns(DeprecationWarning, match="stream.Watching has moved to .*stream.VideoStream"):
        assert stream.Watching is stream.VideoStream
    with pytest.raises(AttributeError, match="no attribute 'Seeing'"):
        _ = stream.Seeing


def test_what_made_caches_of_bytes_is_found_where_it_was() -> None:
    from voco_plugin.cache import cache, file_format

    for name in ("cache_from_buffer", "cache_to_bytes"):
        with pytest.warns(DeprecationWarning, match=f"cache.{name}"):
            assert getattr(file_format, name) is getattr(cache, name)

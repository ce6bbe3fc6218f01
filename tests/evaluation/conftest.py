"""A folder to run studies in."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies import prepare


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a base model and data by name only, and the journal of the children."""
    return prepare(tmp_path, monkeypatch)

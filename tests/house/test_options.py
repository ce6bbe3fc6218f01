"""docs/options.md says what becomes of every option of the installed versions."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import pytest
from packaging.version import Version

from paths import ROOT


@pytest.fixture(scope="module")
def options():
    """benchmarks/options.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("options")


def known(options, section: str) -> dict[str, str | None]:
    """Name → the version that it came with."""
    said = options.table()[section]
    if section == "training":
        return {name: row["since"] for name, row in options.training_rows(said).items()}
    return dict.fromkeys(said)


@pytest.mark.parametrize("section", ["generation", "arguments", "training", "voco"])
def test_the_table_and_the_installed_packages_name_the_same_options(options, section):
    found, rows = set(options.names()[section]), known(options, section)
    if section == "arguments":  # what generate takes through **kwargs is named too
        found |= {"tokenizer", "past_key_values", "inputs_embeds", "position_ids", "a name that is not known"}
    missing = found - set(rows)
    assert not missing, f"benchmarks/options.yaml does not say what becomes of {sorted(missing)}"
    installed = Version(version("transformers"))
    expected = {name for name, since in rows.items() if since is None or Version(since) <= installed}
    assert not expected - found, "options.yaml has rows of options that no longer exist: give them up"


def test_rows_are_whole(options):
    said = options.table()
    for section, statuses in (("generation", 2), ("arguments", 2), ("voco", 3)):
        for name, cells in said[section].items():
            assert len(cells) == statuses + 1, name
            assert set(cells[:-1]) <= set(options.STATUSES), name
            assert cells[-1] or set(cells[:-1]) == {"honoured"}, f"{name}: why?"
    rows = options.training_rows(said["training"]).values()
    assert {row["status"] for row in rows} <= set(options.STATUSES)
    assert all(row["reason"] for row in rows if row["status"] != "honoured")


def test_the_page_is_what_the_script_writes(options, tmp_path):
    options.main(["--out", str(tmp_path / "options.md")])
    wanted = (tmp_path / "options.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == wanted, "run python benchmarks/options.py --out docs/options.md"


def test_a_field_that_is_new_upstream_is_asked_for(options, monkeypatch):
    names = options.names()
    monkeypatch.setattr(
        options, "names", lambda: {**names, "generation": [*names["generation"], "brand_new"]}
    )
    with pytest.raises(SystemExit, match="does not know brand_new"):
        options.main([])

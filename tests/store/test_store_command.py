"""`voco store`: what it tells, prunes, exports, imports, verifies and removes, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest

from stores import MADE_BY, key, made, opened, raw_put, same
from voco_plugin.cache.cache import cache_to_bytes
from voco_plugin.cli import main
from voco_plugin.store import VoCoCacheStore


@pytest.fixture
def folder(tmp_path):
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n)) for n in range(6))
    return tmp_path / "s"


def told(capsys, *arguments, status=0) -> dict:
    capsys.readouterr()
    assert main(["store", *map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_command_stats_prunes_exports_and_imports(folder, tmp_path, capsys):
    facts = told(capsys, "stat", folder)
    assert facts["records"] == 6 and facts["fingerprint"]["model"] == MADE_BY["model"]
    size = facts["bytes"] // 6
    assert told(capsys, "export", folder, tmp_path / "files") == {"exported": 6}
    assert told(capsys, "import", tmp_path / "t", tmp_path / "files") == {"imported": 6}
    assert told(capsys, "import", tmp_path / "t", tmp_path / "files") == {"imported": 0}
    assert told(capsys, "prune", tmp_path / "t", "--max-bytes", 2 * size + 1)["removed"] == 4
    assert main(["store", "stat", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 record(s)") and "rule" in out and "isolated" in out
    with VoCoCacheStore(folder) as a, VoCoCacheStore(tmp_path / "t") as b:
        assert all(same(a.get(k), b.get(k)) for k in b)


def test_the_command_verifies_names_and_removes_what_is_bad(folder, capsys):
    found = told(capsys, "verify", folder)
    assert (found["records"], found["bad"], found["index"]) == (6, [], []) and not found["pages"]
    with opened(folder) as store:
        data = bytearray(cache_to_bytes(made(2)))
        data[-3] ^= 1
        raw_put(store, key(2), bytes(data))
    assert main(["store", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"record {key(2)}" in out and "1 fault(s), 0 removed" in out
    assert told(capsys, "verify", folder, "--delete", status=1)["deleted"] == 1
    assert told(capsys, "verify", folder)["records"] == 5


def test_the_command_keeps_lmdb_from_damaged_pages(folder, capsys):
    pytest.importorskip("lmdb.verify", reason="lmdb before 3.0 cannot look at a file without trusting it")
    os.truncate(folder / "data.mdb", 30_000)
    found = told(capsys, "verify", folder, status=1)
    assert found["pages"] and found["records"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stat", "nowhere"], "there is no store at nowhere"),
        (["prune", "nowhere"], "needs --max-bytes"),
        (["prune", "nowhere", "--max-bytes", "much"], "'much' is no size"),
        (["prune", "nowhere", "--max-bytes", "4QB"], "'4QB' is no size"),
        (["export", "nowhere"], "needs FOLDER"),
        (["stat", "nowhere", "there"], "takes no FOLDER"),
        (["stat", "nowhere", "--delete"], "--delete is for `voco store verify`"),
        (["stat", "nowhere", "--max-bytes", "1"], "--max-bytes is for `voco store prune`"),
        (["import", "nowhere", "neither"], "neither is no folder"),
        (["look", "nowhere"], "invalid choice: 'look'"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["store", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" and message in found.err and found.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read():
    from voco_plugin.cli.store import size

    assert [size(t) for t in ("1500", "20GB", "4GiB", "1.5 kb", "2T")] == [
        1500, 20 * 10**9, 4 * 2**30, 1500, 2 * 10**12,
    ]  # fmt: skip

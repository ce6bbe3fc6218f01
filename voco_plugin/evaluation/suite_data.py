"""Local data for the harness: a working folder in which its tasks find their data sets by name.

``datasets.load_dataset("owner/name")`` takes a folder of that name below the working directory before it asks
a hub. The folder is made here, of links to the files in ``--data-root`` and a card that maps splits to them:

    DATA/lmms-lab-encoder/POPE/data/test-00000-of-00003.parquet   (as a snapshot of the repository has it)
    DATA/POPE/… · DATA/lmms-lab/POPE/…                            (these too)
    WORK/lmms-lab-encoder/POPE/README.md, data-test-0.parquet → …

Only the splits that a task reads are in the card: nothing else is read, whatever else lies there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from .suites import REPOSITORIES, Benchmark, Wanted

VIDEO_SETS = {
    "voco_msvdqa": ("MSVD-QA", "msvd", "test_qa.json"),
    "voco_msrvttqa": ("MSRVTT-QA", "msrvtt", "test_qa.json"),
    "voco_activitynetqa": ("ActivityNet-QA", "activitynet", "test_q.json"),
}
"""Task → folder of the set below the data root, the format of its annotations, and their file."""


def prepare(benchmarks: Sequence[Benchmark], root: str | Path, work: str | Path) -> None:
    """Make ``work``, in which the harness finds the data of all ``benchmarks``.

    Raises:
        FileNotFoundError: data is missing; the message names every file that is wanted, and where.
    """
    data, folder = Path(root).expanduser().resolve(), Path(work).resolve()
    if not data.is_dir():
        raise FileNotFoundError(f"--data-root {root} is no folder; give the one that holds the data sets.")
    missing: list[str] = []
    for repository in dict.fromkeys(want.repository for one in benchmarks for want in one.wanted):
        wants = [want for one in benchmarks for want in one.wanted if want.repository == repository]
        missing += _link(list(dict.fromkeys(wants)), data, folder / repository)
    for one in benchmarks:
        if one.task in VIDEO_SETS:
            missing += _videos(one, data, folder)
        elif one.task == "voco_gridworld":
            missing += _gridworld(data, folder)
    if missing:
        names = ", ".join(one.name for one in benchmarks)
        raise FileNotFoundError(
            f"data is missing under {data}: {'; '.join(missing)}. Copy it there (a snapshot of each data "
            f"set's repository will do), or name the benchmarks that you have with --only (of {names})."
        )


# -- data sets in Parquet


def _link(wants: Sequence[Wanted], data: Path, folder: Path) -> list[str]:
    """Links and card of one repository; what is missing, in words."""
    places = homes(wants[0].repository, data)
    found = {want: files_of(want, places) for want in wants}
    lost = [f"{wanted_words(want)} in {places[0]}" for want, files in found.items() if not files]
    if lost:
        return lost
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        if old.is_symlink():
            old.unlink()
    listed: dict[str, dict[str, list[str]]] = {}
    for want, files in found.items():
        names = listed.setdefault(want.config, {}).setdefault(want.split, [])
        for number, file in enumerate(files):
            name = f"{_plain(want.config)}-{_plain(want.split)}-{number:05d}-{_state(file)}.parquet"
            (folder / name).symlink_to(file)
            names.append(name)
    atomic_write_text(folder / "README.md", _card(listed))
    return []


def homes(repository: str, data: Path) -> list[Path]:
    """Where a repository's files may lie, the first of them as it is published."""
    owner, name = repository.split("/")
    owners = [owner, *(["lmms-lab"] if owner == REPOSITORIES else [])]
    places = [data / one / name for one in owners] + [data / name]
    for one in owners:  # as the hub's own cache keeps them
        snapshots = data / f"datasets--{one}--{name}" / "snapshots"
        places += sorted(snapshots.glob("*"), reverse=True) if snapshots.is_dir() else []
    return places


def files_of(want: Wanted, places: Iterable[Path]) -> list[Path]:
    """The Parquet files of a split, in the first place that has them."""
    for place in places:
        if not place.is_dir():
            continue
        for pattern in (*_of_card(place, want), *_patterns(want)):
            files = sorted(path for path in place.glob(pattern) if path.suffix == ".parquet")
            if files:
                return [path.resolve() for path in files]
    return []


def wanted_words(want: Wanted) -> str:
    """``testdev_balanced_images/testdev-*.parquet``: the files of a split as they are published."""
    return _patterns(want)[0]


def _patterns(want: Wanted) -> list[str]:
    config, split = want.config, want.split
    if config == "default":
        return [f"data/{split}-*.parquet", f"{split}-*.parquet", f"**/{split}-*.parquet", f"{split}.parquet"]
    return [f"{config}/{split}-*.parquet", f"{config}/{split}.parquet", f"data/{config}/{split}-*.parquet"]


def _of_card(place: Path, want: Wanted) -> list[str]:
    """The patterns that the repository's own card names for this split."""
    card = place / "README.md"
    if not card.is_file():
        return []
    import yaml

    parts = card.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        facts = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    except yaml.YAMLError:
        return []
    found: list[str] = []
    for config in (facts or {}).get("configs") or []:
        files = config.get("data_files") if config.get("config_name", "default") == want.config else None
        for entry in files if isinstance(files, list) else []:
            if isinstance(entry, dict) and entry.get("split") == want.split:
                paths = entry.get("path")
                found += paths if isinstance(paths, list) else [str(paths)]
    return [path for path in found if not Path(path).is_absolute() and ".." not in Path(path).parts]


def _state(file: Path) -> str:
    """Part of a link's name: ``datasets`` keeps what it has read under a hash of the card alone, and would
    give the old questions where a file has changed, or another data root has a set of this name.
    """
    facts = file.stat()
    return hashlib.sha256(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def _card(listed: dict[str, dict[str, list[str]]]) -> str:
    lines = ["---", "configs:"]
    for config, splits in listed.items():
        lines += [f"- config_name: {json.dumps(config)}", "  data_files:"]
        for split, names in splits.items():
            lines += [f"  - split: {json.dumps(split)}", "    path:"]
            lines += [f"    - {json.dumps(name)}" for name in names]
    return "\n".join([*lines, "---", ""])


# -- sets that the harness does not know


def set_file(work: Path, task: str) -> Path:
    """Where the questions of a task lie that this package ships; no folder may have a task's name, which the
    harness would take for a folder of tasks.
    """
    return work / "voco_sets" / f"{task.removeprefix('voco_')}.jsonl"


def _videos(one: Benchmark, data: Path, folder: Path) -> list[str]:
    """The questions of a set of videos, each with the path of its video, as JSON lines."""
    from .video_qa import read_video_qa, video_rows

    name, kind, annotations = VIDEO_SETS[one.task]
    home = data / name
    asked = home / annotations
    wanted = [asked, *([home / "test_a.json"] if kind == "activitynet" else [])]
    lost = [f"{path.name} in {home}" for path in wanted if not path.is_file()]
    videos = next((home / part for part in ("videos", "video", "all_test") if (home / part).is_dir()), None)
    if videos is None:
        lost.append(f"a folder videos in {home}")
    if lost or videos is None:
        return lost
    mapping = home / "youtube_mapping.txt"
    items = read_video_qa(asked, kind, mapping=mapping if kind == "msvd" and mapping.is_file() else None)
    paths = {item.id: row.path for row in video_rows(items, videos) for item in row.items}
    lines = [
        {"id": item.id, "question": item.question, "answer": item.answer, "type": item.type,
         "video": str(paths[item.id].resolve())}
        for item in items
    ]  # fmt: skip
    _write_lines(set_file(folder, one.task), lines)
    return []


def _gridworld(data: Path, folder: Path) -> list[str]:
    """The questions of a gridworld, one a row, with the path of its picture."""
    from ..data.loaders import load_vision_dataset
    from .metrics import questions_of

    file = data / "test.json"
    if not file.is_file():
        return [f"test.json in {data} (voco gridworld {data} writes it)"]
    rows = load_vision_dataset(str(file), None, None, missing_images=False)
    raw = json.loads(file.read_text(encoding="utf-8"))
    lines = []
    for number, question in enumerate(questions_of(rows.remove_columns(["images"]))):
        names = raw[question.row]["image"]
        names = [names] if isinstance(names, str) else names
        images = [str(_image_path(data, name)) for name in names]
        lines.append(
            {"id": number, "question": question.text, "answer": question.answer, "type": question.type,
             "images": images}
        )  # fmt: skip
    _write_lines(set_file(folder, "voco_gridworld"), lines)
    return []


def _image_path(data: Path, name: str) -> Path:
    places = [data / name, data / "images" / name]
    return next((place for place in places if place.is_file()), places[0]).resolve()


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

"""Names of models: local folders told apart from hub ids, and the base of an adapter wherever both have gone.

Needs no torch: the command line asks here before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import CONFIG_NAME, nearest
from ..files import atomic_write_text

ADAPTER = "adapter_config.json"
_BASE = "base_model_name_or_path"
_RELATIVE = "base_relative_to_adapter"
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def looks_local(name: str) -> bool:
    """Whether a name is, by its form, that of a folder on this disk: a hub id has one slash at most."""
    here = (".", "/", "~", "runs/")  # the shipped recipes write below runs/
    return name.startswith(here) or name.count("/") > 1 or name.endswith((os.sep, ".gguf"))


def check_model_path(source: str, what: str = "model") -> None:
    """Refuse a local folder that is not there or holds no model, before transformers takes it for a hub id.

    Args:
        what: what it is, for the message.

    Raises:
        FileNotFoundError: it is not there, or has no config.
        ValueError: it is a GGUF file, or a folder with nothing else.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if looks_local(source):
            raise FileNotFoundError(
                f"{what} {source} does not exist: give a folder that holds a config.json (or {ADAPTER}), or "
                "a hub id."
            )
        return
    if path.is_dir() and any((path / name).is_file() for name in ("config.json", ADAPTER)):
        return
    if any(path.glob(f"*/{ADAPTER}")):  # as PEFT saves an adapter that is not called default
        return
    packed = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if packed:
        raise ValueError(
            f"{what} {source}: a GGUF file holds a language model alone. Compose it with an encoder: "
            f"model: {{encoder: …, llm: {packed[0]}, projector: …}} in a recipe, or voco_plugin.compose."
        )
    if not path.is_dir():
        raise ValueError(f"{what} {source} is a file: give the folder of a checkpoint, or a hub id.")
    if looks_local(source) or not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{what} {source} is a folder without a config.json (or {ADAPTER}): give the folder of a "
            "checkpoint."
        )


@contextlib.contextmanager
def named(source: str, what: str = "model") -> Iterator[None]:
    """Where the block cannot get ``source`` from the hub, the error says what was asked for.

    Raises:
        OSError: the name is no local folder, and the hub does not give it.
    """
    try:
        yield
    except OSError as problem:
        text = str(problem)
        if problem.errno is not None or source in text or os.path.isdir(source):
            raise
        reason = " ".join(text.split("\n", 1)[0].split()).rstrip(".")
        beside = Path(source).parent
        folders = [str(path) for path in beside.iterdir() if path.is_dir()] if beside.is_dir() else []
        raise OSError(
            f"{what} {source} is no folder here{nearest(source, folders)}, and the hub does not give it: "
            f"{reason}."
        ) from problem


def note_base(folder: str | os.PathLike, place: str | os.PathLike | None = None) -> None:
    """Write down where the base of the adapter in ``folder`` is, so that it is found from any working
    directory: its absolute path in ``adapter_config.json``, its path from the adapter in
    ``voco_config.json``. Nothing happens where ``folder`` holds no adapter, or its base is no local folder.

    Args:
        place: where the folder will be when it is finished; itself where left out.
    """
    file = Path(folder) / ADAPTER
    if not file.is_file():
        return
    facts = _read(file)
    base = facts.get(_BASE)
    if not isinstance(base, str) or not os.path.isdir(base):
        return
    base = os.path.abspath(base)
    if facts[_BASE] != base:
        atomic_write_text(file, json.dumps({**facts, _BASE: base}, indent=2, sort_keys=True))
    own = Path(folder) / CONFIG_NAME
    with contextlib.suppress(ValueError):  # another drive: there is no path from here to there
        relative = Path(os.path.relpath(base, os.path.abspath(place or folder))).as_posix()
        if own.is_file():
            record = {**_read(own), _RELATIVE: relative}
            atomic_write_text(own, json.dumps(record, indent=2, sort_keys=True) + "\n")


def base_of_adapter(source: str, adapter_file: str) -> str:
    """The base model of an adapter: a hub id, or the folder where it is by now. Looked at are the path from
    the adapter (both may have moved together) and the one that training had; where that is relative, in an
    older checkpoint, it is taken from each folder above the adapter, then from the working directory.

    Raises:
        ValueError: the adapter names no base.
        FileNotFoundError: it is in none of these places.
    """
    recorded = _read(Path(adapter_file)).get(_BASE)
    if not recorded:
        raise ValueError(f"{adapter_file} names no base model; merge the adapter, or add {_BASE}.")
    here = Path(os.path.abspath(source))
    places: list[Path] = []
    own = here / CONFIG_NAME
    relative = _read(own).get(_RELATIVE) if own.is_file() else None
    if isinstance(relative, str):
        places += [Path(os.path.normpath(here / relative)), Path(os.path.realpath(source)) / relative]
    if not os.path.isabs(recorded) and os.path.isdir(source):
        places += [above / recorded for above in here.parents]
    places.append(Path(os.path.abspath(os.path.expanduser(recorded))))
    found = [place for place in places if (place / "config.json").is_file() or (place / ADAPTER).is_file()]
    if found:
        _warn_of_two(found[0], found[1:], source)
        return str(found[0])
    if not looks_local(recorded) and not isinstance(relative, str):
        return recorded
    seen = f" seen from {os.getcwd()} or from a folder above it" if not os.path.isabs(recorded) else ""
    beside = f", nor {places[0]}" if isinstance(relative, str) else ""
    raise FileNotFoundError(
        f"the adapter at {source} was trained on {recorded}, which does not exist{seen}{beside}; put the "
        f"base model back, or change {_BASE} in {adapter_file}."
    )


def _warn_of_two(taken: Path, others: list[Path], source: str) -> None:
    for other in others:
        if not os.path.samefile(taken, other) and _witness(taken) != _witness(other):
            import warnings

            warnings.warn(
                f"the adapter at {source} was trained on {other}, and {taken}, where its base lies as seen "
                f"from the adapter, is another model. {taken} is taken; if that is wrong, move it away or "
                "merge the adapter.",
                stacklevel=4,
            )
            return


def _witness(folder: Path) -> Any:
    """What tells two models apart at little cost: names, sizes and samples of their files of weights."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") and file.is_file():
            size = file.stat().st_size
            with open(file, "rb") as stream:
                samples = []
                for number in range(_SAMPLES):
                    stream.seek(size * number // _SAMPLES)
                    samples.append(stream.read(_SAMPLE_BYTES))
            found.append((file.name, size, samples))
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file} is no JSON file ({problem}).") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{file} holds no names and values.")
    return facts

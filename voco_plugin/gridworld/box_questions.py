"""Fine-grained questions about a placed scene (paper, Sec. 4.3): where an object is, and what is in a box.

    rec  Where is the red circle?       [06,12,31,38]    referring expression comprehension
    reg  What is in [06,12,31,38]?      red circle       referring expression generation

Boxes are those of the pixels drawn (`voco_plugin.evaluation.boxes` has their text). `rec` is right from an
overlap of one half, `reg` where every attribute is. No conversation names one box twice: it would give an
answer away.
"""

from __future__ import annotations

import numpy as np

from voco_plugin.evaluation.boxes import box_text
from voco_plugin.gridworld.questions import pick
from voco_plugin.gridworld.scenes import Scene


def _box(scene: Scene, index: int) -> str:
    box, side = scene.things[index].box, scene.side
    if box is None or side is None:
        raise ValueError("the scene is not placed: boxes are known once it is (scenes.place)")
    return box_text(box, side, side)


def rec(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    """Where is the one object of that name?"""
    unique = [i for i, name in enumerate(scene.names) if scene.names.count(name) == 1]
    if not unique:
        return None
    index = pick(rng, unique)
    return f"Where is the {scene.names[index]}?", _box(scene, index)


def reg(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    """What is in that box?"""
    index = int(rng.integers(len(scene.things)))
    return f"What is in {_box(scene, index)}?", scene.names[index]


def rec_terse(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    """`rec` in the wording of `terse`."""
    asked = rec(scene, rng, colors)
    return asked and (asked[0].replace("Where is the ", "Where is ").removesuffix("?"), asked[1])


def reg_terse(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    """`reg` in the wording of `terse`."""
    asked = reg(scene, rng, colors)
    return asked and (asked[0].removesuffix("?"), asked[1])


BOX_TYPES = {"rec": rec, "reg": reg}
TERSE_BOX_TYPES = {"rec": rec_terse, "reg": reg_terse}

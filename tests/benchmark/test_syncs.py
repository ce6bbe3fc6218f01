"""The host waits for the device no more often than is promised, counted on a pretend device: a count is the
same on every machine. `python benchmarks/syncs.py --lines` names the lines.
"""

from __future__ import annotations

import functools
import importlib
import sys

import pytest

from paths import ROOT
from pretend_device import unavailable
from voco_plugin.core import layout

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")

BENCHMARKS = ROOT / "benchmarks"
FAMILIES = ("llava_llama", "qwen2_5_vl", "gemma3", "internvl")
BEYOND_PLAIN = {"decode, cached blocks": 0, "training step": 2}
"""Waits more than the plain model's: of one token; of forward and backward of a batch."""
FIRST_TOKEN = 6
"""Waits of stage 2, place and forward, whatever upstream's share; `generate` adds its own preparations, of
which none is ours.
"""


@functools.cache
def syncs():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("syncs")
    finally:
        sys.path.remove(str(BENCHMARKS))


@functools.cache
def measured(name: str, cases: str):
    return syncs().measured((name,), cases)[name]


def lines(case) -> str:
    """What a failure shows: every line that waits, in the model with VoCo."""
    return "\n".join(["", *(f"{times:4d} × {wait}" for wait, times in syncs().in_order(case.ours))])


@pytest.mark.parametrize("case", BEYOND_PLAIN)
@pytest.mark.parametrize("name", FAMILIES)
def test_waits_beyond_the_plain_model(name, case):
    found = measured(name, case)[case]
    ours, alone = syncs().waits(found.ours), syncs().waits(found.plain)
    assert alone >= 1, "upstream's own checks were not seen"
    assert ours <= alone + BEYOND_PLAIN[case], lines(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_waits_of_a_first_token(name):
    check_first_token(measured(name, "first token"))


def check_first_token(found):
    forward, generate = found["first token, forward"], found["first token, generate"]
    count = syncs().waits(forward.ours)
    assert count <= FIRST_TOKEN, lines(forward)
    own = syncs().own_waits(generate.ours)
    assert own <= FIRST_TOKEN, lines(generate)


@pytest.mark.parametrize("more", ["compress, 8 images", "compress, 8 images in one row"])
@pytest.mark.parametrize("name", FAMILIES)
def test_compressing_more_images_adds_no_wait(name, more):
    """Beyond those of the backbone's own forward, which looks at the grid of each of a Qwen-VL's images. One
    image alone needs none to be told from others, and waits less.
    """
    found = measured(name, "compress, ")
    assert syncs().own_waits(found["compress, 1 image"].ours) < syncs().own_waits(found[more].ours)
    one, many = found["compress, 2 images"], found[more]
    own = [syncs().own_waits(case.ours) for case in (one, many)]
    assert own[0] == own[1], lines(many)
    ours, alone = (
        syncs().waits(b) - syncs().waits(a)
        for a, b in zip((one.ours, one.plain), (many.ours, many.plain), strict=True)
    )
    assert ours <= alone, lines(many)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_copies_that_are_waited_for_are_noticed(name, monkeypatch):
    """A broken version, as those of tests/house/test_broken.py: `sent` waits for the device."""
    check_first_token(measured(name, "first token"))
    modules = [module for key, module in sys.modules.items() if key.startswith("voco_plugin.")]
    holders = [module for module in modules if vars(module).get("sent") is layout.sent]
    assert len(holders) > 3
    for module in holders:
        monkeypatch.setattr(module, "sent", lambda value, device: value.to(device))
    with pytest.raises(AssertionError):
        check_first_token(syncs().measured((name,), "first token")[name])

"""Settings of the whole suite: one thread, no network, `gpu` tests skipped where there is no GPU."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# before torch, transformers and datasets are imported anywhere: tiny models are fastest on one thread, and no
# test may need the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402

pytest.register_assert_rewrite("contracts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no CUDA device; runs that are killed go first: they
    are forked, which autograd forbids once it has started its threads. Those on the pretend device go last:
    torch does not let go of a device.
    """
    order = {"test_killed_saves.py": 0, "test_pretend_device.py": 2, "test_syncs.py": 2}
    items.sort(key=lambda item: order.get(item.path.name, 1))
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """Modules and shared models are no garbage: a collection (each training starts several) need not look at
    them. A third of the suite's time went into that.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """``name → folder`` of tiny base models on disk, as a user has them; nothing writes into these."""
    import tiny
    from tiny import processors

    made: dict[str, str] = {}

    def base(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name) / "base")
            tiny.build(name).save_pretrained(made[name])
            processors.processor(name).save_pretrained(made[name])
        return made[name]

    return base


@pytest.fixture(scope="session")
def made_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`world` is a copy of."""
    from commands import SHORT
    from voco_plugin.cli import main

    folder = tmp_path_factory.mktemp("made") / "world"
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    try:
        made = ["gridworld", "runs/gridworld", "--num-train", "12", "--num-test", "6"]
        assert main([*made, "--base", "runs/gridworld_base"]) == 0
        assert main(["train", "gridworld_voco", *SHORT]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def world(made_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small gridworld, its shipped VLM and a VoCo adapter trained on it for two steps."""
    return Path(shutil.copytree(made_world, tmp_path_factory.mktemp("copied") / "world"))


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: :func:`world`."""
    monkeypatch.chdir(world)
    return world


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Images that are odd and good, by name."""
    from odd_images import ODD, write_odd

    made = write_odd(tmp_path_factory.mktemp("odd"))
    assert tuple(made) == ODD
    return made


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Images that cannot be read, by name."""
    from odd_images import BAD, write_bad

    made = write_bad(tmp_path_factory.mktemp("bad"))
    assert tuple(made) == BAD
    return made

"""Settings of the whole suite: one thread, no network, `gpu` tests skipped where there is no GPU."""

from __future__ import annotations

import os

# before torch, transformers and datasets are imported anywhere: tiny models are fastest on one thread, and no
# test may need the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no CUDA device; runs that are killed go first: they
    are forked, which autograd forbids once it has started its threads.
    """
    items.sort(key=lambda item: item.path.name != "test_killed_saves.py")
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))

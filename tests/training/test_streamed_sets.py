"""Streamed data sets (``IterableDataset``) evaluate as map-style ones, whichever the training set is."""

from __future__ import annotations

import pytest

import tiny
from tiny import processors
from trainers import trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A family whose pixels are not one entry a row."""
    folder = str(tmp_path_factory.mktemp("sets") / "base")
    tiny.build("qwen2_5_vl").save_pretrained(folder)
    processors.processor("qwen2_5_vl").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("streams", [False, True])
def test_a_streamed_evaluation_is_that_of_the_same_rows(base, data, tmp_path, streams):
    stream = data.to_iterable_dataset()
    train = stream if streams else data
    made = trainer(base, tmp_path, train, eval_dataset={"stream": stream, "rows": data}, max_steps=1)
    found = made.evaluate()
    assert found["eval_stream_loss"] == found["eval_rows_loss"] > 0
    assert made.evaluate(stream)["eval_loss"] == found["eval_rows_loss"]
    rows, streamed = (made.predict(given).metrics["test_loss"] for given in (data, stream))
    assert rows == streamed
    made.train()


@pytest.mark.parametrize("evaluates", [False, True])
def test_dispatch_is_refused(base, data, tmp_path, evaluates):
    options = {"eval_dataset": {"a": data.to_iterable_dataset()}} if evaluates else {}
    with pytest.raises(ValueError, match="dispatch_batches=True cuts a batch by its rows"):
        trainer(base, tmp_path, data, accelerator_config={"dispatch_batches": True}, **options)

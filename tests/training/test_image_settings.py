"""Settings that TRL applies to text datasets beforehand, and passes over where there are images."""

from __future__ import annotations

import pytest

from tiny import build, processors
from trainers import rows, trainer


def made(tmp_path, data=None, **options):
    """A trainer of a tiny LLaVA."""
    words = processors.processor("llava_llama")
    data = rows() if data is None else data
    return trainer(build("llava_llama"), tmp_path, data, processing_class=words, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_packing": True}, "eval_packing=True: evaluation with images is not packed"),
        (
            {"dataset_kwargs": {"skip_prepare": True}},
            r"no 'skip_prepare' \(did you mean 'skip_prepare_dataset'",
        ),
        ({"stage1": "streamed", "torch_compile": True}, "torch_compile follows one pass"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_rows_with_images_do_not_go_through_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **options)


def test_a_formatting_func_is_refused(tmp_path, monkeypatch):
    import voco_plugin as vp

    args = vp.VoCoSFTConfig(str(tmp_path), voco=vp.VoCoConfig(num_tokens=2), report_to=[])
    more = {"train_dataset": rows(), "processing_class": processors.processor("llava_llama")}
    with pytest.raises(ValueError, match="formatting_func is not called on rows with images"):
        vp.VoCoSFTTrainer(build("llava_llama"), args=args, **more, formatting_func=str)


@pytest.mark.parametrize("streamed", [False, True])
def test_shuffle_dataset_shuffles(tmp_path, streamed):
    data = rows().to_iterable_dataset() if streamed else rows()
    plain = [row["id"] for row in made(tmp_path, data).train_dataset]
    shuffled = [row["id"] for row in made(tmp_path, data, shuffle_dataset=True).train_dataset]
    assert shuffled != plain and sorted(shuffled) == sorted(plain)

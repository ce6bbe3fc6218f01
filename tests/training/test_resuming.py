"""Training asked for another way than tests do: a run resumed as something else, TRL's own arguments, rows
that only ``predict`` sees.
"""

from __future__ import annotations

import pytest
from datasets import Dataset
from trl import SFTConfig

import voco_plugin as vp
from trainers import rows, trainer
from voco_plugin.training.model_setup import as_voco_args


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """Two finished runs of two steps, with VoCo tokens and without."""
    out = tmp_path_factory.mktemp("runs")
    for name, voco in (("voco", True), ("plain", None)):
        options = {"voco": voco, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        trainer(bases("llava_llama"), out / name, rows(), **options).train()
    return out


@pytest.mark.parametrize(
    ("run", "voco", "said"),
    [
        ("voco", vp.VoCoConfig(num_tokens=3), r"trained with num_tokens=2 \(now 3\)"),
        ("voco", vp.VoCoConfig(num_tokens=2, rule="star"), r"trained with rule='isolated' \(now 'star'\)"),
        ("voco", None, "trained with VoCo tokens, and this run has none"),
        ("plain", True, "trained without VoCo tokens, and this run has them"),
    ],
)
@pytest.mark.parametrize("how", ["path", "newest"])
def test_a_run_is_not_resumed_as_something_else(runs, run, voco, said, how, bases, tmp_path):
    made = trainer(bases("llava_llama"), runs / run, rows(), voco=voco, max_steps=3)
    with pytest.raises(ValueError, match=said):
        made.train(resume_from_checkpoint=True if how == "newest" else str(runs / run / "checkpoint-1"))


@pytest.mark.parametrize("run", ["voco", "plain"])
def test_as_itself_it_is(runs, run, bases, tmp_path):
    voco = vp.VoCoConfig(num_tokens=2, attention="dense") if run == "voco" else None
    made = trainer(bases("llava_llama"), tmp_path, rows(), voco=voco, max_steps=3)
    made.train(resume_from_checkpoint=str(runs / run / "checkpoint-2"))
    assert made.state.global_step == 3


def test_trls_own_arguments_are_taken_with_their_tokens(tmp_path):
    theirs = SFTConfig(str(tmp_path), eos_token="</s>", pad_token="<pad>", hub_token="secret", bf16=False)
    made = as_voco_args(theirs, None)
    assert (made.eos_token, made.pad_token, made.hub_token) == ("</s>", "<pad>", "secret")
    assert made.output_dir == str(tmp_path)


def llava(number: int) -> dict:
    from PIL import Image

    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "red"}]
    return {
        "conversations": talk,
        "image": Image.new("RGB", (32, 32), (40 * number, 0, 0)),
        "id": f"{number}",
    }


def test_predict_takes_the_rows_that_evaluate_takes(bases, tmp_path):
    data = Dataset.from_list([llava(n) for n in range(4)])
    made = trainer(bases("llava_llama"), tmp_path, data, eval_dataset=data)
    assert made.predict(data).metrics["test_loss"] == pytest.approx(
        made.evaluate(data)["eval_loss"], rel=1e-5
    )

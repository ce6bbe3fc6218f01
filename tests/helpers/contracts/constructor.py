"""What tests/models/test_state_copies.py holds of a trainer that is made, or not made; run on broken versions
too.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PrefixTuningConfig
from transformers import TrainerCallback
from trl.trainer import utils as trl_utils

import tiny
import voco_plugin as vp
from contracts.copies import SOME, check_apart, hooks, traces
from harness import attached
from states import IN_TWO_STAGES, MODES, equal, images, in_a_thread, trained, trainer
from tiny import processors
from trainers import LORA


def looks(model: Any, processor: Any) -> dict[str, Any]:
    """All that a constructor may change on what it was given, by what it is."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = vp.attachment(model) if vp.is_attached(model) else None
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        "attached": state is not None,
        "rows": [layer.weight.detach().clone() for layer in embeddings],
        "ours": traces(model),
        "class": type(model),
        "rule": None if state is None else copy.deepcopy(state.config),
        "modules": {name: type(module) for name, module in modules.items()},
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "trains": {name: p.requires_grad for name, p in parameters.items()},
        "mode": {name: module.training for name, module in modules.items()},
        "forwards": {name for name, module in modules.items() if "forward" in vars(module)},
        "hooks": hooks(model),
        "weight hooks": {name for name, p in parameters.items() if p._backward_hooks},
        "config": copy.deepcopy(model.config.to_dict()),
        "checkpointing": [n for n, m in modules.items() if getattr(m, "gradient_checkpointing", False)],
        "tokens": dict(processor.tokenizer.get_vocab()),
        "peft": hasattr(model, "peft_config"),
    }


def changed(before: dict[str, Any], after: dict[str, Any], parts: Sequence[str] | None = None) -> str:
    """The names of what differs."""
    found = []
    for name in before if parts is None else parts:
        try:
            same = name in ("weights", "rows") or before[name] == after[name]
            equal(after[name], before[name]) if name in ("weights", "rows") else None
        except AssertionError:
            same = False
        found += [] if same else [name]
    return ", ".join(found)


class Refuses(TrainerCallback):
    """The last thing that Trainer's own constructor runs."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        raise self.error("not made")


class Interrupted(io.StringIO):
    """Interrupts the last line of the constructor: what trains."""

    def write(self, text: str) -> int:
        if text.startswith("training "):
            raise KeyboardInterrupt("not made")
        return len(text)


def other_store(folder: Path) -> str:
    model = attached("llava_tied")
    vp.VoCoCacheStore.for_model(folder, model).close()
    return str(folder)


def no_images() -> Any:
    return images().remove_columns("images")


FAILS: dict[str, Any] = {
    "its data have no images": lambda out: {"data": no_images()},
    "its data for evaluation are none": lambda out: {"eval_dataset": 5},
    "nothing trains": lambda out: {"peft": False, "train_language": False, "train_voco": False},
    "prefix tuning": lambda out: {"peft": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
    "another model's store": lambda out: {**MODES["frozen"], "stage1_store": other_store(out / "store")},
    "frozen and metrics": lambda out: {**MODES["frozen"], "compute_metrics": lambda found: {}},
    "frozen and no adapter": lambda out: {**MODES["frozen"], "peft": False},
    "frozen and biases": lambda out: {**MODES["frozen"], "peft": LoraConfig(**{**LORA, "bias": "all"})},
    "streamed and smoothed": lambda out: {"stage1": "streamed", "label_smoothing_factor": 0.1},
    "streamed in full and smoothed": lambda out: {
        "stage1": "streamed",
        "label_smoothing_factor": 0.1,
        "peft": False,
    },  # fmt: skip
    "no such teacher": lambda out: {"distill": {"teacher": str(out / "nowhere")}},
    "no base to go back to": lambda out: {"distill": {"teacher": "base"}, "peft": False},
    "a callback fails": lambda out: {"callbacks": [Refuses(RuntimeError)]},
    "ctrl-c": lambda out: {"callbacks": [Refuses(KeyboardInterrupt)], "train_projector": True},
    "ctrl-c in full": lambda out: {"callbacks": [Refuses(KeyboardInterrupt)], "peft": False},
    "ctrl-c with a held row": lambda out: {
        "callbacks": [Refuses(KeyboardInterrupt)],
        "peft": False,
        "train_voco": False,
    },  # fmt: skip
    "ctrl-c while it reports": lambda out: {**MODES["frozen"], "stderr": Interrupted()},
}


RULE = ("attached", "class", "rule", "ours", "forwards", "rows", "tokens")
"""What attaching and this package's stages change."""


def not_made(why: str, given: str, out: Path) -> tuple[Any, Any, dict, dict]:
    """What a failing constructor was given (``given``: a plain model or an attached one), and how it looked
    before and after.
    """
    model, its = tiny.build("llava_llama"), processors.processor("llava_llama")
    options = FAILS[why](out) if why else MODES["frozen"]
    if given == "an attached one":
        vp.attach(model, vp.VoCoConfig(num_tokens=2), its)
        options = {"voco": None, **options}
    before = looks(model, its)
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError, vp.VoCoCacheError, KeyboardInterrupt)):
        trainer(model, out / "out", processor=its, **options)
    return model, its, before, looks(model, its)


@in_a_thread
def a_trainer_that_is_not_made_changes_nothing(why: str, given: str, out: Path) -> None:
    _, _, before, after = not_made(why, given, out)
    assert changed(before, after) == ""


@in_a_thread
def a_trainer_stopped_at_its_end_changes_nothing(given: str, out: Path) -> None:
    """All is set up, and that stage 1 is frozen is noted: the last moment at which ctrl-c stops it."""
    real = vp.VoCoSFTTrainer._set_up

    def stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise KeyboardInterrupt("not made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vp.VoCoSFTTrainer, "_set_up", stopped)
        _, _, before, after = not_made("", given, out)
    assert changed(before, after) == ""


# -- TRL's own functions
# ------------------------------------------------------------------------------------------------------------

REPLACED = ("_use_triton", "maybe_gather_lm_head_ctx")


@in_a_thread
def a_function_of_trls_that_is_gone_is_missed_aloud(name: str, out: Path) -> None:
    """Once, when the trainer is made."""
    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    heard = Heard(logging.WARNING)
    logging.getLogger().addHandler(heard)
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            patch.delattr(trl_utils, name)
            trainer(tiny.build("llava_llama"), out)
    finally:
        logging.getLogger().removeHandler(heard)
    said += [str(w.message) for w in warned]
    assert len([text for text in said if name in text]) == 1, said


@in_a_thread
def a_copy_of_a_trained_model_is_apart(mode: str, out: Path) -> None:
    made, _ = trained(mode, out)
    model = made.model.eval()
    check_apart(model, copy.deepcopy(model), IN_TWO_STAGES if mode == "frozen" else SOME)

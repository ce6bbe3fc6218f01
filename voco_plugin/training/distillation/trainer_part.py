"""What a distillation adds to a ``Trainer``: the teacher, the terms of the loss, and their mean in the log.

    loss = ce_weight · TRL's loss + weight · temperature² · D + hidden_weight · H

D and H are divided by what TRL divides its own loss by: the answer tokens of the whole batch, over all
accumulation steps and processes.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from ..._compat import is_partitioned
from ...core.attachment import attachment, unwrap
from ...models.families import family_of
from ..fused_step import FusedStep
from .config import DistillConfig
from .step import DistilledOutput, Distiller
from .teacher import BaseTeacher, OtherTeacher, Teacher, Witness, check_base, load_teacher, original_rows

if TYPE_CHECKING:
    from trl import SFTTrainer as _Base
else:
    _Base = object


class Distilling(_Base):
    """For a ``VoCoSFTTrainer``: with ``args.distill``, training batches are lessons. Evaluation's loss stays
    the ordinary one.
    """

    _fused: FusedStep | None = None
    _distiller: Distiller | None = None

    def _prepare_teacher(
        self, config: DistillConfig | None, frozen: Any, packs: bool, before: Witness | None = None
    ) -> None:
        """Once the model is wrapped in PEFT: get the teacher ready.

        Args:
            frozen: :func:`copy_of_student` from before that.
            packs: whether training rows are packed.
            before: :func:`witness_of` from before that.

        Raises:
            ValueError: something here does not go with distillation, or not with this teacher.
        """
        self._sums: dict[str, torch.Tensor] = {}
        self._sums_from = 0
        if config is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        student = unwrap(model)
        check_distillation(self, packs)
        if self._fused is None:
            raise ValueError(
                "distill needs TRL's fused loss, which is off here (use_liger_kernel, or another loss)."
            )
        vocab = attachment(student).vocab
        if config.teacher == "base":
            check_base(model, config, self._row_only, before)
            teacher: Teacher = BaseTeacher(model)
        else:
            if frozen is None:
                trust = self.args.trust_remote_code
                frozen = load_teacher(student, self.processing_class, vocab, config, trust)
            if any(is_partitioned(parameter) for parameter in frozen.parameters()):
                from trl.models import prepare_deepspeed

                frozen = prepare_deepspeed(frozen, self.accelerator)
            elif not hasattr(frozen, "hf_device_map"):
                frozen = frozen.to(self.accelerator.device)
            teacher = OtherTeacher(frozen)
        self._distiller = Distiller(config, teacher, vocab, original_rows(student), self._fused)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._sums = {}
        return super().train(*args, **kwargs)

    def _distilled_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The loss of a training batch, as a lesson."""
        assert self._distiller is not None
        config = self._distiller.config
        seen = _Seen(model)
        inputs = {**inputs, "training_step": self._distiller.lesson(inputs)}
        ordinary = super().compute_loss(seen, inputs, num_items_in_batch=num_items_in_batch)
        output = seen.output
        count = self._counted(output, num_items_in_batch)
        terms = {"ce_loss": (config.ce_weight, ordinary)}
        if output.divergence is not None:
            terms["distill_loss"] = (config.weight, output.divergence * config.temperature**2 / count)
        if output.hidden is not None:
            terms["hidden_loss"] = (config.hidden_weight, output.hidden / count)
        self._add_up({name: term for name, (_, term) in terms.items()}, num_items_in_batch)
        # a weight of 0 keeps its graph: every process must reduce the same gradients
        return sum(weight * term.to(ordinary.device) for weight, term in terms.values())

    def _counted(self, output: DistilledOutput, num_items_in_batch: Any) -> torch.Tensor:
        """What a sum over answer tokens is divided by, as in ``SFTTrainer.compute_loss``: their number in the
        whole batch, or in this process's part of this micro-batch where Trainer does not count them.
        """
        count = output.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=output.label_mask.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages over the processes what is summed here
            return count / (self.accelerator.num_processes // self.get_tp_size())
        return count

    # -- the log

    def _add_up(self, terms: dict[str, torch.Tensor], num_items_in_batch: Any) -> None:
        """Sum the terms as Trainer sums the loss, so that in the log they add up to it."""
        if not self._sums:
            self._sums_from = self.state.global_step
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        steps = 1 if scaled else self.current_gradient_accumulation_steps
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach() / steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step - self._sums_from
        if "loss" in logs and self._sums and steps:
            for name, total in self._sums.items():
                logs[name] = self.accelerator.gather(total).mean().item() / steps
            self._sums = {}
        super().log(logs, *args, **kwargs)


class _Seen:
    """A model that keeps the output of its last forward, which ``compute_loss`` does not give back."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.model(*args, **kwargs)
        return self.output


def copy_of_student(config: DistillConfig | None, model: Any) -> Any:
    """A copy of the model for ``teacher: frozen``, before anything trains; ``None`` for other teachers.

    Raises:
        ValueError: ZeRO-3 has split the weights over the processes.
    """
    if config is None or config.teacher != "frozen":
        return None
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        source = getattr(unwrap(model), "name_or_path", "") or "PATH"
        raise ValueError(
            "distill.teacher='frozen' copies the model, which ZeRO-3 has split over the processes already; "
            f"name the checkpoint that it was loaded from: --distill.teacher {source}"
        )
    return copy.deepcopy(model)


def witness_of(config: DistillConfig | None, model: Any) -> Witness | None:
    """For ``teacher: base``: what tells whether making the adapter writes to the weights under it."""
    return Witness(model) if config is not None and config.teacher == "base" else None


def check_distillation(trainer: Any, packs: bool) -> None:
    """Refuse what distillation does not go with.

    Raises:
        ValueError: the message names it.
    """
    args = trainer.args
    parallel = trainer.accelerator.parallelism_config
    cut = parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False))
    for wrong, why in (
        (trainer.voco is None, "voco is null, so there is nothing to compress"),
        (trainer.compute_loss_func is not None, "compute_loss_func computes a loss of its own"),
        (args.label_smoothing_factor > 0, "label_smoothing_factor needs whole logits; set it to 0"),
        (cut, "context and sequence parallelism cut rows up"),
        (
            packs and family_of(unwrap(trainer.model).config).images_by_row,
            "packed rows of this family keep the images of a row together; leave packing out",
        ),
    ):
        if wrong:
            raise ValueError(f"distill cannot go with this: {why}.")

"""``VoCoSFTTrainer``: TRL's ``SFTTrainer``, with VoCo tokens in the batches and the rule in the model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from .._compat import (
    introduce_deepspeed_to_the_process_group,
    is_partitioned,
    name_present_layers,
    patch_tied_head,
    token_rows_on_any_device,
)
from ..core.adapter_stages import SEPARATE
from ..core.attachment import attachment, unwrap
from ..core.layout import SequenceLayout, TokenKind
from ..core.packed_rows import DOCUMENT_IDS, Documents
from ..data.lazy_images import has_transform
from ..models import save_voco_config
from ..models.image_first import warn_of_image_first
from ..models.model_paths import note_base
from .adapter_checks import check_adapter
from .adapter_stages import check_adapter_stages, load_adapters, run_by_stage, with_two_adapters
from .adapters import (
    prepare_peft_config,
    save_loose_parameters,
    small_checkpoints,
    train_loose_parameters,
)
from .added_tokens import check_added_tokens
from .answer_end import check_answer_end
from .card import write_card
from .checkpoints import AtomicCheckpoints, SaveAtSteps
from .collator import SKIPPED, VoCoDataCollator
from .config import VoCoSFTConfig
from .datasets import (
    check_dispatch,
    check_lengths,
    groups_by_length,
    has_images,
    prepare_dataset,
    uses_chat_template,
)
from .distillation.trainer_part import Distilling, copy_of_student, witness_of
from .fused_step import take_off_fused_forward
from .given_optimizer import GivenOptimizer
from .image_settings import with_image_settings
from .launch import check_launch, check_sharded_head
from .load_weights import load_whole_weights
from .model_setup import (
    as_it_was_on_failure,
    as_voco_args,
    attach_as_asked,
    check_backbone,
    freeze_as_asked,
    is_peft,
    load_model,
    processor_of,
)
from .packing import check_packing, pack_dataset, without_trls
from .parts import count_trainable, describe_trainable, still_modules
from .quantization import check_quantization
from .skipping import SkipCounter
from .two_stage.trainer_part import Frozen, Staged

logger = logging.getLogger(__name__)


def _heads_on_answers(stock: Callable[..., bool]) -> Callable[..., bool]:
    """TRL 1.16 takes the LM head over labelled positions alone on a GPU, and elsewhere scores every position
    and drops most of it: a fifth of a CPU step of the gridworld recipes, whose answers are a seventh of the
    tokens. Loss and gradients are the same. Remove when TRL scores valid positions on CPU.
    """
    return lambda device: torch.device(device).type == "cpu" or stock(device)


def _gathers_split_heads(stock: Callable[..., Any]) -> Callable[..., Any]:
    """With tied embeddings and trainable token rows, the head's weight is the embedding with the rows written
    in: a plain tensor, whole already, of which TRL 1.16 reads ``ds_status`` under ZeRO-3 ("'Tensor' object
    has no attribute 'ds_status'"), here and again in the backward pass. Such a tensor is told to be whole.
    Remove when TRL skips tensors that are not split.
    """

    def gather(*parameters: torch.Tensor | None) -> Any:
        if is_deepspeed_zero3_enabled():
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            for parameter in parameters:
                if parameter is not None and not is_partitioned(parameter):
                    parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
        return stock(*parameters)

    return gather


IN_TRLS_LOSS = {
    "_use_triton": (_heads_on_answers, "the head scores every position on a CPU"),
    "maybe_gather_lm_head_ctx": (_gathers_split_heads, "ZeRO-3 with tied embeddings may fail"),
}
"""What TRL's fused loss gets instead of its module's own (``fused_step.py``)."""


class VoCoSFTTrainer(AtomicCheckpoints, Distilling, Staged, SFTTrainer):
    """Fine-tunes a vision-language model to compress each image into its VoCo tokens (paper, Sec. 3.2).

    Everything of ``SFTTrainer`` holds: completion-only and assistant-only loss, PEFT, gradient checkpointing,
    resume, evaluation, logging. Besides, each log has ``compression_ratio`` (vision tokens per VoCo token),
    ``voco_tokens_per_sample`` and ``isolation`` (1.0 where text is kept from vision tokens). With
    ``args.distill`` the loss also has the divergence from the plain model (Eq. 1). With
    ``args.stage1="streamed"`` a step of many images runs in two stages (Sec. 3.4), and is the same step; with
    ``"frozen"`` LoRA learns to read what the starting model compresses.

    What trains is what ``args.train_language``, ``train_voco``, ``train_projector`` and
    ``train_vision_tower`` say: with ``peft_config``, adapters in the language model (and the tower), the VoCo
    token's embedding row, and the projector itself; without it, each part's own weights. The line
    ``trainable_report`` says it with counts, and is printed once. A checkpoint holds all that trained.

    Args:
        model: a hub id or path, a model in memory, one that is attached, or a ``PeftModel`` around one. It
            gets :func:`voco_plugin.attach` where ``args.voco`` is set and it is not attached.
        args: a :class:`VoCoSFTConfig`; ``SFTConfig`` will do for an attached model.
        processing_class: the model's processor; read from where the model was loaded if left out.
        data_collator: a :class:`~voco_plugin.VoCoDataCollator` is made if left out.
        train_dataset: rows in TRL's vision formats, or with LLaVA's ``conversations``; a streamed set too.
        eval_dataset: the same, or a dict of several by name.
        quantization_config: how a model that is named is loaded (QLoRA).
        peft_config: of LoRA; its targets are kept to the language model.
        kwargs: whatever else ``SFTTrainer`` takes; ``more`` are its arguments by position.

    Raises:
        ValueError: model, config and data do not fit together; the message says how.
    """

    _tag_names = ["trl", "sft"]
    _name = "VoCo-SFT"

    dataset_name: str | None = None
    """What the model card calls the training data: a hub id or a path."""
    command: str | None = None
    """How the run was started, for the model card; ``None`` reads it off the process."""

    def __init__(
        self,
        model: Any,
        args: VoCoSFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *more: Any,
        quantization_config: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if more:
            raise TypeError("give the arguments after processing_class by name.")
        args = as_voco_args(args, model)
        check_launch(args)
        init_kwargs = args.model_init_kwargs
        introduce_deepspeed_to_the_process_group()
        if isinstance(model, str):
            adapted = peft_config is not None or os.path.isfile(os.path.join(model, "adapter_config.json"))
            check_quantization(quantization_config, adapted)
            model, found = load_model(model, args, quantization_config)
            processing_class = processing_class or found
            # the model is there: TRL would warn that these are ignored
            quantization_config = args.model_init_kwargs = None
        with as_it_was_on_failure(model, processing_class):
            self._set_up(
                model, args, data_collator, train_dataset, eval_dataset, processing_class,
                quantization_config, peft_config, **kwargs,
            )  # fmt: skip
        args.model_init_kwargs = init_kwargs

    def _set_up(
        self,
        model: Any,
        args: Any,
        data_collator: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        quantization_config: Any,
        peft_config: Any,
        **kwargs: Any,
    ) -> None:
        """The rest of the constructor, once the model is in memory."""
        check_backbone(model)
        optimizer = GivenOptimizer(kwargs.get("optimizers"), model)
        if processing_class is None:
            processing_class = processor_of(model, args)
        self.voco = attach_as_asked(model, args.voco, processing_class)
        if self.voco is not None:
            check_added_tokens(model, processing_class, peft_config is not None or is_peft(model))
        train_dataset = prepare_dataset(train_dataset, need_images=self.voco is not None)
        eval_dataset = prepare_dataset(eval_dataset, need_images=False, name="eval_dataset")
        train_dataset = with_image_settings(train_dataset, args, kwargs.get("formatting_func"))
        self._vocab = attachment(model).vocab if self.voco else None
        check_dispatch(args, train_dataset, eval_dataset)
        check_lengths(args, train_dataset)
        templated = uses_chat_template(train_dataset)
        packs = args.packing and has_images(train_dataset)
        if packs:
            check_packing(args, model, self.voco, train_dataset, data_collator)
        check_adapter_stages(self.voco, model, peft_config, args)
        self._note_start(model, args, peft_config)
        frozen = copy_of_student(args.distill, model)
        wrapped = hasattr(model, "peft_config")
        before = None if wrapped else witness_of(args.distill, model)
        hold = None
        if peft_config is not None and not wrapped:
            peft_config = prepare_peft_config(
                model,
                peft_config,
                self._vocab.voco_id if self.voco and args.train_voco and self.voco.reads_vision else None,
                train_projector=args.train_projector,
                train_vision_tower=args.train_vision_tower,
                train_language=args.train_language,
                train_compressor=args.train_voco,
                compresses=self.voco is not None,
            )
            if self.voco is not None and self.voco.adapter_stages == SEPARATE:
                model, peft_config = with_two_adapters(model, peft_config, args), None
        elif not wrapped:
            hold = freeze_as_asked(model, args, self._vocab)
        else:
            check_adapter(
                model,
                language=args.train_language,
                voco=args.train_voco,
                projector=args.train_projector,
                vision_tower=args.train_vision_tower,
                compresses=self.voco is not None,
                by_stage=self.voco is not None and self.voco.adapter_stages == SEPARATE,
            )
        own_forward = vars(unwrap(model)).get("forward")
        with token_rows_on_any_device(), without_trls(args, packs):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **kwargs,
            )
        inner = self.accelerator.unwrap_model(self.model)
        if self.voco is not None:
            self._fused = take_off_fused_forward(unwrap(inner), own_forward, IN_TRLS_LOSS)
            run_by_stage(unwrap(inner), self.voco)
        patch_tied_head(inner)
        if templated:
            check_answer_end(inner, self.processing_class, self.chat_template, args.train_language)
        optimizer.check(inner)
        self._loose = train_loose_parameters(inner, args.train_projector) if is_peft(inner) else []
        self._row_only = hold is not None and hold.only
        if hold is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    f"train_language={args.train_language} with train_voco={args.train_voco} holds rows of "
                    "the embeddings, which DeepSpeed and FSDP cut up; use LoRA, or train both or neither."
                )
            self.add_callback(hold)
        if self.is_fsdp_enabled:
            check_sharded_head(unwrap(self.model), self.accelerator.state.fsdp_plugin.fsdp_version)
            name_present_layers(unwrap(self.model))
        self._prepare_teacher(args.distill, frozen, packs, before)
        self._prepare_stages()
        self._skips = SkipCounter()
        self._trains: tuple[bool, ...] = ()
        self._still: list[Any] = []
        self.add_callback(self._skips)
        if getattr(args, "save_at_steps", None):
            self.add_callback(SaveAtSteps(args.save_at_steps))
        self._set_collators(data_collator)
        if packs:
            self._pack()
        self.trainable_report = self._report()
        if isinstance(self._stages, Frozen):
            attachment(self.model).config.frozen_stage1 = True  # and so says whatever is saved

    # -- setting up

    def _set_collators(self, given: Any) -> None:
        """The training collator, and one for evaluation that always takes K = ``voco.num_tokens``."""
        args = self.args
        if given is None and self._is_vision_dataset:
            self.data_collator = VoCoDataCollator(
                processor=self.processing_class,
                max_length=args.max_length,
                completion_only_loss=self.completion_only_loss,
                pad_to_multiple_of=args.pad_to_multiple_of,
                dataset_text_field=args.dataset_text_field,
                assistant_only_loss=args.assistant_only_loss,
                chat_template=self.chat_template,
                voco=self.voco,
                vocab=self._vocab,
                num_tokens=args.num_tokens_range,
                seed=args.seed if args.data_seed is None else args.data_seed,
                on_bad_sample=args.on_bad_sample,
                pool=_pool(self.train_dataset),
                count_skipped=args.on_bad_sample == "skip",
                made_by=self._image_keys_of,
            )
        elif given is not None and self.voco is not None and not isinstance(given, VoCoDataCollator):
            logger.warning(
                "data_collator is a %s, not a VoCoDataCollator, and VoCo is on: it must put the VoCo "
                "tokens into the batches itself.",
                type(given).__name__,
            )
        self._eval_collator = self.data_collator
        collator = self.data_collator
        if isinstance(collator, VoCoDataCollator) and isinstance(collator.num_tokens, tuple):
            self._eval_collator = dataclasses.replace(collator, num_tokens=self.voco.num_tokens)
            self.add_callback(_TellEpoch(collator))

    def _pack(self) -> None:
        """Put packed rows in the place of the training set."""
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
            raise ValueError("packing=True and context or sequence parallelism: a row would be cut up.")
        rows = self.train_dataset
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        packed = pack_dataset(rows, self.data_collator, seed, process, processes)
        self.train_dataset = packed
        if self.accelerator.is_main_process:
            sys.stderr.write(
                f"packing: {sum(map(len, packed.groups)):,} conversations in {len(packed):,} rows of up to "
                f"{self.data_collator.max_length:,} tokens, {packed.fill:.1%} full\n"
            )

    def _report(self) -> str:
        counts, total = count_trainable(self.accelerator.unwrap_model(self.model), self._row_only)
        self.trained_and_all = sum(counts.values()), total
        report = describe_trainable(counts, total)
        if self.voco is None:
            report += "; no VoCo tokens (voco=None): the plain VLM"
        if self.accelerator.is_main_process:
            sys.stderr.write(report + "\n")
        return report

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._is_vision_dataset:  # TRL drops the text column, and errors name a row by its id
            more = [self.args.length_column_name] if groups_by_length(self.args) else []
            for column in (self.args.dataset_text_field, "conversations", "id", "row", *more):
                if column not in self._signature_columns:
                    self._signature_columns.append(column)

    # -- data

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if has_transform(dataset):  # the transform reads them, whatever it calls what it gives
            return dataset
        return super()._remove_unused_columns(dataset, description)

    @contextlib.contextmanager
    def _collating_for_evaluation(self, dataset: Any) -> Iterator[None]:
        before, self.data_collator = self.data_collator, self._eval_collator
        if isinstance(self.data_collator, VoCoDataCollator) and self.data_collator.on_bad_sample == "skip":
            if dataset is None or isinstance(dataset, str):
                dataset = self.eval_dataset[dataset] if dataset else self.eval_dataset
            self.data_collator = dataclasses.replace(self.data_collator, pool=_pool(dataset))
        # accelerate dispatches a streamed set's batches by default: it cuts them by row, pixels too
        loading = self.accelerator.dataloader_config
        dispatch = loading.dispatch_batches
        loading.dispatch_batches = False if dispatch is None and self._is_vision_dataset else dispatch
        try:
            yield
        finally:
            self.data_collator, loading.dispatch_batches = before, dispatch

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._collating_for_evaluation(eval_dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._collating_for_evaluation(test_dataset):
            return super().get_test_dataloader(test_dataset)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        eval_dataset = prepare_dataset(eval_dataset, need_images=False, name="eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        test_dataset = prepare_dataset(test_dataset, need_images=False, name="test_dataset")
        return super().predict(test_dataset, *args, **kwargs)

    # -- loss and metrics

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if SKIPPED in inputs:
            inputs = dict(inputs)
            skipped = self.accelerator.gather(inputs.pop(SKIPPED))
            self._skips.add(int(skipped.sum()), training=self.model.training)
        if self.voco is not None:
            self._count(inputs)
        if self.model.training:
            self._hold_still()
        if self._distiller is not None and self.model.training:
            return self._distilled_loss(model, inputs, num_items_in_batch)
        step = self._stages or self._fused
        if step is not None:
            inputs = {**inputs, "training_step": step}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _hold_still(self) -> None:
        """The trainer has put the whole model into training mode: not what is frozen of the tower."""
        trains = tuple(parameter.requires_grad for parameter in self.model.parameters())
        if trains != self._trains:  # a callback may freeze or thaw
            self._trains, self._still = trains, still_modules(self.model)
        for module in self._still:
            module.eval()

    def _count(self, inputs: dict[str, Any]) -> None:
        """Log what the batch holds; counts are summed over all processes."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if DOCUMENT_IDS in inputs:
            documents = Documents(inputs[DOCUMENT_IDS], ids.shape)
            ids, mask = documents.split(ids, self._vocab.voco_id), documents.mask
        layout = SequenceLayout.from_ids(ids, mask, self._vocab, require_voco=False)
        local = [(layout.kind == TokenKind.VISION).sum(), (layout.kind == TokenKind.VOCO).sum(), len(ids)]
        counts = self.accelerator.gather(torch.tensor([[int(n) for n in local]], device=ids.device))
        vision, voco, rows = counts.sum(dim=0).tolist()
        if self.voco.isolates and not self.voco.hide_prefix and layout.begins_with_image:
            warn_of_image_first(self.processing_class, "a row of the data has an image")
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["voco_tokens_per_sample"].append(voco / rows)
        if voco:
            metrics["compression_ratio"].append(vision / voco)
            metrics["isolation"].append(float(self.voco.rule != "causal"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.args.on_bad_sample == "skip":
            logs.update(self._skips.metrics(evaluating=any(key.startswith("eval_") for key in logs)))
        super().log(logs, *args, **kwargs)

    # -- saving and loading

    @property
    def _whole_weights(self) -> bool:
        """Whether checkpoints are whole models in one piece (no adapter, nothing sharded)."""
        return not (hasattr(self.model, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def _two_adapters(self) -> bool:
        """Whether two adapters train, of which transformers would load the first."""
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        return whole and self.voco is not None and self.voco.adapter_stages == SEPARATE

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._two_adapters:
            return load_adapters(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)
        if not self._whole_weights:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        load_whole_weights(target, resume_from_checkpoint, self.args.trust_remote_code)

    def _load_best_model(self) -> None:
        if self._two_adapters:
            best = self.state.best_model_checkpoint
            return load_adapters(self.accelerator.unwrap_model(self.model), best)
        if not self._whole_weights:
            return super()._load_best_model()
        target = self.accelerator.unwrap_model(self.model)
        load_whole_weights(target, self.state.best_model_checkpoint, self.args.trust_remote_code)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        with self._whole_model(folder, state_dict) as place:
            with small_checkpoints(self.model):
                super()._save(place, state_dict)
            if self._loose and self.args.should_save:
                inner = self.accelerator.unwrap_model(self.model)
                save_loose_parameters(inner, self._loose, place, state_dict)
            if self.args.should_save:
                if self.voco is not None:
                    save_voco_config(self.model, place, place=self._final_place(folder))
                else:
                    note_base(place)
                self._write_card(place)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files it knows of into the folder it pushes
        if self.voco is not None and self.args.should_save:
            save_voco_config(self.model, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """TRL's card in the output folder, with the metadata and the text that :mod:`.card` makes of it."""
        super().create_model_card(model_name=model_name, dataset_name=None, tags=tags)
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir, model_name, dataset_name)

    def _write_card(self, folder: str, name: str | None = None, dataset_name: str | None = None) -> None:
        write_card(self, folder, name=name, dataset_name=dataset_name or self.dataset_name)


class _TellEpoch(TrainerCallback):
    """Tells the collator the epoch, from which (and the batch) it draws K."""

    def __init__(self, collator: VoCoDataCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.collator.set_epoch(int((state.epoch or 0) + 1e-6))


def _pool(dataset: Any) -> Any:
    """Where stand-ins for bad samples are drawn from; ``None`` for a stream, which has no n-th row."""
    return dataset if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") else None

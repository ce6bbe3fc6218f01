"""``VoCoSFTConfig``: TRL's ``SFTConfig`` and what VoCo adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_cuda_available, is_torch_npu_available, is_torch_xpu_available
from trl import SFTConfig

from ..config import VoCoConfig, nearest, read_section, suggest_fields
from ..data.images import ON_BAD_SAMPLE, check_on_bad_sample
from .chat_templates import template_file
from .collator import check_range
from .distillation.config import as_distill_config

STAGE1 = ("joint", "streamed", "frozen")


@suggest_fields
@dataclass
class VoCoSFTConfig(SFTConfig):
    """Arguments of :class:`~voco_plugin.training.VoCoSFTTrainer`: all of TRL's ``SFTConfig``, and those
    below.

    One of TRL's means more here: with ``packing`` conversations with images share rows of up to
    ``max_length`` tokens, whole, and isolated from each other (TRL refuses this): first-fit decreasing over
    the whole training set, by lengths that a first pass counts from image sizes and text.
    ``per_device_train_batch_size`` then counts packed rows. Evaluation is not packed.

    Args:
        voco: the rule, as a :class:`~voco_plugin.VoCoConfig`, a dict of its fields, or such a dict as JSON.
            ``None`` trains the plain VLM (no VoCo tokens, no isolation), unless the model given is attached
            already.
        num_tokens_range: ``[low, high]``: K is drawn for each training batch from low to high (elastic
            training); evaluation keeps ``voco.num_tokens``, which must lie within. ``None`` always takes
            ``voco.num_tokens``.
        train_language: whether the language model trains: its weights, or under PEFT its adapters.
        train_voco: whether the VoCo token's embedding row trains (the input row; with tied embeddings, the
            head's too). Without VoCo tokens it means nothing.
        train_projector: whether the projector between vision tower and language model trains: its own
            weights, under PEFT too, with what belongs to it outside its module (``image_newline``).
        train_vision_tower: whether the vision tower trains. Under PEFT its linear layers get adapters
            instead.
        on_bad_sample: what to do with a sample whose image cannot be read, or that the processor refuses:
            ``raise``, or ``skip``: another row takes its place, the same in every epoch and after a resume;
            each is named in a warning and counted in ``skipped_samples``.
        save_at_steps: optimizer steps after which a checkpoint is saved, besides those of ``save_strategy``:
            for a curve over training.
        distill: what is added to the loss so that the model answers as the plain one does (paper, Eq. 1):
            a :class:`~voco_plugin.training.DistillConfig`, a dict of its fields, or such a dict as JSON. The
            log then has ``ce_loss`` and ``distill_loss`` next to ``loss``. ``None`` adds nothing.
        stage1: how the images of a batch are compressed while training. ``joint``: in one pass with the text,
            under the rule. ``streamed``: in chunks of images before it, each recomputed in the backward pass;
            the text then runs on their VoCo tokens' keys and values. Loss and gradients are the same, and
            memory does not grow with the number of images but by those keys and values (paper, Sec. 3.4).
            ``frozen``: by the model training starts from, without gradient; only a LoRA adapter that reads
            the blocks trains (``train_voco: false``), and the saved model compresses without it.
        stage1_chunk: images (blocks) a chunk of ``streamed`` and ``frozen``; ``None``: 8.
        stage1_store: folder of a :class:`~voco_plugin.store.store.VoCoCacheStore` for ``frozen``: blocks that
            it holds are read, others computed and, unless it cannot be written to, put there. One that ``voco
            compress --store`` filled with the starting model will do. ``None`` computes every block at every
            step.

    ``chat_template_path`` is a ``.jinja`` file, a folder that has one (``chat_template.jinja``), or the bare
    name of a shipped template: the conversation that a family was tuned with, its answers marked for
    ``assistant_only_loss`` (``vicuna_v1``, ``llava_plain``, ``llava_onevision``, ``qwen2_5_vl``,
    ``qwen3_vl``, ``internvl``, ``smolvlm``, ``gemma3``). Another tokenizer's, which TRL would copy, is
    refused.

    Defaults that differ from TRL's:
        - ``max_length``: ``None`` instead of 1024. A limit never cuts through an image: it raises.
        - ``bf16``: false without an accelerator (or with ``use_cpu``), where TRL's default raises.

    As in TRL, ``gradient_checkpointing`` is on, ``logging_steps`` is 10, ``remove_unused_columns`` keeps the
    columns of the vision formats, and ``padding_free`` is refused for vision data.

    Raises:
        ValueError: ``voco``, ``num_tokens_range``, ``save_at_steps``, ``stage1`` or ``on_bad_sample`` is not
            valid, ``stage1="frozen"`` is to train more than an adapter of the language model, the range is
            given without ``voco``, or ``packing`` without ``max_length``.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "voco", "distill"]

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest sequence in tokens; only text after the last image is ever cut. None: no limit."
        },
    )
    voco: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The VoCo rule as JSON, e.g. '{\"num_tokens\": 2}'; none trains the plain VLM."},
    )
    distill: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Distillation from the plain model as JSON, e.g. \'{"teacher": "base"}\'.'},
    )
    num_tokens_range: list[int] | None = field(
        default=None,
        metadata={"help": "Two integers, low and high: K is drawn from them for each training batch."},
    )
    train_language: bool = field(default=True, metadata={"help": "Whether the language model trains."})
    train_voco: bool = field(default=True, metadata={"help": "Whether the VoCo token's row trains."})
    train_projector: bool = field(default=False, metadata={"help": "Whether the projector trains."})
    train_vision_tower: bool = field(default=False, metadata={"help": "Whether the vision tower trains."})
    on_bad_sample: str = field(
        default="raise",
        metadata={
            "help": "A sample whose image is unusable: raise, or skip (another row takes its place).",
            "choices": list(ON_BAD_SAMPLE),
        },
    )

    save_at_steps: list[int] | None = field(
        default=None,
        metadata={"help": "Optimizer steps after which a checkpoint is saved, besides save_strategy's."},
    )

    stage1: str = field(
        default="joint",
        metadata={
            "help": "Images compressed in one pass with the text (joint), in chunks before it (streamed), or "
            "by the starting model, untrained (frozen).",
            "choices": list(STAGE1),
        },
    )
    stage1_chunk: int | None = field(
        default=None, metadata={"help": "Images a chunk of stage1=streamed or frozen; none: 8."}
    )
    stage1_store: str | None = field(
        default=None,
        metadata={"help": "Folder of the store that stage1=frozen reads blocks from, and fills."},
    )

    def __post_init__(self) -> None:
        voco = as_voco_config(self.voco)
        # the fields are annotated as what is given, for HfArgumentParser; from here on they are configs
        self.voco = voco  # type: ignore[assignment]
        self.distill = as_distill_config(self.distill)  # type: ignore[assignment]
        check_on_bad_sample(self.on_bad_sample)
        self._check_stage1()
        if self.num_tokens_range is not None:
            self.num_tokens_range = list(check_range(self.num_tokens_range))
            low, high = self.num_tokens_range
            if voco is not None and not low <= voco.num_tokens <= high:
                raise ValueError(
                    f"voco.num_tokens={voco.num_tokens} is outside "
                    f"num_tokens_range={self.num_tokens_range}, so it would be evaluated untrained; choose "
                    "it within the range."
                )
        if any(step < 1 for step in self.save_at_steps or []):
            raise ValueError(f"save_at_steps={self.save_at_steps} must be optimizer steps of at least 1.")
        if self.packing and self.max_length is None:
            raise ValueError(
                "packing=True needs max_length, the tokens of a packed row (at least the longest "
                "conversation); set it, e.g. max_length=2048."
            )
        if self.chat_template_path is not None:
            self.chat_template_path = template_file(self.chat_template_path)
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not _has_accelerator()):
            self.bf16 = False
        super().__post_init__()

    def _check_stage1(self) -> None:
        if self.stage1 not in STAGE1:
            raise ValueError(
                f"stage1={self.stage1!r} is not known{nearest(self.stage1, STAGE1)}; "
                f"use one of {', '.join(STAGE1)}."
            )
        if self.stage1 == "frozen":
            for name in ("train_voco", "train_projector", "train_vision_tower"):
                if getattr(self, name):
                    raise ValueError(
                        f"stage1='frozen' keeps what compresses as it is, and {name} is true; set {name}: "
                        "false, or stage1: streamed."
                    )
        elif self.stage1_store is not None:
            raise ValueError(
                f"stage1_store={self.stage1_store!r} is for stage1=frozen, not {self.stage1!r}: the blocks "
                "of other ways change with every step; leave it out."
            )
        if self.stage1_chunk is None:
            return
        if self.stage1 == "joint":
            raise ValueError(
                f"stage1_chunk={self.stage1_chunk} is for stage1=streamed or frozen, not {self.stage1!r}; "
                "leave it out, or set stage1=streamed."
            )
        if self.stage1_chunk < 1:
            raise ValueError(f"stage1_chunk={self.stage1_chunk} must be at least 1, images a chunk.")

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values, ``voco`` and ``distill`` as dicts."""
        values = super().to_dict()
        for name in ("voco", "distill"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name).to_dict()
        return values


def as_voco_config(value: VoCoConfig | dict[str, Any] | str | None) -> VoCoConfig | None:
    """``value`` as a :class:`~voco_plugin.VoCoConfig`; see :func:`~voco_plugin.config.read_section`."""
    return read_section(value, VoCoConfig, "voco", '{"num_tokens": 2}')


def _has_accelerator() -> bool:
    return is_torch_cuda_available() or is_torch_xpu_available() or is_torch_npu_available()

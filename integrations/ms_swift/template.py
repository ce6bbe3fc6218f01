"""``--template voco``: rows as ``VoCoSFTTrainer`` makes them, in ms-swift's template.

messages with <image> tags → chat parts → the model's chat template and processor, VoCo tokens in
→ lists of ids and labels, and pixels, which ms-swift's collator pads
"""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

from swift.template import TEMPLATE_MAPPING, Template, TemplateMeta, register_template
from voco_plugin.integrations.trainer_rule import check_row_trains

import voco_plugin as vp
from voco_plugin.training.chat_templates import training_template
from voco_plugin.training.labelled_batch import labelled_batch, prompt_batch
from voco_plugin.training.parts import keep_still

from .loading import VOCO
from .settings import REFUSED_TEMPLATE, TEMPLATE, asked_chat_template, check_template

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
_GATHERED = ("pixel_values", "image_sizes", "image_grid_thw")
_TAG = "<image>"
_UNFREEZE = (
    "leave the embeddings out of --freeze_parameters, set --freeze_llm false, or use --tuner_type lora"
)


def register_templates() -> None:
    """Add ``voco``; refuse the others by name."""
    for name, meta in TEMPLATE_MAPPING.items():
        if name != TEMPLATE:
            meta.template_cls = functools.partial(_refuse, name)
    meta = TemplateMeta(
        TEMPLATE,
        prefix=[],
        prompt=["{{QUERY}}"],
        chat_sep=[],
        system_prefix=["{{SYSTEM}}"],
        template_cls=VoCoTemplate,
    )
    register_template(meta, exist_ok=True)


def _refuse(name: str, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(REFUSED_TEMPLATE.format(name=name, template=TEMPLATE))


class VoCoTemplate(Template):
    """The model's own chat template, VoCo tokens after each image, and labels on the answers alone.

    Images stand where a message has ``<image>``; text is taken as it stands. Rows of tools, videos, audio and
    boxes, and weights of single messages, are refused.
    """

    support_padding_free = False
    _rows: Any = None
    _prompts: Any = None
    _chat_template = ""
    _checked = False

    def init_processor(self, processor: Any) -> None:
        """
        Raises:
            ValueError: a setting makes other batches than ``VoCoSFTTrainer``'s, or the chat template does not
                mark the answers.
        """
        if processor is None or self._processor_inited:
            return
        super().init_processor(processor)
        check_template(self)
        config = getattr(self.model_info, VOCO, None)
        if config is None:
            raise ValueError(
                "--template voco needs a model that was loaded under the rule: a vision-language model, with "
                "this plugin in --external_plugins."
            )
        self._chat_template = training_template(processor, asked_chat_template())
        self._rows = self._inserting(labelled_batch, config)
        self._prompts = self._inserting(prompt_batch, config)
        self._probe()

    def _inserting(self, collate: Any, config: vp.VoCoConfig) -> Any:
        """``collate`` of conversations, with VoCo tokens put in."""
        plain = functools.partial(collate, processor=self.processor, template=self._chat_template)
        return vp.wrap_collator(plain, config, processor=self.processor)

    def _probe(self) -> None:
        """Encode one conversation: what cannot be done is said here, once, and not for each row.

        Raises:
            ValueError: the processor gives what ms-swift's collator does not gather.
        """
        from PIL import Image

        image = Image.new("RGB", (64, 48))
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
        known = {"input_ids", "attention_mask", "labels", *_PER_TOKEN, *_GATHERED}
        others = sorted(set(self._rows([turns])) - known)
        if others:
            raise ValueError(
                f"{type(self.processor).__name__} gives {', '.join(others)}, which ms-swift's collator does "
                "not gather; train this family with voco train."
            )

    def set_mode(self, mode: str) -> None:
        """
        Raises:
            ValueError: it is one of preference training, which was not compared.
        """
        if mode in ("rlhf", "kto"):
            raise ValueError(
                f"{mode} is refused under VoCo: only swift sft was compared with VoCoSFTTrainer."
            )
        super().set_mode(mode)

    def _preprocess_tools(self, inputs: Any) -> None:
        """
        Raises:
            ValueError: the row has tools.
        """
        if inputs.tools:
            raise ValueError("the row has tools, which --template voco does not write.")

    def _encode(self, inputs: Any) -> dict[str, Any]:
        """One row: ``input_ids`` and ``labels`` as lists, per-token ids, and pixels."""
        messages = self._chat(inputs)
        if not self.is_training and messages[-1]["role"] == "assistant":
            raise ValueError("a prompt ends with an answer; end it with the user's turn.")
        batch = self._rows([messages]) if self.is_training else self._prompts([messages])
        encoded = {key: batch[key] for key in _GATHERED if key in batch}
        for key in ("input_ids", *_PER_TOKEN):
            if key in batch:
                encoded[key] = batch[key][0].tolist()
        encoded["labels"] = encoded["loss_scale"] = None
        if self.is_training:
            labels = batch["labels"][0]
            if self._loss_scale == "last_round":
                labels = _last_answer(labels)
            encoded["labels"] = labels.tolist()
        return encoded

    def _chat(self, inputs: Any) -> list[dict[str, Any]]:
        """The conversation as chat messages, images in their places.

        Raises:
            ValueError: it holds what is not written here, or not one ``<image>`` for each image.
        """
        for name in ("videos", "audios", "objects"):
            if getattr(inputs, name, None):
                raise ValueError(f"the row has {name}, which --template voco does not write.")
        images = list(inputs.images)
        system = inputs.system if inputs.system is not None else self.template_meta.default_system
        found = [{"role": "system", "content": system}] if system else []
        for message in deepcopy(inputs.messages):
            if message["content"] is None:
                continue  # the answer that is asked for
            if message.get("loss") is not None or message.get("loss_scale") is not None:
                raise ValueError("a message has loss or loss_scale: answers are learnt with weight 1.")
            role, content = message["role"], message["content"]
            if role not in ("user", "assistant", "system") or not isinstance(content, str):
                raise ValueError(f"a message of role {role!r} is not written by --template voco.")
            parts: list[dict[str, Any]] = []
            for number, text in enumerate(content.split(_TAG)):
                if number:
                    if not images:
                        raise ValueError(f"there are more {_TAG} in the messages than images.")
                    parts.append({"type": "image", "image": images.pop(0)})
                if text:
                    parts.append({"type": "text", "text": text})
            found.append({"role": role, "content": parts})
        if images:
            raise ValueError(f"there are more images than {_TAG} in the messages.")
        return found

    def _data_collator(self, batch: list[dict[str, Any]], *, padding_to: int | None = None) -> dict[str, Any]:
        """ms-swift's, without positions: the model counts them once VoCo tokens are in."""
        made = super()._data_collator(batch, padding_to=padding_to)
        made.pop("position_ids", None)
        return made

    def _post_encode(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Nothing: the model puts the image features in itself."""
        return inputs

    def forward_context(self, model: Any, inputs: Any) -> Any:
        """
        Raises:
            ValueError: at the first step, that the VoCo token's row does not train.
        """
        if not self._checked:
            check_row_trains(model, _UNFREEZE)
            keep_still(model)
            self._checked = True
        return super().forward_context(model, inputs)


def _last_answer(labels: Any) -> Any:
    """``labels`` ``(T,)`` with those of the last answer alone."""
    learnt = (labels != -100).nonzero().flatten().tolist()
    start = learnt[-1]
    for place in reversed(learnt[:-1]):
        if place != start - 1:
            break
        start = place
    kept = labels.clone()
    kept[:start] = -100
    return kept

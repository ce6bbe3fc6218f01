"""The generic family: what can be told from a pure-attention vision-language model and its processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...config import VoCoConfig
from ...core.layout import TokenVocabulary, sequential_positions, tokenizer_of
from .observe import observed_markers

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_STARTS = (
    "vision_start_token_id",
    "boi_token_id",
    "boi_token_index",
    "image_start_token_id",
    "start_image_token_id",
    "video_start_token_id",
)
_ENDS = (
    "vision_end_token_id",
    "eoi_token_id",
    "eoi_token_index",
    "image_end_token_id",
    "end_image_token_id",
    "video_end_token_id",
)
_START_NAMES = ("boi_token", "start_image_token", "image_start_token", "vision_start_token")
_END_NAMES = ("eoi_token", "end_image_token", "image_end_token", "vision_end_token")
_GRID = "grid_thw"
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


class VocabularyError(ValueError):
    """The ids of a family's image tokens cannot be told."""


def _ids(source: Any, names: tuple[str, ...]) -> set[int]:
    return {int(v) for n in names if isinstance(v := getattr(source, n, None), int) and v >= 0}


class Family:
    """Accessors and rules of a vision-language family; subclasses override what differs.

    ``model`` is a transformers model without wrappers, ``backbone`` its module that takes ``input_ids`` and
    pixels. Both are ``Any`` to type checkers: what they have depends on the family.

    Attributes:
        prefix_lm: whether the backbone reads its prompt both ways where it is given ``token_type_ids``.
        images_by_row: whether its pixels are laid out by batch row, ``(rows, tiles, 3, H, W)``, with tiles
            of zeros as padding, and not listed image after image.
    """

    prefix_lm = False
    images_by_row = False

    def prefix(self, token_types: torch.Tensor) -> torch.Tensor:
        """Which tokens a prefix-LM reads both ways, of its ``token_type_ids`` ``(B, N)``."""
        raise NotImplementedError("only a prefix-LM has a prefix")

    def backbone(self, model: Any) -> torch.nn.Module:
        """The module below the LM head."""
        return model.base_model

    def text_model(self, model: Any) -> torch.nn.Module:
        """The decoder stack that runs over merged embeddings."""
        text = model.get_decoder()
        inner = getattr(text, "model", None)
        return (
            text if inner is None or hasattr(text, "layers") else inner
        )  # Llama 4's decoder has its LM head on

    def merged_at(self, model: Any) -> tuple[torch.nn.Module, bool]:
        """Where the embeddings with the image features merged in can be had: a module, and whether they are
        its output (else its argument ``inputs_embeds``).
        """
        text = self.text_model(model)
        merges = getattr(text, "embed_tokens_extend", None)  # Phi-4's decoder encodes the images itself
        return (text, False) if merges is None else (merges, True)

    def chunk_size(self, model: Any) -> int | None:
        """How many tokens a chunk of chunked attention holds, or ``None`` where no layer has it."""
        config = self.text_model(model).config
        chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        return getattr(config, "attention_chunk_size", None) if chunked else None

    def windowed(self, model: Any) -> bool:
        """Whether any layer attends within a window or a chunk, so that it asks where a slot stood."""
        config = self.text_model(model).config
        types = getattr(config, "layer_types", None)
        if types:
            return bool({"sliding_attention", "chunked_attention"} & set(types))
        return getattr(config, "sliding_window", None) is not None

    def shares_keys(self, model: Any) -> bool:
        """Whether layers use the keys and values of an earlier layer (Gemma 3n), which must then be whole."""
        return bool(getattr(self.text_model(model).config, "num_kv_shared_layers", 0))

    def multi_axis(self, backbone: Any) -> bool:
        """Whether positions have three axes (mrope: Qwen-VL's), which the backbone reads off the grids."""
        return hasattr(backbone, "get_rope_index")

    def has_grids(self, vision: Mapping[str, Any]) -> bool:
        """Whether a forward's keyword arguments hold the grids that place image tokens on three axes."""
        return any(name.endswith(_GRID) and value is not None for name, value in vision.items())

    def refusal(self, model: Any) -> str | None:
        """Why the isolation rule cannot hold in this model, or ``None``.

        Recurrent and convolutional layers carry vision past any mask in their state; an encoder-decoder or a
        cross-attending model has no vision tokens in its sequence.
        """
        config = model.config.get_text_config()
        name = getattr(model.config, "model_type", type(model).__name__)
        if getattr(model.config, "is_encoder_decoder", False):
            return (
                f"{name} is an encoder-decoder: its decoder cross-attends, there is no vision token to hide"
            )
        odd = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
        if odd:
            return (
                f"{name} has layers of type {', '.join(odd)}, not plain attention: a recurrent or "
                "convolutional state (or keys chosen by an index) carries the vision tokens past any mask"
            )
        text = self.text_model(model)
        if getattr(model, "_is_stateful", False) or getattr(text, "_is_stateful", False):
            return f"{name} keeps a recurrent state, which carries the vision tokens past any mask"
        layers = getattr(text, "layers", text)  # what stands beside them may be image or audio encoders
        for path, module in layers.named_modules():
            kind = type(module).__name__.lower()
            if isinstance(module, torch.nn.Conv1d):
                return f"{name} has a convolution over the sequence ({path}), which mixes past any mask"
            if "crossattention" in kind or "crossattn" in path.replace("_", ""):
                return self._crosses(name, f"layer {path}")
        beside = next((n for n, _ in text.named_children() if "crossattn" in n.replace("_", "")), None)
        return None if beside is None else self._crosses(name, beside)

    @staticmethod
    def _crosses(name: str, where: str) -> str:
        return f"{name} reads images by cross-attention ({where}): its text holds no vision token to hide"

    def placeholders(self, config: Any, processor: Any) -> set[int]:
        """Ids that are replaced by image or video features."""
        found: set[int] = set()
        for source in (
            config,
            getattr(config, "vision_config", None),
            processor,
            getattr(processor, "tokenizer", None),
        ):
            if source is not None:
                found |= _ids(source, _PLACEHOLDERS)
        starts, others = self.markers(config, processor)
        return found - starts - others  # Gemma's processor calls its start marker the image token

    def markers(self, config: Any, processor: Any) -> tuple[set[int], set[int]]:
        """``(start markers, other markers)`` that the processor or template puts around the placeholders."""
        tokenizer = getattr(processor, "tokenizer", None)
        starts: set[int] = set()
        others: set[int] = set()
        for source in (config, processor, tokenizer):
            if source is not None:
                starts |= _ids(source, _STARTS)
                others |= _ids(source, _ENDS)
        if tokenizer is not None:
            known = tokenizer.get_vocab()
            for names, well_known, found in (
                (_START_NAMES, "<|vision_start|>", starts),
                (_END_NAMES, "<|vision_end|>", others),
            ):
                tokens = {getattr(source, n, None) for source in (processor, tokenizer) for n in names}
                found |= {known[t] for t in {*tokens, well_known} if isinstance(t, str) and t in known}
        return starts, others

    def edges(self, config: Any, processor: Any) -> set[int]:
        """Markers that open and close an image alike."""
        return set()

    def finals(self, config: Any, processor: Any) -> set[int]:
        """Markers of an image's last tile: glue after it is the user's text."""
        return set()

    def glue(self, config: Any, processor: Any) -> set[int]:
        """Ordinary text ids that belong to an image where they stand between its vision tokens."""
        return set()

    def vocabulary(self, *, config: Any = None, processor: Any = None, voco: VoCoConfig) -> TokenVocabulary:
        """The ids by which sequences of this family are read."""
        tokenizer = tokenizer_of(processor)
        placeholders = self.placeholders(config, processor)
        if not placeholders:
            raise VocabularyError(
                "no image token id in the model config or the processor; give a config with image_token_id, "
                "or attach(…, vocabulary=TokenVocabulary(…))."
            )
        voco_id = voco.token_id
        if voco_id is None and tokenizer is not None:
            voco_id = tokenizer.get_vocab().get(voco.token)
        if voco_id is None:
            raise VocabularyError(
                f"the VoCo token {voco.token!r} has no id: pass processor=… to attach (it adds the token), "
                "or set VoCoConfig(token_id=…)."
            )
        if voco_id in placeholders:
            raise VocabularyError(
                f"VoCoConfig.token_id={voco_id} is the image token itself; choose another id."
            )
        bos = None
        if voco.block_sink == "bos":
            bos = getattr(tokenizer, "bos_token_id", None)
            if bos is None and config is not None:
                bos = getattr(config.get_text_config(), "bos_token_id", None)
            if not isinstance(bos, int):
                raise VocabularyError(
                    "block_sink='bos' needs a BOS token, and this tokenizer has none; use 'none'."
                )
        starts, others = self.markers(config, processor)
        if processor is not None:
            seen_starts, seen_others = observed_markers(processor, placeholders)
            others = others | (seen_others - starts)
            starts = starts | (seen_starts - others)
        return TokenVocabulary(
            voco_id=int(voco_id),
            placeholders=frozenset(placeholders),
            markers=frozenset(starts | others) - placeholders,
            glue=frozenset(self.glue(config, processor)),
            starts=frozenset(starts) - placeholders,
            edges=frozenset(self.edges(config, processor)),
            finals=frozenset(self.finals(config, processor)),
            bos_id=bos,
        )

    def sequential(
        self,
        backbone: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        vision: dict[str, Any],
    ) -> torch.Tensor:
        """The backbone's own positions of a sequence from 0: ``(B, N)``, or ``(3, B, N)`` for mrope families.

        Args:
            vision: the forward's other keyword arguments (grids, token types, …).

        Raises:
            ValueError: an mrope family's image tokens without the grids that place them.
        """
        if not self.multi_axis(backbone):
            return self.sequential_of_text(backbone, attention_mask)
        wanted = inspect.signature(backbone.get_rope_index).parameters
        given = {k: v for k, v in vision.items() if k in wanted and v is not None}
        if not bool((self.token_types(backbone.config, input_ids) > 0).any()):
            return self.sequential_of_text(backbone, attention_mask)
        if not self.has_grids(given):
            raise ValueError(
                "image tokens without image_grid_thw: their positions cannot be told (the backbone would "
                "count them as text); pass the processor's image_grid_thw along."
            )
        if "mm_token_type_ids" in wanted and "mm_token_type_ids" not in given:
            given["mm_token_type_ids"] = self.token_types(backbone.config, input_ids)
        given.update(input_ids=input_ids, attention_mask=attention_mask)
        return backbone.get_rope_index(**given)[0]

    def sequential_of_text(self, backbone: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        """:meth:`sequential` of tokens that are known to be text, which need not be read for it."""
        positions = sequential_positions(attention_mask)
        return positions.expand(3, *positions.shape).clone() if self.multi_axis(backbone) else positions

    def token_types(self, config: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """``mm_token_type_ids`` as the processor would give them: 0 text, 1 image, 2 video. ``(B, N)``."""
        types = torch.zeros_like(input_ids)
        for value, names in ((1, _PLACEHOLDERS[:2]), (2, _PLACEHOLDERS[2:])):
            for token in _ids(config, names):
                types[input_ids == token] = value
        return types

    def shape_positions(self, backbone: Any, positions: torch.Tensor) -> torch.Tensor:
        """1-D text positions ``(B, N)`` in the shape the backbone wants."""
        if self.multi_axis(backbone) and positions.dim() == 2:
            return positions.expand(3, *positions.shape)
        return positions

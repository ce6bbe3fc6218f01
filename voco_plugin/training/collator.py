"""``VoCoDataCollator``: TRL's vision collator, with VoCo tokens after each image.

rows (messages | prompt + completion | text | LLaVA's conversations)
  → copies in TRL's own format → TRL's collator, without a length limit → VoCo tokens in → cut to max_length
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..config import VOCO, VoCoConfig
from ..core.block_embeddings import QUESTION_MASK
from ..core.injection import insert_voco_tokens, truncate
from ..core.layout import TokenVocabulary, plain_processor
from ..core.packed_rows import pack_batch
from ..data.conversations import llava_to_messages
from ..data.images import BadImageError, check_on_bad_sample, open_image
from ..models.families import family_of_processor
from ..registry import compressors
from ..store.keys import image_key
from .bad_rows import DRAWS, NothingToLearn, ReplacesBadRows
from .placeholders import check_answers, check_texts
from .two_stage.frozen_blocks import IMAGE_KEYS, as_tensor

logger = logging.getLogger(__name__)

SKIPPED = "skipped_samples"


@dataclass
class VoCoDataCollator(ReplacesBadRows, DataCollatorForVisionLanguageModeling):
    """Batches of a vision dataset with K VoCo tokens after each image, labelled -100.

    Every row is one of TRL's vision formats (``messages``, ``prompt`` and ``completion``, or ``text``) or
    LLaVA's ``conversations``, with ``image`` or ``images``: PIL images, paths, lists of them, or none. Rows
    are not mutated. Where the examples are lists of such rows, each list is packed into one row of the batch
    (:func:`~voco_plugin.core.packed_rows.pack_batch`).

    The tokenizer of ``processor`` must know the VoCo token (:func:`voco_plugin.attach` adds it).

    A batch is a dict with ``input_ids``, ``attention_mask``, ``labels`` ``(B, M)``, type ids where the
    processor gives them, and its pixel arguments; of packed rows also ``document_ids``.

    Differs from TRL's collator: ``max_length`` never cuts through an image, which raises;
    ``pad_to_multiple_of`` holds for prompt-completion rows too; rows with and without images may be mixed.

    Args:
        voco: what is compressed; ``None`` is TRL's collator as it is, without VoCo tokens (``vocab``,
            ``num_tokens`` and ``seed`` are then unused).
        vocab: the ids by which sequences are read; ``None`` derives it from ``processor``.
        num_tokens: K; ``None`` takes ``voco.num_tokens``; ``(low, high)`` draws one K per batch, both ends
            included. The draw depends on the batch's ids, ``seed`` and the epoch only, so that neither
            workers, processes nor a resumed run change it.
        seed: seed of that draw, and of the rows that stand in for bad ones.
        on_bad_sample: ``raise``, or ``skip``: a row whose image cannot be read, that the image processor
            refuses, or of which nothing would be learnt, is named in a warning and another takes its place,
            so that batches stay full. Which one depends on the bad row's content and ``seed`` only. Faults
            of format always raise. Of a packed row it is left out; only where nothing else is in it, another
            takes its place.
        pool: the data set the other row is drawn from; without one, a good row of the same batch comes twice.
        count_skipped: put ``skipped_samples`` ``(B,)`` into the batch: how many bad ones each row had.
        made_by: the fingerprint of a store's blocks: put the images' keys in that store into the batch,
            ``voco_image_keys`` ``(B, I, 32)`` (``I`` images of the row with most). Not of packed rows.

    Raises:
        ValueError: a row's format is unknown or differs from its neighbours', images and placeholders differ
            in number, a cut at ``max_length`` would go through an image, or packed rows are longer than that.
        NothingToLearn: no token of a row has a label (``max_length`` cut its answer off), and
            ``on_bad_sample`` is ``raise``.
        BadImageError: an image is unusable and ``on_bad_sample`` is ``raise``, or nothing good was found in
            its place.
    """

    voco: VoCoConfig | None = None
    vocab: TokenVocabulary | None = None
    num_tokens: int | tuple[int, int] | None = None
    seed: int = 0
    on_bad_sample: str = "raise"
    pool: Any = None
    count_skipped: bool = False
    made_by: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_on_bad_sample(self.on_bad_sample)
        self.processor = plain_processor(self.processor)
        self._named: set[str] = set()
        # shared memory, so that workers that outlive an epoch see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if self.voco is None:
            return
        if self.vocab is None:
            from ..models.families import vocabulary_for

            self.vocab = vocabulary_for(processor=self.processor, config=None, voco=self.voco)
        if self.num_tokens is None:
            self.num_tokens = self.voco.num_tokens
        if not isinstance(self.num_tokens, int):
            self.num_tokens = check_range(self.num_tokens)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is: a K drawn from a range differs between epochs."""
        self._epoch.fill_(int(epoch))

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of ``examples``; see the class."""
        packed: list[int] | None = None
        examples = list(examples)
        places = list(range(len(examples)))  # the batch's row of each conversation
        if examples and isinstance(examples[0], (list, tuple)):
            # one list under two names: a conversation that is left out leaves it too
            places = packed = [place for place, group in enumerate(examples) for _ in group]
            examples = list(itertools.chain.from_iterable(examples))
        names = [name_of(example, row) for row, example in enumerate(examples)]
        problems: dict[int, str] = {}
        rows: list[Any] = [
            self._row(e, n, problems, i) for i, (e, n) in enumerate(zip(examples, names, strict=True))
        ]
        bad = [places[number] for number in problems]
        size = 1 + max(places, default=-1)
        if problems:
            self._replace(problems, examples, rows, names, packed)
        check_same_kind(rows, self.dataset_text_field, names)
        kind: type[ValueError]
        last: Exception
        for _ in range(DRAWS):  # what stands in for a row may teach nothing either
            try:
                with _plain_offsets(self.processor):
                    batch = self._collate([dict(row) for row in rows], names, packed)
                break
            except NothingToLearn as found:
                refused, kind, last = found.problems, NothingToLearn, found
            except Exception as error:
                refused, kind, last = self._refused(rows, names), BadImageError, error
                if not refused:
                    self._blame(error, rows, names)
                    raise
            bad += [places[number] for number in refused]
            self._replace(refused, examples, rows, names, packed, kind)
        else:
            raise last
        if self.count_skipped:
            batch[SKIPPED] = torch.bincount(torch.tensor(bad, dtype=torch.long), minlength=size)
        return batch

    def _row(self, example: Any, name: str, problems: dict[int, str], number: int) -> dict[str, Any] | None:
        """The row of ``example``; where its image is bad, the reason goes to ``problems``."""
        try:
            row = as_trl_row(example, self.dataset_text_field, name)
        except BadImageError as error:
            problems[number] = str(error)
            return None
        check_texts(row, name, self.processor)
        return row

    def _blame(self, error: Exception, rows: list[dict[str, Any]], names: list[str]) -> None:
        """Raise ``error`` with the name of the row that it comes from, where it names none: processors and
        chat templates know of no rows.
        """
        if any(name in str(error) for name in names):
            return
        for row, name in zip(rows, names, strict=True):
            try:
                self._collate([dict(row)], [name])
            except NothingToLearn:
                continue
            except (ValueError, TemplateError) as own:
                raise ValueError(f"{name}: {own}") from error
            except Exception:
                return

    def _collate(
        self, rows: list[dict[str, Any]], names: list[str], packed: list[int] | None = None
    ) -> dict[str, Any]:
        """The batch of ``rows``; ``packed`` says which go side by side, or ``None``."""
        if self.voco is None:
            if packed is not None:
                raise ValueError(
                    "packing needs VoCo on: nothing else keeps packed conversations apart in the model; set "
                    "voco (rule: causal isolates nothing else), or leave packing off."
                )
            batch = super().torch_call(rows)
            self._check_labels(batch, names)
            return batch
        assert self.vocab is not None  # `__post_init__` derives it
        images = [len(row["images"]) for row in rows]
        # TRL's limit cuts through images, and its padding is undone by the insertion: both come after it
        plain = copy.copy(self)
        plain.max_length = plain.pad_to_multiple_of = None
        batch = super(VoCoDataCollator, plain).torch_call(rows)
        shape = {
            "pad_token_id": self.processor.tokenizer.pad_token_id,
            "padding_side": "right",
            "pad_to_multiple_of": self.pad_to_multiple_of if packed is None else None,
            "names": names,
        }
        count = self.draw_num_tokens(batch["input_ids"])
        batch = insert_voco_tokens(dict(batch), self.vocab, count, images_per_row=images, **shape)
        if packed is not None:
            self._check_labels(batch, names)
            return pack_batch(
                batch,
                [len(list(group)) for _, group in itertools.groupby(packed)],
                pad_token_id=self.processor.tokenizer.pad_token_id,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                images_by_row=family_of_processor(self.processor).images_by_row,
                names=names,
            )
        if self.made_by is not None:
            batch[IMAGE_KEYS] = as_tensor(
                [[image_key(image, self.made_by, count) for image in row["images"]] for row in rows]
            )
        if self.max_length is not None and int(batch["attention_mask"].sum(1).max()) > self.max_length:
            batch = truncate(batch, self.vocab, self.max_length, **shape)
        self._check_labels(batch, names)
        if self.voco.compressor != VOCO and compressors.get(self.voco.compressor).reads_question:
            asked = batch["attention_mask"].bool() & (batch["labels"] == -100)
            batch[QUESTION_MASK] = asked.to(batch["attention_mask"].dtype)
        return batch

    def _check_labels(self, batch: dict[str, Any], names: list[str]) -> None:
        """Refuse rows of which no token is learnt: their loss is 0, or not a number, whatever is answered.

        Raises:
            NothingToLearn: it names them.
        """
        learnt = (batch["labels"] != -100).any(dim=1).tolist()
        if all(learnt):
            return
        why = "it has no answer to learn"
        if self.max_length is not None:
            why += f", or none within max_length={self.max_length}"
        raise NothingToLearn(
            {n: f"{names[n]}: no token of it has a label; {why}." for n, has in enumerate(learnt) if not has}
        )

    def draw_num_tokens(self, input_ids: torch.Tensor) -> int:
        """K for the batch of ``input_ids`` ``(B, N)``, before the VoCo tokens are in."""
        if isinstance(self.num_tokens, int):
            return self.num_tokens
        assert self.num_tokens is not None  # `__post_init__` takes the config's
        low, high = self.num_tokens
        key = f"{self.seed}/{int(self._epoch)}/{tuple(input_ids.shape)}/".encode()
        digest = hashlib.blake2b(
            key + input_ids.cpu().numpy().astype("<i8").tobytes(), digest_size=8
        ).digest()
        return low + int.from_bytes(digest, "little") % (high - low + 1)


@contextlib.contextmanager
def _plain_offsets(processor: Any) -> Iterator[None]:
    """Give the processor its offset mapping as lists while it marks the answers, as long as the block lasts.

    transformers compares every token's offsets with every answer's in a Python loop, one tensor element at a
    time: most of a batch's preparation (0.2 s for 32 conversations of 150 tokens). Lists give the same masks.
    """
    name = "_adjust_assistant_masks_indices"
    stock = getattr(processor, name, None)
    if stock is None or name in vars(processor):
        yield
        return

    def adjust(processed: dict[str, Any], *args: Any) -> Any:
        offsets = processed.get("offset_mapping")
        if isinstance(offsets, torch.Tensor):
            processed["offset_mapping"] = offsets.tolist()
        return stock(processed, *args)

    setattr(processor, name, adjust)
    try:
        yield
    finally:
        delattr(processor, name)


def check_range(value: Sequence[int]) -> tuple[int, int]:
    """``(low, high)`` with ``1 <= low <= high``, or ``ValueError``."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not whole or not 1 <= values[0] <= values[1]:
        raise ValueError(
            f"num_tokens range {value!r} must be two integers [low, high] with 1 <= low <= high."
        )
    return values


# -- rows
# ------------------------------------------------------------------------------------------------------------


def as_trl_row(
    example: Mapping[str, Any],
    text_field: str = "text",
    where: str = "the sample",
    opener: Callable[[Any, str], Any] = open_image,
) -> dict[str, Any]:
    """A copy of ``example`` in TRL's vision format; ``images`` holds its images in reading order, loaded by
    ``opener``.
    """
    row = {key: value for key, value in example.items() if key not in ("image", "images", "conversations")}
    if "conversations" in example and "messages" not in example:
        row["messages"] = llava_to_messages(example, where)
    if not any(key in row for key in ("messages", text_field)) and not {"prompt", "completion"} <= set(row):
        raise ValueError(
            f"{where} has the keys {', '.join(map(str, example))}; give 'messages', 'prompt' and "
            f"'completion', {text_field!r} or 'conversations', with 'image' or 'images'."
        )
    given = [
        _open(image, where, opener) for key in ("image", "images") for image in _as_list(example.get(key))
    ]
    if example.get("videos") and not given:
        raise ValueError(
            f"{where} has videos and no images, and videos are not read here; give frames as images."
        )
    images: list[Any] = []
    row["images"] = images
    for key in ("messages", "prompt", "completion"):
        if isinstance(row.get(key), list):
            row[key] = [_lift_images(message, given, images, where, opener) for message in row[key]]
    check_answers(row, where)
    images += given  # of plain text, and of messages whose content is a string
    spoken = row.get("messages", row.get("prompt"))
    if isinstance(spoken, list):
        try:
            prepare_multimodal_messages(spoken, images=images)
        except ValueError as error:
            raise ValueError(
                f"{where}: {error} Write one placeholder per image, where the image stands."
            ) from None
    return row


def _lift_images(
    message: dict[str, Any],
    given: list[Any],
    images: list[Any],
    where: str,
    opener: Callable[[Any, str], Any],
) -> dict[str, Any]:
    """A copy of ``message``; the image of each image part (its own, or the next given) goes to ``images``."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        part = {
            key: value for key, value in part.items() if value is not None
        }  # Arrow fills absent keys with None
        if part.get("type") == "image":
            own = [part.pop(key) for key in ("image", "url", "path", "base64") if key in part]
            if own:
                images.append(_open(own[0], where, opener))
            elif given:
                images.append(given.pop(0))
        parts.append(part)
    return {**message, "content": parts}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _open(image: Any, where: str, opener: Callable[[Any, str], Any]) -> Any:
    """An RGB image of whatever :func:`~voco_plugin.data.images.open_image` reads; arrays as they are."""
    if isinstance(image, (str, bytes, os.PathLike, Mapping, Image.Image)):
        return opener(image, where)
    return image


def _kind(row: Mapping[str, Any], text_field: str) -> str:
    return next((key for key in ("messages", text_field) if key in row), "prompt")


def check_same_kind(rows: list[dict[str, Any]], text_field: str, names: list[str]) -> None:
    """One format a batch: TRL's collator goes by its first row."""
    kinds = [_kind(row, text_field) for row in rows]
    for kind, name in zip(kinds, names, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"{name} has {kind!r} where {names[0]} has {kinds[0]!r}; give all rows one format."
            )


def name_of(example: Mapping[str, Any], number: int) -> str:
    for key in ("id", "row"):
        if example.get(key) is not None:
            return f"sample {number} ({key} {example[key]!r})"
    return f"sample {number}"

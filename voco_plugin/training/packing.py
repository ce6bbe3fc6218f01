"""``packing: true``: which conversations share a row, decided once before training.

    data set → tokens of each conversation (images by their size, no pixels) → first-fit decreasing → rows

The rows are a data set of their own, each a list of conversations, which the collator lays side by side. So
the trainer shuffles, shards, skips and resumes them as it does any samples.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import Dataset

from ..core.attachment import attachment, unwrap
from ..core.packed_rows import check_packs, first_fit_decreasing
from ..data.images import BadImageError
from .collator import VoCoDataCollator, as_trl_row
from .token_counting import counting_processor, placeholder_image

logger = logging.getLogger(__name__)


class PackedDataset(Dataset):
    """Rows of conversations: item ``i`` is the list of ``rows[j]`` for ``j`` in ``groups[i]``.

    Attributes:
        rows: the conversations, a map-style data set.
        groups: indices into ``rows``, packed row by packed row.
        fill: tokens in the rows, of all they have room for.
    """

    def __init__(self, rows: Any, groups: Sequence[Sequence[int]], fill: float) -> None:
        self.rows, self.groups, self.fill = rows, groups, fill

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[j] for j in self.groups[index]]


def pack_dataset(
    rows: Any, collator: VoCoDataCollator, seed: int, process: int = 0, processes: int = 1
) -> PackedDataset:
    """``rows`` packed into rows of ``collator.max_length`` tokens, the same in every process.

    Args:
        rows: a map-style data set of conversations; each of ``processes`` counts its share of it.
        collator: what will collate them; with ``on_bad_sample="skip"``, conversations with an image whose
            size cannot be read are left out, with a warning.

    Raises:
        ValueError: a conversation is longer than ``collator.max_length``, or nothing is left.
        BadImageError: an image's size cannot be read, and ``collator.on_bad_sample`` is ``raise``.
    """
    assert collator.max_length is not None
    capacity = collator.max_length
    count = token_counter(collator)
    share: list[tuple[int, int]] = []
    problem: Exception | None = None
    for index in range(process, len(rows), processes):
        try:
            share.append((index, count(rows[index], index)))
        except BadImageError as error:
            if collator.on_bad_sample == "raise":
                problem = error
                break
            logger.warning("%s Left out of the packed rows.", error)
        except Exception as error:  # told to all processes, which would wait for this one otherwise
            problem = error
            break
    # every process must learn of a problem, or the others would wait for ever
    gathered = gather_object([(share, problem)]) if processes > 1 else [(share, problem)]
    for _, found in gathered:
        if found is not None:
            raise found
    known = sorted(pair for part, _ in gathered for pair in part)
    longest = max(known, key=lambda pair: pair[1], default=None)
    if longest is None:
        raise ValueError("packing found no conversation that can be used; the warnings name each.")
    if longest[1] > capacity:
        many = sum(length > capacity for _, length in known)
        raise ValueError(
            f"{_name(rows, longest[0])} of the data set has {longest[1]} tokens, more than "
            f"max_length={capacity} ({many} of {len(rows)} rows are too long), and packing never cuts a "
            f"conversation; set max_length to {longest[1]}, or take such rows out."
        )
    lengths = [length for _, length in known]
    groups = [[known[i][0] for i in group] for group in first_fit_decreasing(lengths, capacity, seed)]
    return PackedDataset(rows, groups, sum(lengths) / (capacity * len(groups)))


def _name(rows: Any, index: int) -> str:
    known = rows[index].get("id")
    return f"row {index}" + ("" if known is None else f" (id {known!r})")


def token_counter(collator: VoCoDataCollator) -> Callable[[dict[str, Any], int], int]:
    """A function of ``(conversation, its number)`` that says how many tokens ``collator`` makes of it.

    VoCo tokens are counted, the largest K where it is drawn. Images are not decoded: placeholders of their
    sizes stand in for them.
    """
    drawn = collator.num_tokens
    counting = dataclasses.replace(
        collator,
        processor=counting_processor(collator.processor),
        max_length=None,
        pad_to_multiple_of=None,
        num_tokens=max(drawn) if isinstance(drawn, tuple) else drawn,
        assistant_only_loss=False,
        on_bad_sample="raise",
        pool=None,
        count_skipped=False,
    )

    def count(example: dict[str, Any], number: int) -> int:
        row = as_trl_row(example, collator.dataset_text_field, f"row {number}", placeholder_image)
        if "id" not in row:
            row["row"] = number
        return int(counting([row])["attention_mask"].sum())

    return count


def check_packing(args: Any, model: Any, voco: Any, dataset: Any, collator: Any) -> None:
    """Refuse what cannot be packed, before anything is counted.

    Raises:
        ValueError: no VoCo, a streamed data set, another collator, an option that packing has no meaning
            for, or a model with chunked attention.
    """
    if voco is None:
        raise ValueError(
            "packing=True needs VoCo on (voco is None): nothing else keeps packed conversations apart in the "
            "model; set voco ({'rule': 'causal'} hides nothing else), or packing=False."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            "packing=True needs the length of every conversation beforehand, and a streamed data set has no "
            "n-th row; load it whole, or set packing=False."
        )
    if collator is not None and not isinstance(collator, VoCoDataCollator):
        raise ValueError(
            f"packing=True and data_collator is a {type(collator).__name__}, which lays no conversations "
            "side by side; leave data_collator out, or give a VoCoDataCollator."
        )
    if collator is not None and collator.max_length is None:
        raise ValueError("packing=True needs a max_length, and data_collator has none; give it one.")
    for name, allowed, why in (
        ("packing_strategy", ("bfd",), "conversations with images are packed whole, first-fit decreasing"),
        ("eval_packing", (None, False), "evaluation with images is not packed"),
        ("train_sampling_strategy", ("random", "sequential"), "packed rows are all of about one length"),
    ):
        given = getattr(args, name, allowed[0])
        if given not in allowed:
            raise ValueError(f"packing=True and {name}={given!r}: {why}; leave {name} out.")
    inner = unwrap(model)
    check_packs(attachment(inner).family, inner)


@contextmanager
def without_trls(args: Any, packs: bool) -> Iterator[None]:
    """``args.packing`` is false inside the block where we pack ourselves: TRL refuses it for vision data."""
    args.packing = args.packing and not packs
    try:
        yield
    finally:
        args.packing = args.packing or packs

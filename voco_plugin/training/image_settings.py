"""Settings that TRL applies where it tokenizes a dataset beforehand, which it does not do with images: each
is done here, or refused, since TRL passes over it without a word.
"""

from __future__ import annotations

from typing import Any

from ..config import nearest
from .datasets import has_images

DATASET_KWARGS = ("skip_prepare_dataset",)


def with_image_settings(dataset: Any, args: Any, formatting_func: Any = None) -> Any:
    """``dataset``, shuffled where ``args.shuffle_dataset`` says so; one without images is TRL's.

    Raises:
        ValueError: a setting that rows with images do not go through.
    """
    if not has_images(dataset):
        return dataset
    if formatting_func is not None:
        raise ValueError(
            "formatting_func is not called on rows with images, which are tokenized batch by batch; write "
            "the text into the rows (dataset.map), or leave it out."
        )
    for name in args.dataset_kwargs or {}:
        if name not in DATASET_KWARGS:
            raise ValueError(
                f"dataset_kwargs has no {name!r}{nearest(name, DATASET_KWARGS)}: rows with images are "
                "tokenized batch by batch, as their processor does it; leave it out."
            )
    if args.eval_packing and not args.packing:  # with packing=True it is refused there
        raise ValueError("eval_packing=True: evaluation with images is not packed; leave eval_packing out.")
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

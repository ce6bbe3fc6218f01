"""Arguments → a reader: the model in the mode asked for; what that mode cannot do is said before it runs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import voco_plugin as vp
from voco_plugin.cli.eval_modes import check_lower, is_plain_adapter, plain_model, reads_question, voco_of
from voco_plugin.registry import load_plugin

from .arguments import ModelArgs
from .reading import Reader


def load_reader(args: ModelArgs) -> Reader:
    """Load ``args.pretrained`` in ``args.mode``.

    Raises:
        ValueError: the model cannot be read in that mode; the message says in which it can.
        FileNotFoundError: the path does not exist.
        VoCoCacheError: the store is another model's.
    """
    import torch

    if args.plugin is not None:
        load_plugin(args.plugin)
    check_lower(args.pretrained, [args.mode])
    device = args.device or (_own_gpu() if torch.cuda.is_available() else "cpu")
    voco = voco_of(args.pretrained, None if args.num_tokens is None else [args.num_tokens], [args.mode])
    own = {k: getattr(args, k) for k in ("rule", "attention") if getattr(args, k) is not None}
    if own:
        voco = dataclasses.replace(voco or voco_of(args.pretrained, [_saved_k(args)], [args.mode]), **own)
    model, processor = vp.load(
        args.pretrained, voco, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code,
        inserting=False,
    )  # fmt: skip
    return reader_of(model, processor, args)


def reader_of(model: Any, processor: Any, args: ModelArgs) -> Reader:
    """A reader of a model that is loaded, and attached."""
    cached = args.mode in ("voco", "lower")
    if cached:
        reason = _why_not_cached(model)
        if reason is not None and args.store is not None:
            raise ValueError(f"store={args.store!r}: {reason}; leave store out and give mode=single.")
        if reason is not None:
            raise ValueError(f"mode={args.mode}: {reason}; give mode=single.")
    detach = None
    if args.mode in ("base", "blind"):
        keep = bool(args.pretrained) and is_plain_adapter(args.pretrained)
        detach = lambda given: plain_model(given, vp.detach, keep_adapter=keep)  # noqa: E731
    return Reader(
        model, processor, mode=args.mode, cached=cached, shown=args.mode != "blind", detach=detach,
        store=args.store, batch_size=args.batch_size, answers=args.answers,
    )  # fmt: skip


def _why_not_cached(model: Any) -> str | None:
    """Why this model's images cannot be compressed once for all questions."""
    config = vp.attachment(model).config
    if not config.isolates:
        return f"under rule {config.rule!r} text reads the vision tokens, which a cache does not keep"
    if config.block_context != "self":
        return f"with block_context={config.block_context!r} a block belongs to the prompt it was made in"
    if reads_question(model):
        return "its compressor reads the question, so there is no block for all questions"
    return None


def _saved_k(args: ModelArgs) -> int:
    from voco_plugin.cli.eval_modes import saved_config

    saved = saved_config(args.pretrained)
    return vp.VoCoConfig().num_tokens if saved is None else saved.num_tokens


def _own_gpu() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

"""A question whose answer is known, asked of an engine before anyone else may: does a block in its cache give
what the plain model gives?
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import DynamicCache

from ....cache import VoCoBlock, VoCoCache
from ....core.forward import as_cache
from ..request import EngineError, EngineRequest, Sampling, Step

_BEFORE, _TOKENS, _AFTER, _STOOD, _NEW = 5, 3, 4, 11, 3
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
_ROUNDED = 0.25


def check_answers(engine: Any, voco_id: int) -> None:
    """Ask with a block of random keys in the middle of a prompt, read in one piece and moved.

    Raises:
        EngineError: the log-probabilities of the answer are not those of the plain model.
    """
    model = engine.text_model
    draw = torch.Generator().manual_seed(0)
    rows = model.config.vocab_size
    ids = [i for i in torch.randint(rows, (64,), generator=draw).tolist() if i not in engine._input_only]
    before, after = ids[:_BEFORE], ids[_BEFORE : _BEFORE + _AFTER]
    shapes, _ = engine._no_block()
    keys, values = (
        tuple(
            torch.randn(layer.shape[0], _TOKENS, layer.shape[2], generator=draw).to(layer) for layer in shapes
        )
        for _ in range(2)
    )
    block = VoCoBlock(keys=keys, values=values, position=_STOOD, extent=1, num_vision=1)
    cache = VoCoCache([block], fingerprint=engine._made_by)
    stream = (*before, *[voco_id] * _TOKENS, *after)
    request = EngineRequest(
        stream, cache, ("probe",), Sampling(max_new_tokens=_NEW, logprobs=0, ignore_eos=True)
    )

    async def ask() -> list[Step]:
        return [step async for step in engine.submit(request)]

    with ThreadPoolExecutor(1) as thread:  # who starts the engine may be in an event loop
        steps = thread.submit(asyncio.run, ask()).result()
    wanted = _plainly(engine, block, before, after, [step.token for step in steps])
    found = torch.tensor([step.logprob for step in steps])
    off = float((found - wanted).abs().max()) if len(steps) == _NEW else float("inf")
    if not off <= _TOLERANCE.get(model.dtype, _ROUNDED):
        raise EngineError(
            f"the engine answers a known question otherwise than the plain {type(model).__name__} (its "
            f"log-probabilities are off by {off:.2g}): this version of transformers runs continuous batching "
            "in a way that this engine does not know."
        )


@torch.no_grad()
def _plainly(
    engine: Any, block: VoCoBlock, before: list[int], after: list[int], answer: list[int]
) -> torch.Tensor:
    model = engine.text_model
    device, past = model.device, DynamicCache()
    shift = torch.full((_TOKENS,), len(before) - block.position, device=device, dtype=torch.long)
    keys, values = engine._relocator.move((list(block.keys), list(block.values)), shift)

    def read(ids: list[int], start: int) -> torch.Tensor:
        at = torch.arange(start, start + len(ids), device=device)[None]
        return model(
            input_ids=torch.tensor([ids], device=device), position_ids=at, **as_cache(past)
        ).logits[0].float()  # fmt: skip

    read(before, 0)
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        past.update(key[None], value[None], layer)
    logits = read([*after, *answer[:-1]], len(before) + _TOKENS)[len(after) - 1 :]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer, device=device)[:, None])[:, 0].cpu()


__all__ = ["check_answers"]

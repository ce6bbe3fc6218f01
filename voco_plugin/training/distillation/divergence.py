"""The divergence of the student's next-token distributions from the teacher's, in chunks of answer tokens.

Shapes: ``n`` answer tokens, ``c`` of them in a chunk, ``d`` width (the teacher's may differ), ``V`` rows of
the vocabulary that are compared, ``k`` of them under ``top_k``.

    hidden (n, d) ──head──> logits (c, V) ──> outcomes, as log-probabilities (c, V) or (c, k + 1) ──> D (c,)

Logits exist for one chunk at a time, in the forward pass and again in the backward pass, which computes them
anew. The head is read by its weight, not called: ZeRO-3 has to gather it in the backward pass too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from ..._compat import full_shape, gathered

NEVER = -1e30
"""Stands for log 0: its exponential is exactly 0 in fp32 and fp64, and differences of it are finite."""


@dataclass(frozen=True)
class Head:
    """How a model gets its logits from the hidden states below its head.

    Attributes:
        weight: ``(rows, d)``; under ZeRO-3 the parameter itself, empty until it is gathered.
        bias: ``(rows,)`` or ``None``.
        scale: what the product is multiplied by (Cohere).
        softcap: the bound of ``softcap · tanh(logits / softcap)`` after that (Gemma 2), or ``None``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any, scaled: bool = True, capped: bool = True) -> Head:
        """The head of a transformers model.

        Args:
            scaled: whether the model applies the logit scale of its text config.
            capped: whether it applies the soft cap; ``step.observe_head`` finds out both.
        """
        head, text = model.get_output_embeddings(), model.config.get_text_config()
        return cls(
            _whole(head.weight),
            None if getattr(head, "bias", None) is None else _whole(head.bias),
            _scale(text) if scaled else 1.0,
            getattr(text, "final_logit_softcapping", None) if capped else None,
        )

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def rows(self) -> int:
        return int(full_shape(self.weight)[0])

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """Logits of the product with the weight."""
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(n, d)`` → all logits ``(n, rows)``, in fp32 at least."""
        with gathered(self.parameters):
            product = _Product(hidden, self.weight, self.bias, self.rows, _dtype(hidden))
            return self.finish(product.of(slice(None)))


def _scale(text: Any) -> float:
    """The logit scale of a text config, under the names that TRL's fused loss knows too."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return getattr(text, name)
    divisor = getattr(text, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return divisor if text.model_type == "hyperclovax" else 1 / divisor


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        divergence: ``forward``, ``reverse`` or ``jsd``.
        temperature: logits are divided by it.
        rows: V, the rows of the vocabulary that both models have.
        left_out: ids below V that are not outcomes (the VoCo token, which the original model does not know).
        top_k: compare the teacher's k likeliest tokens and the rest as one; ``None``: every token.
        chunk: c, at most.
    """

    divergence: str = "forward"
    temperature: float = 1.0
    rows: int | None = None
    left_out: tuple[int, ...] = ()
    top_k: int | None = None
    chunk: int = 128

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """``(c, V)`` logits → log-probabilities."""
        if self.left_out:
            logits = logits.index_fill(-1, torch.tensor(self.left_out, device=logits.device), NEVER)
        return torch.log_softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)

    def value(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """The divergence of outcomes given as log-probabilities, ``(c, outcomes)`` → ``(c,)``."""
        if self.divergence == "jsd":
            mean = torch.logaddexp(teacher, student) - math.log(2)
            return (_kl(teacher, mean) + _kl(student, mean)) / 2
        return _kl(student, teacher) if self.divergence == "reverse" else _kl(teacher, student)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of log-probabilities ``(c, outcomes)``."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


class _Whole:
    """The teacher's distribution over every token, made anew where it is needed."""

    def __init__(self, hidden: torch.Tensor, head: Head, how: Comparison) -> None:
        self.hidden, self.head, self.how = hidden, head, how
        self.rows = head.rows if how.rows is None else how.rows
        self.dtype = _dtype(hidden)
        self.parameters = head.parameters

    def __enter__(self) -> None:
        self.product = _Product(self.hidden, self.head.weight, self.head.bias, self.rows, self.dtype)

    def __exit__(self, *error: Any) -> None:
        del self.product

    @torch.no_grad()
    def outcomes(self, part: slice, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the teacher's and the student's outcomes, from ``student`` ``(c, V)``; inside
        the block only.
        """
        return self.how.log_probs(self.head.finish(self.product.of(part))), student


class _Top:
    """The teacher's k likeliest tokens, and all others as one outcome: ``(n, k + 1)`` in memory."""

    def __init__(self, whole: _Whole, how: Comparison, top_k: int) -> None:
        self.parameters: list[torch.Tensor] = []
        ids, kept = [], []
        with whole:
            for part in _chunks(len(whole.hidden), how.chunk):
                log_probs, _ = whole.outcomes(part, whole.hidden)
                ids.append(log_probs.topk(top_k, dim=-1).indices)
                kept.append(_with_rest(log_probs, ids[-1]))
        self.ids, self.log_probs = torch.cat(ids), torch.cat(kept)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

    def outcomes(self, part: slice, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.log_probs[part], _with_rest(student, self.ids[part])


def _with_rest(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``(c, V)`` at ``ids`` ``(c, k)``, and the log of all that is elsewhere → ``(c, k + 1)``."""
    rest = log_probs.scatter(-1, ids, NEVER).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), rest], dim=-1)


def divergence(
    hidden: torch.Tensor, head: Head, teacher_hidden: torch.Tensor, teacher: Head, how: Comparison
) -> torch.Tensor:
    """The divergence of each answer token; the gradient goes to the student alone.

    Args:
        hidden: ``(n, d)``, the student's hidden states at the positions that predict the answer tokens.
        teacher_hidden: ``(n, d')``, the teacher's at the same tokens.

    Returns:
        ``(n,)``, fp32 at least, not multiplied by the squared temperature.
    """
    rows = min(head.rows, teacher.rows, head.rows if how.rows is None else how.rows)
    left_out = tuple(i for i in how.left_out if i < rows)
    top_k = how.top_k if how.top_k is not None and how.top_k < rows - len(left_out) else None
    how = replace(how, rows=rows, left_out=left_out, top_k=top_k)
    whole = _Whole(teacher_hidden.detach(), teacher, how)
    with gathered(_distinct([*head.parameters, *whole.parameters])):
        target = whole if top_k is None or not len(hidden) else _Top(whole, how, top_k)
        return _Chunked.apply(hidden, head.weight, head.bias, head, target, how)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, target, how):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.target, ctx.how, ctx.dtype = head, target, how, _dtype(hidden)
        product = _Product(hidden, weight, bias, how.rows, ctx.dtype)
        found = [hidden.new_zeros(0, dtype=_accurate(ctx.dtype))]
        with target:
            for part in _chunks(len(hidden), how.chunk):
                log_probs = how.log_probs(head.finish(product.of(part)))
                found.append(how.value(*target.outcomes(part, log_probs)))
        return torch.cat(found)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias = ctx.saved_tensors
        head, target, how, rows = ctx.head, ctx.target, ctx.how, ctx.how.rows
        own = [p for p in (weight, bias) if p is not None]
        with gathered(_distinct([*own, *target.parameters])), target:
            product = _Product(hidden, weight, bias, rows, ctx.dtype)
            # summed over the chunks in fp32: in half precision small ones would be lost
            sums = [
                torch.zeros_like(value, dtype=_accurate(value.dtype)) if wanted else None
                for value, wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            ]
            of_hidden, of_weight, of_bias = sums
            for part in _chunks(len(hidden), how.chunk):
                with torch.enable_grad():
                    leaf = product.of(part).requires_grad_()
                    log_probs = how.log_probs(head.finish(leaf))
                    value = how.value(*target.outcomes(part, log_probs))
                (of_product,) = torch.autograd.grad(value, leaf, gradient[part])
                if of_bias is not None:
                    of_bias[:rows] += of_product.sum(0)
                of_product = of_product.to(ctx.dtype)
                if of_hidden is not None:
                    _add_product(of_hidden[part], of_product, product.weight)
                if of_weight is not None:
                    _add_product(of_weight[:rows], of_product.t(), product.hidden[part])
        given = (hidden, weight, bias)
        made = [None if s is None else s.to(v.dtype) for s, v in zip(sums, given, strict=True)]
        return (*made, None, None, None)


class _Product:
    """The product of hidden states with the first ``rows`` rows of a head, in fp32 at least."""

    def __init__(self, hidden, weight, bias, rows: int, dtype: torch.dtype) -> None:
        self.hidden, self.weight = hidden.detach().to(dtype), weight.detach()[:rows].to(dtype)
        self.bias = None if bias is None else bias.detach()[:rows].to(_accurate(dtype))

    def of(self, part: slice) -> torch.Tensor:
        """``(c, V)``."""
        hidden = self.hidden[part]
        made = hidden.new_zeros(len(hidden), len(self.weight), dtype=_accurate(hidden.dtype))
        _add_product(made, hidden, self.weight.t())
        return made if self.bias is None else made.add_(self.bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``, in the precision of ``total``: what half precision rounds off a logit is as large
    as the divergences at the end of training.
    """
    with torch.autocast(total.device.type, enabled=False):
        if total.is_cuda and a.dtype != total.dtype:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _dtype(hidden: torch.Tensor) -> torch.dtype:
    """What a head computes in: autocast's type, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor once: ZeRO-3 cannot gather one twice at a time."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP2 has split, put together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight

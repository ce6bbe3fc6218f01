"""The chunked divergence is the plain one of whole logits: values, gradients, and never the memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from textbook import plain
from voco_plugin.training.distillation import divergence as module
from voco_plugin.training.distillation.divergence import Comparison, Head, divergence

N, D, V = 23, 8, 50
KINDS = ("forward", "reverse", "jsd")


def setup(dtype=torch.float64, n=N, v=V, bias=True, seed=0, **head):
    """Student's and teacher's hidden states and heads; the student's have gradients."""
    g = torch.Generator().manual_seed(seed)

    def made(*shape, trains=False):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(trains)

    student = Head(made(v, D, trains=True), made(v, trains=True) if bias else None, **head)
    teacher = Head(made(v, D), made(v) if bias else None, **head)
    return made(n, D, trains=True), student, made(n, D), teacher


def logits(hidden, head):
    product = F.linear(hidden, head.weight, head.bias) * head.scale
    return product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)


def gradients(values: torch.Tensor, hidden, head, weights=None) -> list[torch.Tensor]:
    weights = torch.linspace(0.5, 2.0, len(values), dtype=values.dtype) if weights is None else weights
    leaves = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    return list(torch.autograd.grad((values * weights).sum(), leaves))


def same(found, expected, tolerance):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk", [1, 7, N, 1000])
def test_values_and_gradients_are_those_of_whole_logits(kind, temperature, dtype, tolerance, chunk):
    h, student, t, teacher = setup(dtype)
    expected = plain(logits(h, student), logits(t, teacher), kind, temperature)
    found = divergence(h, student, t, teacher, Comparison(kind, temperature, chunk=chunk))
    assert found.dtype == dtype and found.shape == (N,)
    same([found], [expected], tolerance)
    same(gradients(found, h, student), gradients(expected, h, student), tolerance * 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [{"softcap": 2.0}, {"scale": 0.25}, {"scale": 3.0, "softcap": 5.0}])
def test_soft_caps_and_scales(kind, head):
    h, student, t, teacher = setup(bias=False, **head)
    expected = plain(logits(h, student), logits(t, teacher), kind)
    found = divergence(h, student, t, teacher, Comparison(kind, chunk=5))
    same([found], [expected], 1e-9)
    same(gradients(found, h, student), gradients(expected, h, student), 1e-9)
    bare = setup(bias=False)
    other = divergence(bare[0], bare[1], bare[2], bare[3], Comparison(kind))
    assert float((other - found).abs().max()) > 1e-2, "the head makes no difference: the test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_trls_own_divergence_agrees(kind):
    """An implementation that shares nothing with this one (fp32, no top-k)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    h, student, t, teacher = setup(torch.float32, scale=0.5, softcap=4.0)
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}[kind]
    theirs, _ = ChunkedDivergenceFunction.apply(
        h, student.weight, student.bias, t, teacher.weight, teacher.bias, beta, 2.0, 0.5, 4.0, 0.5, 4.0
    )
    found = divergence(h, student, t, teacher, Comparison(kind, 2.0, chunk=9))
    same([found], [theirs], 1e-6)
    same(gradients(found, h, student), gradients(theirs, h, student), 1e-5)


def bucketed(s, t, k, kind):
    """The reference of top-k: the teacher's k likeliest tokens, and all others together."""
    p, q = torch.softmax(t, -1), torch.softmax(s, -1)
    ids = p.topk(k, -1).indices
    outcomes = []
    for x in (p, q):
        top = x.gather(-1, ids)
        outcomes.append(torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1).log())
    return plain(outcomes[1], outcomes[0], kind)  # a softmax of log-probabilities is itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_k_is_the_divergence_of_k_tokens_and_the_rest(kind, k):
    h, student, t, teacher = setup()
    expected = bucketed(logits(h, student), logits(t, teacher), k, kind)
    found = divergence(h, student, t, teacher, Comparison(kind, top_k=k, chunk=4))
    same([found], [expected], 1e-9)
    same(gradients(found, h, student), gradients(expected, h, student), 1e-9)
    whole = divergence(h, student, t, teacher, Comparison(kind))
    assert bool((found <= whole + 1e-12).all()), "less is seen, so it is never more than the whole"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [V - 2, V - 1, V, V + 7])
@pytest.mark.parametrize("left_out", [(), (4,)])
def test_top_k_of_the_vocabulary_is_exact(kind, k, left_out):
    h, student, t, teacher = setup()
    whole = divergence(h, student, t, teacher, Comparison(kind, left_out=left_out))
    found = divergence(h, student, t, teacher, Comparison(kind, left_out=left_out, top_k=k))
    if k == V - 2 and not left_out:  # two tokens share the rest: the one case that is not exact
        assert float((whole - found).max()) > 1e-9
        return
    same([found], [whole], 1e-9)
    same(gradients(found, h, student), gradients(whole, h, student), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_left_out_and_rows_beyond_are_no_outcome(kind):
    h, student, t, teacher = setup()
    columns = [i for i in range(40) if i not in (3, 17)]
    expected = plain(logits(h, student)[:, columns], logits(t, teacher)[:, columns], kind)
    found = divergence(h, student, t, teacher, Comparison(kind, rows=40, left_out=(3, 17, 45), chunk=6))
    same([found], [expected], 1e-9)
    grads = gradients(found, h, student)
    same(grads, gradients(expected, h, student), 1e-9)
    assert not grads[1][[3, 17, *range(40, V)]].any() and not grads[2][[3, 17]].any()
    short = Head(teacher.weight[:40], teacher.bias[:40])  # a teacher without the rows that were added
    again = divergence(h, student, t, short, Comparison(kind, left_out=(3, 17)))
    same([again], [expected], 1e-9)


def test_the_teacher_may_be_wider_and_is_never_given_a_gradient():
    h, student, _, _ = setup()
    wide = torch.randn(N, 2 * D, dtype=torch.float64, requires_grad=True)
    teacher = Head(torch.randn(V, 2 * D, dtype=torch.float64, requires_grad=True))
    found = divergence(h, student, wide, teacher, Comparison())
    same([found], [plain(logits(h, student), logits(wide, teacher))], 1e-9)
    found.sum().backward()
    assert wide.grad is None and teacher.weight.grad is None and h.grad is not None


def test_the_same_distribution_costs_nothing():
    h, student, _, _ = setup()
    for kind in KINDS:
        found = divergence(h, student, h, student, Comparison(kind, chunk=8))
        assert float(found.abs().max()) <= 1e-12
        assert all(float(g.abs().max()) <= 1e-12 for g in gradients(found, h, student))


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_batch_without_an_answer_gives_a_zero_with_a_graph(top_k):
    h, student, t, teacher = setup()
    total = divergence(h[:0], student, t[:0], teacher, Comparison(top_k=top_k)).sum()
    assert float(total) == 0.0
    total.backward()
    assert not h.grad.any() and not student.weight.grad.any()


def test_a_frozen_head_gets_no_gradient():
    h, student, t, teacher = setup()
    frozen = Head(student.weight.detach(), student.bias.detach())
    divergence(h, frozen, t, teacher, Comparison()).sum().backward()
    assert h.grad is not None and frozen.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rounds_what_it_is_given_and_no_logit(kind):
    """bf16 hidden states and heads: the logits, the softmax and the sums over chunks are fp32's."""
    h, student, t, teacher = setup(torch.bfloat16)
    exact = [x.detach().double() for x in (h, student.weight, student.bias, t, teacher.weight, teacher.bias)]
    h64, w64, b64 = (x.requires_grad_() for x in exact[:3])
    expected = plain(F.linear(h64, w64, b64), F.linear(exact[3], exact[4], exact[5]), kind)
    found = divergence(h, student, t, teacher, Comparison(kind, chunk=5))
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 2e-5
    for mine, its in zip(gradients(found, h, student), gradients(expected, h64, Head(w64, b64)), strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine - its).abs().max()) <= 2e-2 * float(its.abs().max())


def test_autocast_holds_in_the_backward_pass_too():
    h, student, t, teacher = setup(torch.float32)
    half = [x.detach().bfloat16() for x in (h, student.weight, student.bias, t, teacher.weight, teacher.bias)]
    expected = divergence(half[0], Head(*half[1:3]), half[3], Head(*half[4:]), Comparison())
    with torch.autocast("cpu", torch.bfloat16):
        found = divergence(h, student, t, teacher, Comparison())
    # a bias is added in fp32 here, and was rounded there
    assert float((found - expected).abs().max()) <= 2e-2
    full = gradients(divergence(h, student, t, teacher, Comparison()), h, student)
    for mine, its in zip(gradients(found, h, student), full, strict=True):
        assert mine.dtype == torch.float32 and 0 < float((mine - its).abs().max()) <= 0.1


class Largest(TorchDispatchMode):
    """The most bytes of live tensors that operations made, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(made, torch.Tensor) or made.untyped_storage().data_ptr() == 0:
                continue
            storage = made.untyped_storage()
            if getattr(storage, "_counted", False):
                continue
            size = storage.nbytes()
            storage._counted = True
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
            weakref.finalize(storage, self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("top_k", [None, 16])
def test_logits_are_never_whole_in_memory(top_k):
    n, vocabulary, chunk = 512, 20_000, 16
    h, student, t, teacher = setup(torch.float32, n=n, v=vocabulary, bias=False)
    student = Head(student.weight.detach())  # LoRA: the head is frozen
    whole = n * vocabulary * 4
    with Largest() as counted:
        divergence(h, student, t, teacher, Comparison(top_k=top_k, chunk=chunk)).sum().backward()
    assert counted.largest <= chunk * vocabulary * 8, "one chunk of int64 ids, at most"
    assert counted.peak <= 12 * chunk * vocabulary * 4 < whole / 2
    h.grad = None
    with Largest() as reference:
        plain(logits(h, student), logits(t, teacher)).sum().backward()
    assert reference.peak > 4 * whole, "whole logits are not seen: the count shows nothing"


# -- the tests can fail: each is run on a divergence that is broken in one place
# ------------------------------------------------------------------------------------------------------------

values = test_values_and_gradients_are_those_of_whole_logits
exact = (torch.float64, 1e-9, 7)


def broken_kl(p, q):
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)


BROKEN = {
    "the divergence is turned round": (
        lambda patch: patch.setattr(module, "_kl", broken_kl),
        lambda: values("forward", 1.0, *exact),
    ),
    "chunks lose their last token": (
        lambda patch: patch.setattr(
            module, "_chunks", lambda n, c: (slice(a, max(a + 1, min(a + c, n) - 1)) for a in range(0, n, c))
        ),
        lambda: values("forward", 1.0, *exact),
    ),
    "the temperature is forgotten": (
        lambda patch: patch.setattr(Comparison, "log_probs", lambda self, x: torch.log_softmax(x, -1)),
        lambda: values("jsd", 3.0, *exact),
    ),
    "the rest is dropped": (
        lambda patch: patch.setattr(module, "_with_rest", lambda x, ids: x.gather(-1, ids)),
        lambda: test_top_k_is_the_divergence_of_k_tokens_and_the_rest("reverse", 5),
    ),
    "the VoCo token is an outcome": (
        lambda patch: patch.setattr(
            Comparison, "log_probs", lambda self, x: torch.log_softmax(x / self.temperature, -1)
        ),
        lambda: test_tokens_left_out_and_rows_beyond_are_no_outcome("forward"),
    ),
    "the soft cap is forgotten": (
        lambda patch: patch.setattr(Head, "finish", lambda self, x: x * self.scale),
        lambda: test_soft_caps_and_scales("forward", {"scale": 3.0, "softcap": 5.0}),
    ),
    "all tokens are one chunk": (
        lambda patch: patch.setattr(module, "_chunks", lambda n, c: iter([slice(0, n)])),
        lambda: test_logits_are_never_whole_in_memory(None),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_tests_notice(name, monkeypatch):
    break_it, run = BROKEN[name]
    break_it(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        run()

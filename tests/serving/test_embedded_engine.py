"""Continuous batching gives the tokens of stage 2, for everybody at once, and survives itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
import torch

from harness import attached, inputs, shared
from stand_alone import STAND_ALONE
from voco_plugin.cache import VoCoCache
from voco_plugin.serving.engines.embedded import paged_blocks
from voco_plugin.serving.engines.embedded.engine import EmbeddedEngine
from voco_plugin.serving.engines.embedded.manager import BatchLimits
from voco_plugin.serving.engines.request import (
    EngineError,
    EngineRequest,
    RequestError,
    Sampling,
)
from voco_plugin.serving.text_model import text_model_of

SMALL = BatchLimits(kv_bytes=1 << 23, batch_tokens=32, page_tokens=8)
NEW = 8


@contextlib.contextmanager
def running(model, limits=SMALL):
    engine = EmbeddedEngine(model, text_model_of(model), limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def request_of(model, row, sampling=None, pixels=0, key="image"):
    """A prompt from the tiny models' words, and the tokens that stage 2 gives."""
    batch = inputs("llava_llama", [row])
    batch = {k: v + pixels if k == "pixel_values" else v for k, v in batch.items()}
    cache, stream = (
        (model.compress(**batch), model.stream_inputs(batch))
        if "pixel_values" in batch and batch["pixel_values"] is not None
        else (VoCoCache(), batch)
    )
    ids = tuple(stream["input_ids"][0].tolist())
    keys = tuple(f"{key}-{pixels}-{number}" for number in range(len(cache)))
    wanted = model.generate(
        **{k: stream[k] for k in ("input_ids", "attention_mask")},
        **({"voco_cache": cache} if len(cache) else {}),
        max_new_tokens=NEW, eos_token_id=-1, do_sample=False,
    )[0, len(ids) :].tolist()  # fmt: skip
    return EngineRequest(ids, cache, keys, sampling or Sampling(NEW, ignore_eos=True)), wanted


async def all_of(engine, requests):
    async def one(request):
        return [step.token async for step in engine.submit(request)]

    return await asyncio.gather(*(one(request) for request in requests))


def row_of(place: str, k: int) -> list[str]:
    image = ["img", f"c{k}"]
    return {
        "first": ["bos", *image, "t4"],
        "middle": ["bos", "t7", *image, "t3"],
        "touching": ["bos", "t2", *image, *image, "t3"],
        "several": ["bos", "t1", *image, "t5", *image, "t2", *image, "t4"],
    }[place]


@pytest.mark.parametrize("limits", [SMALL, BatchLimits(kv_bytes=1 << 24)], ids=["in pieces", "at once"])
@pytest.mark.parametrize("k", [1, 2, 5, 8, 130])
def test_its_tokens_are_those_of_stage_two(k, limits):
    model = shared("llava_llama")
    model_inputs = [
        request_of(model, row_of(place, k), pixels=image)
        for place in ("first", "middle", "touching", "several")
        for image in range(4)
    ]
    text = [request_of(model, ["bos", f"t{n}"]) for n in (3, 40)]
    cases = model_inputs + text
    assert len({tuple(wanted) for _, wanted in cases}) > 10, "the images must matter"
    with running(model, limits) as engine:
        for request, wanted in cases:
            engine.check(request)
            assert asyncio.run(all_of(engine, [request])) == [wanted]
        found = asyncio.run(all_of(engine, [request for request, _ in cases]))
        assert found == [wanted for _, wanted in cases]
        state = engine.state()
        assert state["running"] == state["waiting"] == 0 and not engine._blocks._held


@pytest.mark.parametrize(
    ("name", "attention"), [("llava_llama", "eager"), *((name, "sdpa") for name in STAND_ALONE)]
)
def test_every_family_that_stands_alone(name, attention):
    model = shared(name)
    text = text_model_of(model)
    text.config._attn_implementation_internal = attention
    stream = model.stream_inputs(inputs(name, [["bos", "t3", "img", "c2", "t4", "img", "c1", "t3"]]))
    ids = stream["input_ids"]
    # made in another prompt, so that they move
    cache = model.compress(**inputs(name, [["bos", "t6", "img", "c2", "t1", "img", "c1", "t3"]]))
    wanted = model.generate(
        input_ids=ids, attention_mask=stream["attention_mask"], voco_cache=cache, max_new_tokens=NEW,
        eos_token_id=-1, do_sample=False,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    engine = EmbeddedEngine(model, text, SMALL)
    engine.start()
    try:
        request = EngineRequest(tuple(ids[0].tolist()), cache, ("a", "b"), Sampling(NEW, ignore_eos=True))
        assert asyncio.run(all_of(engine, [request])) == [wanted]
    finally:
        engine.stop()


def test_two_images_under_equal_prompts_do_not_mix_and_equal_beginnings_are_shared():
    model = shared("llava_llama")
    row = ["bos", "t9", "img", "c8", "t9"]
    (first, a), (second, b) = (request_of(model, row, pixels=image) for image in (0, 3))
    assert a != b
    with running(model) as engine:
        seen = []
        real = engine.text_model.forward

        def counted(*args, **kwargs):
            seen.append(kwargs["input_ids"].shape[1])
            return real(*args, **kwargs)

        engine.text_model.forward = counted
        try:
            for request, wanted in [(first, a), (second, b), (first, a), (second, b)]:
                before = len(seen)
                assert asyncio.run(all_of(engine, [request])) == [wanted]
                prompt = seen[before]
            assert prompt < len(first.ids), "a prompt read before is not read again from its beginning"
        finally:
            del engine.text_model.forward


def test_without_moving_the_answers_differ(monkeypatch):
    """What the parity above rests on; and the probe at the start notices it before anybody asks."""
    model = shared("llava_llama")
    monkeypatch.setattr(paged_blocks.PagedBlocks, "_moved", _unmoved(paged_blocks.PagedBlocks._moved))
    with pytest.raises(EngineError, match="answers a known question otherwise"), running(model):
        pass


def _unmoved(real):
    def moved(self, ids, positions):
        keys, values = real(self, ids, positions)
        return [key + 0.5 for key in keys], values

    return moved


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ids": ()}, "prompt is empty"),
        ({"ids": tuple(range(5, 9)) * 300}, "1024 positions"),
        ({"sampling": Sampling(2000)}, "1024 positions"),
        ({"sampling": Sampling(0)}, "1 token or more"),
        ({"sampling": Sampling(4, logit_bias={10**9: 1.0})}, "logit_bias names token 1000000000"),
        ({"ids": (1, 2, -5)}, "token id -5"),
        ({"ids": (1, 10**7)}, "token id 10000000"),
        ({"blocks": VoCoCache()}, "0 block(s)"),
        ({"keys": ()}, "VoCo tokens"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_before_it_runs(changed, said):
    model = shared("llava_llama")
    request, _ = request_of(model, row_of("middle", 2))
    if "ids" in changed:
        request = EngineRequest(changed["ids"], VoCoCache(), (), request.sampling)
    else:
        fields = {n: getattr(request, n) for n in ("ids", "blocks", "keys", "sampling")}
        request = EngineRequest(**{**fields, **changed})
    engine = EmbeddedEngine(model, text_model_of(model), SMALL)
    with pytest.raises(RequestError) as caught:
        engine.check(request)
    assert said in str(caught.value)


def test_a_block_of_another_model_is_refused():
    model = shared("llava_llama")
    request, _ = request_of(model, row_of("middle", 2))
    other = VoCoCache(request.blocks.blocks, fingerprint={**request.blocks.fingerprint, "model": "x"})
    engine = EmbeddedEngine(model, text_model_of(model), SMALL)
    with pytest.raises(RequestError, match="another model"):
        engine.check(EngineRequest(request.ids, other, request.keys, request.sampling))
    ends = EngineRequest(request.ids[:-3], request.blocks, request.keys, request.sampling)
    with pytest.raises(RequestError, match="ends with an image"):
        engine.check(ends)


def test_an_exception_ends_what_runs_with_its_reason_and_nothing_after():
    model = shared("llava_llama")
    cases = [request_of(model, row_of("middle", 2), pixels=image) for image in range(3)]
    with running(model) as engine:
        real, once = engine.text_model.forward, []

        def broken(*args, **kwargs):
            if not once:
                once.append(True)
                raise ValueError("out of luck")
            return real(*args, **kwargs)

        async def ask():
            engine.text_model.forward = broken
            failed = engine.submit(cases[0][0])
            with pytest.raises(EngineError, match="out of luck"):
                async for _ in failed:
                    pass
            # at once, while the loop is dead or dying
            return await all_of(engine, [request for request, _ in cases] * 3)

        try:
            found = asyncio.run(ask())
        finally:
            del engine.text_model.forward
        assert found == [wanted for _, wanted in cases] * 3
        state = engine.state()
        assert state["restarts"] == 1 and state["ready"] and "out of luck" in state["error"]
        assert not engine._blocks._held and not engine._live


def test_a_thread_that_is_killed_is_replaced():
    model = shared("llava_llama")
    request, wanted = request_of(model, row_of("first", 2))
    with running(model) as engine:
        real = engine._before_step

        def killed():
            if engine._live:
                engine._manager._before_step = real
                raise SystemExit

        engine._manager._before_step = killed

        async def ask():
            with contextlib.suppress(EngineError):
                await all_of(engine, [request])
            return await all_of(engine, [request])

        assert asyncio.run(asyncio.wait_for(ask(), 30)) == [wanted]
        assert engine.state()["restarts"] == 1


def test_leaving_an_answer_frees_what_it_held():
    model = shared("llava_llama")
    request, wanted = request_of(model, row_of("middle", 5), Sampling(500, ignore_eos=True))
    with running(model) as engine:

        async def ask():
            answers = [engine.submit(request) for _ in range(5)]
            async for _ in answers[0]:
                break
            for answer in answers:
                answer.cancel()
                answer.cancel()
            assert len([step async for step in answers[1]]) < 50, "what had been drawn"
            assert answers[1].finish_reason == "cancelled"
            return await all_of(engine, [request_of(model, row_of("middle", 5))[0]])

        assert asyncio.run(ask())[0] == wanted
        until = time.monotonic() + 10
        while engine._live and time.monotonic() < until:
            time.sleep(0.02)
        assert not engine._live and not engine._blocks._held
        cache = engine._manager.batch_processor.cache
        assert not any(a.block_table for a in cache.cache_allocators.values() if hasattr(a, "block_table"))


def test_more_than_the_cache_holds_waits_and_is_answered():
    model = shared("llava_llama")
    limits = BatchLimits(kv_bytes=1 << 15, batch_tokens=16, page_tokens=8)
    cases = [request_of(model, row_of("several", 2), pixels=image) for image in range(6)]
    with running(model, limits) as engine:
        assert engine.max_tokens < sum(len(request.ids) + NEW for request, _ in cases)
        found = asyncio.run(all_of(engine, [request for request, _ in cases] * 4))
        assert found == [wanted for _, wanted in cases] * 4
        long = EngineRequest((5,) * 200, VoCoCache(), (), Sampling(200))
        with pytest.raises(RequestError, match="cache holds"):
            engine.check(long)


def test_stopping_drains_or_ends_with_a_reason():
    model = shared("llava_llama")
    long, _ = request_of(model, row_of("first", 2), Sampling(900, ignore_eos=True))
    short, wanted = request_of(model, row_of("first", 2))
    engine = EmbeddedEngine(model, text_model_of(model), SMALL)
    with pytest.raises(EngineError, match="stopping"):
        asyncio.run(all_of(engine, [short]))
    engine.start()

    async def ask():
        answers = [engine.submit(short), engine.submit(long)]
        stopper = threading.Thread(target=engine.stop, args=(0.5,))
        stopper.start()
        assert [step.token async for step in answers[0]] == wanted
        with pytest.raises(EngineError, match="stopped before"):
            async for _ in answers[1]:
                pass
        stopper.join(10)
        assert not stopper.is_alive()
        with pytest.raises(EngineError, match="stopping"):
            engine.submit(short)

    asyncio.run(ask())
    engine.stop()
    assert not engine.state()["ready"]
    names = {thread.name for thread in threading.enumerate()}
    assert "voco-engine-watch" not in names


# -- sampling


def steps_of(engine, request):
    async def ask():
        answer = engine.submit(request)
        return [step async for step in answer], answer.finish_reason

    return asyncio.run(ask())


def test_sampling_is_each_requests_own():
    model = shared("llava_llama")
    row = row_of("middle", 2)
    plain, wanted = request_of(model, row)
    voco = model._voco_attachment.vocab.voco_id

    def with_(**changed):
        return EngineRequest(plain.ids, plain.blocks, plain.keys, Sampling(NEW, ignore_eos=True, **changed))

    with running(model) as engine:
        asked = [
            with_(), with_(temperature=1.0, seed=3), with_(temperature=1.0, seed=3),
            with_(temperature=1.0, seed=4), with_(temperature=5.0, top_k=1),
            with_(temperature=5.0, top_p=1e-9),
            with_(logit_bias={7: 100.0}), with_(logit_bias={wanted[0]: -100.0}),
            with_(frequency_penalty=1e4, logit_bias={7: 500.0}), with_(logprobs=2),
        ]  # fmt: skip
        found = asyncio.run(all_of(engine, asked))
        greedy, seeded, again, other, first, narrow, biased, barred, penalised, told = found
        assert greedy == first == narrow == told == wanted
        assert seeded == again != other
        assert biased == [7] * NEW and barred[0] != wanted[0]
        assert penalised[0] == 7 and 7 not in penalised[1:] and len(set(penalised)) == NEW
        assert all(voco not in tokens for tokens in found)
        ((steps, reason),) = [steps_of(engine, with_(logprobs=3))]
        assert reason == "length"
        logits = model(
            input_ids=torch.tensor([plain.ids]), voco_cache=plain.blocks
        ).logits[0, -1].log_softmax(-1)  # fmt: skip
        assert abs(steps[0].logprob - float(logits[steps[0].token])) < 1e-4
        assert [i for i, _ in steps[0].alternatives] == logits.topk(3).indices.tolist()
        stop = EngineRequest(
            plain.ids, plain.blocks, plain.keys, Sampling(NEW, stop_ids=(wanted[2],), ignore_eos=True)
        )
        steps, reason = steps_of(engine, stop)
        assert reason == "stop" and [s.token for s in steps] == wanted[: wanted.index(wanted[2]) + 1]


def test_ids_for_blocks_begin_anew_when_all_were_given(monkeypatch):
    model = shared("llava_llama")
    cases = [request_of(model, row_of("middle", 5), pixels=image) for image in range(3)]
    monkeypatch.setattr(paged_blocks, "LAST_ID", paged_blocks.FIRST_ID + 14)
    with running(model) as engine:
        found = asyncio.run(all_of(engine, [request for request, _ in cases] * 3))
        assert found == [wanted for _, wanted in cases] * 3
        assert engine._life > 1 and engine.state()["restarts"] == 0


def test_another_continuous_batching_is_refused_by_name(monkeypatch):
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    monkeypatch.setattr(PagedAttentionCache, "update", lambda self, keys, values, layer: None)
    model = shared("llava_llama")
    with pytest.raises(EngineError, match=r"updates its paged cache with \(self, keys, values, layer\)"):
        EmbeddedEngine(model, text_model_of(model), SMALL)


def test_an_adapter_and_whole_model_serve_alike():
    model = attached("llava_llama")
    request, wanted = request_of(model, row_of("middle", 2))
    with running(model) as engine:
        assert asyncio.run(all_of(engine, [request])) == [wanted]
    # the attached model is as it was
    assert request_of(model, row_of("middle", 2))[1] == wanted

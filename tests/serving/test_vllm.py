"""vLLM answers from blocks as the package's own stage 2 does, token by token, and a request that cannot be
answered fails alone.

Needs vLLM's own environment and what the package's made before: ``make test-vllm``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_reference import BAD, TOKENS, key_of
from vllm_runs import GIVEN, Run, apart, bridge, case, cases, needs_vllm, reference, request_of, run, wrong

pytestmark = needs_vllm
BATCHED = (32, 64, 2048)
"""Tokens of a step at most: two sizes that cut blocks and prompts, and one that cuts none."""


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``tokens of a step → Run`` of every compared prompt: all at once, one by one, and once more from the
    prefix cache.
    """
    made: dict[int, Run] = {}

    def of(batched: int) -> Run:
        if batched not in made:
            requests = [request_of(one) for one in cases()]
            steps = [
                {"requests": requests},
                {"requests": requests, "at_once": False},
                {"requests": requests, "keep": True},
            ]
            folder = tmp_path_factory.mktemp(f"batched{batched}")
            made[batched] = run(folder, steps, max_num_batched_tokens=batched)
        return made[batched]

    return of


def test_the_compared_prompts_are_all_there() -> None:
    names = {one["name"].rsplit("-", 1)[0] for one in cases("K")}
    assert names == {f"K{k}-{where}" for k in TOKENS for where in ("first", "middle", "touching", "several")}
    with_blocks = [one for one in cases() if one["blocks"]]
    assert len({tuple(one["tokens"]) for one in with_blocks}) == len(with_blocks)  # no two answers alike


@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize(("step", "how"), [(0, "16 at once"), (1, "one by one")])
def test_greedy_tokens_are_stage_twos(batched: int, step: int, how: str, parity: Any) -> None:
    answers = parity(batched).steps[step]
    assert wrong(answers, cases()) == []
    far = apart(answers, cases())
    assert far <= 1e-4
    tokens = sum(len(answer["tokens"]) for answer in answers)
    sys.stdout.write(
        f"{how}, {batched} tokens a step: {len(answers)} of {len(answers)} prompts, {tokens} tokens, "
        f"log-probabilities {far:.1e} apart\n"
    )


@pytest.mark.parametrize("batched", BATCHED)
def test_greedy_tokens_are_stage_twos_out_of_the_prefix_cache(batched: int, parity: Any) -> None:
    answers = parity(batched).steps[2]
    assert wrong(answers, cases()) == [] and apart(answers, cases()) <= 1e-4
    cached = [answer["cached"] for answer in answers]
    long = [one["ids"] for one in cases() if len(one["ids"]) > 32]
    assert sum(count > 0 for count in cached) == len(long)  # whoever fills a block of 32 tokens
    assert max(cached) >= 256


def test_text_alone_is_answered_as_without_the_connector(tmp_path: Path, parity: Any) -> None:
    texts = cases("text")
    plain = run(tmp_path, [{"requests": [request_of(one) for one in texts]}], store=None)
    names = [one["name"] for one in cases()]
    found = [parity(2048).steps[1][names.index(one["name"])] for one in texts]
    assert wrong(plain.steps[0], texts) == []
    assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in plain.steps[0]]


def test_one_prompt_with_two_images_never_mixes(tmp_path: Path) -> None:
    pair = [case("K130-middle-0"), case("K130-middle-1")]
    assert pair[0]["ids"] == pair[1]["ids"] and pair[0]["tokens"] != pair[1]["tokens"]
    requests = [request_of(one) for one in pair]
    steps = [
        {"requests": requests * 2, "at_once": False},
        {"requests": requests * 8, "keep": True},
        {"requests": [{**request_of(one), "salt": request_of(one)["salt"] + ":tenant"} for one in pair]},
    ]
    made = run(tmp_path, steps)
    assert wrong(made.steps[0], pair * 2) == [] and wrong(made.steps[1], pair * 8) == []
    assert [answer["cached"] > 0 for answer in made.steps[0]] == [False, False, True, True]
    assert all(answer["cached"] > 0 for answer in made.steps[1])
    assert wrong(made.steps[2], pair) == []


def test_a_preempted_request_gets_its_blocks_again(tmp_path: Path) -> None:
    some = [one for one in cases("K5", "K8", "K130", "text") if len(one["ids"]) < 300]
    requests = [request_of(one, max_tokens=150, ignore_eos=True) for one in some]
    (tmp_path / "roomy").mkdir()
    roomy = run(tmp_path / "roomy", [{"requests": requests, "at_once": False}])
    tight = run(tmp_path, [{"requests": requests}], num_gpu_blocks_override=40, max_model_len=600)
    assert roomy.made["preemptions"] == 0 and tight.made["preemptions"] >= 5
    tokens = [[answer["tokens"] for answer in one.steps[0]] for one in (roomy, tight)]
    assert tokens[0] == tokens[1] and all(len(answer) == 150 for answer in tokens[0])
    for answer, one in zip(tokens[0], some, strict=True):
        assert answer[: len(one["tokens"])] == one["tokens"]
    sys.stdout.write(f"{len(some)} prompts of 150 tokens, {tight.made['preemptions']} preemptions\n")


def test_voco_and_image_tokens_are_never_answered(tmp_path: Path) -> None:
    voco_id = reference()["voco_id"]
    one = case("K2-middle-0")
    (made,) = run(
        tmp_path, [{"requests": [request_of(one, logit_bias={str(voco_id): 100.0, "2": -100.0})]}]
    ).steps
    assert voco_id not in made[0]["tokens"] and len(made[0]["tokens"]) == 24


# -- requests that cannot be answered
# ------------------------------------------------------------------------------------------------------------


def _named(one: dict[str, Any], blocks: Any, salt: str | None = None) -> dict[str, Any]:
    """The prompt of ``one`` with other blocks, and the salt of these where none is given."""
    keys = [(block["key"], block.get("block", 0)) for block in blocks]
    return {"ids": one["ids"], "salt": salt or bridge.salt_of(keys), "params": {"voco": blocks}}


def bad_requests() -> dict[str, tuple[dict[str, Any], str]]:
    """Name → the request, and what the log says of it."""
    middle, touching, several = case("K2-middle-0"), case("K2-touching-0"), case("K5-several-0")
    voco_id, good = reference()["voco_id"], request_of(middle)
    at = middle["blocks"][0]["at"]
    ids = middle["ids"]
    none = "0" * 64
    made: dict[str, tuple[dict[str, Any], str]] = {
        "no such key": (_named(middle, [{"key": none, "at": at}]), f"key {none} is not in store"),
        "no salt": ({**good, "salt": None}, "cache_salt=None does not cover the blocks"),
        "another salt": ({**good, "salt": bridge.salt_of([key_of(1, 2)])}, "does not cover the blocks"),
        "a salt without the end": ({**good, "salt": good["salt"][:-1]}, "does not cover the blocks"),
        "typed": ({"ids": ids}, "holds a VoCo token, but the request names no block"),
        "typed, and salted": ({"ids": ids, "salt": good["salt"]}, "the request names no block"),
        "no VoCo token": (
            {**good, "ids": [t for t in ids if t != voco_id]},
            "names 1 block(s), but the prompt holds no VoCo token",
        ),
        "K too large": (_named(middle, [{"key": key_of(0, 5), "at": at}]), "has K=5, but 2 VoCo tokens"),
        "K too small": (_named(middle, [{"key": key_of(0, 1), "at": at}]), "has K=1, but 2 VoCo tokens"),
        "K past the end": (_named(middle, [{"key": key_of(0, 130), "at": at}]), "has K=130, but 2 VoCo"),
        "touching, shifted": (
            _named(touching, [{"key": key_of(0, 1), "at": 6}, {"key": key_of(1, 5), "at": 7}]),
            "has K=5, but 3 VoCo tokens",
        ),
        "one block too few": (
            _named(several, several["blocks"][:2]), "but 10 VoCo tokens stand for it",
        ),
        "the first has none": (_named(several, several["blocks"][1:]), "has no block"),
        "the wrong place": (_named(middle, [{"key": key_of(0, 2), "at": at - 1}]), "no VoCo token (id"),
        "behind the prompt": (_named(middle, [{"key": key_of(0, 2), "at": 9999}]), "no VoCo token (id"),
        "out of order": (_named(several, several["blocks"][::-1]), "is not after block 0"),
        "no such block": (
            _named(middle, [{"key": key_of(0, 2), "at": at, "block": 1}]), "its cache holds 1",
        ),
        "no key": ({**good, "params": {"voco": [{"key": "abc", "at": at}]}}, "is not a key"),
        "no place": ({**good, "params": {"voco": [{"key": key_of(0, 2)}]}}, "at=None is not an integer"),
        "a field more": (
            {**good, "params": {"voco": [{**middle["blocks"][0], "K": 2}]}}, "'K' is unknown",
        ),
        "no list": ({**good, "params": {"voco": {"key": key_of(0, 2)}}}, "is not a list of blocks"),
        "no object": ({**good, "params": {"voco": [key_of(0, 2)]}}, "is not an object"),
        "an image token": ({"ids": [6, *ids[1:5]]}, "the id of a vision token"),
        "a block at the end": (
            {**good, "ids": ids[: at + 2]}, "the prompt ends with a block",
        ),
        "a block alone": (
            {**_named(middle, [{"key": key_of(0, 1), "at": 0}]), "ids": [voco_id]}, "ends with a block",
        ),
        "prompt_logprobs": (
            {**good, "sampling": {"prompt_logprobs": 1}}, "prompt_logprobs (echo with logprobs) is refused",
        ),
        "another shape": (_named(middle, [{"key": BAD["shape"], "at": at}]), "are not the model's 3 of"),
        "too few layers": (_named(middle, [{"key": BAD["layers"], "at": at}]), "2 layers of"),
        "another model": (_named(middle, [{"key": BAD["other"], "at": at}]), "is not of store"),
        "damaged": (_named(middle, [{"key": BAD["damaged"], "at": at}]), f"record {BAD['damaged']}"),
    }  # fmt: skip
    return made


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each bad request beside two good ones, then all of them at once, then good ones alone."""
    good = [request_of(case("K2-middle-0")), request_of(case("K130-several-1"))]
    bad = [request for request, _ in bad_requests().values()]
    steps = [{"requests": [good[0], request, good[1]], "keep": True} for request in bad]
    steps += [{"requests": [*bad, *good]}, {"requests": [*good, *bad], "keep": True}]
    return run(tmp_path_factory.mktemp("refused"), [*steps, {"requests": [request_of(c) for c in cases()]}])


@pytest.mark.parametrize("name", bad_requests() if GIVEN.joinpath("reference.json").is_file() else [])
def test_a_bad_request_fails_alone_and_the_log_says_why(name: str, refused: Run) -> None:
    number = list(bad_requests()).index(name)
    before, answer, after = refused.steps[number]
    assert (answer["finish"], answer["tokens"]) == ("error", [])
    assert wrong([before, after], [case("K2-middle-0"), case("K130-several-1")]) == []
    lines = [line for line in refused.log.splitlines() if " is refused: " in line]
    asked = len(bad_requests())
    assert len(lines) == asked * 3
    assert bad_requests()[name][1] in lines[number]


def test_many_bad_requests_leave_the_engine_as_it_was(refused: Run) -> None:
    count = len(bad_requests())
    for answers in (refused.steps[count][:count], refused.steps[count + 1][2:]):
        assert [answer["finish"] for answer in answers] == ["error"] * count
    good = [case("K2-middle-0"), case("K130-several-1")]
    assert wrong(refused.steps[count][count:], good) == []
    assert wrong(refused.steps[count + 1][:2], good) == []
    assert wrong(refused.steps[-1], cases()) == []
    assert refused.made["open"] == 0
    sys.stdout.write(f"{count} kinds of bad request, {count * 3} refused\n")


# -- the store
# ------------------------------------------------------------------------------------------------------------


def test_a_key_that_is_gone_fails_unless_it_is_in_memory(tmp_path: Path) -> None:
    one, other = case("K8-middle-0"), case("K8-middle-1")
    steps = [
        {"requests": [request_of(one), request_of(other)]},
        {"requests": [request_of(one), request_of(other)], "delete": [one["blocks"][0]["key"]]},
    ]
    for memory, answered in ((None, True), (0, False)):
        folder = tmp_path / str(memory)
        store = Path(shutil.copytree(GIVEN / "store", folder / "store"))
        made = run(folder, steps, store=store, memory=memory)
        assert wrong(made.steps[0], [one, other]) == [] and wrong(made.steps[1][1:], [other]) == []
        assert (made.steps[1][0]["finish"] != "error") == answered
        assert made.steps[1][0]["tokens"] == (one["tokens"] if answered else [])


def test_memory_is_bounded_and_changes_no_answer(tmp_path: Path) -> None:
    requests = [request_of(one) for one in cases()]
    made = run(tmp_path, [{"requests": requests}], memory=210_000)  # one block of K = 130 and a bit
    assert wrong(made.steps[0], cases()) == []
    assert 0 < made.made["memory"]["nbytes"] <= 210_000
    assert made.made["memory"]["misses"] > 40


# -- the tests above can fail
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "engine"),
    [("writing", {}), ("relocation", {}), ("chunks", {"max_num_batched_tokens": 32})],
)
def test_answers_are_wrong_where_a_part_is_left_out(patch: str, engine: dict, tmp_path: Path) -> None:
    made = run(tmp_path, [{"requests": [request_of(one) for one in cases()]}], patch=patch, **engine)
    bad = wrong(made.steps[0], cases())
    assert len(bad) >= 10 and not [name for name in bad if name.startswith("text")]


def test_images_mix_where_the_salt_is_not_checked(tmp_path: Path) -> None:
    pair = [case("K130-middle-0"), case("K130-middle-1")]
    requests = [{**request_of(one), "salt": "same"} for one in pair]
    made = run(tmp_path, [{"requests": requests, "at_once": False}], patch="salt")
    assert wrong(made.steps[0], pair) == ["K130-middle-1"]
    refused = run(tmp_path, [{"requests": requests, "at_once": False}])
    assert [answer["finish"] for answer in refused.steps[0]] == ["error", "error"]


def test_a_voco_token_is_answered_where_it_is_not_suppressed(tmp_path: Path) -> None:
    one = request_of(case("K2-middle-0"), logit_bias={str(reference()["voco_id"]): 100.0})
    (made,) = run(tmp_path, [{"requests": [one]}], patch="suppress").steps
    assert reference()["voco_id"] in made[0]["tokens"]


def test_a_block_of_another_k_is_answered_from_where_k_is_not_checked(tmp_path: Path) -> None:
    bad, _ = bad_requests()["K too small"]
    (made,) = run(tmp_path, [{"requests": [bad]}], patch="tokens").steps
    assert made[0]["finish"] != "error" and wrong(made, [case("K2-middle-0")])

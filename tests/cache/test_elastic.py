"""Elastic K (paper, Sec. 4.4, Table 4): cut, re-cut, trained with K drawn, evaluated over several K."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness import attached, inputs, largest_difference, shared
from matrix import in_turn
from paths import ROOT
from tiny import NAMES
from voco_plugin.cache.compress.num_voco_tokens import recut
from voco_plugin.cli import main

BOTH_WAYS = ("paligemma", "paligemma2")
"""A prefix-LM's VoCo tokens see those after them, so that the first of three are not two."""


def rows(k: int, more: int | None = None):
    """A row with an image of ``k`` VoCo tokens, one with two images of ``more``, one of text."""
    more = k if more is None else more
    return [
        ["bos", "t3", "img", f"c{k}", "t4"],
        ["bos", "t5"],
        ["img", f"c{more}", "t1", "img", f"c{more}", "t2"],
    ]


def difference(a, b) -> float:
    """The largest difference of two caches' keys and values; what is known of their blocks must be equal."""
    facts = [[(x.position, x.extent, x.order, x.num_vision, x.num_tokens) for x in c] for c in (a, b)]
    assert facts[0] == facts[1] and a.rows == b.rows
    return max(
        float((x - y).abs().max())
        for one, two in zip(a, b, strict=True)
        for x, y in zip((*one.keys, *one.values), (*two.keys, *two.values), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_first_k_are_a_compression_into_k(name):
    model = shared(name)
    four = model.compress(**inputs(name, [["bos", "t3", "img", "c4", "t4"]]))
    for k in (1, 2, 4):
        into = model.compress(**inputs(name, [["bos", "t3", "img", "c4", "t4"]]), num_tokens=k)
        if name in BOTH_WAYS and k < 4:
            assert difference(four.first(k), into) > 1e-3
        else:
            assert difference(four.first(k), into) <= 5e-6
    with pytest.raises(ValueError, match=r"first\(5\)"):
        four.first(5)


@pytest.mark.parametrize(("name", "k"), in_turn(NAMES, [1, 3, 5]))
def test_another_k_is_what_inputs_with_that_k_give(name, k):
    """Below and above the K of the inputs, which differs from image to image: same blocks, same places."""
    model = shared(name)
    for side in ("left", "right") if k == 3 else ("left",):
        asked = model.compress(**inputs(name, rows(2, 4), side), num_tokens=k)
        given = model.compress(**inputs(name, rows(k), side))
        assert asked.num_tokens == [k] * 3 and difference(asked, given) <= 1e-5


@pytest.mark.parametrize("rule", ["prefix", "star", "bos-sink", "sequential"])
@pytest.mark.parametrize("name", ["llava_llama", "gemma3", "qwen2_5_vl"])
def test_another_k_under_every_rule(name, rule):
    from harness import rows_for

    model = shared(name, rule=rule)
    asked = model.compress(**inputs(name, rows_for(rule, rows(2, 4))), num_tokens=3)
    assert difference(asked, model.compress(**inputs(name, rows_for(rule, rows(3))))) <= 1e-5


@torch.no_grad()
def test_a_prompt_with_k_tokens_reads_the_blocks_cut_to_k():
    model = shared("qwen2_5_vl")
    batch = inputs("qwen2_5_vl", rows(2))
    cache = model.compress(**inputs("qwen2_5_vl", rows(4)), num_tokens=2)
    stream = model.stream_inputs(batch)
    logits = model(**stream, voco_cache=cache).logits
    assert largest_difference(model, batch, model(**batch).logits, stream, logits) <= 1e-4


def test_recut_keeps_every_other_token_and_the_padding_side():
    from harness import layout_of

    model = shared("gemma3")
    for side in ("left", "right"):
        before = inputs("gemma3", rows(2, 4), side)
        after = recut(before, layout_of(model, before), 3, pad_id=0)
        expected = inputs("gemma3", rows(3), side)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            real = expected["attention_mask"].bool()
            assert torch.equal(after[name][real], expected[name][real]), (side, name)
        assert torch.equal(after["attention_mask"], expected["attention_mask"])
        assert after["pixel_values"] is before["pixel_values"]
    same = inputs("gemma3", rows(2))
    assert recut(same, layout_of(model, same), 2, 0) is same, "nothing to cut"


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_k_is_a_whole_number(k):
    model = shared("llava_llama")
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        model.compress(**inputs("llava_llama", rows(2)), num_tokens=k)


# -- training with K drawn, from a recipe
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gridworld, a tiny random VLM, and the same with VoCo attached, K = 4."""
    import voco_plugin as vp
    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm

    folder = tmp_path_factory.mktemp("elastic")
    assert main(["gridworld", str(folder / "runs/gridworld"), "--num-train", "4", "--num-test", "4"]) == 0
    model, processor = build_tiny_vlm(vision_width=32, vision_layers=2, text_width=32, text_layers=2)
    model.save_pretrained(folder / "runs/gridworld_base")
    processor.save_pretrained(folder / "runs/gridworld_base")
    vp.attach(model, vp.VoCoConfig(num_tokens=4), processor=processor).save_pretrained(folder / "runs/k4")
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def out_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    try:
        status = main(list(arguments))
    except SystemExit as found:  # argparse
        status = found.code
    assert status == 2
    return capsys.readouterr().err


def test_a_recipe_draws_k_from_a_range(here: Path, capsys) -> None:
    """`num_tokens_range` of a YAML file reaches the collator, which draws every K of it."""
    from transformers import AutoProcessor

    import voco_plugin as vp
    from voco_plugin.cli.recipe import load

    text = (ROOT / "recipes/gridworld_voco.yaml").read_text(encoding="utf-8")
    (here / "mine.yaml").write_text(
        text.replace("num_tokens: 1", "num_tokens: 4") + "\nnum_tokens_range: [1, 4]\n"
    )
    arguments = load("mine.yaml", ["--bf16", "false"]).arguments(vp.VoCoSFTConfig)
    assert arguments.num_tokens_range == [1, 4]
    base = AutoProcessor.from_pretrained("runs/gridworld_base")
    base.tokenizer.add_tokens(["<voco>"])
    collator = vp.VoCoDataCollator(base, arguments.voco, num_tokens=arguments.num_tokens_range)
    drawn = {collator.draw_num_tokens(torch.tensor([[i, i + 1]])) for i in range(60)}
    assert drawn == {1, 2, 3, 4}
    (here / "wrong.yaml").write_text(text + "\nnum_tokens_range: [2, 4]\n")
    problem = error_of(capsys, "train", "wrong.yaml", "--bf16", "false")
    assert "voco.num_tokens=1 is outside num_tokens_range=[2, 4]" in problem


# -- voco eval over K
# ------------------------------------------------------------------------------------------------------------


DATA = ["--data", "runs/gridworld/test.json", "--limit", "2", "--max-new-tokens", "3"]


def test_eval_has_a_row_for_each_k(here: Path, capsys, monkeypatch) -> None:
    """Images are compressed once, into the largest K; the answers are those of an evaluation with that K."""
    from voco_plugin.evaluation import metrics

    calls, real = [], metrics.compress_rows
    monkeypatch.setattr(
        metrics, "compress_rows", lambda *a, **k: calls.append(k.get("num_tokens")) or real(*a, **k)
    )
    modes = ["--mode", "voco", "--mode", "single", "--mode", "blind"]
    found = json.loads(
        out_of(capsys, "eval", "runs/k4", *DATA, *modes, "--num-tokens", "1,3", "--json", "--out", "k.json")
    )
    assert calls == [3]
    assert list(found["scores"]) == ["voco K=1", "voco K=3", "single K=1", "single K=3", "blind"]
    assert [found["scores"][n]["num_tokens"] for n in found["scores"]] == [1, 3, 1, 3, None]
    answers = {n: e["answers"] for n, e in json.loads((here / "k.json").read_text())["scores"].items()}
    assert answers["voco K=1"] == answers["single K=1"] and answers["voco K=3"] == answers["single K=3"]
    for k in ("1", "3"):
        out_of(capsys, "eval", "runs/k4", *DATA, "--num-tokens", k, "--json", "--out", "one.json")
        (name,) = (one := json.loads((here / "one.json").read_text())["scores"])
        assert name == "voco" and one["voco"]["answers"] == answers[f"voco K={k}"]
        assert one["voco"]["num_tokens"] == int(k)
    table = out_of(capsys, "eval", "runs/k4", *DATA, "--num-tokens", "1,3").splitlines()
    assert table[0].split()[:3] == ["mode", "K", "all"] and [line.split()[1] for line in table[2:]] == [
        "1",
        "3",
    ]


def test_eval_reads_the_first_k_of_what_was_compressed(here: Path, capsys) -> None:
    found = json.loads(
        out_of(capsys, "eval", "runs/k4", *DATA, "--first", "4,1", "--json", "--out", "f.json")
    )
    scores = found["scores"]
    assert list(scores) == ["voco K=4", "voco K=1"]
    assert [(e["num_tokens"], e["compressed_with"]) for e in scores.values()] == [(4, 4), (1, 4)]
    out_of(capsys, "eval", "runs/k4", *DATA, "--json", "--out", "four.json")
    four = json.loads((here / "four.json").read_text())["scores"]["voco"]
    first = json.loads((here / "f.json").read_text())["scores"]["voco K=4"]
    assert four["answers"] == first["answers"] and four["num_tokens"] == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--num-tokens", "1,0"], "'0' is not a whole number of at least 1"),
        (["--num-tokens", "1,2", "--first", "1"], "give one K"),
        (["--num-tokens", "2", "--first", "1,3"], "--first 3 is more than --num-tokens 2"),
        (["--first", "1", "--mode", "single"], "--mode single has none"),
        (["--first", "5"], "this model compresses into 4"),
    ],
)
def test_eval_refuses_a_k_that_means_nothing(here: Path, capsys, options, problem) -> None:
    assert problem in error_of(capsys, "eval", "runs/k4", *DATA, *options)


def test_a_prefix_lm_compresses_again_for_each_k(monkeypatch) -> None:
    """Where VoCo tokens see those after them, `--num-tokens` may not cut a larger compression."""
    from argparse import Namespace

    from voco_plugin.cli.eval_modes import CutCaches
    from voco_plugin.evaluation import metrics

    made = []

    def compress_rows(model, processor, dataset, questions, num_tokens, batch_size):
        made.append(num_tokens)
        return {0: model.compress(**inputs("paligemma", rows(2)[:1]), num_tokens=num_tokens)}

    monkeypatch.setattr(metrics, "compress_rows", compress_rows)
    model = attached("paligemma")
    for first, expected in ((None, [4, 2, 3]), ([2, 3], [4])):
        made.clear()
        caches = CutCaches(model, None, None, None, Namespace(num_tokens=[4], first=first, batch_size=1))
        if first is None:
            caches.args.num_tokens = [2, 3, 4]
        assert [caches.of(k)[0].num_tokens for k in (2, 3)] == [[2], [3]]
        assert made == expected

"""`voco bench`: every command at a small size, what its figures must satisfy, and the arithmetic by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import voco_plugin as vp
from harness import inputs, shared
from paths import ROOT
from voco_plugin.benchmark import attention, context_length, inference, serving, shapes, timing, training_step
from voco_plugin.cli import main
from voco_plugin.core.attention import backends
from voco_plugin.core.layout import SequenceLayout
from voco_plugin.core.masks import dense_mask

GPU = ROOT / "benchmarks" / "gpu"


class Results:
    """Runs each command once, at its quick size, with JSON and picture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, {}

    def __call__(self, what: str) -> dict:
        if what not in self.known:
            options = ["--out", f"{self.folder}/{what}.json", "--plot", f"{self.folder}/{what}.png"]
            assert main(["bench", what, "--quick", *options]) == 0
            self.known[what] = json.loads((self.folder / f"{what}.json").read_text())
        return self.known[what]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("bench"))


KINDS = ("attention", "train", "inference", "context")


@pytest.mark.parametrize("what", KINDS)
def test_json_says_where_and_how_and_the_picture_is_one(results, what):
    found = results(what)
    assert found["benchmark"] == what and found["command"] == f"voco bench {what} --quick"
    assert found["device"] == "cpu" and found["device_name"] and found["threads"] >= 1
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    assert set(found["versions"]) == {"voco_plugin", "torch", "transformers", "peft"} and found["settings"]
    assert str(results.folder) not in json.dumps(found) and str(Path.home()) not in json.dumps(found)
    picture = (results.folder / f"{what}.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000


@pytest.mark.parametrize("what", KINDS)
def test_tables_and_json_on_stdout(results, what, capsys):
    from voco_plugin.cli.bench_tables import TABLES

    lines = TABLES[what](results(what)).splitlines()
    assert len(lines) > 3 and all(len(line) < 240 for line in lines)
    if what == "context":
        assert main(["bench", what, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["benchmark"] == what


@pytest.mark.parametrize("what", KINDS)
def test_help_has_an_example(what, capsys):
    assert main(["bench", what, "--help"]) == 0
    assert f"example:\n  voco bench {what} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "WHAT"),
        (["atention"], "attention"),
        (["attention", "--frames", "4,x"], "'4,x' is no list of numbers"),
        (["attention", "--frames", "0"], "below 1"),
        (["attention", "--backends", "dense,segmentd"], "did you mean 'segmented'"),
        (["attention", "--backends", "segmented"], "compared with 'dense'"),
        (["attention", "--framse", "4"], "--frames"),
        (["train", "--repeats", "0"], "at least 1"),
        (["train", "--device", "tpu"], "'tpu' is not known"),
        (["inference", "--dtype", "float8"], "float8"),
        (["inference", "--memory", "lots"], "'lots' is no size"),
        (["inference", "--quick", "--shape", "huge"], "huge"),
        (["context", "--text", "2048"], "leave nothing of a context of 2048"),
    ],
)
def test_errors_are_one_line(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "error" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_gpu_is_an_error(capsys):
    assert main(["bench", "inference", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_memory_too_small_is_an_error(capsys):
    model = shapes.build("tiny")
    with pytest.raises(ValueError, match="give at least (\\d+)") as problem:
        serving.largest_batch(model, 1000, 600)
    enough = int(str(problem.value).partition("at least ")[2].split(",")[0])
    assert serving.largest_batch(model, enough, 600) == 1


# -- timing
# ------------------------------------------------------------------------------------------------------------


def test_ways_alternate_and_ratios_are_of_the_same_turn(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    turns = {"a": iter([1, 1, 1, 10, 1]), "b": iter([5, 2, 2, 20, 3])}

    def way(name):
        def run():
            order.append(name)
            now[0] += next(turns[name])

        return lambda: run

    times = timing.interleaved_times({n: way(n) for n in "ab"}, repeats=4, warm_up=1)
    assert times == {"a": [1, 1, 10, 1], "b": [2, 2, 20, 3]}
    assert all({x, y} == {"a", "b"} for x, y in zip(order[::2], order[1::2], strict=True))
    found = timing.compare(times, "a")
    assert found == {"seconds": {"a": 1, "b": 2.5}, "ratio": {"a": 1, "b": 2}}


def test_the_limit_ends_a_case_but_not_before_its_least_turns(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += 1

    for limit, turns in ((0.5, 3), (6.5, 6), (None, 10)):
        now[0] = 0.0
        found = timing.interleaved_times({"a": lambda: run}, repeats=10, warm_up=1, limit=limit)
        assert len(found["a"]) == turns


# -- attention
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 5, 1, 3), (3, 4, 2, 5), (2, 7, 3, 1)])
def test_needed_pairs_are_those_of_the_mask(sizes):
    table = attention.token_table(*sizes)
    mask = dense_mask(vp.VoCoConfig(), SequenceLayout(table.kind, table.block))
    assert attention.needed_pairs(*sizes) == int(mask.sum())


def test_the_backends_that_are_timed_give_the_same():
    table = attention.token_table(3, 6, 2, 5)
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 2, table.length, 8, generator=draw) for _ in range(3)]
    outputs = {}
    backends.register()
    for name in ("dense", "segmented"):
        function = attention.ALL_ATTENTION_FUNCTIONS[backends.NAMES[name, "sdpa"]]
        mask = attention.build_mask(name, table, torch.float32)
        outputs[name] = function(attention._Layer(), *qkv, mask, scaling=0.3)[0]
        assert (getattr(mask, "plan", None) is not None) == (name == "segmented")
    assert (outputs["dense"] - outputs["segmented"]).abs().max() < 1e-5


def test_attention_figures(results):
    found = results("attention")
    assert [(c["frames"], c["vision_tokens"]) for c in found["cases"]] == [(1, 36), (2, 16), (4, 16)]
    for case in found["cases"]:
        tokens = case["tokens"]
        assert case["pairs"]["dense"] == tokens**2 == case["mask_bytes"]["dense"]
        assert case["needed_pairs"] < case["pairs"]["segmented"] < case["pairs"]["dense"]
        assert case["mask_bytes"]["segmented"] <= 3 * 8 * (tokens + 4 * 2)  # indices only
        assert set(case["seconds"]) == {"dense", "segmented", "plain causal"}
        assert all(s > 0 for s in (*case["seconds"].values(), case["floor_seconds"]))
        assert case["needed_flops"] == 14 * 16 * 2 * case["needed_pairs"]
    assert set(found["slope"]) == {"dense", "segmented", "plain causal"}
    assert [p["tokens"] for p in found["crossover"]["points"]] == [32, 64]


def test_slope_and_crossover(monkeypatch):
    assert attention.slope([(10, 300), (20, 1200), (40, 4800)]) == pytest.approx(2)
    assert attention.slope([(10, 3)]) is None

    def fake(frames, *, vision, num_tokens, text, backends):
        tokens = vision + num_tokens + text
        faster = tokens in (64, 256, 512)  # 64 by chance: what pays must pay from there on
        own = {"dense": 2.0 if faster else 1.0, "segmented": 1.5}
        return {"tokens": tokens, "seconds": own, "mask_seconds": {"dense": 0.0, "segmented": 1.6}}

    monkeypatch.setattr(attention, "attention_case", fake)
    found = attention.crossover((64, 128, 256, 512), layers=32)
    assert found["segmented_from"] == 256 and found["points"][0]["faster"] == pytest.approx(2 / 1.55)
    assert attention.crossover((64, 128), layers=32)["segmented_from"] is None


# -- training
# ------------------------------------------------------------------------------------------------------------


def test_train_figures(results):
    found = results("train")
    assert found["model"]["layers"] == 1 and 0 < found["model"]["trained_parameters"]
    for case, images in zip(found["cases"], (1, 2), strict=True):
        plain, dense, segmented = (
            case["tokens"][n] for n in (training_step.PLAIN, training_step.DENSE, training_step.SEGMENTED)
        )
        assert plain == 8 + 16 + 576 * images and dense == segmented == plain + 2 * images
        assert case["ratio_to_plain"][training_step.PLAIN] == 1 and min(case["ratio_to_plain"].values()) > 0
        # what the rule hides is not counted, either
        assert (
            case["flops"][training_step.SEGMENTED]
            < case["flops"][training_step.PLAIN]
            < case["flops"][training_step.DENSE]
        )


@pytest.mark.parametrize("tune", training_step.TUNES)
def test_the_three_ways_are_one_model_under_two_rules(tune):
    models, trained = training_step.three_ways(
        "tiny", layers=1, device="cpu", dtype="float32", tune=tune, rank=4
    )
    weights = [{id(p) for p in m.parameters()} for m in models.values()]
    assert weights[0] == weights[1] == weights[2] and {id(p) for p in trained} <= weights[0]
    assert (len(trained) == 14) == (tune == "lora")
    plain = models[training_step.PLAIN]
    batch = shapes.prompt(plain, 8, 2, rows=1)
    logits = {n: m(**batch).logits[0, -8:] for n, m in models.items()}
    assert (logits[training_step.DENSE] - logits[training_step.SEGMENTED]).abs().max() < 1e-5
    assert (
        logits[training_step.DENSE] - logits[training_step.PLAIN]
    ).abs().max() > 1e-4  # the rule hides something
    assert vp.attachment(models[training_step.SEGMENTED]).config.attention == "segmented"


@pytest.mark.parametrize("layers", [2, 8, 32])
def test_the_cut_vocabulary_keeps_the_heads_share(layers):
    share = training_step.cut_vocabulary("vicuna7b", layers) / layers
    assert share == pytest.approx(shapes.VOCABULARY / 32, rel=0.05)


# -- inference
# ------------------------------------------------------------------------------------------------------------


def test_inference_figures(results):
    found = results("inference")
    (first,) = found["first_token"]
    count = first["flops"]
    assert count["no cache"] > 20 * count["full caching"] and count["full caching"] > count["VoCo"]
    assert 0.9 < count["VoCo"] / count["floor"] <= 1  # a token less than the floor reads
    layer = 4 * 64 * 64 + 3 * 64 * 172  # weights; in both ways 16 text tokens are read, and the head once
    read = 2 * 2 * layer * 16 + 2 * 64 * 32064
    for way, slots in (("VoCo", 17), ("full caching", 592)):
        assert count[way] == read + 2 * 2 * 2 * 64 * 16 * slots
    assert first["stream_tokens"] == 8 + 1 + 8 and first["ratio_to_floor"]["floor"] == 1
    held = found["storage"]
    assert held["bytes"]["full caching"] == 576 * held["bytes"]["VoCo"] == 576 * 2 * 2 * 64 * 4
    assert held["images_in_one_full"] == 576
    for entry, rows in zip(found["decode"], (1, 2), strict=True):
        assert entry["slots"] == {"floor": 16, "VoCo": 17, "full caching": 592}
        assert entry["kv_bytes"]["full caching"] == rows * 592 * 2 * 2 * 64 * 4
        assert entry["tokens_per_second"]["VoCo"] == pytest.approx(rows / entry["seconds"]["VoCo"])
    assert [r["images"] for r in found["requests"]] == [1, 2]
    assert [r["prompt_tokens"] for r in found["requests"]] == [592, 1168]


@pytest.fixture(scope="module")
def tiny_pair():
    return shapes.pair(shapes.build("tiny"))


def test_flops_of_a_deep_shape_are_counted_on_two_of_its_layers(monkeypatch):
    deep = {**shapes.SHAPES["tiny"], "text": {**shapes.SHAPES["tiny"]["text"], "num_hidden_layers": 5}}
    monkeypatch.setitem(shapes.SHAPES, "tiny", deep)
    plain, attached = shapes.pair(shapes.build("tiny"))
    with torch.no_grad():
        ways, _ = inference.first_token_ways(plain, attached, text=8, num_tokens=2, rows=1)
        whole = {name: timing.flops(way()) for name, way in ways.items()}
    assert inference.counted_flops("tiny", text=8, num_tokens=2, dtype="float32") == whole


def test_a_turn_of_decoding_leaves_the_cache_as_it_was(tiny_pair):
    plain, _ = tiny_pair
    past = serving.random_past(plain, rows=3, tokens=7)
    assert past.layers[0].keys.shape == (3, 4, 7, 16) and len(past.layers) == 2
    before = past.layers[1].values.clone()
    way = serving._steps(plain, past, steps=2)
    with torch.no_grad():
        for _ in range(2):
            way()()
            assert past.get_seq_length() == 9
    way()
    assert past.get_seq_length() == 7 and torch.equal(past.layers[1].values, before)


def test_the_largest_batch_fits_and_one_more_does_not(tiny_pair):
    plain, _ = tiny_pair
    row = 2 * 2 * 64 * 4 * 100 * (1 + 1 / 2) + 32064 * (4 + 4)
    for rows in (1, 7):
        need = (serving.weight_bytes(plain) + rows * row) / 0.9
        assert serving.largest_batch(plain, int(need) + 2, 100) == rows
        assert serving.largest_batch(plain, int(need + row / 0.9) - 2, 100) == rows


def test_long_prompts_are_left_out_and_it_is_said(tiny_pair):
    (found,) = serving.requests(
        *tiny_pair, images=(1,), text=4, num_tokens=1, answer=2, repeats=1, longest=587
    )
    assert set(found["seconds"]) == {"VoCo", "full caching"} and "588 tokens" in found["left_out"]


def test_requests_answer_what_the_model_answers(tiny_pair, monkeypatch):
    """The decoding loop of a request against `generate`."""
    plain, attached = tiny_pair
    seen = []
    real = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda t, **k: (seen.append(real(t, **k)), seen[-1])[1])
    with torch.no_grad():
        stream, cache = inference.many_images(plain, attached, images=3, text=5, num_tokens=2)
        serving._request(attached, {"input_ids": stream, "voco_cache": cache}, 4)()()
        monkeypatch.undo()
        expected = attached.generate(
            input_ids=stream, attention_mask=torch.ones_like(stream), voco_cache=cache, max_new_tokens=3,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert stream.shape[1] == 8 + 3 * 2 + 5
    assert [int(t) for t in seen[-3:]] == expected[0, -3:].tolist()


# -- context
# ------------------------------------------------------------------------------------------------------------


def test_frames_that_fit_by_hand():
    whole, sequential, compact = context_length.fits(context_length.llava(), 2048, 2, 128).values()
    # 1920 positions: 3 x 576 = 1728; 3 x 578 = 1734; 960 x 2
    assert (whole, sequential, compact) == (3, 3, 960)
    assert list(context_length.fits(context_length.llava(224), 4096, 2, 128).values()) == [
        15,
        15,
        1984,
    ]  # 3968 / 256, 258
    qwen = context_length.qwen(448, 448)
    assert (qwen.vision, qwen.extent) == (16 * 16 + 2, 16 + 2)
    # 32640 positions over 258, 18 + 2 and 2
    assert list(context_length.fits(qwen, 32768, 2, 128).values()) == [126, 1632, 16320]
    video = context_length.qwen(448, 448, frames=2)
    assert list(context_length.fits(video, 32768, 2, 128).values()) == [252, 3264, 32640]
    assert context_length.qwen(720, 1280).vision == 26 * 46 + 2  # 728 x 1288 pixels
    with pytest.raises(ValueError, match="frames=3"):
        context_length.qwen(448, 448, frames=3)


def test_qwens_count_is_the_familys():
    """Vision tokens and positions of an image, as the tiny Qwen2.5-VL of the real class has them."""
    batch = inputs("qwen2_5_vl", [["bos", "img", "c2", "t3"]])
    (block,) = shared("qwen2_5_vl").compress(**batch)
    _, height, width = batch["image_grid_thw"][0].tolist()
    same = context_length.qwen(height * 14, width * 14)
    markers = 2 - (block.num_vision - height * width // 4)  # the tiny vocabulary may leave markers out
    assert block.num_vision == same.vision - markers and block.extent == same.extent - markers


def test_the_papers_ratio(results):
    """ "Approximately 200 times more frames" lies between 256 and 576 tokens a frame, at 2 VoCo tokens."""
    rows = [r for r in results("context")["rows"] if r["family"] == "LLaVA-1.5" and r["num_tokens"] == 2]
    assert sorted({r["token_ratio"] for r in rows}) == [128, 288]
    assert all(r["times"]["VoCo, sequential"] <= 1 for r in rows)


# -- scripts for a GPU, small and on a CPU
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    for name in ("line", "long_video", "table7", "train_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", ["table7", "train_step", "attention"])
def test_gpu_scripts_end_in_a_line_of_json(name, scripts, monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--dtype", "float32", "--quick"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(GPU / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["device"] == "cpu" and found["dtype"] == "float32" and "--quick" in found["command"]


@pytest.mark.parametrize("max_memory", [None, "500000000"])
def test_a_long_video_in_small(scripts, capsys, max_memory):
    from long_video import main as long_video

    small = ["--device", "cpu", "--dtype", "float32", "--shape", "tiny", "--frames", "5", "--batch", "2"]
    more = [] if max_memory is None else ["--max-memory", max_memory]
    assert long_video([*small, *more, "--text", "8", "--repeats", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["vision_tokens"] == 256 and found["stage_two"]["stream_tokens"] == 5 * 2 + 8
    assert found["cache_bytes"] == 5 * 2 * 2 * 2 * 64 * 4
    assert found["all_vision_tokens_bytes"] == 128 * found["cache_bytes"]
    assert found["compress"]["frames_per_second"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wide_model_in_half_precision_moves_its_blocks(dtype):
    """Rounding below the first layer was once taken for a value that turns with its position."""
    model = shapes.build("medium", dtype=dtype, layers=2, vision="tiny", vocabulary=1024)
    with torch.no_grad():
        ways, _ = inference.first_token_ways(*shapes.pair(model), text=4, num_tokens=1, rows=1)
        assert torch.isfinite(ways["VoCo"]()().logits).all()

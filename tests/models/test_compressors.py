"""What VoCo tokens start from, and rivals outside the LLM: in models, over the families, and mistakes."""

from __future__ import annotations

import copy

import pytest
import torch

import voco_plugin as vp
from contracts import compressors
from contracts.compressors import OPTIONS, merged_and_written
from harness import CORE, attached, inputs, layout_of, plain, shared, text_columns, trained, vocabulary
from matrix import in_turn
from tiny import NAMES, voco_id
from voco_plugin import registry
from voco_plugin.cache.compress import last_rows
from voco_plugin.cache.compress.last_rows import NotCut
from voco_plugin.core.layout import TokenKind

REUSABLE = [n for n in OPTIONS if n not in ("llama_vid", "pixel_shuffle", "downsample")]


@pytest.mark.parametrize(("name", "option"), in_turn(NAMES, ["pooled", "slots", "queries", "avg_pool"]))
def test_only_voco_slots_are_written_and_from_their_own_image(name, option):
    compressors.only_voco_slots_are_written_and_from_their_own_image(name, option)


@pytest.mark.parametrize("option", REUSABLE)
@pytest.mark.parametrize("name", CORE)
def test_every_compressor_in_two_stages(name, option):
    if option == "token_merge":  # merges to no more tokens than there are
        rows = [["bos", "t3", "img", "c2", "t4"], ["bos", "t6"], ["img", "c1", "img", "c1", "t2"]]
    else:
        rows = None
    model = attached(name, **OPTIONS[option]).eval()
    batch = inputs(name, rows, side="left")
    with torch.no_grad():
        logits, cache = model(**batch).logits, model.compress(**batch)
        stream = model.stream_inputs(batch)
        cached = model(**stream, voco_cache=cache).logits
    real, own = (
        text_columns(model, batch),
        (stream["attention_mask"].bool()) & (stream["input_ids"] != voco_id(name)),
    )
    for row, columns in enumerate(real):
        assert (logits[row, columns] - cached[row, own[row]]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CORE)
def test_stage_one_of_a_rival_leaves_the_vision_tokens_out(name, monkeypatch):
    model = attached(name, compressor="avg_pool").eval()
    batch = inputs(name, side="left")
    layers = vp.attachment(model).family.text_model(model).layers
    rows: list[int] = []
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args or [kwargs["hidden_states"]])[0].shape[1]),
        with_kwargs=True,
    )
    short = model.compress(**batch)
    handle.remove()
    assert set(rows) == {1, 2, 3}, "as many rows as a block has VoCo tokens"

    def refuse(*args):
        raise NotCut("told to")

    monkeypatch.setattr(last_rows, "cut_argument", refuse)
    for a, b in zip(short, model.compress(**batch), strict=True):  # over the whole blocks
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            assert (x - y).abs().max() <= 1e-5


@pytest.mark.parametrize("context", ["self", "prefix"])
@pytest.mark.parametrize("option", ["avg_pool", "qformer", "token_merge", "matryoshka", "downsample"])
def test_a_rival_is_a_plain_model_that_reads_its_embeddings(option, context):
    compressors.a_rival_is_a_plain_model_that_reads_its_embeddings(option, context)


@pytest.mark.parametrize("option", list(OPTIONS))
def test_gradients_reach_every_weight(option):
    name = "llava_llama"
    options = OPTIONS[option]
    model = attached(name, **options).train()
    batch = inputs(name, [["bos", "t3", "img", f"c{options.get('num_tokens', 2)}", "t4"]])
    if option == "llama_vid":
        with pytest.raises(ValueError, match="question_mask"):
            model(**batch)
        batch["question_mask"] = torch.ones_like(batch["input_ids"])
    plainly = weight_gradients(model, batch)
    assert all(bool(g.abs().max() > 0) for name, g in plainly.items() if not name.endswith("key.bias"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in weight_gradients(model, batch).items():
        torch.testing.assert_close(grad, plainly[name])


def weight_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).logits[:, -3:].pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in model.voco_compressor.named_parameters()}


def test_the_first_of_queries_are_what_fewer_tokens_would_be():
    name = "llava_llama"
    model = attached(name, **OPTIONS["queries"]).eval()
    three = inputs(name, [["bos", "t3", "img", "c3", "t4"]])
    with torch.no_grad():
        cut, fewer = model.compress(**three).first(2), model.compress(**three, num_tokens=2)
    one, other = cut.blocks[0], fewer.blocks[0]
    for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_question_is_read_and_answers_are_not():
    name = "llava_llama"
    model = attached(name, **OPTIONS["llama_vid"]).eval()
    batch = inputs(name, [["bos", "t3", "img", "c2", "t6"]])
    columns = text_columns(model, batch)[0]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, columns[-1]] += 1
    mask = torch.zeros_like(batch["input_ids"])
    mask[0, columns[-6:-1]] = 1
    _, a = merged_and_written(model, batch)
    _, b = merged_and_written(model, other)
    voco = layout_of(model, batch).kind[0] == TokenKind.VOCO
    assert (a[0, voco] - b[0, voco]).abs().max() > 1e-4  # no mask: all text behind the image is the question
    _, a = merged_and_written(model, {**batch, "question_mask": mask})
    _, b = merged_and_written(model, {**other, "question_mask": mask})
    assert torch.equal(a[0, voco], b[0, voco])
    with pytest.raises(ValueError, match="reads the question before it compresses"):
        model.compress(**batch)
    made = model.generate(**batch, max_new_tokens=3, do_sample=False)
    again = model.generate(**batch, max_new_tokens=3, do_sample=False, two_stage=False)
    assert torch.equal(made, again)


@pytest.mark.parametrize("option", ["pooled", "queries", "avg_pool", "slots"])
def test_packed_rows_are_as_alone(option):
    compressors.packed_rows_are_as_alone(option)


def test_detaching_and_copying():
    name = "llava_llama"
    batch = inputs(name)
    stock = plain(name).eval()
    with torch.no_grad():
        before = stock(**inputs(name, [["bos", "t6"]])).logits
    names = set(stock.state_dict())
    config = vp.VoCoConfig(token_id=voco_id(name), token_init="pooled")
    model = trained(vp.attach(stock, config, vocabulary=vocabulary(name, stock, config)))
    twin = copy.deepcopy(model)
    assert twin.voco_compressor is not model.voco_compressor
    with torch.no_grad():
        same = twin(**batch).logits
        assert torch.equal(
            same[batch["attention_mask"].bool()], model(**batch).logits[batch["attention_mask"].bool()]
        )
        twin.voco_compressor.seed.weight.zero_()
        assert not torch.equal(twin(**batch).logits, model(**batch).logits)
        assert torch.equal(same, model(**batch).logits)
    vp.detach(model)
    assert set(model.state_dict()) == names and not hasattr(model, "voco_compressor")
    with torch.no_grad():
        assert torch.equal(model(**inputs(name, [["bos", "t6"]])).logits, before)


def test_learned_tokens_bring_no_module():
    model = shared("llava_llama")
    assert not hasattr(model, "voco_compressor") and vp.attachment(model).embeddings is None


@pytest.mark.parametrize("option", ["pooled", "queries", "qformer", "slots"])
def test_a_saved_model_comes_back(option, tmp_path):
    name = "llava_llama"
    model = attached(name, **OPTIONS[option]).eval()
    batch = inputs(name)
    model.save_pretrained(tmp_path)
    assert any(k.startswith("voco_compressor.") for k in _names(tmp_path / "model.safetensors"))
    from voco_plugin.models.compressor_weights import load_compressor, read_compressor

    found = read_compressor(lambda file: str(tmp_path / file) if (tmp_path / file).is_file() else None)
    other = attached(name, **OPTIONS[option]).eval()
    with torch.no_grad():
        for parameter in other.voco_compressor.parameters():
            parameter.zero_()
        assert not torch.equal(other(**batch).logits, model(**batch).logits)
        load_compressor(other, found, tmp_path)
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="holds weights of another compressor"):
        load_compressor(attached(name, token_init="slots", num_tokens=5), found, tmp_path)


def _names(path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_a_cache_of_another_compressor_is_refused():
    name = "llava_llama"
    batch = inputs(name)
    model = attached(name).eval()
    cache = model.compress(**batch)
    assert cache.first(1).num_tokens == [1] * len(cache)
    rival = attached(name, compressor="matryoshka").eval()  # no weights of its own: only the name differs
    with pytest.raises(ValueError, match="compressor is 'voco', not 'matryoshka'"):
        rival(**rival.stream_inputs(batch), voco_cache=cache)
    with pytest.raises(ValueError, match="whole number"):
        rival.compress(**batch).first(1)
    old = dict(cache.fingerprint)
    del old["compressor"]  # as written before rivals were there
    with torch.no_grad():
        model(**model.stream_inputs(batch), voco_cache=vp.VoCoCache(cache.blocks, cache.rows, 4, old))


# -- mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compressor": "avg_poll"}, "did you mean 'avg_pool'"),
        ({"compressor": "avg_pool", "compressor_options": {"layers": 2}}, "has no option 'layers'"),
        ({"compressor": "qformer", "compressor_options": {"layer": 2}}, "did you mean 'layers'"),
        ({"compressor": "avg_pool", "rule": "star"}, "use rule='isolated'"),
        ({"compressor": "avg_pool", "token_init": "pooled"}, "leave token_init out"),
        ({"rule": "causal", "token_init": "pooled"}, "use token_init='learned'"),
        ({"rule": "causal", "token_init": "slots"}, "use token_init='learned'"),
        ({"compressor_options": {"layers": 2}}, "would go unused"),
        ({"token_init": "pooled", "compressor_options": {"heads": 2}}, "'pooled' has no option 'heads'"),
        ({"token_init": "pooled", "compressor_options": {"start": "one"}}, "zero or identity, not 'one'"),
        ({"token_init": "queries", "compressor_options": {"head": 2}}, "did you mean 'heads'"),
        ({"token_init": "queries", "compressor_options": {"heads": 3}}, "256 with 3 heads"),
        ({"token_init": "queries", "compressor_options": {"heads": 0}}, "at least 1, not 0"),
        ({"compressor": "llama_vid"}, "must be at least 2"),
        ({"compressor": "pixel_shuffle", "num_tokens": 2}, "needs compressor_options"),
        (
            {"compressor": "pixel_shuffle", "num_tokens": 3, "compressor_options": {"num_vision": 16}},
            "divide",
        ),
        ({"token_init": "pool"}, "did you mean 'pooled'"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        attached("llava_llama", **options)


def test_a_compressor_of_ones_own():
    from voco_plugin.models.compressors import Compressor

    class First(Compressor):
        """The first k features."""

        def forward(self, vision, rows, question=None):
            return vision[:, : len(rows)]

    registry.compressors.register("first_features", First)
    try:
        model = attached("llava_llama", compressor="first_features").eval()
        batch = inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"]])
        before, after = merged_and_written(model, batch)
        span = layout_of(model, batch).spans[0]
        assert torch.equal(after[0, span.voco : span.stop], before[0, span.start : span.start + 2])
    finally:
        registry.compressors._entries.pop("first_features")

"""`voco convert`: what it writes computes what the original code computes, and nothing wrong gets written."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

import voco_plugin as vp
from tiny import official
from voco_plugin.cli import main
from voco_plugin.files import atomic_folder
from voco_plugin.training.parts import FIXED, ModelParts

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant of the image. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)
ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is\nthe image"}]}]


def picture(width: int = 20, height: int = 12) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def converted(folder: Path, *more: str, name: str = "out") -> Path:
    """Run the command on ``folder/ckpt``."""
    out = folder / name
    assert main(["convert", str(folder / "ckpt"), str(out), *more]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    """The command's one line of error; its status must be 2, and there must be no trace of OUT."""
    capsys.readouterr()
    assert main(["convert", str(folder / "ckpt"), str(folder / "out"), *more]) == 2
    found = capsys.readouterr()
    assert "Traceback" not in found.err and found.out == ""
    assert not [p for p in folder.iterdir() if "out" in p.name], "something was left behind"
    return found.err.strip().splitlines()[-1]


def prompt(processor, text: str | None = None):
    """Inputs of a conversation as text, and its ids with -200 for the image."""
    text = text or processor.apply_chat_template(ASK, add_generation_prompt=True)
    inputs = processor(images=picture(), text=text, return_tensors="pt", add_special_tokens=False)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids: list[int] = []
    for token in inputs["input_ids"][0].tolist():
        if token != image:
            ids.append(token)
        elif not ids or ids[-1] != -200:
            ids.append(-200)
    return inputs, ids


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0]


def largest_difference(model, processor, state, voco_id, text=None, **options) -> float:
    inputs, ids = prompt(processor, text)
    assert ids.count(-200) == 1
    wanted = official.official_logits(state, ids, inputs["pixel_values"], voco_id, **options)
    found = logits(model, inputs)
    assert found.shape[0] == wanted.shape[0] > 40
    assert wanted.abs().max() > 2, "logits too small to tell anything apart"
    return float((found[:, : wanted.shape[1]] - wanted).abs().max())


# -- logits


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "mlp1x_gelu"])
@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_voco_llama_has_the_logits_of_the_original_code(tmp_path, projector, safetensors, inside) -> None:
    state = official.write_checkpoint(
        tmp_path / "ckpt", projector=projector, safetensors=safetensors, tower_inside=inside
    )
    model, processor = vp.load(converted(tmp_path, "--num-tokens", "2"))
    config = vp.attachment(model).config
    assert (config.rule, config.hide_prefix, config.block_context, config.positions, config.num_tokens) == (
        "isolated", True, "prefix", "sequential", 2,
    )  # fmt: skip
    assert model.config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert largest_difference(model, processor, state, config.token_id, projector=projector) < 1e-5


def test_the_rule_and_the_conversation_matter(tmp_path) -> None:
    """The comparison sees a wrong mask, a wrong K, a wrong layer and a wrong position of the line break."""
    state = official.write_checkpoint(tmp_path / "ckpt")
    model, processor = vp.load(out := converted(tmp_path, "--num-tokens", "2"))
    voco_id = vp.attachment(model).config.token_id
    assert largest_difference(model, processor, state, voco_id) < 1e-5
    assert largest_difference(model, processor, state, None) > 0.1, "causal"
    assert largest_difference(model, processor, state, voco_id, select_layer=-1) > 0.1
    assert largest_difference(model, processor, state, voco_id, theta=10000.0) > 1e-3
    for wrong in ({"hide_prefix": False}, {"block_context": "self"}):
        values = {**vp.attachment(model).config.to_dict(), **wrong}
        other, _ = vp.load(out, voco=vp.VoCoConfig(**values))
        assert largest_difference(other, processor, state, voco_id) > 1e-3, wrong


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_plain_llava_has_the_logits_of_a_causal_run(tmp_path, projector) -> None:
    state = official.write_checkpoint(
        tmp_path / "ckpt", voco=False, projector=projector, model_type="llava", image_aspect_ratio=None
    )
    out = converted(tmp_path)
    assert not (out / "voco_config.json").exists()
    from transformers import AutoProcessor

    model, told = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(out)
    assert largest_difference(model.eval(), processor, state, None, projector=projector) < 1e-5
    text = processor.apply_chat_template(ASK, add_generation_prompt=True)
    assert text.startswith("<s>A chat between") and text.endswith(
        "USER: <image>\nwhat is\nthe image ASSISTANT:"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_linear_projector_is_the_original_one_bit_for_bit(tmp_path, dtype) -> None:
    state = official.write_checkpoint(tmp_path / "ckpt", projector="linear", voco=False)
    out = converted(tmp_path, "--dtype", dtype)
    whole = LlavaForConditionalGeneration.from_pretrained(out)
    assert ModelParts(whole).of("model.multi_modal_projector.linear_2.weight") == FIXED
    made = whole.model.multi_modal_projector
    weight, bias = (state[f"model.mm_projector.{n}"].to(getattr(torch, dtype)) for n in ("weight", "bias"))
    features = torch.randn(3, 9, weight.shape[1]).to(weight.dtype)
    with torch.no_grad():
        assert torch.equal(made(features), torch.nn.functional.linear(features, weight, bias))


def test_class_token_and_last_layer_are_read_from_the_config(tmp_path) -> None:
    more = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}
    state = official.write_checkpoint(tmp_path / "ckpt", **more)
    model, processor = vp.load(converted(tmp_path))
    voco_id = vp.attachment(model).config.token_id
    options = {"class_token": True, "select_layer": -1}
    assert largest_difference(model, processor, state, voco_id, **options) < 1e-5
    assert model.config.image_seq_length == 10


def test_a_projector_alone_joins_its_language_model(tmp_path) -> None:
    official.write_checkpoint(tmp_path / "whole", voco=False)  # for the tokenizer and the tower
    rows = json.loads((tmp_path / "whole/config.json").read_text())["vocab_size"]
    llm, stage = tmp_path / "vicuna", tmp_path / "ckpt"
    llm.mkdir(), stage.mkdir()
    language = official.llama_state(rows, seed=9)
    official.write_weights(llm, language, 2, safetensors=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llm / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    official.write_config(stage, rows)
    projector = {"model." + n: t for n, t in official.projector_state("mlp2x_gelu", seed=8).items()}
    # with start and end markers that code trains and saves the embeddings too: they replace the LLM's
    embeddings = {
        "model.embed_tokens.weight": official.llama_state(rows, seed=7)["model.embed_tokens.weight"]
    }
    torch.save({**projector, **embeddings}, stage / "mm_projector.bin")
    out = converted(tmp_path, "--language-model", str(llm))
    tower = {"model.vision_tower.vision_tower." + n: t for n, t in official.clip_state().items()}
    from transformers import AutoProcessor

    model = LlavaForConditionalGeneration.from_pretrained(out).eval()
    state = {**language, **embeddings, **projector, **tower}
    assert largest_difference(model, AutoProcessor.from_pretrained(out), state, None) < 1e-5


# -- the files


def test_every_weight_is_the_original_one_bit_for_bit_in_shards_too(tmp_path) -> None:
    state = official.write_checkpoint(tmp_path / "ckpt", dtype=torch.bfloat16, shards=3)
    small = converted(tmp_path, "--max-shard-size", "50KB", name="small")
    whole = converted(tmp_path, name="whole")
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and not (small / "model.safetensors").exists()
    assert not (whole / "model.safetensors.index.json").exists()
    one, two = (LlavaForConditionalGeneration.from_pretrained(p).state_dict() for p in (small, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    rows = state["lm_head.weight"].shape[0]
    assert one["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(one["lm_head.weight"][:rows], state["lm_head.weight"].bfloat16())
    assert len(one["lm_head.weight"]) == len(one["model.language_model.embed_tokens.weight"]) == rows + 1
    layer = "layers.1.mlp.up_proj.weight"
    assert torch.equal(one["model.language_model." + layer], state["model." + layer].bfloat16())
    # the new row's logit is the mean of all: it never wins
    mean = state["lm_head.weight"].bfloat16().float().mean(0)
    assert torch.equal(one["lm_head.weight"][rows], mean.bfloat16())


def test_the_dtype_asked_for_is_written_and_said(tmp_path, capsys) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    capsys.readouterr()
    out = converted(tmp_path, "--dtype", "float16", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["dtype"] == "float16" and any("float32 were written as float16" in n for n in told["notes"])
    assert any("num_tokens=1 was taken" in n for n in told["notes"])
    assert any("vision tower's weights were taken from" in n for n in told["notes"])
    assert vp.load(out)[0].dtype == torch.float16


def test_the_conversation_is_the_original_one(tmp_path) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    model, processor = vp.load(converted(tmp_path, "--num-tokens", "3"))
    answered = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    again = [{"role": "user", "content": "what"}]
    text = processor.apply_chat_template([*answered, *again], add_generation_prompt=True)
    head = "<s><image>\n<voco><voco><voco>\n"
    assert text == f"{head}{SYSTEM} USER: what isthe image ASSISTANT: red</s>USER: what ASSISTANT:"
    inputs, ids = prompt(processor)
    assert ids[0] == processor.tokenizer.bos_token_id and ids[1] == -200
    # what stands between image and VoCo tokens is part of the block, as the original mask has it
    vocab = vp.attachment(model).vocab
    voco_at = ids.index(vocab.voco_id)
    assert voco_at > 2 and set(ids[2:voco_at]) <= vocab.markers
    # and the collator finds the VoCo tokens there already
    same = model.insert_voco_tokens(inputs)
    assert torch.equal(same["input_ids"], inputs["input_ids"])


def test_the_cached_answer_equals_the_single_pass(tmp_path) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    model, processor = vp.load(converted(tmp_path, "--num-tokens", "2"))
    inputs, _ = prompt(processor)
    cache = model.compress(**inputs)
    stream = model.stream_inputs(inputs)
    with torch.no_grad():
        cached = model(**stream, voco_cache=cache).logits[0]
    assert (cached[-5:] - logits(model, inputs)[-5:]).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (15, 15)])
def test_images_are_padded_to_a_square_as_the_original_does(tmp_path, size) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    _, processor = vp.load(converted(tmp_path))
    plain = CLIPImageProcessor.from_pretrained(tmp_path / "tower")
    image, side = picture(*size), max(size)
    square = Image.new("RGB", (side, side), tuple(int(255 * c) for c in plain.image_mean))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    wanted = plain(square, return_tensors="pt")["pixel_values"]
    found = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, wanted)
    cropped = plain(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, cropped) == (size[0] == size[1])


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="needs sentencepiece (the `convert` extra)"
)
def test_a_slow_tokenizer_is_read(tmp_path) -> None:
    state = official.write_checkpoint(tmp_path / "ckpt", slow=True)
    model, processor = vp.load(converted(tmp_path, "--num-tokens", "2"))
    voco_id = vp.attachment(model).config.token_id
    assert voco_id == state["lm_head.weight"].shape[0] - 1
    assert largest_difference(model, processor, state, voco_id) < 1e-5


def test_a_slow_tokenizer_without_sentencepiece_says_what_to_install(tmp_path, capsys, monkeypatch) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "ckpt/tokenizer.json").unlink()
    (tmp_path / "ckpt/tokenizer.model").write_bytes(b"x")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sentencepiece" else found(name, *a)
    )
    assert "pip install 'voco_plugin[convert]'" in error_of(capsys, tmp_path)


def test_start_and_end_markers_stand_around_the_image(tmp_path) -> None:
    official.write_checkpoint(tmp_path / "ckpt", voco=False, mm_use_im_start_end=True)
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(converted(tmp_path))
    text = processor.apply_chat_template(ASK, add_generation_prompt=True)
    assert "USER: <im_start><image><im_end>\nwhat is" in text


def test_hub_ids_are_fetched_as_snapshots(tmp_path, monkeypatch) -> None:
    state = official.write_checkpoint(tmp_path / "ckpt", mm_vision_tower="openai/clip")
    places = {"someone/voco": tmp_path / "ckpt", "openai/clip": tmp_path / "tower"}
    fetched = []

    def fetch(name, allow_patterns):
        fetched.append(name)
        return str(places[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert main(["convert", "someone/voco", str(tmp_path / "out"), "--num-tokens", "2"]) == 0
    assert fetched == ["someone/voco", "openai/clip"]
    model, processor = vp.load(tmp_path / "out")
    assert largest_difference(model, processor, state, vp.attachment(model).config.token_id) < 1e-5


# -- errors


def edit(folder: Path, **values) -> None:
    path = folder / "ckpt/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]},
            "is of a LlavaMistral",
        ),
        ({"text_config": {}}, "in transformers' format already"),
        ({"mm_projector_type": "mlp3x_gelu"}, "'mlp3x_gelu' has no counterpart"),
        (
            {"mm_projector_type": "linear"},
            "2 unexpected: model.mm_projector.2.bias, model.mm_projector.2.weight",
        ),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad' is LLaVA-NeXT's"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres' is LLaVA-NeXT's"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls' is not known"),
        ({"mm_vision_tower": "./gone"}, "the vision tower ./gone does not exist"),
        ({"mm_vision_tower": "nobody/clip"}, "nobody/clip is neither a folder here nor"),
        ({"mm_hidden_size": 48}, "has features of size 32, the checkpoint's projector reads 48"),
        ({"intermediate_size": 80}, "model.layers.0.mlp.gate_proj.weight has shape (96, 64), not (80, 64)"),
        ({"num_hidden_layers": 4}, "9 missing: model.layers.3."),
        ({"num_hidden_layers": 2}, "9 unexpected: model.layers.2."),
        ({"vocab_size": 390}, "has 394 tokens and the checkpoint 390 rows"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(tmp_path, capsys, values, message) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    edit(tmp_path, **values)
    assert message in error_of(capsys, tmp_path)


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def _drop(folder: Path, name: str) -> None:
    path = folder / "ckpt/pytorch_model-00001-of-00002.bin"
    state = torch.load(path, weights_only=True)
    torch.save({n: t for n, t in state.items() if n != name}, path)


@pytest.mark.parametrize("broken", ["shard", "cut", "pickle", "object", "tensor", "extra", "twice", "none"])
def test_broken_weights_are_an_error_that_names_them(tmp_path, capsys, monkeypatch, broken) -> None:
    monkeypatch.chdir(tmp_path)
    official.write_checkpoint(tmp_path / "ckpt")
    first, second = (tmp_path / f"ckpt/pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
    state = torch.load(first, weights_only=True)
    if broken == "shard":
        second.unlink()
        message = f"names {second.name}, which the folder does not hold"
    elif broken == "cut":
        first.write_bytes(first.read_bytes()[:5000])
        message = f"{first} is not read: it is cut short"
    elif broken == "pickle":
        torch.save({**state, "x": _Trap()}, first)
        message = "holds more than tensors, which could run code"
    elif broken == "object":
        first.write_bytes(pickle.dumps(_Trap()))
        message = "holds more than tensors, which could run code"
    elif broken == "tensor":
        _drop(tmp_path, "model.embed_tokens.weight")
        message = "has no model.embed_tokens.weight"
    elif broken == "extra":
        torch.save({**state, "model.image_newline": torch.zeros(64)}, first)
        message = "1 unexpected: model.image_newline"
    elif broken == "twice":
        torch.save({**state, **torch.load(second, weights_only=True)}, first)
        message = "and again in"
    else:
        for path in (tmp_path / "ckpt").glob("*.bin*"):
            path.unlink()
        message = "holds no pytorch_model*.bin"
    assert message in error_of(capsys, tmp_path)
    assert not (tmp_path / "trap").exists(), "code of the file was run"


def test_arguments_that_contradict_the_checkpoint(tmp_path, capsys) -> None:
    official.write_checkpoint(tmp_path / "ckpt", voco=False)
    assert "no <voco> token: this is a plain LLaVA" in error_of(capsys, tmp_path, "--num-tokens", "2")
    assert "a language model of its own" in error_of(capsys, tmp_path, "--language-model", str(tmp_path))
    for path in (tmp_path / "ckpt").glob("pytorch_model*"):
        path.unlink()
    assert "holds a projector alone" in error_of(capsys, tmp_path)
    (tmp_path / "ckpt/adapter_config.json").write_text("{}")
    assert "is a LoRA checkpoint" in error_of(capsys, tmp_path)
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "out")]) == 2


def test_a_voco_llama_whose_tokenizer_is_missing_is_told(tmp_path, capsys) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    official.write_checkpoint(tmp_path / "plain/ckpt", voco=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ckpt" / name).write_bytes((tmp_path / "plain/ckpt" / name).read_bytes())
    out = converted(tmp_path)
    assert "its tokenizer is missing" in capsys.readouterr().err
    assert not (out / "voco_config.json").exists()


def test_a_folder_that_is_there_is_never_written_into(tmp_path, capsys) -> None:
    official.write_checkpoint(tmp_path / "ckpt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "ckpt"), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "whole").write_text("1")
        assert list((tmp_path / "x").iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x/whole").exists()

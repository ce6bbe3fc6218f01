"""Composed models: two stages = single pass, plain transformers loads them, features as the library gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import voco_plugin as vp
from harness import largest_difference
from paths import ROOT
from tiny.parts import ENCODERS, WIDTH, write_encoder, write_llm
from voco_plugin.models.encoders import load_encoder

timm = pytest.importorskip("timm", reason="timm is in the extra `backbones`")
open_clip = pytest.importorskip("open_clip", reason="open_clip is in the extra `backbones`")

HOSTS = {"timm_vit": "PerceptionLM", "timm_siglip": "PerceptionLM", "timm_eva": "PerceptionLM"}
HOSTS["timm_convnext"] = "FastVlm"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """A folder for each part, written when first asked for."""
    root = tmp_path_factory.mktemp("parts")

    class Parts(dict):
        def __missing__(self, name: str) -> str:
            self[name] = (write_encoder if name in ENCODERS else write_llm)(root, name)
            return self[name]

    return Parts()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 20, 3), dtype=np.uint8))


def made(parts, encoder: str, llm: str, projector: str = "mlp2x_gelu", **options):
    """A composed model whose projector lets the image through."""
    if encoder == "timm_convnext":
        options.setdefault("image_size", 64)
    model, processor = vp.compose(parts[encoder], parts[llm], projector, **options)
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            if weight.dim() > 1 and weight.requires_grad:
                weight.mul_(10)
    return model, processor


def batch_of(processor, first: int = 0):
    texts = ["<s>one <image> is what it?", "<s><image>and <image> is the color red blue"]
    images = [[picture(first)], [picture(1), picture(2)]]
    return processor(images=images, text=texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("llm", ["llama", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("encoder", ["clip", "timm_vit", "timm_convnext", "open_clip"])
@torch.no_grad()
def test_a_composed_model_keeps_the_contract(parts, encoder, llm):
    model, processor = made(parts, encoder, llm)
    assert type(model).__name__ == f"{HOSTS.get(encoder, 'Llava')}ForConditionalGeneration"
    other = model(**batch_of(processor, first=5)).logits[0, -1]
    assert (other - model(**batch_of(processor)).logits[0, -1]).abs().max() > 1e-2  # the image matters
    vp.attach(model, vp.VoCoConfig(num_tokens=2), processor)
    batch = model.insert_voco_tokens(batch_of(processor))
    logits = model(**batch).logits
    cache = model.compress(**batch)
    stream = model.stream_inputs(batch)
    cached = model(**stream, voco_cache=cache).logits
    assert cache.num_tokens == [2, 2, 2]
    assert largest_difference(model, batch, logits, stream, cached) <= 1e-4


_PLAIN = """
import sys, torch
{extra}
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.open(folder + "/picture.png")
    inputs = processor(images=image, text="<s><image>is what", return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder + "/logits.pt")
    print("voco_plugin" in sys.modules, type(model).__name__)
"""


def save_composed(parts, folder: Path, *names: str) -> torch.Tensor:
    """Write a composed model, and return the logits that it gives here."""
    model, processor = made(parts, *names)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture().save(folder / "picture.png")
    inputs = processor(images=picture(), text="<s><image>is what", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def process(folders: list[Path], extra: str = "", path: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    command = [sys.executable, "-c", _PLAIN.format(extra=extra), *map(str, folders)]
    return subprocess.run(command, cwd=folders[0], env=env, capture_output=True, text=True)


CASES = [
    ("clip", "llama", "linear"),
    ("timm_eva", "qwen3", "mlp2x_gelu"),
    ("timm_convnext", "gemma3", "linear"),
    ("siglip", "mistral", "mlp2x_gelu"),
    ("dinov2", "gemma2", "linear"),
    ("dinov3", "llama", "mlp2x_gelu"),
    ("timm_siglip", "llama", "mlp2x_gelu"),
]


def test_plain_transformers_gives_the_same_logits(parts, tmp_path):
    """In a process that never imports this package; a tower of open_clip is refused there by name."""
    folders = [tmp_path / "-".join(names) for names in (*CASES, ("open_clip", "llama", "linear"))]
    wanted = []
    for folder, names in zip(folders, [*CASES, ("open_clip", "llama", "linear")], strict=True):
        folder.mkdir()
        wanted.append(save_composed(parts, folder, *names))
        published = json.dumps(json.loads((folder / "config.json").read_text())["composed_of"])
        assert "/" not in published  # no local path
    done = process(folders)
    classes = [f"{HOSTS.get(names[0], 'Llava')}ForConditionalGeneration" for names in CASES]
    assert done.stdout.split() == [word for name in classes for word in ("False", name)], done.stderr[-2000:]
    for folder, logits in zip(folders[:-1], wanted[:-1], strict=True):
        assert torch.equal(logits, torch.load(folder / "logits.pt")), folder.name
    assert done.returncode != 0 and "open_clip_vision" in done.stderr


@pytest.mark.parametrize(
    "extra",
    [
        "import voco_plugin",
        pytest.param("import transformers.models.auto.modeling_auto, voco_plugin", marks=pytest.mark.slow),
    ],
)
def test_an_open_clip_tower_loads_once_the_package_is_imported(parts, tmp_path, extra):
    wanted = save_composed(parts, tmp_path, "open_clip", "llama")
    done = process([tmp_path], extra, str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(wanted, torch.load(tmp_path / "logits.pt"))


# -- features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2, -3])
@torch.no_grad()
def test_features_are_those_of_the_chosen_layer(parts, layer):
    pixels = torch.randn(2, 3, 16, 16)
    found = load_encoder(parts["clip"], feature_layer=layer)
    wanted = found.tower(pixels, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(found.features(pixels), wanted[:, 1:])
    kept = load_encoder(parts["clip"], feature_layer=layer, class_token=True)
    assert torch.equal(kept.features(pixels), wanted) and kept.num_tokens == found.num_tokens + 1 == 17

    from transformers import TimmWrapperModel

    for name in ("timm_vit", "timm_eva", "timm_siglip"):
        whole = TimmWrapperModel.from_pretrained(parts[name]).timm_model.eval()
        found = load_encoder(parts[name], feature_layer=layer)
        if layer == -1:
            wanted = whole.forward_features(pixels)[:, whole.num_prefix_tokens :]
        else:
            options = {"indices": [3 + layer], "output_fmt": "NLC", "intermediates_only": True}
            wanted = whole.forward_intermediates(pixels, **options)[0]
        assert torch.allclose(found.features(pixels), wanted, atol=1e-5), name
        assert wanted.shape == (2, found.num_tokens, WIDTH) == (2, 16, WIDTH)

    found = load_encoder(parts["open_clip"], feature_layer=layer)
    visual = found.tower.visual
    wanted = visual.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"][layer]
    assert torch.equal(found.features(pixels), wanted)
    kept = load_encoder(parts["open_clip"], feature_layer=layer, class_token=True)
    assert torch.equal(kept.features(pixels)[:, 1:], wanted) and kept.num_tokens == 17


@torch.no_grad()
def test_a_convnet_gives_its_map_row_by_row(parts):
    found = load_encoder(parts["timm_convnext"], image_size=64)
    pixels = torch.randn(1, 3, 64, 64)
    wanted = found.tower.timm_model.forward_features(pixels)
    assert found.grid == (2, 2) and found.patch_size == 32
    features = found.features(pixels)
    assert torch.equal(features[0, 1], wanted[0, :, 0, 1]) and torch.equal(features[0, 2], wanted[0, :, 1, 0])


@torch.no_grad()
def test_registers_stay_and_are_counted(parts):
    found = load_encoder(parts["dinov3"])
    assert (found.prefix_tokens, found.num_tokens) == (3, 18)
    model, processor = made(parts, "dinov3", "llama")
    inputs = processor(images=picture(), text="<image>", return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 18
    model(**inputs)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_another_resolution_interpolates_as_transformers_does(parts, name):
    pixels = torch.randn(1, 3, 24, 24)
    small, large = load_encoder(parts[name]), load_encoder(parts[name], image_size=24)
    assert large.num_tokens == 36 and large.tower.config.image_size == 24
    wanted = small.tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    wanted = wanted[:, 1:] if small.drops_first else wanted
    assert torch.allclose(large.features(pixels), wanted, atol=1e-5)
    assert large.image_processor(picture(), return_tensors="pt")["pixel_values"].shape[-1] == 24


@pytest.mark.parametrize("name", ["timm_vit", "timm_eva", "dinov2", "dinov3"])
@torch.no_grad()
def test_another_resolution_runs_and_reloads(parts, name, tmp_path):
    model, processor = made(parts, name, "llama", image_size=24)
    inputs = processor(images=picture(), text="<image>is", return_tensors="pt")
    model.save_pretrained(tmp_path)
    assert (
        int((inputs["input_ids"] == processor.image_token_id).sum())
        == load_encoder(parts[name], image_size=24).num_tokens
    )
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


def test_a_named_open_clip_model_is_loaded_with_its_weights(tmp_path):
    vision = {"layers": 2, "width": 24, "head_width": 12, "image_size": 16, "patch_size": 4}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    described = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    (tmp_path / "tiny-of-test.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path)
    whole = open_clip.create_model("tiny-of-test").eval()
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    found = load_encoder(f"open_clip/tiny-of-test:{tmp_path / 'w.pt'}")
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        wanted = whole.visual.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"][-2]
        assert torch.equal(found.features(pixels), wanted)
    assert load_encoder(f"open_clip/tiny-of-test:{tmp_path / 'w.pt'}", image_size=24).num_tokens == 36
    with pytest.raises(ValueError, match="names no weights"):
        load_encoder("open_clip/tiny-of-test")


# -- projectors and heads ------------------------------------------------------------------------------------


@torch.no_grad()
def test_linear_is_one_linear_to_the_bit_and_stays_one(parts):
    from voco_plugin.training.parts import PROJECTOR, ModelParts, freeze

    model, _ = made(parts, "clip", "llama", "linear")
    projector = model.model.multi_modal_projector
    features = torch.randn(2, 16, WIDTH)
    assert torch.equal(projector(features), projector.linear_1(features))
    freeze(model, language=True, projector=True, vision_tower=False)
    trains = {n for n, p in projector.named_parameters() if p.requires_grad}
    assert trains == {"linear_1.weight", "linear_1.bias"}
    assert ModelParts(model).roots(model, PROJECTOR) == ["model.multi_modal_projector.linear_1"]
    plain, _ = made(parts, "clip", "llama")
    freeze(plain, language=True, projector=True, vision_tower=False)
    assert all(p.requires_grad for p in plain.model.multi_modal_projector.parameters())


@torch.no_grad()
def test_identity_passes_features_on(parts, tmp_path):
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="features on as they are.*24 wide.*32"):
        vp.compose(parts["clip"], parts["llama"], "identity")
    config = LlamaConfig(
        vocab_size=181, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, _ = vp.compose(parts["clip"], write_llm(tmp_path, "narrow", config=config), "identity")
    features = torch.randn(1, 16, WIDTH)
    assert torch.equal(model.model.multi_modal_projector(features), features)


def test_what_a_llava_class_cannot_hold_is_refused_with_the_reason(parts, tmp_path, caplog):
    from transformers import GraniteConfig, Lfm2Config, MambaConfig, PhiConfig

    sizes = {"vocab_size": 181, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    cases = [
        (MambaConfig(vocab_size=181, hidden_size=32, num_hidden_layers=2), "recurrent|convolution"),
        (Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"]), "layers of type conv"),
        (PhiConfig(**sizes, num_attention_heads=4), "bias in its LM head"),
        (GraniteConfig(**sizes, **heads, logits_scaling=8.0, initializer_range=0.2), "head does more"),
    ]
    for number, (config, reason) in enumerate(cases):
        with pytest.raises(ValueError, match=reason):
            vp.compose(parts["clip"], write_llm(tmp_path, f"llm{number}", config=config))
    with pytest.raises(ValueError, match="GELU between its two layers"):
        vp.compose(parts["timm_vit"], parts["llama"], "linear")
    with pytest.raises(ValueError, match="keeps a timm tower's class token"):
        load_encoder(parts["timm_vit"], class_token=True)
    with pytest.raises(ValueError, match="no class token to keep"):
        load_encoder(parts["siglip"], class_token=True)
    vp.compose(parts["clip"], parts["gemma2"])
    assert "caps its logits softly at 30" in caplog.text


@torch.no_grad()
def test_text_alone_gets_the_llms_own_logits_and_new_rows_are_there(parts, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from tiny.vocab import tokenizer

    config = LlamaConfig(
        vocab_size=181, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    folder = write_llm(tmp_path, "bare", config=config)
    backend = (
        tokenizer().backend_tokenizer.to_str().replace("<image>", "<imag0>").replace("<video>", "<vide0>")
    )
    from tokenizers import Tokenizer

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    model, processor = vp.compose(parts["clip"], folder)
    new = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>", "<pad>")]
    assert min(new[:2]) >= 181 and processor.image_token_id == model.config.image_token_id == new[0]
    table = model.get_input_embeddings().weight
    assert table.shape[0] == model.config.text_config.vocab_size == model.lm_head.weight.shape[0] > max(new)
    assert torch.allclose(table[new[0]], table[:181].mean(0), atol=1e-6)
    ids = torch.tensor([[1, 50, 60, 70]])
    wanted = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    got = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(got[..., :181], wanted, atol=1e-6)
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("clip_vit_l14_336", "llama3_1_8b"), "'clip_vit_l14_336' is not known .did you mean 'clip_vit_l"),
        (("timm/vit_bas_patch16_224", "x/y"), "timm has no model 'vit_bas_patch16_224' .did you mean 'vit_"),
        (("timm/vit_base_patch16_224.augreg_in21", "x/y"), "no weights 'augreg_in21'.*mean 'augreg_in21k'"),
        (("open_clip/ViT-L14:openai", "x/y"), "no architecture 'ViT-L14' .did you mean 'ViT-L-14'"),
        (("open_clip/ViT-L-14:opnai", "x/y"), "no weights 'opnai' of ViT-L-14 .did you mean 'openai'"),
        (("./gone", "x/y"), "encoder ./gone: there is no config.json"),
        (("clip_vit_l_14", "vicuna_7b"), "llm 'vicuna_7b' is not known .did you mean 'vicuna_7b_v1_5'"),
        (("clip_vit_l_14", "./gone"), "llm ./gone does not exist"),
        (("clip_vit_l_14", "llama3_8b", "mlp2x"), "'mlp2x' is not known .did you mean 'mlp2x_gelu'"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(names, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vp.compose(*names)


# -- presets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vp.registry.encoders.list())
def test_an_encoder_preset_says_what_its_library_says(name):
    spec = vp.registry.encoders.get(name)
    assert spec.num_tokens and spec.licence and spec.hidden_size
    if spec.library == "timm":
        with torch.device("meta"):
            whole = timm.create_model(spec.source, num_classes=0)
        assert whole.num_features == spec.hidden_size and whole.pretrained_cfg["license"] == spec.licence
        assert whole.pretrained_cfg["input_size"][-1] == spec.image_size
        assert whole.feature_info[-1]["reduction"] == spec.patch_size
    if spec.library == "open_clip":
        arch, _, tag = spec.source.partition(":")
        assert tag in open_clip.list_pretrained_tags_by_model(arch)
        vision = open_clip.get_model_config(arch)["vision_cfg"]
        assert vision["image_size"] == spec.image_size
        if "width" in vision:
            assert (vision["width"], vision["patch_size"]) == (spec.hidden_size, spec.patch_size)


@pytest.mark.parametrize("name", vp.registry.llms.list())
def test_an_llm_preset_has_its_template(name):
    from voco_plugin.models.llms import TEMPLATES

    spec = vp.registry.llms.get(name)
    assert (TEMPLATES / f"{spec.chat_template}.jinja").is_file() and spec.source.count("/") == 1
    text = (TEMPLATES / f"{spec.chat_template}.jinja").read_text()
    ends = spec.end_token in text or (spec.end_token == "</s>" and "eos_token" in text)
    assert ends and "{%- generation -%}" in text


# -- where an answer ends
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("vicuna_v1", "</s>"), ("mistral", "</s>")],
)
def test_generation_stops_where_the_template_that_is_used_ends_an_answer(parts, tmp_path, template, end):
    model, processor = vp.compose(parts["clip"], parts["llama"], chat_template=template)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    stops = saved if isinstance(saved, list) else [saved]
    known = processor.tokenizer.get_vocab()
    assert known[end] in stops and known[processor.tokenizer.eos_token] in stops and len(stops) <= 2


@pytest.mark.parametrize(
    ("template", "said"),
    [("llama3", "'<|eot_id|>', which is no token of this LLM"), ("llava_plain", "no token")],
)
def test_an_answer_that_cannot_end_is_said(parts, caplog, template, said):
    vp.compose(parts["clip"], parts["llama"], chat_template=template)
    assert f"ends an answer with {said}, at which generation cannot stop" in caplog.text

"""Files written before the package was rearranged are read as they were then, by whatever code there is now.

``make.py`` says how they were made, and why they are never made again.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from uses import BASES, QUESTIONS, USES, Files, compress_again, log_of, trainer
from voco_plugin.answering import compress_images

import voco_plugin as vp
from voco_plugin.cli import main

VERSION = Path(__file__).parent / "files" / "v1"
EXPECTED = json.loads((VERSION / "expected.json").read_text(encoding="utf-8"))
TENSORS = load_file(VERSION / "expected.safetensors")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""fp32 on another machine: logits are of size 6, and the best is 1e-3 ahead of the second."""
CACHES = sorted(path.stem for path in (VERSION / "caches").glob("*.safetensors"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """A copy that all tests share: what they put into a store there changes no record."""
    return Files(VERSION, tmp_path_factory.mktemp("files") / "v1")


# -- what comes out


@pytest.mark.parametrize("name", sorted(EXPECTED["uses"]))
def test_old_files_give_what_they_gave(name: str, files: Files) -> None:
    """Files are accepted (fingerprints are the same), ids are the same, logits are equal."""
    found = USES[name](files)
    tensors = {key: value for key, value in found.items() if torch.is_tensor(value)}
    wanted = {key.split("/")[1]: value for key, value in TENSORS.items() if key.split("/")[0] == name}
    assert set(tensors) == set(wanted)
    values = {key: value for key, value in found.items() if key not in tensors}
    assert json.loads(json.dumps(values)) == EXPECTED["uses"][name]
    for key, value in tensors.items():
        torch.testing.assert_close(
            value.float(),
            wanted[key],
            **TOLERANCE,
            equal_nan=True,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_every_use_has_an_expectation() -> None:
    assert set(USES) == set(EXPECTED["uses"])
    assert {key.split("/")[0] for key in TENSORS} == set(USES) - {"empty"}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_file_holds_the_numbers_in_its_bytes(name: str, files: Files) -> None:
    """As plain safetensors reads them: ``layers.{l}.key`` and ``.value``, ``(T, H, D)``."""
    raw = load_file(VERSION / "caches" / f"{name}.safetensors")
    cache = files.cache(name)
    layers = len(raw) // 2
    assert bool(layers) == bool(len(cache)) and all(block.num_layers == layers for block in cache)
    for layer in range(layers if len(cache) else 0):
        for kind in ("key", "value"):
            parts = [getattr(block, f"{kind}s")[layer].transpose(0, 1) for block in cache]
            assert torch.equal(torch.cat(parts), raw[f"layers.{layer}.{kind}"])


def test_stage_one_makes_the_blocks_in_the_file(files: Files) -> None:
    """Two images compressed now are those compressed then."""
    for name, folder in (("two_images", "model"), ("of_adapter", "adapter"), ("of_pooled", "pooled")):
        model, processor = files.load(folder)
        made = compress_images(model, processor, [files.image("a"), files.image("b")])
        for new, old in zip(made, files.cache(name), strict=True):
            (block,) = new
            for field in ("position", "extent", "num_vision", "relocatable", "order", "num_tokens"):
                assert getattr(block, field) == getattr(old, field)
            torch.testing.assert_close(block.keys, old.keys, **TOLERANCE)
            torch.testing.assert_close(block.values, old.values, **TOLERANCE)


# -- stores go on


@pytest.mark.parametrize("target", ["store", "shards"])
def test_a_job_finds_everything_done(target: str, files: Files, monkeypatch) -> None:
    """Keys and names are the same, so that a run that is started again computes nothing."""
    monkeypatch.chdir(files.path)
    for source in (["images"], ["frames", "--every-frame", "--rate", "2"]):
        report = compress_again(files, *source, f"--{target}", target)
        assert (report["computed"], report["hits"]) == (0, 3)


def test_stores_verify(files: Files, capsys) -> None:
    for name, records in (("store", 6), ("store_int8", 2)):
        assert main(["store", "verify", str(files.path / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["records"], found["bad"], found["index"]) == (records, [], [])


def test_a_session_takes_images_from_an_old_store(files: Files, monkeypatch) -> None:
    model, processor = files.load("model")
    monkeypatch.setattr(model, "compress", lambda **inputs: pytest.fail("compressed again"))
    with vp.VoCoCacheStore.for_model(files.path / "store", model) as store:
        talk = vp.VoCoSession(model, processor, store=store).add(files.image("a"), files.image("c"))
        assert talk.ask(QUESTIONS[0], max_new_tokens=2) and talk.num_images == 2


# -- training goes on


def test_a_run_resumes_from_an_old_checkpoint(files: Files, tmp_path) -> None:
    """With its K drawn anew for each batch, its optimizer and its order of samples."""
    made = trainer(files.path / "model", tmp_path, num_tokens_range=[1, 8])
    made.train(resume_from_checkpoint=str(files.path / "adapter"))
    assert made.state.global_step == 4
    found, wanted = log_of(made), EXPECTED["run"]
    assert found["voco_tokens_per_sample"] == wanted["voco_tokens_per_sample"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize("adapter", sorted(BASES))
def test_pickled_training_arguments_load(adapter: str) -> None:
    """transformers pickles the arguments, and with them the paths of their classes."""
    args = torch.load(VERSION / adapter / "training_args.bin", weights_only=False)
    assert type(args) is vp.VoCoSFTConfig
    assert args.stage1 == ("frozen" if adapter == "frozen_adapter" else "joint")
    if adapter == "pooled_adapter":
        assert args.voco == vp.VoCoConfig(num_tokens=2, token_init="pooled", token_id=args.voco.token_id)


# -- the class of this package in checkpoints


def test_transformers_knows_the_tower_of_an_old_composed_checkpoint() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(VERSION / "composed")
    assert type(config.vision_config).__name__ == "OpenClipVisionConfig"
    assert config.vision_config.vision_cfg["layers"] == 3


@pytest.mark.slow
def test_an_old_composed_checkpoint_has_the_weights_it_had() -> None:
    pytest.importorskip("open_clip", reason="open_clip is in the extra `backbones`")
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(VERSION / "composed"))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == EXPECTED["composed"]


# -- paths that are written down

PROMISED = """
    answering:answer,compress_images
    benchmark:stage_two_times
    bulk:Counts,compress_dataset
    cache:VoCoBlock,VoCoCache,VoCoCacheError,VoCoCacheStore,image_key,quantization_error
    cache.shards:read_shards
    cache.store_names:caches_by_name
    cli:main
    cli.inputs:find_images
    cli.output:emit,human_bytes,note,table
    compressors:Compressor
    data.gridworld_questions:DESCRIBE
    data.image_items:PickedImages
    data.video_formats:load_video_dataset
    encoders:EncoderSpec
    families:Family
    images:open_image
    judge:Judge
    llms:LLMSpec
    masks:
    metrics:agreement,raw_ratio,retention
    prompts:encode,stream_of
    registry:compressors,encoders,families,llms,load_plugin,projectors
    reporting.charts:draw_bars,draw_losses,read_losses
    reporting.report:Report
    reporting.sheet:SheetEntry,draw_sheet
    video:probe,read_video,segments
"""
"""What README, CONTRIBUTING, docs/, examples/ and integrations/ import or name by its dotted path, and the
public modules. ``voco_plugin.integrations`` is not among them: it is there in the wheel only.
"""

NAMED_FILES = """
    _compat agreement attention.dense block_embeddings cache.block cache.container cache.stage_one cache.store
    cache.turns collator config data.tiny_align data.video_qa encoders.open_clip_towers encoders.presets
    families.base generation images injection isolation layout llms masks packing projectors prompts
    video.stage
"""
"""What they name as a file, ``voco_plugin/….py``."""

FORMER_HOMES = """
    cache:VoCoBlock,VoCoCache,VoCoCacheError,VoCoCacheStore
    cache.block:VoCoBlock
    cache.container:VoCoCacheError
    cache.store:VoCoCacheStore
    collator:VoCoDataCollator
    config:VoCoConfig
    generation:VoCoGenerationMixin
    layout:LayoutError,SequenceLayout,TokenVocabulary
    modeling:attach,attachment,compose,detach,is_attached,load,save_voco_config
    session:VoCoSession
    training:DistillConfig,VoCoSFTConfig,VoCoSFTTrainer
"""
"""Where public names were: the same objects are there, or ``except`` and ``isinstance`` would miss them."""


def imported(module: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a moved module may say so
        return importlib.import_module(f"voco_plugin.{module}")


@pytest.mark.parametrize("line", PROMISED.split())
def test_a_path_in_the_documents_imports(line: str) -> None:
    module, names = line.split(":")
    found = imported(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = [name for name in names.split(",") if name and not hasattr(found, name)]
    assert not missing


@pytest.mark.parametrize("module", NAMED_FILES.split())
def test_a_file_in_the_documents_imports(module: str) -> None:
    assert imported(module).__name__.startswith("voco_plugin.")


@pytest.mark.parametrize("line", FORMER_HOMES.split())
def test_a_public_name_is_the_same_object_in_its_former_home(line: str) -> None:
    module, names = line.split(":")
    for name in names.split(","):
        assert getattr(imported(module), name) is getattr(vp, name)


def test_no_public_name_is_gone() -> None:
    names = {name for line in FORMER_HOMES.split() for name in line.split(":")[1].split(",")}
    names |= {"__version__", "registry", "masks", "metrics"}
    assert names <= set(vp.__all__)
    assert all(getattr(vp, name) is not None for name in vp.__all__)

"""The `voco` command: every subcommand on real files; one line and status 2 for what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from commands import SHORT, error_of, out_of
from paths import ROOT
from voco_plugin.cli import COMMANDS, main
from voco_plugin.cli.accelerate_launch import launch_arguments, profiles

# -- the command itself --------------------------------------------------------------------------------------


ON_THE_HUB = ["--model_name_or_path", "a/b", "--dataset_name", "c/d"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"examples?:\n +voco {command}\b", text), text


def test_module_and_console_script_are_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "voco_plugin", "recipes", "list"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "gridworld_voco" in done.stdout


def test_no_command_shows_the_help_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct"], "no command 'inspct' (did you mean 'inspect'?)"),
        (["inspect", "--layot", "t1"], "unknown argument '--layot' (did you mean '--layout'?)"),
        (["recipes", "lst"], "invalid choice: 'lst'"),
        (["compress", "m"], "the following arguments are required"),
        (["registry", "encoder"], "no registry 'encoder' (did you mean 'encoders'?)"),
        (["recipes", "show"], "needs a name"),
        (["recipes", "list", "gridworld_voco"], "takes no name"),
        (["recipes", "copy", "gridworld_vco"], "did you mean 'gridworld_voco'"),
        (["train", "nothing"], "no recipe 'nothing'"),
        (["train", "gridworld_voco", "--max_step", "3"], "unknown key 'max_step' (did you mean "
        "'max_steps'?)"),
        (["train", "gridworld_voco", *ON_THE_HUB, "--max_steps", "x"], "max_steps='x' is a text"),
        (["train", "gridworld_voco", "--model_name_or_path", "./gone"], "model ./gone does not exist"),
        (["train", "gridworld_voco", *ON_THE_HUB, "--model_name_or_path", "null"],
        "has no model_name_or_path"),
        (["train", "gridworld_voco", *ON_THE_HUB, "--accelerate_config", "zer3"],
        "'zer3' is neither a file nor a profile (did you mean 'zero3'?)"),
        (["inspect"], "give either --layout RUNS, or a MODEL"),
        (["inspect", "--layout", "t3 x4"], "'x4' is no run"),
        (["inspect", "--layout", "t3 v0"], "'v0' is no run"),
        (["inspect", "--layout", "t3 v4 t5"], "position 3: vision tokens with no VoCo tokens"),
        (["inspect", "--layout", "t3 c1"], "VoCo token(s) with no vision tokens"),
        (["inspect", "--layout", "t3", "--positions", "compact", "--rule", "causal"], "positions='compact'"),
        (["inspect", "./gone", "--text", "x"], "model ./gone does not exist"),
        (["generate", "./gone", "--question", "x"], "model ./gone does not exist"),
        (["generate", "m", "--image", "x.png"], "nothing to ask"),
        (["generate", "m", "--image", "no.png", "--question", "x"], "image no.png does not exist"),
        (["generate", "m", "--cache", "no.safetensors", "--question", "x"], "cache no.safetensors does "
        "not exist"),
        (["generate", "m", "--question", "x", "--max-new-tokens", "0"], "'0' is not a whole number of at "
        "least 1"),
        (["compress", "m", "no", "--out", "x"], "image no does not exist"),
        (["eval", "m", "--data", "./no.json"], "no.json does not exist"),
        (["gridworld", "x", "--grid", "1"], "--grid 1 is out of range"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)


def test_a_wrong_key_is_found_before_any_model_loads(capsys, tmp_path, monkeypatch) -> None:
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("a model was about to load")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    assert "did you mean 'num_tokens'" in error_of(capsys, "train", "gridworld_voco", "--voco.num_token", "2")
    assert "did you mean 'lora_r'" in error_of(capsys, "train", "gridworld_voco", "--lora_rr", "2")


def test_a_wrong_voco_section_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("voco:\n  num_token: 2\n")
    code = (
        "import sys; from voco_plugin.cli import main; status = main(['train', sys.argv[1]])\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.yaml")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "did you mean 'num_tokens'" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no recipe"):
        main(["train", "nothing", "--debug"])


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m voco_plugin recipes show gridworld_voco | head -1", shell=True, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.startswith("#")


# -- recipes and registry ------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = json.loads(out_of(capsys, "recipes", "--json"))
    files = [p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "studies"]
    assert {r["name"] for r in listed} == {p.stem for p in files}
    shown = out_of(capsys, "recipes", "show", "gridworld_voco")
    assert shown == (ROOT / "recipes" / "gridworld_voco.yaml").read_text()
    out_of(capsys, "recipes", "copy", "gridworld_voco", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == shown
    assert "exists already" in error_of(capsys, "recipes", "copy", "gridworld_voco", "mine.yaml")
    out_of(capsys, "recipes", "copy", "gridworld_voco", "mine.yaml", "--force")
    study = (ROOT / "recipes" / "studies" / "gridworld_table1.yaml").read_text()
    assert out_of(capsys, "recipes", "show", "gridworld_table1") == study


def test_a_copied_recipe_trains_like_the_shipped_one(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out_of(capsys, "recipes", "copy", "gridworld_voco", "mine.yaml")
    mine = json.loads(out_of(capsys, "train", "mine.yaml", "--check", "--json"))
    shipped = json.loads(out_of(capsys, "train", "gridworld_voco", "--check", "--json"))
    assert mine["values"] == shipped["values"]


def test_registry_lists_what_the_registries_hold(capsys) -> None:
    from voco_plugin.registry import families

    assert json.loads(out_of(capsys, "registry", "families", "--json")) == {
        "families": [{"name": name} for name in families.list()]
    }
    assert "families:" in out_of(capsys, "registry")


# -- inspect -------------------------------------------------------------------------------------------------


def test_inspect_draws_the_layout_it_was_given(capsys, tmp_path) -> None:
    picture = tmp_path / "mask.png"
    text = out_of(capsys, "inspect", "--layout", "t1 v2 c1 t1", "--out", str(picture))
    drawn = text.split("\n\n")[1].splitlines()
    assert drawn == ["  t v v C t", "t x", "v   x", "v   x x", "C   x x x", "t x     x x"]
    assert Image.open(picture).size[0] > 100


@pytest.mark.parametrize("runs", ["t1 v2 c1 t1", "v3 c2 t2 v2 c1 t3", "p2 t1 v2 c1 t1"])
@pytest.mark.parametrize("rule", ["isolated", "star", "causal"])
def test_the_picture_shows_the_mask_cell_by_cell(runs: str, rule: str, capsys, tmp_path) -> None:
    """One source: the colours of the PNG are read back and compared with the dense mask."""
    import torch

    from voco_plugin import SequenceLayout, TokenVocabulary, VoCoConfig
    from voco_plugin.cli.inspect import parse_runs
    from voco_plugin.core.masks import dense_mask
    from voco_plugin.evaluation.reporting.mask import HIDDEN

    picture = tmp_path / "mask.png"
    out_of(capsys, "inspect", "--layout", runs, "--rule", rule, "--out", str(picture))
    kinds = "".join(k * n for k, n in parse_runs(runs))
    ids = torch.tensor([["tvc".find(k.replace("p", "t")) for k in kinds]])
    mask = torch.tensor([[int(k != "p") for k in kinds]])
    layout = SequenceLayout.from_ids(ids, mask, TokenVocabulary(2, frozenset({1})))
    expected = dense_mask(VoCoConfig(rule=rule), layout)[0]
    image, cell, left, top = Image.open(picture), 24, 24 + 24, 70 + 24
    centre = cell // 2
    seen = [
        [
            image.getpixel((left + j * cell + centre, top + i * cell + centre)) != HIDDEN
            for j in range(len(kinds))
        ]
        for i in range(len(kinds))
    ]
    assert seen == expected.tolist()


def test_inspect_of_a_model_shows_the_sequence_it_would_get(here: Path, capsys) -> None:
    image = "runs/gridworld/images/test/000000.png"
    arguments = ["--text", "What is at b2?", "--image", image, "--json"]
    adapter = json.loads(out_of(capsys, "inspect", "runs/gridworld_voco", *arguments))
    base = json.loads(out_of(capsys, "inspect", "runs/gridworld_base", *arguments, "--num-tokens", "3"))
    tokens = {run["kind"]: run["tokens"] for run in adapter["runs"] if run["kind"] != "text"}
    assert tokens == {"vision": 16, "VoCo": 1}
    assert {run["tokens"] for run in base["runs"] if run["kind"] == "VoCo"} == {3}


# -- train ---------------------------------------------------------------------------------------------------


def test_training_saves_what_loads_again_by_path_alone(here: Path) -> None:
    import voco_plugin as vp

    folder = here / "runs" / "gridworld_voco"
    assert {"adapter_config.json", "voco_config.json", "trainer_state.json"} <= {
        p.name for p in folder.iterdir()
    }
    model, processor = vp.load(str(folder))
    assert vp.is_attached(model) and processor.tokenizer.convert_tokens_to_ids("<voco>") is not None


def test_a_checkpoint_is_read_from_any_folder_and_after_all_of_it_has_moved(
    here: Path, tmp_path, monkeypatch, capsys
) -> None:
    adapter = here / "runs" / "gridworld_voco"
    assert Path(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    ).is_absolute()
    for folder in (adapter, adapter / "checkpoint-2"):
        if folder.is_dir():
            noted = json.loads((folder / "voco_config.json").read_text())["base_relative_to_adapter"]
            assert (folder / noted).resolve() == (here / "runs" / "gridworld_base").resolve()
    data = ["--data", str(here / "runs/gridworld/test.json"), "--limit", "2", "--json"]
    (tmp_path / "far").mkdir()
    shutil.copytree(here / "runs", tmp_path / "far" / "others", ignore=shutil.ignore_patterns("gridworld"))
    config = tmp_path / "far" / "others" / "gridworld_voco" / "adapter_config.json"
    values = json.loads(config.read_text())  # the place where it was made is gone
    config.write_text(json.dumps({**values, "base_model_name_or_path": "/gone/runs/gridworld_base"}))
    monkeypatch.chdir("/")
    first = json.loads(out_of(capsys, "eval", str(adapter), *data))
    moved = json.loads(out_of(capsys, "eval", str(config.parent), *data))
    assert first["scores"]["voco"]["accuracy"] == moved["scores"]["voco"]["accuracy"]


def test_check_prints_the_resolved_recipe_and_trains_nothing(here: Path, capsys) -> None:
    found = json.loads(
        out_of(
            capsys,
            "train",
            "gridworld_voco",
            "--max_steps",
            "7",
            "--voco.num_tokens",
            "3",
            "--check",
            "--json",
        )
    )
    assert found["values"]["max_steps"] == 7 and found["values"]["voco"]["num_tokens"] == 3


def test_the_base_recipe_trains_the_plain_model(here: Path, capsys) -> None:
    model = [
        "--model_name_or_path",
        "runs/gridworld_base",
        "--output_dir",
        "runs/base_again",
        "--bf16",
        "false",
    ]
    result = json.loads(out_of(capsys, "train", "gridworld_base", *SHORT, *model, "--json"))
    assert result["steps"] == 2 and (here / "runs" / "base_again" / "config.json").is_file()
    assert not (here / "runs" / "base_again" / "voco_config.json").exists()


def test_a_datasets_folder_trains_too(here: Path, capsys) -> None:
    more = [
        "--dataset_name",
        "runs/gridworld/hf",
        "--image_folder",
        "null",
        "--output_dir",
        "runs/from_hf",
        "--max_train_samples",
        "4",
    ]
    assert json.loads(out_of(capsys, "train", "gridworld_voco", *SHORT, *more, "--json"))["steps"] == 2


def test_accelerate_profiles_are_trls_and_the_child_does_not_launch_again(tmp_path) -> None:
    from voco_plugin.cli.recipe import RecipeArguments, load

    assert {"single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"} <= set(profiles())
    overrides = ["--accelerate_config", "multi_gpu", "--num_processes", "2", "--max_steps", "3"]
    overrides += ["--use_cpu", "true"]  # the suite runs where there is no GPU, too
    recipe = load("gridworld_voco", overrides)
    found = launch_arguments(recipe, recipe.arguments(RecipeArguments), overrides)
    assert found[:2] == ["--config_file", str(profiles()["multi_gpu"])] and found[2:4] == [
        "--num_processes",
        "2",
    ]
    child = found[found.index("train") + 2 :]
    assert load("gridworld_voco", child).values["accelerate_config"] is None
    assert load("gridworld_voco", child).values["max_steps"] == 3


@pytest.mark.slow
def test_training_through_accelerate_gives_the_same_checkpoint(here: Path) -> None:
    profile = here / "one.yaml"
    profile.write_text("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\nmixed_precision: 'no'\n")
    command = [sys.executable, "-m", "voco_plugin", "train", "gridworld_voco", *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--accelerate_config", "one.yaml", "--output_dir", "runs/launched"],
        cwd=here, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (
        here / "runs" / name / "adapter_model.safetensors" for name in ("gridworld_voco", "launched")
    )
    from safetensors.torch import load_file

    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys() and all((left[k] == right[k]).all() for k in left)


# -- compress, generate, eval --------------------------------------------------------------------------------


def test_a_folder_becomes_one_file_or_one_file_an_image(here: Path, capsys) -> None:
    from voco_plugin import VoCoCache

    images = "runs/gridworld/images/test"
    together = json.loads(
        out_of(capsys, "compress", "runs/gridworld_voco", images, "--out", "all.safetensors", "--json")
    )
    apart = json.loads(
        out_of(
            capsys, "compress", "runs/gridworld_voco", images, "--out", "apart", "--json", "--batch-size", "4"
        )
    )
    assert len(together["images"]) == 6 and len(together["files"]) == 1 and len(apart["files"]) == 6
    assert together["full_kv_bytes"] == 16 * together["cache_bytes"] == 16 * apart["cache_bytes"]
    cache = VoCoCache.load("all.safetensors")
    for number, file in enumerate(apart["files"]):
        alone = VoCoCache.load(file)
        assert len(alone) == 1
        for a, b in zip(alone.blocks[0].keys, cache.blocks[number].keys, strict=True):
            assert (a - b).abs().max() < 1e-5


def test_answers_from_a_file_equal_answers_from_the_images(here: Path, capsys) -> None:
    images = "runs/gridworld/images/test"
    out_of(capsys, "compress", "runs/gridworld_voco", images, "--out", "answers.safetensors")
    (here / "asked.txt").write_text("What is at a1?\n\nHow many red shapes are there?\n")
    asked = [
        "--questions",
        "asked.txt",
        "--question",
        "Is there a digit 7?",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    asked += ["--batch-size", "5"]
    cached = json.loads(
        out_of(capsys, "generate", "runs/gridworld_voco", "--cache", "answers.safetensors", *asked)
    )
    seen = json.loads(out_of(capsys, "generate", "runs/gridworld_voco", "--image", images, *asked))
    assert len(cached) == 18 and [e["question"] for e in cached[:3]] == [
        "Is there a digit 7?", "What is at a1?", "How many red shapes are there?",
    ]  # fmt: skip
    assert [e["answer"] for e in cached] == [e["answer"] for e in seen]
    one = json.loads(
        out_of(
            capsys,
            "generate",
            "runs/gridworld_voco",
            "--cache",
            "answers.safetensors",
            "--index",
            "2",
            *asked,
        )
    )
    assert [e["answer"] for e in one] == [e["answer"] for e in cached[6:9]]


def test_answering_from_a_file_opens_no_image(here: Path, capsys, monkeypatch) -> None:
    out_of(
        capsys,
        "compress",
        "runs/gridworld_voco",
        "runs/gridworld/images/test/000000.png",
        "--out",
        "one.safetensors",
    )

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    answered = out_of(
        capsys,
        "generate",
        "runs/gridworld_voco",
        "--cache",
        "one.safetensors",
        "--question",
        "What is at a1?",
        "--json",
    )
    assert [entry["question"] for entry in json.loads(answered)] == ["What is at a1?"]


def test_several_images_go_into_one_prompt_when_asked(here: Path, capsys) -> None:
    images = ["runs/gridworld/images/test/000000.png", "runs/gridworld/images/test/000001.png"]
    out_of(capsys, "compress", "runs/gridworld_voco", *images, "--out", "two.safetensors")
    asked = ["--question", "What is at a1?", "--together", "--json", "--max-new-tokens", "4"]
    cached = json.loads(
        out_of(capsys, "generate", "runs/gridworld_voco", "--cache", "two.safetensors", *asked)
    )
    repeated = [word for image in images for word in ("--image", image)]
    seen = json.loads(out_of(capsys, "generate", "runs/gridworld_voco", *repeated, *asked))
    assert len(cached) == len(seen) == 1 and cached[0]["answer"] == seen[0]["answer"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-40], "safetensors"),
        (lambda data: b"not a cache", "safetensors"),
    ],
)
def test_a_damaged_cache_is_an_error_that_names_it(here: Path, capsys, spoil, message: str) -> None:
    out_of(
        capsys,
        "compress",
        "runs/gridworld_voco",
        "runs/gridworld/images/test/000000.png",
        "--out",
        "good.safetensors",
    )
    (here / "bad.safetensors").write_bytes(spoil((here / "good.safetensors").read_bytes()))
    found = error_of(
        capsys, "generate", "runs/gridworld_voco", "--cache", "bad.safetensors", "--question", "x"
    )
    assert "bad.safetensors" in found


def test_a_cache_of_another_model_is_refused(here: Path, capsys) -> None:
    out_of(
        capsys,
        "compress",
        "runs/gridworld_base",
        "runs/gridworld/images/test/000000.png",
        "--out",
        "base.safetensors",
    )
    found = error_of(
        capsys, "generate", "runs/gridworld_voco", "--cache", "base.safetensors", "--question", "x"
    )
    assert "not made by this model" in found and "adapter is" in found


def test_images_that_are_none_are_errors_that_name_them(here: Path, capsys) -> None:
    (here / "broken.png").write_bytes(b"\x89PNG no")
    (here / "empty").mkdir(exist_ok=True)
    assert "broken.png" in error_of(capsys, "compress", "runs/gridworld_voco", "broken.png", "--out", "x")
    assert "holds no image" in error_of(capsys, "compress", "runs/gridworld_voco", "empty", "--out", "x")
    one = "runs/gridworld/images/test/000000.png"
    assert "would both become 000000.safetensors" in error_of(
        capsys, "compress", "runs/gridworld_voco", one, one, "--out", "x"
    )


def test_eval_scores_every_mode_per_question_type(here: Path, capsys) -> None:
    data = ["--data", "runs/gridworld/test.json", "--limit", "3", "--max-new-tokens", "3"]
    modes = ["--mode", "voco", "--mode", "single", "--mode", "base", "--mode", "blind"]
    found = json.loads(
        out_of(capsys, "eval", "runs/gridworld_voco", *data, *modes, "--json", "--out", "scores.json")
    )
    assert list(found["scores"]) == ["voco", "single", "base", "blind"] and found["questions"] == 24
    written = json.loads((here / "scores.json").read_text())
    assert written["scores"]["voco"]["answers"] == written["scores"]["single"]["answers"]
    assert "mode" in out_of(capsys, "eval", "runs/gridworld_base", *data, "--mode", "lower")
    assert "trained with VoCo tokens" in error_of(
        capsys, "eval", "runs/gridworld_voco", *data, "--mode", "lower"
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_no_command_fails_because_of_what_a_terminal_cannot_show(encoding, tmp_path):
    """`→` in a line, and any character in JSON that a program reads."""
    code = (
        "import sys; from voco_plugin.cli import main, output; "
        "main(['registry', 'projectors']); output.emit('a → b'); output.emit_json({'é→😀': 1})"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    text = done.stdout.decode(encoding)
    assert "a \\u2192 b" in text and json.loads(text[text.index("{") :]) == {"é→😀": 1}

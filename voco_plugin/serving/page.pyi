"""The Gradio page: drop an image or a short video, ask, see what the cache saves.

page = build_page(model, processor, plain=load_plain, examples=[("a.png", "What is at b2?")])
page.launch()

Each browser has a conversation of its own (:class:`~voco_plugin.serving.picture_chat.PictureChat`); the model
is shared and works for one at a time. Nothing of a conversation is kept on disk but the images that Gradio
itself stores for its page.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.images import BadImageError, open_image
from .page_words import added_line, costs_table, read_table
from .picture_chat import Answered, PictureChat

_KEEP_SECONDS = 3600
"""A browser's conversation, and the files it gave, are forgotten after so long without it."""
USER_ERRORS = (ValueError, OSError, ImportError)
_WORKING: Any = {"value": "", "submit_btn": False, "stop_btn": True, "__type__": "update"}
_READY: Any = {"submit_btn": True, "stop_btn": False, "__type__": "update"}
"""The question's box while an answer comes, and afterwards."""

from gradio.events import Dependency

class _Picture(gr.Image):
    """An image as the file that was dropped: it is opened by the package's own opener, which says in words
    what is wrong with a broken one. Gradio's own component would open it first, and fail without a word.
    """

    is_template = True  # the browser's side is Gradio's

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class _Page:
    """The handlers of one page: each takes and gives what its components hold.

    Args:
        plain: gives the model without VoCo; ``None``: there is nothing to compare with.
    """

    def __init__(
        self, model: Any, processor: Any, plain: Callable[[], Any] | None, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.lock = threading.Lock()
        self._make_plain = plain
        self._plain: Any = None

    def _chat(self, num_tokens: int) -> PictureChat:
        return PictureChat(
            self.model, self.processor, num_tokens=int(num_tokens), max_new_tokens=self.max_new_tokens,
            lock=self.lock,
        )  # fmt: skip

    def plain(self) -> Any:
        """The uncompressed model, made when it is first wanted."""
        if self._plain is None:
            assert self._make_plain is not None
            self._plain = self._make_plain()
        return self._plain

    def show(
        self, path: str | None, keep: bool, num_tokens: int, chat: PictureChat | None, log: list
    ) -> tuple[Any, ...]:
        if path is None:
            return chat, log, costs_table([]), None, ""
        if chat is None or not keep or not chat.added:
            chat, log = self._chat(num_tokens), []
        chat.num_tokens = int(num_tokens)
        with said_plainly():
            try:
                added = chat.show(open_image(path))
            except BadImageError as problem:  # the path on this machine is nobody's business
                raise gr.Error(str(problem).replace(str(path), Path(path).name)) from None
        shown = {"role": "user", "content": {"path": path}}
        log = [*log, shown, {"role": "assistant", "content": added_line(added)}]
        return chat, log, costs_table(chat.added), self._mask(chat), read_table(chat.read_by_answer())

    def watch(self, path: str | None, frames: int, num_tokens: int) -> tuple[Any, ...]:
        if path is None:
            raise gr.Error("Drop a video first.")
        chat = self._chat(num_tokens)
        with said_plainly():
            added = chat.watch(path, frames=int(frames), name=Path(path).name)
        log = [{"role": "assistant", "content": added_line(added)}]
        return chat, log, costs_table(chat.added), None, read_table(chat.read_by_answer())

    def ask(self, question: str, chat: PictureChat | None, log: list) -> Iterator[tuple[Any, ...]]:
        if chat is None or not chat.added:
            raise gr.Error("Drop an image or a video first.")
        log = [*log, {"role": "user", "content": question}]
        with said_plainly():
            for text in chat.ask(question):
                growing = [*log, {"role": "assistant", "content": text}]
                yield _WORKING, chat, growing, gr.skip(), gr.skip(), gr.skip()
            assert chat.last is not None
            log = [*log, {"role": "assistant", "content": chat.last.text or "(empty)"}]
            costs, read = costs_table(chat.added, chat.last), read_table(chat.read_by_answer())
            yield _READY, chat, log, costs, self._mask(chat), read

    def compare(self, chat: PictureChat | None) -> Iterator[str]:
        if chat is None or chat.last is None:
            raise gr.Error("Ask a question first.")
        if self._make_plain is None:
            raise gr.Error("This page was started without the uncompressed model.")
        with said_plainly():
            for found in chat.uncompressed(self.plain):
                if isinstance(found, Answered):
                    yield costs_table(chat.added, chat.last, found)
                else:
                    yield costs_table(chat.added, chat.last) + f"\n\nuncompressed: {found} …"

    def clear(self) -> tuple[Any, ...]:
        return None, [], "", None, "", None

    def _mask(self, chat: PictureChat) -> Any:
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            drawn = chat.draw_mask(Path(folder) / "mask.png")
            return None if drawn is None else Image.open(drawn).copy()


class said_plainly:
    """What the user got wrong is shown as one line in the page; anything else is a fault, and named so."""

    def __enter__(self) -> said_plainly:
        return self

    def __exit__(self, kind: Any, problem: Any, trace: Any) -> None:
        if isinstance(problem, USER_ERRORS) and not isinstance(problem, gr.Error):
            raise gr.Error(" ".join(str(problem).split())) from problem


def build_page(
    model: Any,
    processor: Any,
    *,
    name: str = "this model",
    num_tokens: Sequence[int] | None = None,
    plain: Callable[[], Any] | None = None,
    plain_name: str = "the same weights without VoCo",
    examples: Sequence[tuple[str, str]] = (),
    video: bool = True,
    max_new_tokens: int = 64,
) -> gr.Blocks:
    """The page for an attached model.

    Args:
        processor: the model's, with a chat template.
        name: of the model, for the heading.
        num_tokens: the K to choose from, the first preset; ``None``: the model's own.
        plain: gives the model without VoCo, to compare with; called once, when it is first wanted.
        plain_name: what it is, in words.
        examples: image files and a question about each.
        video: whether the page takes videos.
        max_new_tokens: of an answer at most.
    """
    from ..core.attachment import attachment

    choices = [int(k) for k in num_tokens or [attachment(model).config.num_tokens]]
    page = _Page(model, processor, plain, max_new_tokens)
    with gr.Blocks(title="VoCo", analytics_enabled=False, delete_cache=(600, _KEEP_SECONDS)) as blocks:
        chat = gr.State(None, time_to_live=_KEEP_SECONDS)
        gr.Markdown(
            f"## VoCo: {name}\nAn image is read once and kept as the keys and values of a few VoCo tokens. "
            "Every question is answered from those; the image is not opened again."
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Image"):
                        image = _Picture(
                            type="filepath", label="Image", height=280, sources=["upload", "clipboard"],
                            elem_id="image", buttons=[],
                        )  # fmt: skip
                        keep = gr.Checkbox(False, label="Keep earlier images in the conversation")
                    if video:
                        with gr.Tab("Video"):
                            clip = gr.Video(label="A short video", height=240, elem_id="video")
                            frames = gr.Slider(1, 64, 16, step=1, label="Frames")
                            read = gr.Button("Read the video", elem_id="read_video")
                tokens = gr.Radio(
                    choices, value=choices[0], label="VoCo tokens an image (K)", visible=len(choices) > 1,
                    elem_id="tokens",
                )  # fmt: skip
                with gr.Accordion("Who reads whom", open=False, elem_id="who"):
                    read_by = gr.Markdown(elem_id="read")
                    mask = gr.Image(show_label=False, interactive=False, buttons=[], elem_id="mask")
            with gr.Column(scale=5, min_width=300):
                log = gr.Chatbot(label="Conversation", height=380, elem_id="log", buttons=[])
                question = gr.Textbox(
                    label="Question", placeholder="Ask about it, and press Enter", submit_btn=True,
                    elem_id="question", max_length=4000,
                )  # fmt: skip
                with gr.Row():
                    clear = gr.Button("New conversation", size="sm")
                    compare = gr.Button(
                        "Ask the uncompressed model too", size="sm", visible=plain is not None,
                        elem_id="compare",
                    )  # fmt: skip
                costs = gr.Markdown(elem_id="costs")
                if plain is not None:
                    gr.Markdown(f"<small>Uncompressed: {plain_name}.</small>")
        shown = [chat, log, costs, mask, read_by]
        one = {"concurrency_id": "model", "concurrency_limit": 1}
        image.change(page.show, [image, keep, tokens, chat, log], shown, api_name="show", **one)
        tokens.change(page.show, [image, keep, tokens, chat, log], shown, api_name=False, **one)
        asked = [question, *shown]
        asking = question.submit(page.ask, [question, chat, log], asked, api_name="ask", **one)
        question.stop(lambda: _READY, None, [question], cancels=[asking], api_name=False)
        if plain is not None:
            compare.click(page.compare, [chat], [costs], api_name="compare", **one)
        if video:
            read.click(page.watch, [clip, frames, tokens], shown, api_name="watch", **one)
        clear.click(page.clear, None, [*shown, image], api_name="clear")
        if examples:
            gr.Examples([list(e) for e in examples], [image, question], label="Examples", examples_per_page=8)
    return blocks


THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
"""Gradio's own look, with fonts that no server has to give."""

__all__ = ["THEME", "build_page"]
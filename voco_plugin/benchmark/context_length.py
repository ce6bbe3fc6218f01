"""How many images or frames fit a context, by arithmetic: no model is run.

Of ``n`` positions, ``T`` for text, blocks of ``V`` vision and ``K`` VoCo tokens:

    all vision tokens       (n - T) // V             what the backbone itself does; V slots a block
    VoCo, sequential        (n - T) // (E + K)       positions run on over the vision tokens: their extent E
                                                     is V, or less with mrope; only K slots are kept
    VoCo, compact           (n - T) // K             the stream numbered as if V were not there

A context is a limit on positions (what was trained) and on tokens (what fits memory): the first row is cut by
both, which mrope keeps apart; the others keep K tokens a block, so positions are what cuts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """An image or group of frames as a family takes it.

    Attributes:
        family: whose.
        what: in words.
        vision: vision tokens, markers included.
        extent: positions that the family counts over them.
        frames: frames that it holds.
        contexts: lengths of context that the family is known by, in tokens.
    """

    family: str
    what: str
    vision: int
    extent: int
    frames: int
    contexts: tuple[int, ...]


VICUNA, QWEN = (2048, 4096), (32768, 131072)


def llava(side: int = 336, patch: int = 14) -> Kind:
    """An image or frame of LLaVA-1.5: a token a patch."""
    tokens = (side // patch) ** 2
    return Kind("LLaVA-1.5", f"{side} x {side} px", tokens, tokens, 1, VICUNA)


def qwen(height: int, width: int, frames: int = 1) -> Kind:
    """An image of Qwen2.5-VL, or two frames of a video as a block of their own, resized by its processor: a
    token for each 28 x 28 pixels between a start and an end marker; positions advance by the longer side
    (mrope).

    Raises:
        ValueError: ``frames`` is neither 1 (an image) nor 2 (the temporal patch of a video).
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    if frames not in (1, 2):
        raise ValueError(f"frames={frames}: Qwen2.5-VL merges two frames of a video; use 1 (image) or 2.")
    high, wide = (pixels // 28 for pixels in smart_resize(height, width, factor=28))
    what = f"{width} x {height} px" + (", 2 frames" if frames == 2 else "")
    return Kind("Qwen2.5-VL", what, high * wide + 2, max(high, wide) + 2, frames, QWEN)


def default_kinds() -> list[Kind]:
    """LLaVA-1.5 at 336 and at 224 pixels (256 tokens, as video models of the paper's Table 8 use), Qwen2.5-VL
    at three sizes and as video.
    """
    return [llava(), llava(224), qwen(224, 224), qwen(448, 448), qwen(720, 1280), qwen(448, 448, frames=2)]


def fits(kind: Kind, context: int, num_tokens: int, text: int) -> dict[str, int]:
    """Frames that a context of ``context`` positions holds next to ``text`` tokens, by way.

    Raises:
        ValueError: the text alone fills the context.
    """
    room = context - text
    if room <= 0:
        raise ValueError(f"{text} text tokens leave nothing of a context of {context}; give less text.")
    blocks = {
        "all vision tokens": room // max(kind.vision, kind.extent),
        "VoCo, sequential": room // (kind.extent + num_tokens),
        "VoCo, compact": room // num_tokens,
    }
    return {name: count * kind.frames for name, count in blocks.items()}


def context_table(
    kinds: Sequence[Kind], *, num_tokens: Sequence[int], text: int, contexts: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """A row for each kind, context and K.

    Args:
        contexts: lengths, where not each family's own.
    """
    rows = []
    for kind in kinds:
        for context in contexts or kind.contexts:
            for tokens in num_tokens:
                frames = fits(kind, context, tokens, text)
                whole = frames["all vision tokens"]
                times = {n: count / whole if whole else None for n, count in frames.items() if "VoCo" in n}
                rows.append(
                    {
                        "family": kind.family, "what": kind.what, "vision_tokens": kind.vision,
                        "extent": kind.extent, "context": context, "num_tokens": tokens,
                        "text_tokens": text, "frames": frames, "times": times,
                        "token_ratio": kind.vision / tokens,
                    }
                )  # fmt: skip
    return rows

"""Stop strings over a text that comes in pieces: what could still become one is held back.

stop "###"      pieces  "a #"  "# b"  "c ##"  "# d"
                given   "a "   "## b" "c "    ""      then it has stopped
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Gives a text piece by piece up to the first stop string, which is left out.

    Of several the one that is whole first counts, of two that end together the longer; so the cut does not
    depend on how the text was divided.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops, self.stopped = tuple(stops), False
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that may go out after ``piece`` has come."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if found:
            end, length = min(found)
            self.stopped, self._held = True, ""
            return text[: end + length]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


__all__ = ["StopStrings"]

"""How often the host waits for the device, with VoCo next to the plain backbone; counted without a GPU.

    python benchmarks/syncs.py                                      # a table a family
    python benchmarks/syncs.py --lines                              # and the lines that wait
    python benchmarks/syncs.py --families gemma3 --cases decode     # a part of it (names begin so)
    python benchmarks/syncs.py --json --out syncs.json

A wait drains the device's queue: until the host has the value it can launch nothing. Counted are reads (a
value goes to the host: `.item()`, `bool(t)`, `.cpu()`, `.tolist()`, `nonzero`, a boolean index …) and copies
(host memory goes to the device and the host waits for it: `torch.tensor(list, device=…)`, `.to(device)`,
a CPU index …), as CUDA has them; `tests/pretend_device.py` says how they are found. Copies with
`non_blocking=True` are listed and not counted. Models are the tests' tiny ones of the real classes: a count
depends on the number of images, rows and layers, not on widths.

    decode, cached blocks     a token of greedy generate behind compressed images, against one of the plain
                              model's behind the images
    decode, single pass       the same with two_stage=False: the vision tokens' keys are kept and masked
    training step             forward and backward of a batch
    trainer's step            VoCoSFTTrainer with voco, against voco=None: data, loss, metrics, optimizer
    compress, N images        one image a row (or all in one), a model that has compressed before; against a
                              forward of the plain model over the same images
    compress, first time      2 images, with the fingerprint of the weights
    first token, forward      model(stream, voco_cache=…) of the whole prompt
    first token, generate     generate(stream, voco_cache=…, max_new_tokens=1)

Where not said otherwise a batch has two rows of one image each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# a benchmark of the checkout, not of the wheel: the pretend device and the tiny models are the tests'
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests" / "helpers")) if path not in sys.path]

import torch  # noqa: E402
import transformers  # noqa: E402

import voco_plugin as vp  # noqa: E402
from harness import attached, inputs, plain  # noqa: E402
from pretend_device import Wait, pretend_device, recorded, to, unavailable  # noqa: E402
from tiny import build  # noqa: E402
from tiny.processors import NAMES as WITH_PROCESSOR  # noqa: E402
from tiny.processors import processor  # noqa: E402

FAMILIES = ("llava_llama", "qwen2_5_vl", "gemma3", "internvl")
IMAGES = (1, 2, 8)
_NO_END = 1_000_000
"""An end-of-sequence id that is never generated, so that every answer has the length asked for."""


@dataclass(frozen=True)
class Case:
    """What crossed between host and device, by line.

    Attributes:
        plain: in the plain model; ``None`` where it has no such case.
        ours: in the model with VoCo.
    """

    plain: Counter[Wait] | None
    ours: Counter[Wait]


def waits(lines: Counter[Wait] | None) -> int:
    """Reads, and copies that are waited for."""
    return sum(times for wait, times in (lines or {}).items() if wait.kind != "async")


def own_waits(lines: Counter[Wait]) -> int:
    """Those at lines of voco_plugin; the others are upstream's, whoever called it."""
    return sum(n for wait, n in lines.items() if wait.kind != "async" and wait.where == wait.ours)


def _prompt(name: str, rows: int = 2, images: int = 1, voco: bool = True) -> dict[str, torch.Tensor]:
    image = ["img", "c2"] if voco else ["img"]
    return inputs(name, [["bos", "t3", *image * images, "t4"]] * rows, "left")


class Measure:
    """Both models of one family on the device, and what waits in them.

    Args:
        name: a tiny model's (``tests/tiny``).
        attention: ``VoCoConfig.attention``.
    """

    def __init__(self, name: str, device: torch.device, attention: str = "auto") -> None:
        self.name, self.device, self.attention = name, device, attention
        self.plain = plain(name).to(device)
        self.ours = attached(name, attention=attention).to(device)

    def cases(self) -> dict[str, Callable[[], Case]]:
        found: dict[str, Callable[[], Case]] = {
            "decode, cached blocks": self.decode_cached,
            "decode, single pass": self.decode_in_one_pass,
            "training step": self.training,
        }
        if self.name in WITH_PROCESSOR:
            found["trainer's step"] = self.trainer
        for count in IMAGES:
            text = f"compress, {count} image{'s' if count > 1 else ''}"
            found[text] = lambda count=count: self.compress(rows=count)
        found[f"compress, {IMAGES[-1]} images in one row"] = lambda: self.compress(images=IMAGES[-1])
        found["compress, first time"] = self.compress_first
        found["first token, forward"] = self.first_forward
        found["first token, generate"] = self.first_generate
        return found

    def prompt(self, voco: bool, **size: int) -> dict[str, torch.Tensor]:
        return to(_prompt(self.name, voco=voco, **size), self.device)

    def stream(self) -> dict[str, Any]:
        """A prompt of compressed images."""
        batch = self.prompt(True)
        return {**self.ours.stream_inputs(batch), "voco_cache": self.ours.compress(**batch)}

    # -- a token

    def _token(self, model: Any, given: dict[str, Any], **options: Any) -> Counter[Wait]:
        """Of one token in the middle of an answer: two answers, one of them two tokens longer."""
        counts = []
        for tokens in (4, 6):
            with recorded() as found:
                out = model.generate(
                    **given, max_new_tokens=tokens, do_sample=False, eos_token_id=_NO_END, **options
                )
            assert out.shape[1] == given["input_ids"].shape[1] + tokens
            counts.append(found.lines())
        return _each(counts[1] - counts[0], 2)

    def decode_cached(self) -> Case:
        return Case(self._token(self.plain, self.prompt(False)), self._token(self.ours, self.stream()))

    def decode_in_one_pass(self) -> Case:
        alone = self._token(self.plain, self.prompt(False))
        return Case(alone, self._token(self.ours, self.prompt(True), two_stage=False))

    # -- a prompt

    def first_forward(self) -> Case:
        given = {True: self.stream(), False: self.prompt(False)}
        return self._both(lambda m, voco: m(**given[voco], use_cache=True, logits_to_keep=1))

    def first_generate(self) -> Case:
        given = {True: self.stream(), False: self.prompt(False)}
        options = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": _NO_END}
        return self._both(lambda m, voco: m.generate(**given[voco], **options))

    def compress(self, **size: int) -> Case:
        given = {voco: self.prompt(voco, **{"rows": 1, **size}) for voco in (True, False)}
        return self._both(lambda m, voco: (m.compress if voco else m)(**given[voco]))

    def compress_first(self) -> Case:
        model, batch = attached(self.name, attention=self.attention).to(self.device), self.prompt(True)
        with recorded() as found:
            model.compress(**batch)
        return Case(None, found.lines())

    def _both(self, run: Callable[[Any, bool], Any]) -> Case:
        """Once before it is counted: what is made once and kept is no cost of a prompt."""
        lines = []
        for model, voco in ((self.plain, False), (self.ours, True)):
            with torch.no_grad():
                run(model, voco)
                with recorded() as found:
                    run(model, voco)
            lines.append(found.lines())
        return Case(*lines)

    # -- training

    def training(self) -> Case:
        lines = []
        for model, voco in ((self.plain, False), (self.ours, True)):
            batch = _prompt(self.name, voco=voco)
            labels = batch["input_ids"].clone()
            labels[:, :-3] = -100  # the answers
            batch = to({**batch, "labels": labels}, self.device)
            model.train()
            for _ in range(2):
                with recorded(forward_lines=True) as found:
                    model(**batch).loss.backward()
                model.zero_grad()
            model.eval()
            lines.append(found.lines())
        return Case(*lines)

    def trainer(self) -> Case:
        lines = []
        for voco in (None, vp.VoCoConfig(num_tokens=2, attention=self.attention)):
            counts = []
            for steps in (2, 4):
                with tempfile.TemporaryDirectory() as folder, _trainer_device(self.device), _silent():
                    made = _trainer(self.name, folder, voco, steps)
                    with recorded() as found:
                        made.train()
                counts.append(found.lines())
            lines.append(_each(counts[1] - counts[0], 2))
        return Case(*lines)


def _each(lines: Counter[Wait], times: int) -> Counter[Wait]:
    """``lines`` of one of ``times`` equal turns."""
    assert all(count % times == 0 for count in lines.values()), lines
    return Counter({wait: count // times for wait, count in lines.items()})


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the trainer's log."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _trainer_device(device: torch.device) -> Iterator[None]:
    """Trainer and accelerate find ``device`` on this machine."""
    from accelerate.state import AcceleratorState

    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        yield
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before
        AcceleratorState._reset_state(reset_partial_state=True)


def _trainer(name: str, folder: str, voco: vp.VoCoConfig | None, steps: int) -> vp.VoCoSFTTrainer:
    """Full fine-tuning on answers, two rows of one image each a batch; nothing is logged before the end."""
    from datasets import Dataset, Image, List
    from PIL import Image as Picture

    ask = [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]
    said = [{"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": said}]
    pictures = [[Picture.new("RGB", (24, 16), (40 * number, 90, 160))] for number in range(4)]
    data = Dataset.from_dict({"messages": [messages] * 4, "images": pictures})
    args = vp.VoCoSFTConfig(
        folder, voco=voco, max_steps=steps, per_device_train_batch_size=2, logging_steps=1000,
        save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        assistant_only_loss=True,
    )  # fmt: skip
    return vp.VoCoSFTTrainer(
        build(name), args=args, train_dataset=data.cast_column("images", List(Image())),
        processing_class=processor(name),
    )  # fmt: skip


def measured(
    names: tuple[str, ...] = FAMILIES, cases: str = "", attention: str = "auto"
) -> dict[str, dict[str, Case]]:
    """Every case whose name begins with ``cases``, by family."""
    with pretend_device() as device:
        found = {}
        for name in names:
            todo = Measure(name, device, attention).cases()
            found[name] = {case: run() for case, run in todo.items() if case.startswith(cases)}
        return found


# -- what is printed


def _figures(lines: Counter[Wait] | None) -> dict[str, Any] | None:
    if lines is None:
        return None
    kinds: Counter[str] = Counter()
    for wait, times in lines.items():
        kinds[wait.kind] += times
    return {
        "waits": waits(lines), "reads": kinds["read"], "copies": kinds["copy"],
        "async_copies": kinds["async"], "at_lines_of_voco_plugin": own_waits(lines),
        "lines": [
            {
                "times": times, "kind": wait.kind, "op": wait.op, "where": str(wait.where),
                "first_in_voco_plugin": None if wait.ours is None else str(wait.ours),
                "backward": wait.backward,
            }
            for wait, times in in_order(lines)
        ],
    }  # fmt: skip


def in_order(lines: Counter[Wait]) -> list[tuple[Wait, int]]:
    """Lines and how often each waits, the most frequent first."""
    return sorted(lines.items(), key=lambda item: (-item[1], item[0].where, item[0].kind, item[0].op))


def _cell(lines: Counter[Wait] | None) -> str:
    found = _figures(lines)
    if found is None:
        return "–"
    more = f" (and {found['async_copies']} asynchronous)" if found["async_copies"] else ""
    return f"{found['waits']} = {found['reads']} + {found['copies']}{more}"


def _markdown(name: str, cases: dict[str, Case]) -> str:
    rows = [
        f"### {name}", "",
        "| | plain: waits = reads + copies | with VoCo | of these at lines of voco_plugin | difference |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for case, found in cases.items():
        own = own_waits(found.ours)
        beyond = "–" if found.plain is None else f"{waits(found.ours) - waits(found.plain):+d}"
        rows.append(f"| {case} | {_cell(found.plain)} | {_cell(found.ours)} | {own} | {beyond} |")
    return "\n".join(rows)


def _listed(cases: dict[str, Case]) -> str:
    out = []
    for case, found in cases.items():
        for whose, lines in (("plain", found.plain), ("with VoCo", found.ours)):
            if lines:
                out += ["", f"{case}, {whose}:"]
                out += [f"  {times:4d} × {wait}" for wait, times in in_order(lines)]
    return "\n".join(out)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="tiny models, by name")
    parser.add_argument("--cases", default="", help="the cases whose names begin so")
    parser.add_argument("--attention", default="auto", help="VoCoConfig.attention")
    parser.add_argument("--lines", action="store_true", help="list every line that waits")
    parser.add_argument("--json", action="store_true", help="print JSON, lines included")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    args = parser.parse_args(arguments)
    why = unavailable()
    if why is not None:
        parser.error(why)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measured(tuple(args.families), args.cases, args.attention)
    record = {
        "command": " ".join(["python benchmarks/syncs.py", *(arguments or sys.argv[1:])]),
        "torch": torch.__version__, "transformers": transformers.__version__, "attention": args.attention,
        "families": {
            name: {case: {"plain": _figures(c.plain), "voco": _figures(c.ours)} for case, c in cases.items()}
            for name, cases in found.items()
        },
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(record, indent=2))
        return record
    for name, cases in found.items():
        print(_markdown(name, cases), *([_listed(cases)] if args.lines else []), "", sep="\n")
    return record


if __name__ == "__main__":
    main()

"""Writes a version's files: from the checkout's root, ``python tests/legacy/make.py tests/legacy/files/v2``.

files/v1 was written by the commit that its expected.json names, before the package was rearranged. What it
shows is that newer code reads what older code wrote, so it must NEVER be written again with newer code: where
the formats go on, add a new folder beside it. This script refuses a folder that exists.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import uses  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402
from uses import QUESTIONS, USES, Files  # noqa: E402
from voco_plugin.answering import compress_images, prompt  # noqa: E402

import tiny  # noqa: E402
import voco_plugin as vp  # noqa: E402
from tiny.parts import write_encoder, write_llm  # noqa: E402
from tiny.processors import processor  # noqa: E402
from voco_plugin.cache import quantization_error  # noqa: E402
from voco_plugin.cli import main as voco  # noqa: E402

MARGIN = 1e-3
"""The best logit is ahead of the second by this much, so that no machine chooses another greedy token."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "safetensors", "lmdb", "pyarrow")
WHEN = 1_700_000_000  # seconds: the images' time of change, which a store notes


def build(width: int, seed: int, heads: int = 2, head_dim: int = 8) -> Any:
    """A LLaVA of ``width`` with 9 vision tokens an image, in eval mode; ``std`` 0.2, noise on constants. Two
    query heads share a key.
    """
    config = tiny.config("llava_llama")
    text = {
        "hidden_size": width, "intermediate_size": 40, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "head_dim": head_dim,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    torch.manual_seed(seed)
    made = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.min() == parameter.max():
                parameter += torch.randn_like(parameter) * 0.1
    return made.eval()


def write_images() -> None:
    draw = torch.Generator().manual_seed(3)
    for folder, names in (("images", "abc"), ("frames", "012")):
        Path(folder).mkdir()
        for name in names:
            tone = torch.randint(0, 256, (4, 4, 3), generator=draw, dtype=torch.uint8)
            path = Path(folder, f"{name}.png")
            Image.fromarray(tone.numpy()).resize((16, 16), Image.Resampling.NEAREST).save(path)
            os.utime(path, (WHEN, WHEN))


def write_models() -> None:
    plain = build(16, seed=5)
    plain.save_pretrained("plain")
    processor("llava_llama").save_pretrained("plain")

    whole = build(32, seed=0, heads=4, head_dim=20)  # two groups of channels in 8 bits, the second not full
    vp.attach(whole, vp.VoCoConfig(num_tokens=2), processor=processor("llava_llama"))
    whole.save_pretrained("model")

    rule = vp.VoCoConfig(num_tokens=2, token_init="pooled")
    pooled = vp.attach(build(16, seed=2), rule, processor=processor("llava_llama"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pooled.voco_compressor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    pooled.save_pretrained("pooled")


def write_adapters() -> dict[str, Any]:
    """``adapter`` is a trainer's checkpoint, with its optimizer; the others are models saved by a trainer.

    Returns:
        the log of the whole run that ``adapter`` is from the middle of.
    """
    made = uses.trainer(Path("model"), "run", num_tokens_range=[1, 8], save_at_steps=[2])
    made.train()
    shutil.move("run/checkpoint-2", "adapter")
    whole_run = uses.log_of(made)

    frozen = uses.trainer(Path("model"), "run", stage1="frozen", train_voco=False, assistant_only_loss=True)
    frozen.train()
    frozen.save_model("frozen_adapter")

    rule = vp.VoCoConfig(num_tokens=2, token_init="pooled")
    pooled = uses.trainer(Path("plain"), "run", voco=rule, max_steps=2)
    pooled.train()
    pooled.save_model("pooled_adapter")
    shutil.rmtree("run")
    return whole_run


def write_caches() -> None:
    images = [Image.open(f"images/{name}.png") for name in "abc"]
    out = Path("caches")
    out.mkdir()

    def compressed(folder: str, count: int = 2, **options: Any) -> list[vp.VoCoCache]:
        model, tools = vp.load(f"./{folder}")
        return list(compress_images(model, tools, images[:count], **options))

    vp.VoCoCache.cat(compressed("model")).save(out / "two_images.safetensors")
    a, b = compressed("model", num_tokens=1)
    (c, *_) = compressed("model", 1, num_tokens=3)
    vp.VoCoCache.stack([vp.VoCoCache.cat([a, c]), vp.VoCoCache(), b]).save(out / "rows.safetensors")
    vp.VoCoCache().save(out / "empty.safetensors")
    vp.VoCoCache.cat(compressed("model")).to(torch.bfloat16).save(out / "bfloat16.safetensors")
    vp.VoCoCache.cat(compressed("adapter")).save(out / "of_adapter.safetensors")
    vp.VoCoCache.cat(compressed("pooled")).save(out / "of_pooled.safetensors")

    model, tools = vp.load("./model", voco=uses.PREFIX)
    inputs = prompt(model, tools, QUESTIONS[:1], images=[images[:2]])
    model.compress(**inputs).save(out / "prefix.safetensors")
    stream = {name: value.tolist() for name, value in model.stream_inputs(inputs).items()}
    (out / "prefix.json").write_text(json.dumps(stream) + "\n", encoding="utf-8")


def write_stores() -> None:
    for target in (["--store", "store", "--max-bytes", "1MB"], ["--shards", "shards"]):
        for source in (["images"], ["frames", "--every-frame", "--rate", "2"]):
            assert voco(["compress", "./model", *source, *target, "--json"]) == 0

    model, tools = vp.load("./model")
    images = [Image.open(f"images/{name}.png") for name in "ab"]
    caches = list(compress_images(model, tools, images))
    with vp.VoCoCacheStore.for_model("store_int8", model, values="int8") as store:
        store.put_many([(store.key_of(i), cache) for i, cache in zip(images, caches, strict=True)])
        asked = prompt(model, tools, QUESTIONS[:2], caches=caches)
        store.note_error(quantization_error(model, asked, caches))
        store.export("exported")
    for lock in Path().rglob("lock.mdb"):  # holds no data; made anew when a store is opened
        lock.unlink()


def write_session() -> None:
    model, tools = vp.load("./model")
    talk = vp.VoCoSession(model, tools, system="Be brief.")
    talk.add(*(Image.open(f"images/{name}.png") for name in "ab")).ask(QUESTIONS[0], **uses.NEW)
    talk.ask(QUESTIONS[1], **uses.NEW)
    talk.add(Image.open("images/c.png")).save("session.safetensors")


def write_composed() -> dict[str, list[int]]:
    """The config of a composed model with an open_clip tower, the one class of this package in a checkpoint.

    Returns:
        the shapes of its weights, which are not written: they would be the largest file here.
    """
    with tempfile.TemporaryDirectory() as work:
        encoder, llm = write_encoder(Path(work), "open_clip"), write_llm(Path(work), "llama")
        composed, _ = vp.compose(encoder, llm)
    composed.config.save_pretrained("composed")
    return {name: list(value.shape) for name, value in composed.state_dict().items()}


def commit_of_the_package() -> str:
    """The last commit that changed the package; it must be what runs here."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert not git("status", "--porcelain", "voco_plugin"), "the package has changes that are not committed"
    return git("log", "-1", "--format=%H", "--", "voco_plugin").strip()


def write_expected(out: Path, **more: Any) -> None:
    """What this code makes of the files, read as the test reads them; and ``more``."""
    plain: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as work:
        files = Files(out, Path(work))
        for name, use in USES.items():
            plain[name] = {}
            for key, value in use(files).items():
                if torch.is_tensor(value):
                    tensors[f"{name}/{key}"] = value.float().contiguous()
                else:
                    plain[name][key] = value
                if key.endswith("steps"):
                    margin = float((value[..., 0] - value[..., 1]).min())
                    assert margin > MARGIN, f"{name}: the second best token is {margin} behind: other seeds"
    facts = {
        "written_by": commit_of_the_package(),
        "voco_plugin": vp.__version__,
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        **more,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in facts.items()]
    uses_ = [f"  {json.dumps(name)}: {json.dumps(plain[name], sort_keys=True)}" for name in sorted(plain)]
    lines.append('"uses": {\n' + ",\n".join(uses_) + "\n}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"  # a line an entry
    json.loads(text)
    (out / "expected.json").write_text(text, encoding="utf-8")
    save_file(dict(sorted(tensors.items())), out / "expected.safetensors")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1]).resolve()
    if out.exists():
        sys.exit(f"{out} exists: old files are never written again; name a new folder.")
    out.mkdir(parents=True)
    os.chdir(out)  # paths in the files are relative to this folder: they name nobody's machine
    write_images()
    write_models()
    whole_run = write_adapters()
    write_caches()
    write_stores()
    write_session()
    write_expected(out, run=whole_run, composed=write_composed())


if __name__ == "__main__":
    main()

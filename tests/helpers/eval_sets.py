"""Published benchmarks in small: their Parquet schema with a few random pictures, and a tiny VLM that answers
in their words (yes, no, A, B, a box), each by the picture and the question.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tiny
import voco_plugin as vp
from tiny import processors

BOX = "[0.25, 0.25, 0.75, 0.75]"
WORDS = ("yes", "no", "A", "B", BOX, "[0.1, 0.1, 0.3, 0.9]")
QUESTIONS = 6  # an image
_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = (
    "Is there a thing {0} in the image?" + _SHORT, "What is thing {0}?" + _SHORT, "Is it Yes {0}?" + _SHORT,
    "Which is {0}?\nA. this\nB. that" + _LETTER, "What does {0} say?" + _SHORT,
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
    "bottom-right y). All values are floating point numbers bounded between 0 and 1. Please provide the "
    "bounding box coordinate of the region this sentence describes: the thing {0}",
)  # fmt: skip
_KINDS = (0, 0, 0, 1, 0, 2)
"""As the harness writes them, or nearly; and which pair of words answers each."""


def answering_vlm(folder: Path) -> str:
    """A tiny LLaVA whose every answer is one of :data:`WORDS`, with VoCo attached, saved.

    Rows of the head come in pairs ``v + r, v - r``: ``v`` tells a kind of prompt, so that the pair is above
    all other tokens there, and ``r`` is a direction in which prompts of a kind differ. A coordinate of its
    own, large behind an answer alone, raises the end token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the rows that new tokens get
        return _answering_vlm(folder)


def _answering_vlm(folder: Path) -> str:
    model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
    processor.tokenizer.add_tokens(list(WORDS))
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    ids = processor.tokenizer.convert_tokens_to_ids(list(WORDS))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model = vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor)
        embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embed[ids] = 0
        embed[ids, 0] = 60
        kinds, apart = _directions(model, processor)
        head.zero_()
        for number, token in enumerate(ids):
            head[token] = kinds[number // 2] + apart[number // 2] * (1 if number % 2 else -1)
        head[processor.tokenizer.eos_token_id, 0] = 100
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _directions(model: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each ``(3, hidden)``: what tells a kind of prompt, and where prompts of a kind differ by their image
    and their question.
    """
    from voco_plugin.inference.answering import prompt

    apart, means = [], []
    for ask in PROMPTS:
        states = []
        for number in range(8):
            shown = [[image] for image in pictures(6, 11)]
            inputs = prompt(model, processor, [ask.format(number)] * len(shown), shown)
            states.append(model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1])
        found = torch.cat(states)
        found[:, 0] = 0
        means.append(found.mean(dim=0))
        apart.append(found - means[-1])
    wanted = torch.zeros(len(PROMPTS), 3)
    for number, kind in enumerate(_KINDS):
        wanted[number, kind] = 60.0
    kinds = (torch.linalg.pinv(torch.stack(means)) @ wanted).T
    common, _ = torch.linalg.qr(torch.stack(means).T)  # what a kind of prompt has in common says nothing
    found = torch.cat(apart)
    found = found - (found @ common) @ common.T
    by_image = found.view(-1, 6, found.shape[1])
    by_image = (by_image - by_image.mean(dim=1, keepdim=True)).flatten(0, 1)
    image = torch.linalg.svd(by_image, full_matrices=False)[2][:3]
    image = image / (by_image @ image.T).std(dim=0)[:, None]
    question = torch.linalg.svd(found, full_matrices=False)[2][:3]
    question = question / (found @ question.T).std(dim=0)[:, None]
    return kinds, 2 * image + question


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of one random colour with a rectangle of another, all different."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        image = Image.new("RGB", (20, 16), tuple(draw.randrange(256) for _ in range(3)))
        box = (draw.randrange(8), draw.randrange(6), 10 + draw.randrange(10), 8 + draw.randrange(8))
        image.paste(tuple(draw.randrange(256) for _ in range(3)), box)
        made.append(image)
    return made


def _save(path: Path, rows: list[dict[str, Any]], images: tuple[str, ...] = ("image",)) -> None:
    import datasets

    found = datasets.Dataset.from_list(rows)
    for name in images:
        feature = datasets.Image() if name != "images" else datasets.Sequence(datasets.Image())
        found = found.cast_column(name, feature)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_parquet(str(path))


def _asked(shown: list[Image.Image]) -> list[tuple[int, Image.Image, int]]:
    return [(n * QUESTIONS + q, image, q) for n, image in enumerate(shown) for q in range(QUESTIONS)]


def write_pope(home: Path) -> None:
    rows = [
        {"id": str(n), "question_id": str(n), "question": f"Is there a thing {q} in the image?",
         "answer": ("yes", "no")[(n + q // 2) % 2], "image_source": "x", "image": image, "category": "random"}
        for n, image, q in _asked(pictures(5, 1))
    ]  # fmt: skip
    _save(home / "POPE" / "data" / "test-00000-of-00001.parquet", rows)


def write_gqa(home: Path) -> None:
    shown = pictures(5, 2)
    asked = [
        {"id": str(n), "imageId": f"i{n // QUESTIONS}", "question": f"What is thing {q}?",
         "answer": WORDS[(n + q) % 2], "fullAnswer": "x", "isBalanced": True}
        for n, _, q in _asked(shown)
    ]  # fmt: skip
    folder = home / "GQA"
    _save(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", asked, ())
    images = [{"id": f"i{n}", "image": image} for n, image in enumerate(shown)]
    _save(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)


def write_mme(home: Path) -> None:
    rows = []
    for n, image in enumerate(pictures(8, 3)):
        category = ("existence", "count", "OCR", "code_reasoning")[n % 4]
        for answer in ("Yes", "No"):
            question = f"Is it {answer} {n}? Please answer yes or no."
            rows.append({"question_id": f"{category}/{n}.png", "image": image, "question": question,
                         "answer": answer, "category": category})  # fmt: skip
    _save(home / "MME" / "data" / "test-00000-of-00001.parquet", rows)


def write_scienceqa(home: Path) -> None:
    rows = [
        {"image": image, "question": f"Which is {q}?", "choices": ["this", "that"], "answer": (n // 2) % 2,
         "hint": "look" if q % 2 else "", "task": "closed choice", "grade": "grade2"}
        for n, image, q in _asked(pictures(4, 4))
    ]  # fmt: skip
    _save(home / "ScienceQA" / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows)


def write_textvqa(home: Path) -> None:
    rows = [
        {"image": image, "image_id": str(n // QUESTIONS), "question_id": n, "question": f"what does {q} say?",
         "answers": ["yes"] * (n * 7 % 5) + ["No."] * (n * 3 % 5) + ["red"] * (10 - n * 7 % 5 - n * 3 % 5),
         "ocr_tokens": ["x"]}
        for n, image, q in _asked(pictures(4, 5))
    ]  # fmt: skip
    _save(home / "textvqa" / "data" / "validation-00000-of-00001.parquet", rows)


def write_refcoco(home: Path, repository: str = "RefCOCO", split: str = "val") -> None:
    rows = []
    for n, image in enumerate(pictures(12, 6)):
        width, height = image.size
        near = n % 4 * 0.03  # of these some overlap the answered box by half, some do not
        left, top, across, down = (0.25, 0.25, 0.5, 0.5) if n % 3 == 0 else (0.1, 0.1, 0.2, 0.8)
        box = [width * (left + near), height * top, width * (across - near), height * (down - 2 * near)]
        rows.append({"question_id": str(n), "image": image, "question": "Where?", "bbox": box,
                     "answer": [f"the thing {n}", f"a {n} there"], "segmentation": [0.0]})  # fmt: skip
    _save(home / repository / "data" / f"{split}-00000-of-00001.parquet", rows)


def write_vqav2(home: Path) -> None:
    rows = [
        {"question_type": "what", "multiple_choice_answer": "yes",
         "answers": [{"answer": WORDS[(n + k // 4) % 2], "answer_confidence": "yes", "answer_id": k + 1}
                     for k in range(10)],
         "image_id": n // QUESTIONS, "answer_type": "other", "question_id": n, "question": f"What is {q}?",
         "image": image}
        for n, image, q in _asked(pictures(3, 7))
    ]  # fmt: skip
    _save(home / "VQAv2" / "data" / "validation-00000-of-00001.parquet", rows)


def write_mmbench(home: Path) -> None:
    rows = [
        {"index": n, "question": f"Which is {q}?", "hint": "nan", "answer": ("A", "B")[n // 3 % 2],
         "A": "this", "B": "that", "C": "nan", "D": "nan", "category": f"class {q % 2}", "image": image,
         "source": "x", "L2-category": "y", "comment": "nan", "split": "dev"}
        for n, image, q in _asked(pictures(3, 8))
    ]  # fmt: skip
    _save(home / "MMBench" / "en" / "dev-00000-of-00001.parquet", rows)


def write_seedbench(home: Path) -> None:
    rows = [
        {"answer": ("A", "B")[n // 2 % 2], "choice_a": "this", "choice_b": "that", "choice_c": "both",
         "choice_d": "none", "data_id": str(n), "data_type": "video" if n % 7 == 6 else "image",
         "question": f"Which is {q}?", "question_id": str(n), "question_type_id": 1,
         "images": [image, image] if n % 7 == 6 else [image], "segment": []}
        for n, image, q in _asked(pictures(3, 9))
    ]  # fmt: skip
    path = home / "SEED-Bench" / "data" / "test-00000-of-00001.parquet"
    _save(path, rows, ("images",))
    import datasets

    found = datasets.Dataset.from_parquet(str(path)).rename_column("images", "image")
    found.to_parquet(str(path))


def write_sets(home: Path) -> None:
    """The seven sets of the paper's Table 1, and two more."""
    for write in (
        write_pope, write_gqa, write_mme, write_scienceqa, write_textvqa, write_refcoco, write_vqav2,
        write_mmbench, write_seedbench,
    ):  # fmt: skip
        write(home)

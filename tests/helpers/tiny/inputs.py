"""Inputs for the tiny models: token rows with real image runs, and the vision arguments each forward needs.

What transformers 5.23 wants, where it surprises:
- qwen2_vl, qwen2_5_vl, qwen3_vl need `mm_token_type_ids` (0 text, 1 image, 2 video, on placeholders only; the
  start and end markers are text) next to `image_grid_thw`. Without it nothing raises: the positions silently
  become 1-D. `get_rope_index` raises without it, and skips padding by the 2-D mask.
- gemma3 takes `token_type_ids` (1 on the soft tokens only, not on start or end). Without it nothing raises:
  image tokens are silently causal. With it, an image block is bidirectional even past the sliding window.
- llava_onevision wants `batch_num_images`, one entry per row *that has images*; a row with several images has
  them untiled (base features and one newline feature).
- llava_next and llava_onevision stack images as [images, most tiles, 3, H, W], zero-padded, and read the true
  tile count from `image_sizes`; their row newlines are features under ordinary placeholders, not tokens.
- idefics3 and smolvlm lay images out per row, [rows, most tiles, 3, H, W]; an all-zero tile is padding.
  "\\n" after every tile row, and "\\n" before the global tile, which merges with the last one to "\\n\\n".
- Everything else lists images (internvl: tiles) in reading order, whichever row they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from .models import check_name, config, voco_id
from .vocab import BOS, DOUBLE_NEWLINE, IDS, NEWLINE, PAD, ROW_COL, TEXT
from .wide import BACKBONES, IMAGE, VIDEO

_LLAVA = ("llava_llama", "llava_mistral", "llava_qwen2", "llava_tied")
_ANYRES = ("llava_next", "llava_onevision")
_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_IDEFICS = ("idefics3", "smolvlm")

_QWEN_GRIDS = {"": (1, 4, 6), "small": (1, 4, 4), "big": (1, 6, 8)}  # patches (t, h, w), merged 2 x 2
_QWEN_VIDEO_GRID = (3, 4, 4)
_ANYRES_SIZES = {"": (12, 24), "small": (12, 24), "big": (24, 24)}  # pixels (h, w); 12 x 12 is one tile
_INTERNVL_TILES = {"": 1, "small": 1, "big": 3}  # "big": two tiles and the thumbnail
_IDEFICS_GRIDS = {"": (2, 1), "small": (0, 0), "big": (2, 2)}  # tile rows and columns beside the global tile

Rows = Sequence[Sequence[str | int]]


def image_sizes(name: str) -> tuple[str, ...]:
    """The size suffixes that "img:<size>" takes ("" is the default size, plain "img")."""
    check_name(name)
    return ("",) if name in (*_LLAVA, "gemma3", *BACKBONES) else ("", "small", "big")


def vision_ids(name: str) -> set[int]:
    """Placeholder and marker ids: start and end, tile and row tags. Never ordinary text."""
    if name in BACKBONES:
        return {*BACKBONES[name].run, VIDEO}
    tokens: Sequence[str] = ("<image>",)
    if name in _QWEN:
        tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    elif name == "internvl":
        tokens = ("<IMG_CONTEXT>", "<img>", "</img>")
    elif name == "gemma3":
        tokens = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    elif name in _IDEFICS:
        tokens = ("<image>", "<fake_token_around_image>", "<global-img>", *ROW_COL)
    elif name == "llava_onevision":
        tokens = ("<image>", "<video>")
    return {IDS[token] for token in tokens}


def glue_ids(name: str) -> set[int]:
    """Ids written between the tiles of one image that are ordinary text everywhere else."""
    return {NEWLINE, DOUBLE_NEWLINE} if name in _IDEFICS else set()


def image_run(name: str, size: str = "", alone: bool = True) -> list[int]:
    """The ids of one whole image; `alone` is False where its row holds several (llava_onevision cares)."""
    if size not in image_sizes(name):
        raise ValueError(f"{name} has no image size {size!r}: choose from {image_sizes(name)}")
    if name in BACKBONES:
        return list(BACKBONES[name].run)
    if name in _LLAVA:
        return [IDS["<image>"]] * 9
    if name in _ANYRES:
        if name == "llava_onevision" and not alone:
            return [IDS["<image>"]] * 5
        h, w = (side // 6 for side in _ANYRES_SIZES[size])
        return [IDS["<image>"]] * (4 + h * w + h)
    if name in _QWEN:
        t, h, w = _QWEN_GRIDS[size]
        return [IDS["<|vision_start|>"], *[IDS["<|image_pad|>"]] * (t * h * w // 4), IDS["<|vision_end|>"]]
    if name == "internvl":
        return [IDS["<img>"], *[IDS["<IMG_CONTEXT>"]] * (4 * _INTERNVL_TILES[size]), IDS["</img>"]]
    if name == "gemma3":  # its processor also puts "\n\n" on either side: text, left to the caller
        return [IDS["<start_of_image>"], *[IDS["<image_soft_token>"]] * 9, IDS["<end_of_image>"]]
    fake, tile = IDS["<fake_token_around_image>"], [IDS["<image>"]] * 4
    run: list[int] = []
    rows, columns = _IDEFICS_GRIDS[size]
    for r in range(rows):
        for c in range(columns):
            run += [fake, IDS[f"<row_{r + 1}_col_{c + 1}>"], *tile]
        run.append(NEWLINE if r + 1 < rows else DOUBLE_NEWLINE)
    return [*run, fake, IDS["<global-img>"], *tile, fake]


def _video_run(name: str) -> list[int]:
    if name not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(f'{name} takes no "vid" segment here: only qwen2_vl and qwen2_5_vl do')
    t, h, w = _QWEN_VIDEO_GRID
    return [IDS["<|vision_start|>"], *[IDS["<|video_pad|>"]] * (t * h * w // 4), IDS["<|vision_end|>"]]


@cache
def num_features(name: str, size: str = "", alone: bool = True) -> int:
    """How many placeholders, so image features, one image has."""
    image = IMAGE if name in BACKBONES else config(name).image_token_id
    return image_run(name, size, alone).count(image)


def make_inputs(
    name: str,
    rows: Rows,
    padding_side: str = "right",
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    voco_id: int | None = None,
    first_row: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch for `build(name)`.

    Each row is a list of segments: "t3" three random ordinary tokens (no special id, no newline), "c2" two
    VoCo tokens, "img" or "img:big" an image ("img@3": the same pixels wherever it stands), "vid" a video
    (qwen2_vl, qwen2_5_vl), "bos", "nl" a newline, "nl2" a double newline, or an int, the id itself. Content
    depends on `seed` and the row's number alone, so row i of a batch comes back unpadded from
    `make_inputs(name, [rows[i]], first_row=i)`.

    Returns input_ids and attention_mask [B, N] and the vision arguments of the model's forward. With no image
    in any row, only text arguments are there.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}: use 'left' or 'right'")
    voco = _default_voco(name) if voco_id is None else voco_id
    text = [i for i in TEXT if i != voco]
    sequences, images, videos = [], [], []
    for index, row in enumerate(rows):
        generator = torch.Generator().manual_seed(seed * 1009 + first_row + index)
        ids: list[int] = []
        sizes: list[str] = []
        row_images, row_videos = [], []
        alone = sum(isinstance(s, str) and s.startswith("img") for s in row) == 1
        for segment in row:
            spec, _, which = segment.partition("@") if isinstance(segment, str) else ("id", "", "")
            kind, _, size = spec.partition(":")
            pixels = torch.Generator().manual_seed(7919 + int(which)) if which else generator
            if kind == "id":
                ids.append(int(segment))
            elif kind == "img":
                ids += image_run(name, size, alone)
                if name in BACKBONES:
                    row_images.append(BACKBONES[name].pixels(pixels))
                else:
                    row_images.append(_pixels(name, size, alone, pixels))
                sizes.append(size)
            elif kind == "vid":
                ids += _video_run(name)
                row_videos.append(_patches(_QWEN_VIDEO_GRID, generator))
            elif kind in ("bos", "nl", "nl2"):
                ids.append({"bos": BOS, "nl": NEWLINE, "nl2": DOUBLE_NEWLINE}[kind])
            elif kind[0] == "c" and kind[1:].isdigit():
                ids += [voco] * int(kind[1:])
            elif kind[0] == "t" and kind[1:].isdigit():
                picks = torch.randint(len(text), (int(kind[1:]),), generator=generator)
                ids += [text[int(i)] for i in picks]
            else:
                raise ValueError(f"unknown segment {segment!r}: use t3, c2, img, vid, bos, nl, nl2 or an int")
        sequences.append(ids)
        images.append(list(zip(sizes, row_images, strict=True)))
        videos.append(row_videos)

    length = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for b, ids in enumerate(sequences):
        where = slice(0, len(ids)) if padding_side == "right" else slice(length - len(ids), length)
        input_ids[b, where] = torch.tensor(ids, dtype=torch.long)
        attention_mask[b, where] = 1
    out = {"input_ids": input_ids, "attention_mask": attention_mask}
    out |= _type_ids(name, input_ids)
    if any(images):
        out |= _vision_arguments(name, images)
    if any(videos):
        flat = [patches for row in videos for patches in row]
        out["pixel_values_videos"] = torch.cat(flat)
        out["video_grid_thw"] = torch.tensor([_QWEN_VIDEO_GRID] * len(flat))
        if name == "qwen2_5_vl":
            out["second_per_grid_ts"] = torch.ones(len(flat))
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in out.items()}


_default_voco = voco_id


def _type_ids(name: str, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if name in BACKBONES:
        kind = BACKBONES[name].types
        types = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
        return {} if kind is None else {kind: types if kind.startswith("mm") else torch.zeros_like(input_ids)}
    if name == "gemma3":
        return {"token_type_ids": (input_ids == IDS["<image_soft_token>"]).long()}
    if name in _QWEN:
        image, video = input_ids == IDS["<|image_pad|>"], input_ids == IDS["<|video_pad|>"]
        return {"mm_token_type_ids": image.long() + 2 * video.long()}
    return {}


def _patches(grid: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    t, h, w = grid
    return torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=generator)


def _pixels(name: str, size: str, alone: bool, generator: torch.Generator) -> torch.Tensor:
    """One image's pixels: patches [P, D] for Qwen, otherwise tiles [T, 3, H, W]."""
    if name in _QWEN:
        return _patches(_QWEN_GRIDS[size], generator)
    side, tiles = 16, 1
    if name in _LLAVA:
        side = 12
    elif name == "gemma3":
        side = 24
    elif name in _ANYRES:
        side = 12
        h, w = _ANYRES_SIZES[size]
        tiles = 1 + (h // side) * (w // side) if alone or name == "llava_next" else 1
    elif name == "internvl":
        tiles = _INTERNVL_TILES[size]
    else:
        rows, columns = _IDEFICS_GRIDS[size]
        tiles = rows * columns + 1
    return torch.randn(tiles, 3, side, side, generator=generator)


def _pad_stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[T_i, ...] tensors as one [len, max T, ...], zero-padded."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def _vision_arguments(name: str, images: list[list[tuple[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    flat = [image for row in images for image in row]
    if name in BACKBONES:
        if BACKBONES[name].rows:
            none = torch.zeros(0, 3, 12, 12)
            stacked = [torch.cat([none, *(p["pixel_values"] for _, p in row)]) for row in images]
            return {"pixel_values": _pad_stack(stacked)}
        return {key: torch.cat([p[key] for _, p in flat]) for key in flat[0][1]}
    pixels = [p for _, p in flat]
    if name in _QWEN:
        grids = torch.tensor([_QWEN_GRIDS[size] for size, _ in flat])
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": grids}
    if name in _ANYRES:
        sizes = torch.tensor([_ANYRES_SIZES[size] for size, _ in flat])
        out = {"pixel_values": _pad_stack(pixels), "image_sizes": sizes}
        if name == "llava_onevision":
            out["batch_num_images"] = torch.tensor([len(row) for row in images if row])
        return out
    if name in _IDEFICS:
        none = torch.zeros(0, 3, 16, 16)
        rows = [torch.cat([none, *(p for _, p in row)]) for row in images]
        masks = [torch.ones(len(row), 16, 16, dtype=torch.long) for row in rows]
        return {"pixel_values": _pad_stack(rows), "pixel_attention_mask": _pad_stack(masks)}
    return {"pixel_values": torch.cat(pixels)}

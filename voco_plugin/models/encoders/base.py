"""A loaded image encoder: its tower, its image processor, and the patch features it gives.

Shapes: ``B`` images, ``S`` pixels a side, ``h × w`` the patch grid, ``P`` prefix tokens (class token and
registers), ``N`` features an image (``h·w``, and the prefix tokens that stay), ``D`` their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..model_paths import named
from .spec import EncoderSpec, library_module, resolve

HOSTS = ("llava", "perception_lm", "fast_vlm")


@dataclass
class Encoder:
    """A loaded image encoder.

    Attributes:
        name: what it was asked for by.
        tower: the vision model; part of the composed model as it is.
        image_processor: images → ``pixel_values``.
        host: which transformers class reads this tower's output: ``llava`` (token features of any layer),
            ``perception_lm`` (a timm tower's tokens) or ``fast_vlm`` (a timm tower's last feature map).
        hidden_size: D.
        image_size: S, pixels.
        patch_size: pixels.
        prefix_tokens: P, class token and registers before the patches.
        feature_layer: the layer whose features are taken.
        class_token: whether the class token stays among the features.
    """

    name: str
    tower: PreTrainedModel
    image_processor: Any
    host: str
    hidden_size: int
    image_size: int
    patch_size: int
    prefix_tokens: int = 0
    feature_layer: int = -2
    class_token: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches ``(h, w)``."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def drops_first(self) -> bool:
        """Whether the first token, the class token, is left out."""
        return self.prefix_tokens > 0 and not self.class_token

    @property
    def num_tokens(self) -> int:
        """N, features an image: patches, and the prefix tokens that stay (registers always do)."""
        return self.grid[0] * self.grid[1] + self.prefix_tokens - self.drops_first

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features a projector reads: ``(B, 3, S, S)`` → ``(B, N, D)``."""
        if self.host == "llava":
            found = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.feature_layer]
        else:
            found = self.tower(pixel_values, do_pooling=False).last_hidden_state
        if self.host == "fast_vlm":
            found = found.flatten(2).transpose(1, 2)
        return found[:, 1:] if self.drops_first else found

    @torch.no_grad()
    def check(self) -> Encoder:
        """Run one black image and compare what comes out with what is promised.

        Raises:
            ValueError: number or width of the features differ.
        """
        first = next(self.tower.parameters())
        pixels = torch.zeros(1, 3, self.image_size, self.image_size, dtype=first.dtype, device=first.device)
        shape = tuple(self.features(pixels).shape)
        if shape != (1, self.num_tokens, self.hidden_size):
            raise ValueError(
                f"encoder {self.name!r} gives features of shape {shape} for an image of {self.image_size} "
                f"pixels, and (1, {self.num_tokens}, {self.hidden_size}) were expected: its output is not a "
                "row of patch tokens; use another encoder."
            )
        return self


def load_encoder(
    name: str,
    *,
    image_size: int | None = None,
    feature_layer: int | None = None,
    class_token: bool = False,
    dtype: torch.dtype | str | None = None,
    pretrained: bool = True,
) -> Encoder:
    """Load an encoder by name.

    Args:
        name: as :func:`~voco_plugin.models.encoders.spec.resolve` takes it.
        image_size: S, pixels; ``None`` keeps the checkpoint's. Learned position embeddings are interpolated.
        feature_layer: ``None`` takes the encoder's own default: -2 for token towers, -1 for feature maps.
        class_token: keep the class token among the features.
        dtype: of the weights; ``None`` keeps float32.
        pretrained: false builds timm and open_clip models with random weights (nothing is downloaded).

    Raises:
        ValueError: the name is unknown, or the encoder cannot give what is asked for; the message says what
            can.
        ImportError: timm or open_clip is not installed.
    """
    found = resolve(name)
    options: dict[str, Any] = {
        "image_size": image_size,
        "feature_layer": feature_layer,
        "class_token": class_token,
    }
    if not isinstance(found, EncoderSpec):
        encoder = found(**options)
        if not isinstance(encoder, Encoder):
            raise ValueError(f"encoder {name!r} gave a {type(encoder).__name__}, not an Encoder.")
    else:
        if feature_layer is None:
            options["feature_layer"] = found.feature_layer
        if image_size is None:
            options["image_size"] = found.image_size
        if found.library != "transformers":
            options["pretrained"] = pretrained
        with named(found.source, "encoder" if found.source == name else f"encoder {name}:"):
            encoder = library_module(found.library).load(found.source, **options)
        _compare(name, found, encoder, image_size)
    encoder.name = name
    if encoder.class_token and not encoder.prefix_tokens:
        raise ValueError(f"encoder {name!r} has no class token to keep; leave class_token out.")
    encoder.tower.eval()
    if dtype is not None:
        encoder.tower.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return encoder.check()


def _compare(name: str, said: EncoderSpec, found: Encoder, image_size: int | None) -> None:
    """Hold a loaded encoder against the figures that its entry in the registry gives.

    Raises:
        ValueError: one differs.
    """
    figures = ["hidden_size", "patch_size", *(["image_size"] if image_size is None else [])]
    for figure in figures:
        promised, real = getattr(said, figure), getattr(found, figure)
        if promised is not None and promised != real:
            raise ValueError(
                f"encoder {name!r} is registered with {figure}={promised}, and {said.source} has {real}; "
                "correct the EncoderSpec."
            )


def pixels_of(config: Any) -> int:
    """The side of ``config.image_size``; non-square images are refused."""
    size = config.image_size
    if isinstance(size, (list, tuple)):
        if size[0] != size[1]:
            raise ValueError(f"image_size={size} is not square; square encoders only.")
        size = size[0]
    return int(size)


def image_processor_of(size: int, mean: Any, std: Any, *, squash: bool, crop: float, resample: str) -> Any:
    """A plain ``CLIPImageProcessor`` for an encoder whose library describes its preprocessing in figures.

    Args:
        size: S, pixels.
        mean, std: per channel.
        squash: resize to S × S whatever the aspect ratio; else the shorter side, and crop the centre.
        crop: the share of the resized image that the crop keeps.
        resample: ``bicubic``, ``bilinear`` or ``nearest``.
    """
    from PIL import Image
    from transformers import CLIPImageProcessor

    kinds = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    kinds |= {"nearest": Image.Resampling.NEAREST}
    return CLIPImageProcessor(
        size={"height": size, "width": size} if squash else {"shortest_edge": int(size / crop)},
        crop_size={"height": size, "width": size},
        do_center_crop=not squash,
        resample=int(kinds.get(resample, Image.Resampling.BICUBIC)),
        image_mean=[float(v) for v in mean],
        image_std=[float(v) for v in std],
    )

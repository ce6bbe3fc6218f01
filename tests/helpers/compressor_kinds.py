"""Every compressor with options that fit tiny LLaVA."""

from __future__ import annotations

import voco_plugin as vp

QFORMER = {"layers": 2, "hidden_size": 16, "heads": 2}


KINDS = {
    "pooled": {"token_init": "pooled"},
    "slots": {"token_init": "slots"},
    "queries": {"token_init": "queries", "compressor_options": {"hidden_size": 16, "heads": 2}},
    "avg_pool": {"compressor": "avg_pool"},
    "qformer": {"compressor": "qformer", "compressor_options": QFORMER},
    "llama_vid": {"compressor": "llama_vid"},
    "pixel_shuffle": {
        "compressor": "pixel_shuffle",
        "num_tokens": 3,
        "compressor_options": {"num_vision": 9},
    },
    "token_merge": {"compressor": "token_merge"},
    "matryoshka": {"compressor": "matryoshka"},
    "downsample": {"compressor": "downsample", "num_tokens": 4},
}
"""For LLaVA with 9 vision tokens an image."""


def voco(kind: str) -> vp.VoCoConfig:
    return vp.VoCoConfig(**{"num_tokens": 2, **KINDS[kind]})

"""Compressors: what a block's K tokens are when they enter the language model; one per file.

    inside the LLM    voco            the VoCo token's row; vision is read by attention (the paper's)
                      + token_init    slots: a row for each slot; pooled: seeded with the mean of the image;
                                      queries: seeded with what learned queries read off it
    outside it        avg_pool  qformer  llama_vid  pixel_shuffle  token_merge  matryoshka  downsample

A compressor outside the LLM (a baseline) makes K embeddings of the vision tokens, which stand where the VoCo
tokens stand; the rule then hides the vision tokens from these too. So each trains, caches and is evaluated as
VoCo is.
"""

from ...registry import compressors
from .base import Compressor
from .build import build_compressor

for _name, _class in {
    "voco": "voco:VoCo",
    "avg_pool": "avg_pool:AveragePool",
    "qformer": "qformer:QFormer",
    "llama_vid": "llama_vid:LlamaVid",
    "pixel_shuffle": "pixel_shuffle:PixelShuffle",
    "token_merge": "token_merge:TokenMerge",
    "matryoshka": "matryoshka:Matryoshka",
    "downsample": "downsample:Downsample",
}.items():
    compressors.register(_name, f"voco_plugin.models.compressors.{_class}")

__all__ = ["Compressor", "build_compressor"]

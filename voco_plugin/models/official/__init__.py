"""Checkpoints of the original LLaVA-1.5 and VoCo-LLaMA code → ordinary transformers ones.

Reading order: ``checkpoint`` (files and tensors), ``weights`` (names, shapes, shards), ``processor``
(tokenizer, images, conversation), ``original`` (config and parts), ``convert`` (puts them together).
"""

from .convert import Converted, convert_official

__all__ = ["Converted", "convert_official"]

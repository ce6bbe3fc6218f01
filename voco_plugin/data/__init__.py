"""Datasets and images as rows: the one image opener (``images``), LLaVA JSON, saved folders and hub ids in
TRL's format (``llava_format``, ``loaders``), images left as stored until they are opened
(``lazy_images``).

Nothing is imported here: each module loads on its own.
"""

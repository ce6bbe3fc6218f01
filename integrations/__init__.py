"""Bridges to other tools: other trainers, serving engines and evaluation harnesses.

Each sees only the public API of ``voco_plugin``, loads only when its tool asks for it, and ships inside the
wheel as ``voco_plugin.integrations``.
"""

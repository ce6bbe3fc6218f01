"""The isolation rule at work in one forward: where vision, VoCo and text tokens stand, who sees whom, the
forward itself (prepare, run, remember), and the KV cache that knows what its slots hold.

Imports nothing of the package but ``config``, ``files`` and ``registry``. Reading order: ``layout``,
``masks``, ``forward``, ``kv_cache``, ``attention/``.
"""

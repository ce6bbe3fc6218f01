"""``voco compress --engine ray``: the same stage as a Ray Data job, on one machine or many.

``pip install 'voco_plugin[ray]'``. See `compress.py`.
"""

from .compress import compress_with_ray

__all__ = ["compress_with_ray"]

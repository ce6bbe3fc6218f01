"""Images at any number → caches: in a store, in Parquet shards; by one process, several, or a Ray cluster.

Reading order: `job` (the loop, `compress_dataset`), `sinks` (where caches go), `prefetch` (decoding in
threads), `processes` (who takes which share). Where images come from:
`voco_plugin/store/sources/image_sources.py`.
"""

from .job import Counts, compress_dataset
from .processes import Processes

__all__ = ["Counts", "Processes", "compress_dataset"]

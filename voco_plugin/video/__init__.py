"""Videos as frames with their times.

Reading order: `frames` (what others see), `reading` (`read_video`), `sampling` (which frames), `sources`
(what a video may be), `decoding` (PyAV), `packets` and `seeking` (few frames of a long file),
`image_sequence`, `live`, `scenes`, `probing`, `errors`; `dataset_rows` for training sets.
"""

from .decoding import VIDEO_SUFFIXES
from .errors import BadVideoError
from .frames import Frame, Segment, segments
from .probing import VideoInfo, probe
from .reading import read_video
from .sampling import Sampling

__all__ = [
    "VIDEO_SUFFIXES", "BadVideoError", "Frame", "Sampling", "Segment", "VideoInfo", "probe", "read_video",
    "segments",
]  # fmt: skip

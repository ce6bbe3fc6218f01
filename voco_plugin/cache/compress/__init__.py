"""Stage 1 (paper, Sec. 3.3): vision and VoCo tokens in, the VoCo tokens' keys and values out."""

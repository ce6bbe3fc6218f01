"""Video: a series of blocks, one a frame or segment (paper, Sec. 3.4)."""

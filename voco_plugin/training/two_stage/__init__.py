"""Training in two stages (paper, Sec. 3.4): blocks in chunks or from a store, then the text on top of
them.
"""

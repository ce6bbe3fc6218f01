"""The engine that needs nothing but this package: transformers' continuous batching, with VoCo blocks in its
paged cache.

Reading order: `paged_blocks` (blocks under token ids of their own, put in place of computed keys; the one
file that touches what is internal upstream), `sampling` (each request's own), `manager` (upstream's loop with
both in it), `engine` (requests in, tokens out, and what happens when the loop dies).
"""

"""Stage 2 (paper, Sec. 3.3): compressed blocks under a prompt, as the KV cache that its text goes on from."""

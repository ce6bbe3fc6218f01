"""Prompts, answers and conversations over compressed images, and a model's two-stage methods."""

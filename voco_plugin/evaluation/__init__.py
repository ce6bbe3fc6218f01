"""Scores and what they are worth: metrics, intervals, published question sets, a judge, studies."""

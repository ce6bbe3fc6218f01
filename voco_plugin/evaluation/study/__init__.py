"""A study: a grid of runs (method × K × seed) of one recipe, each trained and read as a user would type it.

``definition`` (the YAML, checked) → ``plan`` (runs, trainings, readings, and the ``run_keys`` of what
determines each) → ``runner`` (``child_processes``, locks, resume) → ``records`` (one JSON a finished run) →
``figures`` (means, ratios, intervals) → ``tables``. Nothing is imported here.
"""

"""Gridworld, a synthetic world of images and videos with exact answers, and the tiny VLM that learns it.

Reading order, images: `scenes` (what is in an image, and how it is drawn), `questions` (what is asked and the
exact answer; `words`: in short; `box_questions`: about boxes), `levels` (how hard a world is), `dataset`
(writes LLaVA JSON and a `datasets` folder). Videos: `video_scenes`, `video_questions`, `video_guess` (what
less than the whole video gives away), `video_dataset`. The model: `tiny_processor`, `tiny_tower` (trains the
vision tower), `tiny_align` (then the projector), `tiny_vlm` (a small LLaVA), `tiny_parts` (encoders and LLMs
to compose from). `row_files`: how both kinds of image sets are written. `pictures/`: a second set, of
published drawings.

Of the package only the command line imports it (`tests/house/test_layers.py`); the recipes of studies use the
data it writes. Nothing is imported here: each module loads on its own.
"""

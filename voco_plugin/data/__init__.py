"""Data: the synthetic `gridworld`, dataset loaders, and a tiny VLM of the real classes.

Reading order: `gridworld_scenes` (what is in an image, and how it is drawn), `gridworld_questions` (what is
asked and the exact answer; `gridworld_words`: in short, `gridworld_boxes`: about boxes), `gridworld_levels`
(how hard a world is), `gridworld` (writes both as a LLaVA JSON and as a `datasets` folder),
`llava_format` and `loaders` (LLaVA JSON, saved folders and hub ids → the format of TRL), `tiny_processor` and
`tiny_vlm` (a small LLaVA to train on it). Videos: `gridworld_video_scenes`, `gridworld_video_questions`,
`gridworld_video_guess` (what less than the whole video gives away), `gridworld_video`; `video_qa` and
`video_rows` (published sets, frames read from files).

Nothing is imported here: each module loads on its own.
"""

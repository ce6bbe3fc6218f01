"""What the shipped tasks ask and how they count: one file for gridworld and the sets of videos."""

from voco_plugin.evaluation.metrics import is_right
from voco_plugin.evaluation.video_qa import same_answer


def video_visual(doc):
    return [{"type": "video", "url": doc["video"]}]  # whatever its suffix


def gridworld_visual(doc):
    from voco_plugin.data.images import open_image

    return [open_image(path) for path in doc["images"]]


def text(doc, lmms_eval_specific_kwargs=None):
    given = lmms_eval_specific_kwargs or {}
    return f"{given.get('pre_prompt', '')}{doc['question']}{given.get('post_prompt', '')}"


def video_result(doc, results):
    """VQA's normalisation: case, punctuation, articles and number words do not count."""
    return {"exact_match": float(same_answer(results[0], doc["answer"]))}


def gridworld_result(doc, results):
    """As ``voco eval --data`` counts."""
    return {"exact_match": float(is_right(doc["type"], results[0], doc["answer"]))}


def yes_no(dataset):
    """The questions that are answered with yes or no."""
    return dataset.filter(lambda doc: doc["answer"] in ("yes", "no"))


def choice(doc):
    return ("yes", "no").index(doc["answer"])

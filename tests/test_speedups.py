"""What is done for speed changes no bit of what it speeds up."""

from __future__ import annotations

import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from test_templates import TALK
from test_vocabulary import pictures
from tiny.processors import processor
from voco_plugin import VoCoDataCollator


def test_answers_are_marked_as_transformers_marks_them():
    its = processor("llava_llama")
    rows = [{"messages": TALK, "images": pictures(1)}, {"messages": TALK[:2], "images": pictures(1)}]
    expected = DataCollatorForVisionLanguageModeling(its, assistant_only_loss=True)([dict(r) for r in rows])
    made = VoCoDataCollator(its, assistant_only_loss=True)(rows)
    assert torch.equal(made["labels"], expected["labels"]) and (made["labels"] != -100).any()
    assert "_adjust_assistant_masks_indices" not in vars(its), "the processor is as it was"

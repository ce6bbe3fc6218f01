"""The conversation that the LLMs' templates are rendered with, and what each must make of it."""

from __future__ import annotations

TALK = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>"
    "<s>[INST] Sure? [/INST] Yes. </s>",
    "mistral": "<s>[INST] <image>\nWhat is it?[/INST] A cat.</s>[INST] Be brief.\n\nSure?[/INST] Yes.</s>",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\n<image>\nWhat is it?<end_of_turn>\n"
    "<start_of_turn>model\nA cat.<end_of_turn>\n<start_of_turn>user\nSure?<end_of_turn>\n"
    "<start_of_turn>model\nYes.<end_of_turn>\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWhat is it?<|end|>\n"
    "<|assistant|>\nA cat.<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|><image>\nWhat is it?"
    "<|im_end|><|im_start|>assistant<|im_sep|>A cat.<|im_end|><|im_start|>user<|im_sep|>Sure?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Yes.<|im_end|>",
    "vicuna_v1": "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Sure? ASSISTANT: Yes.</s>",
}  # fmt: skip

"""The tiny families whose language model stands alone beside blocks, which engines can run."""

STAND_ALONE = [
    "llava_llama", "llava_qwen2", "llava_tied", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl",
    "qwen3_vl", "internvl", "idefics3", "smolvlm", "llava_qwen3", "llava_phi", "llava_pixtral",
    "llava_next_video", "video_llava", "vipllava", "mistral3", "glm4v", "glm46v", "glm4v_moe",
    "qwen3_vl_moe", "ovis2", "aria", "video_llama_3", "deepseek_vl", "perception_lm", "got_ocr2", "idefics2",
]  # fmt: skip

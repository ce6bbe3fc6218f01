"""A tiny Llama as a GGUF file: real format, weights that a test knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HEADS, KV_HEADS, WIDTH = 4, 2, 64
MORE = ("he", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bytes_as_text() -> list[str]:
    """The 256 symbols that stand for bytes in byte-level tokenizers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256 + len(MORE), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        bos_token_id=258, eos_token_id=259, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def write_gguf(path: Path, model: Any, quantization: str = "F32") -> str:
    """``model`` in llama.cpp's names and order of rotary channels; matrices as ``quantization`` has them."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*bytes_as_text(), *MORE])
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_chat_template(CHATML)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            heads = HEADS if ".q_proj." in name else KV_HEADS
            values = _interleaved(weight, heads).numpy()
        if values.ndim > 1 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(_packed_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_packed_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns neighbouring channels, transformers those half a head apart."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _packed_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }  # fmt: skip
    for own, packed in parts.items():
        name = name.replace(own, packed)
    return name

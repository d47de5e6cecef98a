"""Sizes of published checkpoints, for plans without a local copy of the model.

Fields that do not change the shape of a program (rotary base, maximum length) are left
at their defaults.
"""

import dataclasses

from oreal_jax.model.config import ModelConfig

_7B = ModelConfig(
    vocab=152_064,
    embed=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    mlp=18_944,
    qkv_bias=True,
)
_32B = dataclasses.replace(_7B, embed=5120, layers=64, heads=40, kv_heads=8, mlp=27_648)
_LLAMA_8B = ModelConfig(
    vocab=128_256,
    embed=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14_336,
)

PUBLISHED = {
    "Qwen/Qwen2.5-7B": _7B,
    "Qwen/Qwen2.5-32B": _32B,
    "internlm/OREAL-7B-SFT": _7B,
    "internlm/OREAL-32B-SFT": _32B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _7B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
}

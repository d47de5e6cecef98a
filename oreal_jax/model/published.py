"""Shapes of published checkpoints, for plans that are made before anything is loaded.

From the config.json of each; `oreal plan` reads a local copy where there is one.
"""

from oreal_jax.model.config import ModelConfig, Rope

_QWEN_7B = ModelConfig(
    vocab=152_064,
    embed=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    mlp=18_944,
    rope=Rope(theta=1e6),
    qkv_bias=True,
)
_QWEN_32B = ModelConfig(
    vocab=152_064,
    embed=5120,
    layers=64,
    heads=40,
    kv_heads=8,
    head_dim=128,
    mlp=27_648,
    rope=Rope(theta=1e6),
    qkv_bias=True,
)

PUBLISHED = {
    "Qwen/Qwen2.5-7B": _QWEN_7B,
    "Qwen/Qwen2.5-32B": _QWEN_32B,
    "internlm/OREAL-7B-SFT": _QWEN_7B,
    "internlm/OREAL-7B": _QWEN_7B,
    "internlm/OREAL-DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B,
    "internlm/OREAL-32B-SFT": _QWEN_32B,
    "internlm/OREAL-32B": _QWEN_32B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B,
}

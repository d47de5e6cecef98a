"""OREAL on a tiny Qwen2-shaped model with random weights, in seconds.

    python tools/make_tiny.py runs/tiny_start    # random weights, prompts, solutions
    oreal sft configs/tiny_sft.py                # learns the form of an answer
    oreal train configs/tiny.py                  # learns the answers

For tests and for trying out changes. The task is the larger of two digits.
"""

from oreal_jax.config import Packing, Saving, TrainConfig, Verification
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Sampling

config = TrainConfig(
    model="runs/tiny_sft",
    prompts="runs/tiny_start/prompts.jsonl",
    steps=20,
    prompts_per_step=8,
    samples_per_prompt=8,
    sampling=Sampling(max_tokens=8),
    max_prompt_tokens=56,
    decode_rows=64,
    verification=Verification(workers=1),
    policy=Optimizer(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=1),
    token_reward=Optimizer(
        learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=0
    ),
    freeze_steps=1,
    packing=Packing(rows=4, row_length=128),
    saving=Saving(every=10),
)

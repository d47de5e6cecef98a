"""OREAL on SmolLM2-135M-Instruct: sums to 20 and times tables, on a CPU.

    make demo

prepares the model and the prompts that this config names, trains, and measures before
and after on held-out problems; the result is in the README.
"""

from oreal_jax.config import Packing, Saving, TrainConfig, Verification
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Sampling

config = TrainConfig(
    model="runs/demo/start",
    prompts="runs/demo/train.jsonl",
    steps=10,
    prompts_per_step=16,
    samples_per_prompt=8,
    sampling=Sampling(max_tokens=24, top_p=0.9),
    max_prompt_tokens=64,
    decode_rows=128,
    verification=Verification(workers=1, deadline=5.0),
    policy=Optimizer(learning_rate=2e-5, final_learning_rate=1e-5, warmup_steps=1),
    token_reward=Optimizer(
        learning_rate=2e-5, final_learning_rate=1e-5, warmup_steps=0
    ),
    freeze_steps=1,
    packing=Packing(rows=1, row_length=320),
    remat="elementwise",  # fits in memory and saves a quarter of the update's FLOPs
    saving=Saving(every=50, keep=1),
)

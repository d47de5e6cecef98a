"""RFT for SmolLM2-135M-Instruct on its own correct sums and products, in minutes.

    oreal sft configs/smollm2_sft.py

docs/data.md makes the examples that this config names, and shows the output.
"""

from oreal_jax.config import Packing, Saving, SftConfig
from oreal_jax.optimizer import Optimizer

config = SftConfig(
    model="runs/demo/start",
    examples="runs/pass/solutions.jsonl",
    epochs=2,
    examples_per_step=8,
    policy=Optimizer(learning_rate=1e-5, final_learning_rate=5e-6, warmup_steps=1),
    packing=Packing(rows=2, row_length=256),
    saving=Saving(every=100),
)

"""SFT of the tiny model of configs/tiny.py on the form of an answer only.

oreal sft configs/tiny_sft.py
"""

from oreal_jax.config import Packing, Saving, SftConfig
from oreal_jax.optimizer import Optimizer

config = SftConfig(
    model="runs/tiny_start/hf",
    examples="runs/tiny_start/solutions.jsonl",
    steps=60,
    examples_per_step=32,
    policy=Optimizer(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=5),
    packing=Packing(rows=8, row_length=128),
    saving=Saving(every=60),
)

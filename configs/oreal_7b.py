"""OREAL-7B as published: Qwen2.5-7B after RFT, with token rewards, 90 steps.

    oreal train configs/oreal_7b.py --set model=DIR

The settings of InternLM/OREAL 2859cc0 (`oreal_w_tokenrm_OREAL-7B-SFT_seqlen16k`):
64 prompts x 16 samples per step, 10 steps for the token reward model alone, then 80 for
both. System prompt and chat template come with the checkpoint's tokenizer.
Published: MATH-500 86.4 -> 91.0 in about 9 hours on 32 A100. Not yet run by us.
"""

from oreal_jax.config import Packing, Saving, TrainConfig
from oreal_jax.losses import Oreal
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Sampling

config = TrainConfig(
    model="internlm/OREAL-7B-SFT",  # a local copy of it
    prompts="internlm/OREAL-RL-Prompts",
    stop_words=("<|im_end|>",),
    steps=90,
    prompts_per_step=64,
    samples_per_prompt=16,
    sampling=Sampling(max_tokens=14_000, temperature=1.0, top_p=0.9),
    max_prompt_tokens=2_384,
    # Four chips form an engine whose cache holds about 40 rows of 6,000 tokens.
    decode_rows=1024,
    decode_tensor=4,
    cache_tokens=262_144,
    loss=Oreal(positive_weight=1.0, negative_weight=0.5, kl_weight=0.01),
    policy=Optimizer(learning_rate=5e-7, final_learning_rate=1e-7, warmup_steps=10),
    token_reward=Optimizer(
        learning_rate=2e-6, final_learning_rate=4e-7, warmup_steps=10
    ),
    freeze_steps=10,
    packing=Packing(rows=1, row_length=16_384),
    saving=Saving(every=10, keep=2),
)

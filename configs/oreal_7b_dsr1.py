"""OREAL-7B from DeepSeek-R1-Distill-Qwen-7B: another initial policy and stop token.

    oreal train configs/oreal_7b_dsr1.py --set model=DIR

Published: MATH-500 92.8 -> 94.0. Not yet run by us.
"""

import dataclasses

import oreal_7b

config = dataclasses.replace(
    oreal_7b.config,
    model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",  # a local copy of it
    stop_words=("<｜end▁of▁sentence｜>",),
)

"""OREAL-32B as published: the 7B recipe on more devices.

    oreal train configs/oreal_32b.py --set model=DIR

The release changes only the model and its tensor parallelism (8). Here weights are
gathered layer by layer instead (FSDP), overlapped with the products of 16k tokens per
chip. Published: MATH-500 95.0, on 128 GPUs. Not yet run by us; by `oreal plan`, it
fits 64 chips of v5p (BENCHMARKS.md).
"""

import dataclasses

import oreal_7b

config = dataclasses.replace(
    oreal_7b.config,
    model="internlm/OREAL-32B-SFT",  # a local copy of it
)

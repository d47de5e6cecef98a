"""OREAL-32B as published: the 7B recipe on more devices.

    oreal train configs/oreal_32b.py --set model=DIR

The release changes the model and its tensor parallelism (8) and nothing else; here
weights are gathered layer by layer instead (FSDP), which 16k tokens a chip hide.
Published: MATH-500 95.0, on 128 GPUs. Not yet run by us; `oreal plan` says that it fits
64 chips of v5p (docs/pods.md).
"""

import dataclasses

import oreal_7b

config = dataclasses.replace(
    oreal_7b.config,
    model="internlm/OREAL-32B-SFT",  # a local copy of it
)

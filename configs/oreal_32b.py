"""OREAL-32B as published: the 7B recipe on more devices.

    oreal train configs/oreal_32b.py --set model=DIR

The release changes the model and its tensor parallelism (8) and nothing else.
Published: MATH-500 95.0, on 128 GPUs. Not yet run by us.
"""

import dataclasses

import oreal_7b

from oreal_jax.sharding import MeshShape

config = dataclasses.replace(
    oreal_7b.config,
    model="internlm/OREAL-32B-SFT",  # a local copy of it
    mesh=MeshShape(fsdp=-1, tensor=8),
)

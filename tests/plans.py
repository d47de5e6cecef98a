"""A small run and its model for tests of plans."""

import dataclasses
import json
from pathlib import Path

import oreal_7b

from oreal_jax import efficiency
from oreal_jax.checkpoints.families import to_hugging_face


def config(**changes):
    """Return a small run of a model that TPU kernels take."""
    recipe = oreal_7b.config
    return dataclasses.replace(
        recipe,
        prompts_per_step=4,
        samples_per_prompt=4,
        decode_rows=16,
        decode_tensor=1,
        cache_tokens=0,
        max_prompt_tokens=128,
        sampling=dataclasses.replace(recipe.sampling, max_tokens=128),
        packing=dataclasses.replace(recipe.packing, row_length=256),
        **changes,
    )


SHAPE = efficiency.ModelConfig(
    vocab=512, embed=256, layers=2, heads=2, kv_heads=2, head_dim=128, mlp=512
)


PAIRS = [(128, 128)] * 8  # (prompt, completion) tokens that a step of `config` selects


CONFIG_FILE = """
import dataclasses
import plans
config = dataclasses.replace(plans.config(), model={model!r})
"""


def write_config(directory: Path) -> Path:
    """Write the config.json of the model and the config file of a run of it."""
    (directory / "config.json").write_text(json.dumps(to_hugging_face(SHAPE)))
    path = directory / "small.py"
    path.write_text(CONFIG_FILE.format(model=str(directory)))
    return path

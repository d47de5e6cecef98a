"""OREAL-7B without its token reward model, as released (`oreal_wo_tokenrm_...`).

    oreal train configs/oreal_7b_without_token_rewards.py --set model=DIR

Every token has weight 1, all 16 samples of a prompt are selected, no steps are frozen.
Not yet run by us.
"""

import dataclasses

import oreal_7b

from oreal_jax.losses import Oreal, unweighted
from oreal_jax.trajectory import select_all

config = dataclasses.replace(
    oreal_7b.config,
    loss=Oreal(weight_correct=unweighted, weight_incorrect=unweighted),
    keep=select_all,
    token_reward=None,
    freeze_steps=0,
)

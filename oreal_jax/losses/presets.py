"""Losses by name: the two readings of OREAL, its ablation, its relatives.

What a name means stands in the docstring of its class; here are only settings. This is
no registry: a config file may hold any loss. `oreal losses` offers these by name.
"""

from oreal_jax.losses.advantages import rloo
from oreal_jax.losses.baselines import (
    BestOfNCloning,
    Dapo,
    DrGrpo,
    Grpo,
    Reinforce,
    XtunerOreal,
)
from oreal_jax.losses.oreal import Oreal, OrealPaper
from oreal_jax.losses.scored import PolicyLoss
from oreal_jax.losses.weights import unweighted

NAMED: dict[str, PolicyLoss] = {
    "released": Oreal(),
    "paper": OrealPaper(),
    # The release without its token reward model (`oreal_wo_tokenrm`).
    "without_token_rewards": Oreal(
        weight_correct=unweighted, weight_incorrect=unweighted
    ),
    # The ladder of the paper's table 2. Its second row has, by the authors' word in
    # review, GRPO's advantage on all samples; RLOO is its unnormalised form. Cloning is
    # the paper's, without the release's factor A: with it, this rung would differ from
    # the one below by its denominators alone.
    "reinforce": Reinforce(),
    "reward_shaping": Reinforce(advantage=rloo),
    "behaviour_cloning": Oreal(
        clone_times_advantage=False,
        weight_correct=unweighted,
        weight_incorrect=unweighted,
    ),
    "token_weights": Oreal(clone_times_advantage=False),
    # Relatives. Completions of the published runs end at 14,000 tokens.
    "best_of_n": BestOfNCloning(),
    "grpo": Grpo(),
    "dr_grpo": DrGrpo(longest=14_000),
    "dapo": Dapo(),
    "xtuner": XtunerOreal(),
}

# The rungs of the ladder, each with one thing more than the one before.
LADDER = ("reinforce", "reward_shaping", "behaviour_cloning", "token_weights")

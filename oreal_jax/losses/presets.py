"""Losses by name: OREAL as released and as printed, its ablation, its relatives.

Only settings; the classes document the losses. `oreal losses` offers these names, but
they are no registry: a config file may hold any loss.
"""

from oreal_jax.losses import baselines
from oreal_jax.losses.advantages import rloo
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
    # The ablation of the paper's table 2. According to the authors' review replies, its
    # second row has GRPO's advantage on all samples; RLOO is its unnormalised form.
    # Cloning is the paper's, without the release's factor A: with it, this rung would
    # differ from the previous one only in its denominators.
    "reinforce": baselines.Reinforce(),
    "reward_shaping": baselines.Reinforce(advantage=rloo),
    "behaviour_cloning": Oreal(
        clone_times_advantage=False,
        weight_correct=unweighted,
        weight_incorrect=unweighted,
    ),
    "token_weights": Oreal(clone_times_advantage=False),
    # Relatives. Completions of the published runs have at most 14,000 tokens.
    "best_of_n": baselines.BestOfNCloning(),
    "grpo": baselines.Grpo(),
    "dr_grpo": baselines.DrGrpo(longest=14_000),
    "dapo": baselines.Dapo(),
    "xtuner": baselines.XtunerOreal(),
}

# The rungs of the ablation, each with one component more than the previous one.
LADDER = ("reinforce", "reward_shaping", "behaviour_cloning", "token_weights")

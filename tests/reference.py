"""Every loss restated as slow loops over completions and their tokens.

Written in float64 from the formulas of the method alone: it imports nothing of
`oreal_jax`, whose losses are tested against it. Each term of a token is a pair, its
value and its derivative with respect to log pi, the token's log-probability; a loss
adds up both, and so returns its own gradient. `NAMED` has the settings as published.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

MAX_EXPONENT = 20.0
Term = tuple[float, float]
Advantage = Callable[[np.ndarray], np.ndarray]
Credit = Callable[[list[float]], list[float]]
Weighting = Callable[[list[float]], list[float]]
Kl = Callable[[float, float], Term]


class Batch(NamedTuple):
    """B completions of at most T tokens: arrays [B, T], and rewards [N, K], B = N K.

    Row n K + k is sample k of prompt n; `completion` is True at its tokens.
    """

    log_probs: np.ndarray
    old_log_probs: np.ndarray
    reference_log_probs: np.ndarray
    token_scores: np.ndarray
    entropy: np.ndarray
    completion: np.ndarray
    rewards: np.ndarray

    def rows(self) -> Iterator[tuple[int, bool, list[int]]]:
        """Each completion: its row, whether it is correct, its tokens' columns."""
        for b in range(self.completion.shape[0]):
            tokens = []
            for t in range(self.completion.shape[1]):
                if self.completion[b, t]:
                    tokens.append(t)
            yield b, bool(self.rewards.reshape(-1)[b] > 0), tokens

    def scores(self, b: int, tokens: list[int]) -> list[float]:
        """Return the token scores of a completion."""
        return [float(self.token_scores[b, t]) for t in tokens]


class Result(NamedTuple):
    """A loss, its metrics and its gradient [B, T].

    The gradient is with respect to log-probabilities, for `token_reward` to scores.
    """

    value: float
    metrics: dict[str, float]
    gradient: np.ndarray


def count_tokens(batch: Batch, kind: str) -> int:
    """Tokens of correct, incorrect or all completions; 1 where there are none."""
    total = 0
    for _, correct, tokens in batch.rows():
        if kind == "all" or correct == (kind == "correct"):
            total += len(tokens)
    return max(1, total)


def count_completions(batch: Batch) -> int:
    """Completions that have tokens; 1 where there are none."""
    total = 0
    for _, _, tokens in batch.rows():
        if tokens:
            total += 1
    return max(1, total)


# Advantages: from rewards [N, K] to advantages [N, K].


def each_sample(rewards: np.ndarray, function: Callable[[list[float], int], float]):
    """`function(rewards of a prompt, k)` for every sample k of every prompt."""
    result = np.zeros(rewards.shape)
    for n in range(rewards.shape[0]):
        group = [float(reward) for reward in rewards[n]]
        for k in range(len(group)):
            result[n, k] = function(group, k)
    return result


def mean(values: list[float]) -> float:
    """sum / number."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def outcome(rewards: np.ndarray) -> np.ndarray:
    """R_k."""
    return each_sample(rewards, lambda group, k: group[k])


def reshaped(rewards: np.ndarray) -> np.ndarray:
    """R_k where correct, (1 - p) R_k where incorrect; p = correct samples / K."""

    def advantage(group: list[float], k: int) -> float:
        p = sum(1 for reward in group if reward > 0) / len(group)
        return group[k] if group[k] > 0 else (1 - p) * group[k]

    return each_sample(rewards, advantage)


def rloo(rewards: np.ndarray) -> np.ndarray:
    """R_k - sum over the other samples of R / (K - 1)."""
    return each_sample(
        rewards, lambda group, k: group[k] - mean(group[:k] + group[k + 1 :])
    )


def group_centred(rewards: np.ndarray) -> np.ndarray:
    """R_k - mean of all R."""
    return each_sample(rewards, lambda group, k: group[k] - mean(group))


def group_normalised(rewards: np.ndarray) -> np.ndarray:
    """(R_k - mean) / (sqrt(sum (R - mean)^2 / (K - 1)) + 1e-8)."""

    def advantage(group: list[float], k: int) -> float:
        squares = sum((reward - mean(group)) ** 2 for reward in group)
        return (group[k] - mean(group)) / (math.sqrt(squares / (len(group) - 1)) + 1e-8)

    return each_sample(rewards, advantage)


def zero_one(advantage: Advantage) -> Advantage:
    """Return the same advantage of rewards 1 and 0 instead of +1 and -1."""
    return lambda rewards: advantage(np.where(rewards > 0, 1.0, 0.0))


# Terms of one token: (value, derivative with respect to log pi).


def exponential(x: float) -> Term:
    """exp(x) up to x = 20, e^20 (1 + x - 20) above."""
    if x > MAX_EXPONENT:
        return math.exp(MAX_EXPONENT) * (1 + x - MAX_EXPONENT), math.exp(MAX_EXPONENT)
    return math.exp(x), math.exp(x)


def clone(log_prob: float) -> Term:
    """-log pi."""
    return -log_prob, -1.0


def reinforce(advantage: float) -> Term:
    """Return -A pi / stop(pi): value -A, derivative -A."""
    return -advantage, -advantage


def clipped_surrogate(
    log_prob: float,
    old: float,
    advantage: float,
    low: float,
    high: float,
    dual: float = math.inf,
) -> Term:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old.

    Where A < 0, at most dual |A|. The derivative is 0 where a bound holds.
    """
    r, slope = exponential(log_prob - old)
    free = -r * advantage
    bounded = -min(max(r, 1 - low), 1 + high) * advantage
    if advantage < 0 and max(free, bounded) > dual * abs(advantage):
        return dual * abs(advantage), 0.0
    if bounded > free:
        return bounded, 0.0
    return free, -slope * advantage


def truncated_importance(log_prob: float, old: float, cap: float | None) -> float:
    """min(pi / pi_old, cap), a constant; 1 without a cap."""
    if cap is None:
        return 1.0
    return min(exponential(log_prob - old)[0], cap)


def kl_k1(log_prob: float, other: float) -> Term:
    """log pi - log other."""
    return log_prob - other, 1.0


def kl_k2(log_prob: float, other: float) -> Term:
    """(log other - log pi)^2 / 2."""
    return (other - log_prob) ** 2 / 2, log_prob - other


def kl_k3(log_prob: float, other: float) -> Term:
    """exp(d) - d - 1, d = log other - log pi; derivative 1 - exp(d)."""
    d = other - log_prob
    if d > MAX_EXPONENT:
        return exponential(d)[0] - d - 1, 1 - exponential(d)[1]
    return math.expm1(d) - d, -math.expm1(d)


# Token weights: credits and weightings of one completion's tokens.


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def running_credit(scores: list[float]) -> list[float]:
    """q_t = sigmoid(mean of w_1 .. w_t)."""
    return [sigmoid(mean(scores[: t + 1])) for t in range(len(scores))]


def token_credit(scores: list[float]) -> list[float]:
    """q_t = sigmoid(w_t)."""
    return [sigmoid(score) for score in scores]


def threshold_weights(threshold: float) -> Weighting:
    """clip((q - c) / (1 - c), 0, 1)."""
    return lambda credits: [
        min(max((q - threshold) / (1 - threshold), 0.0), 1.0) for q in credits
    ]


HALF = threshold_weights(0.5)


def top_k_weights(ratio: float) -> Weighting:
    """Weigh the top int(ratio n) credits by (q - low) / (high - low).

    At least one token has a weight; it is 1 where high = low, other tokens have 0.
    """

    def weigh(credits: list[float]) -> list[float]:
        keep = max(1, int(ratio * len(credits)))
        best = sorted(range(len(credits)), key=lambda t: -credits[t])
        weights = [0.0] * len(credits)
        kept = [credits[t] for t in best[:keep]]
        for t in best[:keep]:
            low, high = min(kept), max(kept)
            weights[t] = (credits[t] - low) / (high - low) if high > low else 1.0
        return weights

    return weigh


def unweighted(credits: list[float]) -> list[float]:
    """1."""
    return [1.0] * len(credits)


def token_weights(
    batch: Batch, credit: Credit, weight_correct: Weighting, weight_incorrect: Weighting
) -> np.ndarray:
    """weight_correct(q) on correct completions, weight_incorrect(1 - q) on others."""
    weights = np.zeros(batch.completion.shape)
    for b, correct, tokens in batch.rows():
        q = credit(batch.scores(b, tokens))
        weighed = weight_correct(q) if correct else weight_incorrect([1 - x for x in q])
        for t, weight in zip(tokens, weighed, strict=True):
            weights[b, t] = weight
    return weights


def weight_metrics(batch: Batch, weights: np.ndarray) -> dict[str, float]:
    """Mean weight of correct and incorrect tokens; share of tokens with weight 0."""
    sums = {"correct": 0.0, "incorrect": 0.0, "none": 0.0}
    for b, correct, tokens in batch.rows():
        for t in tokens:
            sums["correct" if correct else "incorrect"] += weights[b, t]
            sums["none"] += weights[b, t] == 0
    return {
        "oreal/omega_correct/mean": sums["correct"] / count_tokens(batch, "correct"),
        "oreal/omega_incorrect/mean": sums["incorrect"]
        / count_tokens(batch, "incorrect"),
        "oreal/omega_zero_share": sums["none"] / count_tokens(batch, "all"),
    }


# Aggregation: the factor of each token of a completion of n tokens.

Share = Callable[[Batch, int], float]


def token_mean(batch: Batch, n: int) -> float:
    """1 / all tokens."""
    return 1 / count_tokens(batch, "all")


def sequence_sum(batch: Batch, n: int) -> float:
    """1 / completions."""
    return 1 / count_completions(batch)


def sequence_mean(batch: Batch, n: int) -> float:
    """1 / (n * completions)."""
    return 1 / (n * count_completions(batch))


def fixed_length(length: int) -> Share:
    """1 / (length * completions)."""
    return lambda batch, n: 1 / (length * count_completions(batch))


# Losses.


def oreal(
    batch: Batch,
    *,
    advantage: Advantage = rloo,
    positive_weight: float = 1.0,
    negative_weight: float = 0.5,
    kl_weight: float = 0.01,
    clone_times_advantage: bool = True,
    credit: Credit = running_credit,
    weight_correct: Weighting = HALF,
    weight_incorrect: Weighting = HALF,
    kl: Kl = kl_k3,
    importance_cap: float | None = None,
) -> Result:
    """positive_weight P + negative_weight N + kl_weight KL, as released:

    P  = sum over correct tokens of  w (-log pi) A  / correct tokens
    N  = sum over incorrect tokens of  w (-A) pi/stop(pi)  / incorrect tokens
    KL = sum over all tokens of  kl(log pi, log reference) / all tokens

    Each token of P and N is multiplied by min(pi / pi_old, importance_cap).
    """
    A = advantage(batch.rewards).reshape(-1)
    weights = token_weights(batch, credit, weight_correct, weight_incorrect)
    gradient = np.zeros(batch.completion.shape)
    positive = negative = penalty = 0.0
    for b, correct, tokens in batch.rows():
        for t in tokens:
            log_prob = batch.log_probs[b, t]
            importance = truncated_importance(
                log_prob, batch.old_log_probs[b, t], importance_cap
            )
            if correct:
                value, slope = clone(log_prob)
                scale = weights[b, t] * importance / count_tokens(batch, "correct")
                if clone_times_advantage:
                    scale *= A[b]
                positive += scale * value
                gradient[b, t] += positive_weight * scale * slope
            else:
                value, slope = reinforce(A[b])
                scale = weights[b, t] * importance / count_tokens(batch, "incorrect")
                negative += scale * value
                gradient[b, t] += negative_weight * scale * slope
            value, slope = kl(log_prob, batch.reference_log_probs[b, t])
            scale = 1 / count_tokens(batch, "all")
            penalty += scale * value
            gradient[b, t] += kl_weight * scale * slope
    policy = positive_weight * positive + negative_weight * negative
    metrics = {
        "actor/pg_loss": policy,
        "actor/positive_loss": positive,
        "actor/negative_loss": negative,
        "actor/kl_loss": penalty,
    }
    metrics |= weight_metrics(batch, weights)
    return Result(policy + kl_weight * penalty, metrics, gradient)


def oreal_paper(
    batch: Batch,
    *,
    advantage: Advantage = reshaped,
    eta: float = 0.5,
    beta: float = 0.01,
    kl: Kl = kl_k3,
) -> Result:
    """Mean over completions of their sums over tokens (equations 10 and 11) of

    w (-log pi) where correct, eta w F log(pi / pi_old) where incorrect, and
    beta kl(pi, pi_old); w = max(2 q - 1, 0) or max(1 - 2 q, 0), q = sigmoid(w_t),
    F = 1 - p = -A.
    """
    A = advantage(batch.rewards).reshape(-1)
    weights = token_weights(batch, token_credit, HALF, HALF)
    gradient = np.zeros(batch.completion.shape)
    positive = negative = penalty = 0.0
    for b, correct, tokens in batch.rows():
        for t in tokens:
            log_prob, old = batch.log_probs[b, t], batch.old_log_probs[b, t]
            q = sigmoid(batch.token_scores[b, t])
            if correct:
                scale = max(2 * q - 1, 0) / count_completions(batch)
                positive += scale * -log_prob
                gradient[b, t] -= scale
            else:
                scale = max(1 - 2 * q, 0) * -A[b] / count_completions(batch)
                negative += scale * (log_prob - old)
                gradient[b, t] += eta * scale
            value, slope = kl(log_prob, old)
            penalty += value / count_completions(batch)
            gradient[b, t] += beta * slope / count_completions(batch)
    policy = positive + eta * negative
    metrics = {
        "actor/pg_loss": policy,
        "actor/positive_loss": positive,
        "actor/negative_loss": negative,
        "actor/kl_loss": penalty,
    }
    metrics |= weight_metrics(batch, weights)
    return Result(policy + beta * penalty, metrics, gradient)


def best_of_n_cloning(batch: Batch, *, advantage: Advantage = outcome) -> Result:
    """Sum over correct tokens of A (-log pi) / correct tokens."""
    A = advantage(batch.rewards).reshape(-1)
    gradient = np.zeros(batch.completion.shape)
    total = 0.0
    for b, correct, tokens in batch.rows():
        if correct:
            for t in tokens:
                value, slope = clone(batch.log_probs[b, t])
                scale = A[b] / count_tokens(batch, "correct")
                total += scale * value
                gradient[b, t] += scale * slope
    return Result(total, {"actor/pg_loss": total}, gradient)


def plain_reinforce(
    batch: Batch,
    *,
    advantage: Advantage = outcome,
    kl_weight: float = 0.01,
    entropy_weight: float = 0.0,
    importance_cap: float | None = None,
) -> Result:
    """Average the clipped policy loss over tokens.

    -A pi/stop(pi) min(pi / pi_old, importance_cap) + kl_weight k3(log pi, log
    reference) - entropy_weight entropy.
    """
    A = advantage(batch.rewards).reshape(-1)
    gradient = np.zeros(batch.completion.shape)
    policy = penalty = entropy = 0.0
    for b, _, tokens in batch.rows():
        for t in tokens:
            log_prob = batch.log_probs[b, t]
            importance = truncated_importance(
                log_prob, batch.old_log_probs[b, t], importance_cap
            )
            value, slope = reinforce(A[b])
            policy += importance * value * token_mean(batch, len(tokens))
            gradient[b, t] += importance * slope * token_mean(batch, len(tokens))
            value, slope = kl_k3(log_prob, batch.reference_log_probs[b, t])
            penalty += value * token_mean(batch, len(tokens))
            gradient[b, t] += kl_weight * slope * token_mean(batch, len(tokens))
            entropy += batch.entropy[b, t] * token_mean(batch, len(tokens))
    value = policy + kl_weight * penalty - entropy_weight * entropy
    metrics = {"actor/pg_loss": policy, "actor/kl_loss": penalty}
    return Result(value, metrics, gradient)


def grpo(
    batch: Batch,
    *,
    advantage: Advantage = group_normalised,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.04,
    share: Share = sequence_mean,
) -> Result:
    """Aggregate of the clipped surrogate + kl_weight k3(log pi, log reference)."""
    A = advantage(batch.rewards).reshape(-1)
    gradient = np.zeros(batch.completion.shape)
    policy = penalty = 0.0
    for b, _, tokens in batch.rows():
        for t in tokens:
            log_prob = batch.log_probs[b, t]
            scale = share(batch, len(tokens))
            value, slope = clipped_surrogate(
                log_prob, batch.old_log_probs[b, t], A[b], clip_low, clip_high
            )
            policy += scale * value
            gradient[b, t] += scale * slope
            value, slope = kl_k3(log_prob, batch.reference_log_probs[b, t])
            penalty += scale * value
            gradient[b, t] += kl_weight * scale * slope
    metrics = {"actor/pg_loss": policy, "actor/kl_loss": penalty}
    return Result(policy + kl_weight * penalty, metrics, gradient)


def dr_grpo(
    batch: Batch,
    *,
    longest: int,
    advantage: Advantage = group_centred,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Result:
    """Sum of the clipped surrogate / (longest * completions)."""
    return grpo(
        batch,
        advantage=advantage,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_weight=0.0,
        share=fixed_length(longest),
    )


def dapo(
    batch: Batch,
    *,
    advantage: Advantage = group_normalised,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Result:
    """Sum of the clipped surrogate / all tokens."""
    return grpo(
        batch,
        advantage=advantage,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_weight=0.0,
        share=token_mean,
    )


def xtuner_oreal(
    batch: Batch,
    *,
    advantage: Advantage = rloo,
    positive_weight: float = 1.0,
    clone_weight: float = 1.0,
    negative_weight: float = 1.0,
    kl_weight: float = 0.001,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float = 3.0,
) -> Result:
    """positive_weight (clone_weight C + S+) + negative_weight S- + kl_weight KL:

    C  = sum over correct tokens of -log pi / correct tokens
    S+ = sum over correct tokens of the clipped surrogate / correct tokens, S- of
    incorrect ones
    KL = sum over all tokens of k3(log pi, log reference) / all tokens
    """
    A = advantage(batch.rewards).reshape(-1)
    gradient = np.zeros(batch.completion.shape)
    positive = negative = penalty = 0.0
    for b, correct, tokens in batch.rows():
        for t in tokens:
            log_prob = batch.log_probs[b, t]
            gain, pull = clipped_surrogate(
                log_prob, batch.old_log_probs[b, t], A[b], clip_low, clip_high, dual
            )
            if correct:
                value, slope = clone(log_prob)
                scale = 1 / count_tokens(batch, "correct")
                positive += scale * (clone_weight * value + gain)
                gradient[b, t] += (
                    positive_weight * scale * (clone_weight * slope + pull)
                )
            else:
                scale = 1 / count_tokens(batch, "incorrect")
                negative += scale * gain
                gradient[b, t] += negative_weight * scale * pull
            value, slope = kl_k3(log_prob, batch.reference_log_probs[b, t])
            penalty += value / count_tokens(batch, "all")
            gradient[b, t] += kl_weight * slope / count_tokens(batch, "all")
    policy = positive_weight * positive + negative_weight * negative
    metrics = {
        "actor/pg_loss": policy,
        "actor/positive_loss": positive,
        "actor/negative_loss": negative,
        "actor/kl_loss": penalty,
    }
    return Result(policy + kl_weight * penalty, metrics, gradient)


def token_reward(batch: Batch) -> Result:
    """Sum BCE(sigmoid(mean w), correct) over completions / their number.

    Equation 12. Its derivative with respect to a token's score is (sigmoid(mean w) - 1
    or 0) / n / completions, for a completion of n tokens.
    """
    gradient = np.zeros(batch.completion.shape)
    loss = hits = 0.0
    for b, correct, tokens in batch.rows():
        if not tokens:
            continue
        logit = mean(batch.scores(b, tokens))
        # -log sigmoid(x) = log(1 + exp(-x)), and 1 - sigmoid(x) = sigmoid(-x).
        x = logit if correct else -logit
        loss += math.log1p(math.exp(-abs(x))) + max(-x, 0.0)
        hits += (logit > 0) == correct
        for t in tokens:
            slope = -sigmoid(-x) if correct else sigmoid(-x)
            gradient[b, t] = slope / len(tokens) / count_completions(batch)
    value, accuracy = loss / count_completions(batch), hits / count_completions(batch)
    metrics = {"token_reward/loss": value, "token_reward/accuracy": accuracy}
    return Result(value, metrics, gradient)


NAMED: dict[str, Callable[[Batch], Result]] = {
    "released": oreal,
    "paper": oreal_paper,
    "without_token_rewards": partial(
        oreal, weight_correct=unweighted, weight_incorrect=unweighted
    ),
    "reinforce": plain_reinforce,
    "reward_shaping": partial(plain_reinforce, advantage=rloo),
    "behaviour_cloning": partial(
        oreal,
        clone_times_advantage=False,
        weight_correct=unweighted,
        weight_incorrect=unweighted,
    ),
    "token_weights": partial(oreal, clone_times_advantage=False),
    "best_of_n": best_of_n_cloning,
    "grpo": grpo,
    "dr_grpo": partial(dr_grpo, longest=14_000),
    "dapo": dapo,
    "xtuner": xtuner_oreal,
}

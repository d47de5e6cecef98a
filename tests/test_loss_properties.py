"""Properties of every loss on any batch, searched for counterexamples."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oreal_jax.data.packing import Example, pack
from oreal_jax.losses import (
    Counts,
    Oreal,
    Scored,
    ThresholdWeights,
    TokenReward,
    TopKWeights,
    outcome,
    presets,
    running_credit,
    terms,
    token_credit,
    unweighted,
)
from oreal_jax.train.scoring import micro_batch, unpack

# The same examples on every run; each loss is compiled once for each shape.
thorough = settings(deadline=None, max_examples=15, derandomize=True)

# Two prompts of three samples, and the shape that all of them are padded to.
N, K, T = 2, 3, 5
B = N * K
LARGE_B, LARGE_T = 8, 16


@dataclasses.dataclass(frozen=True)
class UserLoss:
    """A loss that relies on `Scored` being 0 outside completions."""

    def advantage(self, rewards):
        return rewards

    def __call__(self, scored: Scored, counts: Counts):
        loss = -jnp.sum(scored.log_probs * scored.advantage[:, None])
        return loss / counts.all.tokens, {}


POLICY_LOSSES: dict[str, Any] = presets.NAMED | {
    "user_loss": UserLoss(),
    "top_k_capped_k1": Oreal(
        credit=token_credit,
        weight_correct=TopKWeights(ratio=0.5),
        weight_incorrect=TopKWeights(ratio=0.25),
        kl=terms.kl_k1,
        importance_cap=1.2,
    ),
}
LOSSES = POLICY_LOSSES | {"token_reward": TokenReward()}
FLOATS = (
    "log_probs",
    "full_log_probs",
    "old_log_probs",
    "reference_log_probs",
    "token_scores",
    "entropy",
)

# Combinations of the parts of other losses; tested by `make test-slow`.
VARIANTS = {"reward_shaping", "behaviour_cloning", "token_weights"}


def for_each(losses: dict[str, Any]):
    """Parametrizes a test over `losses`."""
    marks = lambda name: [pytest.mark.slow] if name in VARIANTS else []
    values = [pytest.param(loss, id=n, marks=marks(n)) for n, loss in losses.items()]
    return pytest.mark.parametrize("loss", values)


every_loss, every_policy_loss = for_each(LOSSES), for_each(POLICY_LOSSES)


class Sampled(NamedTuple):
    """Completions without advantages, which depend on the loss."""

    values: dict[str, Any]
    lengths: np.ndarray
    rewards: np.ndarray

    def scored(self, loss) -> Scored:
        """Return the arrays for a loss, not yet masked, as float64 exact in float32."""
        advantage = getattr(loss, "advantage", outcome)(self.rewards).reshape(-1)
        fields: dict[str, Any] = {
            "completion": np.arange(T)[None] < self.lengths[:, None],
            "correct": self.rewards.reshape(-1) > 0,
            "advantage": advantage.astype(np.float32).astype(np.float64),
        }
        return Scored(**self.values, **fields)


@st.composite
def batches(draw, *, mixed: bool = False) -> Sampled:
    """Draw random numbers: a seed, and a length and verdict of each completion.

    `mixed` has correct and incorrect samples of every prompt.
    """
    lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    if mixed:
        correct = [draw(st.integers(1, K - 1)) for _ in range(N)]
        orders = [draw(st.permutations([k < n for k in range(K)])) for n in correct]
        verdicts = np.array(orders)
    else:
        verdicts = np.array(draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    single = lambda x: x.astype(np.float32).astype(np.float64)
    normal = lambda spread: single(random.normal(0, spread, (B, T)))
    log_probs = -np.abs(normal(2))
    values = {
        "log_probs": log_probs,
        "full_log_probs": single(log_probs - np.abs(normal(0.6))),
        "old_log_probs": single(log_probs + normal(0.6)),
        "reference_log_probs": single(log_probs + normal(0.6)),
        "token_scores": normal(2),
        "entropy": np.abs(normal(1)),
    }
    rewards = np.where(verdicts.reshape(N, K), 1.0, -1.0)
    return Sampled(values, np.array(lengths), rewards)


class Outputs(NamedTuple):
    """A loss, its metrics, and its gradients with respect to what may be trained."""

    value: np.ndarray
    metrics: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]

    def __add__(self, other: "Outputs") -> "Outputs":  # pyright: ignore
        return jax.tree.map(np.add, self, other)


@functools.cache
def compiled(loss):
    def value(trained, scored: Scored, counts: Counts):
        return loss(scored._replace(**trained).masked(), counts)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


count = jax.jit(Counts.of)


def evaluate(loss, scored: Scored, counts: Counts | None = None) -> Outputs:
    """Evaluate a masked loss in the precision of its inputs; `counts`: of the batch."""
    with jax.enable_x64(scored.log_probs.dtype == np.float64):
        counts = counts or count(scored.completion, scored.correct)
        names = ("log_probs", "full_log_probs", "token_scores", "entropy")
        trained = {name: getattr(scored, name) for name in names}
        (total, metrics), gradient = compiled(loss)(trained, scored, counts)
        return jax.tree.map(np.asarray, Outputs(total, metrics, gradient))


def close(ours, theirs):
    """Equal up to the order of float64 sums."""
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    jax.tree.map(compare, ours, theirs)


def enlarged(scored: Scored, places, garbage: float) -> Scored:
    """Put completions into the rows `places` of larger arrays full of garbage."""

    def widen(x) -> Any:
        shape = (LARGE_B, LARGE_T)[: x.ndim]
        large = np.full(shape, False if x.dtype == bool else garbage, x.dtype)
        if x.ndim == 1:
            large[places] = x
        else:
            large[np.ix_(places, np.arange(T))] = x
        return large

    return poisoned(Scored(*map(widen, scored)), garbage)


def poisoned(scored: Scored, garbage: float) -> Scored:
    """Garbage outside completions, also as the advantage of empty rows."""
    inside, present = scored.completion, scored.completion.any(axis=-1)
    outside = lambda x: np.where(inside, x, garbage)
    dirty: dict[str, Any] = {name: outside(getattr(scored, name)) for name in FLOATS}
    dirty["advantage"] = np.where(present, scored.advantage, garbage)
    return scored._replace(**dirty)


garbages = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.0])


@every_loss
@thorough
@given(batches(), garbages)
def test_values_outside_completions_change_nothing(loss, sampled, garbage):
    scored = sampled.scored(loss)
    clean, dirty = evaluate(loss, scored), evaluate(loss, poisoned(scored, garbage))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    for gradient in dirty.gradient.values():
        assert not np.any(gradient[~scored.completion])


@every_loss
@thorough
@given(batches(), garbages, st.permutations(range(LARGE_B)))
def test_padding_and_order_change_nothing(loss, sampled, garbage, order):
    scored, places = sampled.scored(loss), np.array(order[:B])
    plain = evaluate(loss, scored)
    padded = evaluate(loss, enlarged(scored, places, garbage))
    back = {name: x[places, :T] for name, x in padded.gradient.items()}
    close(padded._replace(gradient=back), plain)
    for gradient in padded.gradient.values():
        assert np.count_nonzero(gradient) == np.count_nonzero(gradient[places, :T])


@every_loss
@thorough
@given(batches(), st.lists(st.integers(0, 2), min_size=B, max_size=B))
def test_micro_batches_add_up_to_their_batch(loss, sampled, assignment):
    scored = sampled.scored(loss)
    counts = count(scored.completion, scored.correct)
    parts = []
    for part in range(3):
        chosen = np.flatnonzero(np.array(assignment) == part)
        places = np.arange(len(chosen))
        some = Scored(*(x[chosen] for x in scored))
        outputs = evaluate(loss, enlarged(some, places, 0.0), counts)
        gradient = {}
        for name, values in outputs.gradient.items():
            gradient[name] = np.zeros((B, T))
            gradient[name][chosen] = values[places, :T]
        parts.append(outputs._replace(gradient=gradient))
    close(parts[0] + parts[1] + parts[2], evaluate(loss, scored))


@every_loss
@settings(thorough, max_examples=10)
@given(
    batches(),
    st.lists(st.integers(1, 3), min_size=B, max_size=B),
    st.integers(1, 2),
    st.sampled_from([8, 16, 32]),
)
def test_packing_changes_nothing(loss, sampled, prompts, height, row_length):
    scored, lengths = sampled.scored(loss), sampled.lengths
    examples = [
        Example(
            prompt=[1] * prompts[b],
            completion=[2] * lengths[b],
            correct=bool(scored.correct[b]),
            advantage=float(scored.advantage[b]),
            old_log_probs=np.asarray(scored.old_log_probs[b, : lengths[b]]),
        )
        for b in range(B)
    ]
    packed, slots = pack(examples, rows=height, row_length=row_length)
    plain, counts = evaluate(loss, scored), count(packed.completion(), packed.correct)
    parts = []
    for index in range(len(packed.row)):

        def spread(values, fill, index=index):
            """Move the tokens of completions to the columns that predict them."""
            columns = np.full(packed.predicts[index].shape, fill)
            for b, slot in enumerate(slots):
                if slot.micro_batch == index:
                    first = packed.first[index, slot.completion]
                    there = slice(first, first + lengths[b])
                    columns[packed.row[index, slot.completion], there] = values[b][
                        : lengths[b]
                    ]
            return columns

        part, pulled = packed_outputs(loss, scored, packed, index, counts, spread)
        parts.append(part)
        for name, gradient in pulled.items():
            close(gradient, spread(plain.gradient[name], 0.0))
    close(sum(part.value for part in parts), plain.value)
    for name, metric in plain.metrics.items():
        close(sum(part.metrics[name] for part in parts), metric)


def packed_outputs(loss, scored, packed, index, counts, spread):
    """Return outputs of a micro-batch as in the training step, gradients by column."""
    with jax.enable_x64(True):
        part = micro_batch(packed, index)
        columns = {name: spread(getattr(scored, name), np.nan) for name in FLOATS}
        read, pull = jax.vjp(
            lambda columns: {name: unpack(x, part) for name, x in columns.items()},
            jax.tree.map(jnp.asarray, columns),
        )
        read["old_log_probs"] = part.old_log_probs.astype(jnp.float64)
        inside = packed.completion()[index]
        advantage = part.advantage.astype(jnp.float64)
        outputs = evaluate(
            loss,
            Scored(
                **read, completion=inside, correct=part.correct, advantage=advantage
            ),
            counts,
        )
        gradient = {name: jnp.zeros_like(x) for name, x in read.items()}
        (pulled,) = pull(gradient | outputs.gradient)
    return outputs, {name: pulled[name] for name in outputs.gradient}


@every_policy_loss
@thorough
@given(batches())
def test_a_policy_loss_never_trains_the_token_reward_model(loss, sampled):
    assert not np.any(evaluate(loss, sampled.scored(loss)).gradient["token_scores"])


@every_policy_loss
@thorough
@given(batches())
def test_the_reference_is_compared_with_the_full_distribution(loss, sampled):
    """Whatever distribution the tokens were sampled from, KL and gradient are 0."""
    scored = sampled.scored(loss)
    metrics = evaluate(loss, scored).metrics
    same = scored._replace(reference_log_probs=scored.full_log_probs)
    outputs = evaluate(loss, same)
    if loss_has_reference(loss, scored):
        assert np.any(metrics["actor/kl_loss"]) == np.any(scored.completion)
        assert outputs.metrics["actor/kl_loss"] == 0
    if getattr(loss, "kl", terms.kl_k3) is not terms.kl_k1:
        assert not np.any(outputs.gradient["full_log_probs"])


def loss_has_reference(loss, scored: Scored) -> bool:
    """Whether any of its metrics depend on the reference model."""
    other = scored._replace(reference_log_probs=scored.reference_log_probs - 1)
    one, two = (evaluate(loss, x).metrics for x in (scored, other))
    return any(one[name] != two[name] for name in one)


@thorough
@given(batches())
def test_the_token_reward_loss_never_trains_the_policy(sampled):
    gradient = evaluate(TokenReward(), sampled.scored(TokenReward())).gradient
    assert not np.any(gradient["log_probs"]) and not np.any(gradient["entropy"])


@every_policy_loss
@thorough
@given(batches(mixed=True))
def test_on_policy_correct_tokens_are_never_lowered_and_others_never_raised(
    loss, sampled
):
    off = {"kl_weight", "beta", "entropy_weight"}
    names = {field.name for field in dataclasses.fields(loss)} & off
    loss = dataclasses.replace(loss, **dict.fromkeys(names, 0.0))
    scored = sampled.scored(loss)
    scored = scored._replace(old_log_probs=scored.log_probs)
    gradient = evaluate(loss, scored).gradient["log_probs"]
    correct = scored.completion & scored.correct[:, None]
    assert np.all(gradient[correct] <= 0)
    assert np.all(gradient[scored.completion & ~correct] >= 0)


some_log_probs = st.lists(st.floats(-1e4, 0, width=32), min_size=4, max_size=4).map(
    lambda values: jnp.asarray([values])
)


close_pairs = st.builds(
    lambda log_probs, distance: (log_probs, log_probs * (1 + distance)),
    some_log_probs,
    st.floats(-(2**-10), 2**-10, width=32),
)


@settings(thorough, max_examples=400)
@given(st.tuples(some_log_probs, some_log_probs) | close_pairs)
def test_k3_is_never_negative(pair):
    assert jnp.all(terms.kl_k3(*pair) >= 0)


@thorough
@given(some_log_probs)
def test_k3_and_its_gradient_are_zero_on_policy(log_probs):
    total = lambda x: jnp.sum(terms.kl_k3(x, log_probs))
    value, gradient = jax.value_and_grad(total)(log_probs)
    assert value == 0 and not jnp.any(gradient)


# Extreme log-probabilities and scores. Sigmoids of the scores around -87 are the
# smallest normal numbers of float32, and their differences are less than that.
LOG_PROBS = [-1e4, -1e3, -88.0, -21.0, -1.0, -1e-6, 0.0]
SCORES = [-1e4, -89.0, -87.3, -87.2, -87.1, -87.0, 0.0, 17.0, 1e4]

cells = st.tuples(st.integers(0, B - 1), st.integers(0, T - 1))
extremes = st.fixed_dictionaries(
    {
        name: st.dictionaries(
            cells,
            st.sampled_from(SCORES if name == "token_scores" else LOG_PROBS),
            max_size=8,
        )
        for name in FLOATS[:5]
    }
)


def with_extremes(scored: Scored, extreme, dtype) -> Scored:
    changed: dict[str, Any] = {"advantage": scored.advantage.astype(dtype)}
    for name in FLOATS:
        values = np.array(getattr(scored, name))
        for cell, value in extreme.get(name, {}).items():
            values[cell] = value
        changed[name] = values.astype(dtype)
    return scored._replace(**changed)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_loss
@thorough
@given(batches(), extremes)
def test_extreme_numbers_give_neither_infinity_nor_nan(loss, dtype, sampled, extreme):
    outputs = evaluate(loss, with_extremes(sampled.scored(loss), extreme, dtype))
    for x in jax.tree.leaves(outputs):
        assert np.all(np.isfinite(x.astype(np.float32)))


WEIGHTINGS = [ThresholdWeights(), ThresholdWeights(threshold=0.2), unweighted]
WEIGHTINGS += [TopKWeights(ratio=ratio) for ratio in (0.1, 0.5, 1.0)]


@functools.cache
def weigh(credit, weighting):
    def both(scores, where):
        q = credit(scores, where)
        return weighting(q, where), weighting(1 - q, where)

    return jax.jit(both)


@pytest.mark.parametrize(
    "weighting",
    WEIGHTINGS,
    ids=lambda weighting: getattr(weighting, "__name__", str(weighting)),
)
@pytest.mark.parametrize("credit", [running_credit, token_credit])
@settings(thorough, max_examples=30)
@given(batches(), extremes)
def test_token_weights_are_between_zero_and_one(credit, weighting, sampled, extreme):
    scored = with_extremes(sampled.scored(TokenReward()), extreme, np.float32)
    for weights in weigh(credit, weighting)(scored.token_scores, scored.completion):
        inside = np.asarray(weights)[scored.completion]
        assert np.all((inside >= 0) & (inside <= 1))


@pytest.mark.parametrize("credit", [running_credit, token_credit])
def test_top_k_weights_are_finite_where_credits_underflow(credit):
    scores = jnp.asarray([[-87.0, -87.1, -87.2, -87.3]])
    where = jnp.ones(scores.shape, bool)
    weights = TopKWeights(ratio=1.0)(credit(scores, where), where)
    assert jnp.all((weights >= 0) & (weights <= 1))

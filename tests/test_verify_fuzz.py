"""Any text at all gets a verdict in time, without side effects."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oreal_jax.verify import Pool
from oreal_jax.verify.extract import answer
from oreal_jax.verify.spelling import normalised

GOLDS = ("7654321", r"\frac{7654321}{2}", "x^7+7654321", "(7654321, 0)", "7654321 cm")
PIECES = r"""
\boxed{ } { ( ) [ ] \{ \} ^ _ ^{ _{ \frac{ \sqrt \sqrt[ \left( \right) \text{ \mathrm{
\pi \infty \cup \cap \le \ge \ne \in \pm \cdot \times \sum_ \int \lim \binom{ \log \sin
\begin{pmatrix} \end{pmatrix} \\ & \pmod{ \overline{ \circ \mathbb{R} \setminus \mid
$ $$ \( \) \[ \] % ! = < > | , ; : . ... / * ** + - -- ' " ` # #### @ ~ \ \! \,
0 1 2 7 10 99 0.5 1e9 1e999 999999 123456789012345678901234567890 x y z i e n abc and or
<think> </think> <conclude> **Final Answer** answer is cm hours mod base True None nan
__import__('os') lambda:0 open('x','w') exec(1) eval(1) ½ ² √ ∞ π ≤ 12 ∑ \x00 é 你
""".split()  # noqa: SIM905
TEXTS = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join),
)
COMPLETIONS = st.one_of(TEXTS, TEXTS.map(lambda text: f"So $\\boxed{{{text}}}$."))
BATCH = 50


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("side-effects")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Pool(2, deadline=5.0) as pool:
            yield pool
    assert not list(folder.iterdir())


def check_texts(examples: int):
    """Make a test of `examples` batches of completions."""

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        database=None,
    )
    @given(st.lists(COMPLETIONS, min_size=BATCH, max_size=BATCH, unique=True))
    def check(pool, completions):
        for completion in completions:
            answer(completion)
            normalised(completion[:1000])
        pairs = [(c, GOLDS[i % len(GOLDS)]) for i, c in enumerate(completions)]
        for pair, verdict in zip(pairs, pool.verdicts(pairs), strict=True):
            assert verdict.by == "rule", (pair, verdict)
            assert verdict.outcome in ("incorrect", "undecided"), (pair, verdict)

    return check


def test_500_texts_get_a_verdict(pool):
    check_texts(10)(pool)


@pytest.mark.slow
def test_50000_texts_get_a_verdict(pool):
    check_texts(1000)(pool)

"""Requests that join and leave an engine while others decode."""

import itertools

import numpy as np
import pytest
from tiny_engine import MIXED, make_engine, make_requests, put_weights, tokens_of

from oreal_jax.sampling import session as sessions
from oreal_jax.sampling.session import Piece, Session


@pytest.fixture
def few_steps(monkeypatch):
    """Make rounds of one step, so that requests meet in the middle."""
    monkeypatch.setattr(sessions, "ROUND_SECONDS", 0)


def make_session(params, **options) -> Session:
    engine = make_engine(**options)
    return Session(engine, put_weights(engine, params), length=128, biases=16)


def collect(session: Session, joining) -> dict[tuple[int, int], list[Piece]]:
    """Run to the end; a request joins after each round."""
    pieces: dict[tuple[int, int], list[Piece]] = {}
    joining = iter(joining)
    ended = set()
    while True:
        for request in itertools.islice(joining, 1):
            session.add(request, 3)
        if not session.is_busy:
            return pieces
        for piece in session.step():
            id = (piece.request, piece.sample)
            assert id not in ended
            ended |= {id} if piece.finish_reason else set()
            pieces.setdefault(id, []).append(piece)


SMALL_CACHE = pytest.param({"cache_tokens": 256}, marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [{}, SMALL_CACHE])
def test_requests_that_join_later_get_the_completions_of_one_call(
    params, prompts, options, few_steps
):
    """Also if some are swapped out for lack of pages."""
    requests = [
        request
        for i, (prompt, how) in enumerate(zip(prompts, MIXED, strict=True))
        for request in make_requests([prompt], keys=[i], **how)
    ]
    session = make_session(params, rows=4, **options)
    pieces = collect(session, requests)
    engine = make_engine(rows=4)
    expected = engine.sample(put_weights(engine, params), requests, 3)
    for number, group in enumerate(expected):
        for sample, completion in enumerate(group):
            parts = pieces[number, sample]
            tokens = [token for part in parts for token in part.tokens]
            assert tokens == completion.tokens
            assert parts[-1].finish_reason == completion.finish_reason
            log_probs = np.concatenate([part.log_probs for part in parts])
            np.testing.assert_allclose(log_probs, completion.log_probs, atol=1e-4)
    assert bool(session._runner.swap_outs) == ("cache_tokens" in options)


def test_removed_requests_end_and_do_not_disturb_others(params, prompts, few_steps):
    session = make_session(params, rows=4)
    first, second, third = make_requests(prompts[:3])
    kept, removed = session.add(first, 2), session.add(second, 3)
    pieces = [piece for _ in range(5) for piece in session.step()]
    assert session.running == 4
    session.remove(removed)
    assert session.running == 2
    partly = session.add(third, 2)
    pieces += session.step()
    session.remove(partly, 1)
    assert session.running == 3
    while session.is_busy:
        pieces += (new := session.step())
        assert not {(p.request, p.sample) for p in new} & {(partly, 1), (removed, 0)}
    engine = make_engine(rows=4)
    weights = put_weights(engine, params)
    expected = tokens_of(engine.sample(weights, [first, third], 2))
    text = lambda request, sample: [
        token
        for piece in pieces
        if (piece.request, piece.sample) == (request, sample)
        for token in piece.tokens
    ]
    assert [text(kept, 0), text(kept, 1)] == expected[0]
    assert text(partly, 0) == expected[1][0]
    for number in (kept, removed, partly):
        session.remove(number)
    assert not session._runner.requests and not session._reported

"""Requests that join and leave an engine while others decode."""

import itertools

import numpy as np
import pytest
from tiny_engine import MIXED, make_engine, make_requests, put_weights, tokens_of

from oreal_jax.sampling import session as sessions
from oreal_jax.sampling.session import Session


@pytest.fixture
def few_steps(monkeypatch):
    """Make rounds of one step, so that requests meet in the middle."""
    monkeypatch.setattr(sessions, "ROUND_SECONDS", 0)


def make_session(params, **options) -> Session:
    engine = make_engine(**options)
    return Session(engine, put_weights(engine, params), length=128, biases=16)


def collect(session: Session, joining=()) -> dict[tuple[int, int], list[int]]:
    """Run to the end; a request joins after each round."""
    tokens: dict[tuple[int, int], list[int]] = {}
    joining = iter(joining)
    ended = set()
    while True:
        for request in itertools.islice(joining, 1):
            session.add(request, 3)
        if not session.is_busy:
            return tokens
        for piece in session.step():
            id = (piece.request, piece.sample)
            assert id not in ended and len(piece.log_probs) == len(piece.tokens)
            ended |= {id} if piece.finish_reason else set()
            tokens.setdefault(id, []).extend(piece.tokens)


@pytest.mark.parametrize("options", [{"rows": 8}, {"rows": 8, "cache_tokens": 384}])
def test_requests_that_join_later_get_the_completions_of_one_call(
    params, prompts, options, few_steps
):
    """Also if some are swapped out for lack of pages."""
    requests = [
        request
        for i, (prompt, how) in enumerate(zip(prompts, MIXED, strict=True))
        for request in make_requests([prompt], keys=[i], **how)
    ]
    session = make_session(params, **options)
    tokens = collect(session, requests)
    engine = make_engine()
    expected = engine.sample(put_weights(engine, params), requests, 3)
    for number, group in enumerate(tokens_of(expected)):
        assert [tokens[number, sample] for sample in range(3)] == group
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
    engine = make_engine()
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


def test_log_probs_arrive_with_their_tokens(params, prompts, few_steps):
    session = make_session(params, rows=4)
    session.add(make_requests(prompts[:1])[0], 1)
    parts = []
    while session.is_busy:
        parts += [piece.log_probs for piece in session.step()]
    engine = make_engine()
    weights = put_weights(engine, params)
    ((completion,),) = engine.sample(weights, make_requests(prompts[:1]), 1)
    assert len(parts) > 2
    np.testing.assert_allclose(np.concatenate(parts), completion.log_probs, atol=1e-5)

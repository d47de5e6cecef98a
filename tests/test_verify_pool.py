"""The pool of processes: limits, failures, order, and verifiers of one's own."""

import asyncio
import functools
import threading
import time
from pathlib import Path

import pytest
from verify_judges import by_label, misbehaving, unimportable

from oreal_jax import config_loading
from oreal_jax.config import TrainConfig, Verification
from oreal_jax.errors import InputError
from oreal_jax.verify import Candidate, Pool, Verdict, by_rule
from oreal_jax.verify.completions import verify_completions
from oreal_jax.verify.llm_judge import Judge

ROOT = Path(__file__).parents[1]
DEADLINE = 5.0


@pytest.fixture(scope="module")
def pool():
    with Pool(2, DEADLINE) as pool:
        yield pool


def test_a_verifier_that_hangs_dies_or_raises_loses_only_that_answer():
    pairs = [(word, "a") for word in ("a", "hang", "b", "die", "raise", "c", "a")]
    progress = []
    with Pool(2, deadline=0.5, verifiers=(misbehaving,)) as pool:
        verdicts = pool.verdicts(pairs, progress.append)
    assert [(v.outcome, v.by) for v in verdicts] == [
        ("correct", "misbehaving"),
        ("undecided", "timeout"),
        ("incorrect", "misbehaving"),
        ("undecided", "crash"),
        ("undecided", "crash"),
        ("incorrect", "misbehaving"),
        ("correct", "misbehaving"),
    ]
    assert verdicts[1].reason == "deadline of 0.5 s passed"
    assert sum(progress) == len(pairs)


@pytest.mark.slow
@pytest.mark.timed
def test_answers_that_hang_time_out_in_parallel():
    with Pool(2, deadline=1.0, verifiers=(misbehaving,)) as pool:
        pool.verdicts([("a", "a"), ("b", "b")])  # ready
        start = time.monotonic()
        pool.verdicts([("hang", str(n)) for n in range(4)])
        # 4 x 1 s / 2 workers, and a fifth more: a worker's next child starts at once
        assert time.monotonic() - start < 2 * 1.2


def test_completions_are_verified_in_order_by_rule_then_by_the_judge():
    class AcceptingJudge(Judge):
        def __init__(self):
            pass

        def verdicts(self, candidates, by_rule):
            self.by_rule = by_rule
            return [Verdict("correct", c.question, "judge") for c in candidates]

    endings = [("a", "stop"), ("hang", "length"), ("b", "stop")]
    candidates = [Candidate("q", "a", text, ending) for text, ending in endings]
    judge, progress = AcceptingJudge(), []
    with Pool(1, verifiers=(misbehaving,)) as pool:
        by_rule = verify_completions(candidates, pool, None, progress.append)
        by_judge = verify_completions(candidates, pool, judge)
    assert [(v.outcome, v.by) for v in by_rule] == [
        ("correct", "misbehaving"),
        ("incorrect", "truncated"),  # its text is not judged
        ("incorrect", "misbehaving"),
    ]
    assert judge.by_rule == by_rule and {v.by for v in by_judge} == {"judge"}
    assert sum(progress) == 3


def test_pairs_can_be_submitted_one_by_one():
    with Pool(2, deadline=0.5, verifiers=(misbehaving,)) as pool:
        futures = [pool.submit(word, "a") for word in ("hang", "a", "die", "b")]
        assert futures[1].result().outcome == "correct"  # while another hangs
        by = [future.result().by for future in futures]
        assert by == ["timeout", "misbehaving", "crash", "misbehaving"]


def test_verdicts_can_be_awaited():
    async def submit():
        answers = [pool.submit(word, "a") for word in ("a", "b", "a")]
        return await asyncio.gather(*map(asyncio.wrap_future, answers))

    with Pool(2, verifiers=(misbehaving,)) as pool:
        verdicts = asyncio.run(submit())
    assert [v.outcome for v in verdicts] == ["correct", "incorrect", "correct"]


def test_an_answer_over_the_memory_limit_is_undecided():
    with Pool(1, verifiers=(misbehaving,), memory_bytes=2**30) as pool:
        large, following = pool.verdicts([("eat", "a"), ("a", "a")])
    assert (large.outcome, large.by) == ("undecided", "crash")
    assert following.outcome == "correct"


def test_closing_a_pool_fails_pending_verdicts():
    pool = Pool(1, deadline=60.0, verifiers=(misbehaving,))
    futures = [pool.submit("hang", "a"), pool.submit("b", "a")]
    pool.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(1)
    with pytest.raises(RuntimeError):
        pool.submit("a", "a")


ROW = {"id": "p1", "accepted": ["VII"], "question": "3 + 4?"}


def judge_in_order(verifiers, completions: list[str]) -> list[tuple[str, str]]:
    """Judge completions of one prompt; return outcomes and who decided."""
    with Pool(1, deadline=5.0, verifiers=verifiers) as pool:
        verdicts = pool.verdicts([(text, "7", ROW) for text in completions])
    return [(verdict.outcome, verdict.by) for verdict in verdicts]


def test_the_first_verifier_that_is_not_undecided_decides():
    completions = ["VII", "\\boxed{7}", "\\boxed{8}", "maybe 7"]
    before = judge_in_order((by_label, by_rule), completions)
    after = judge_in_order((by_rule, by_label), completions)
    instead = judge_in_order((by_label,), completions)
    assert before == [
        ("correct", "by_label"),
        ("correct", "rule"),
        ("incorrect", "rule"),
        ("undecided", "rule"),
    ]
    assert after == [
        ("incorrect", "rule"),  # it has no number or formula
        ("correct", "rule"),
        ("incorrect", "rule"),
        ("undecided", "by_label"),
    ]
    assert instead == [("correct", "by_label")] + [("undecided", "by_label")] * 3


def test_the_rule_does_not_hide_the_failure_of_another_verifier():
    with Pool(1, deadline=0.5, verifiers=(misbehaving, by_rule)) as pool:
        pairs = [(word, "7") for word in ("raise", "nonsense", "hang")]
        raised, invalid, late = pool.verdicts(pairs)
    assert raised == Verdict(
        "undecided", "misbehaving failed: ValueError: raise", "crash"
    )
    assert invalid.reason == (
        "misbehaving failed: ValueError: its outcome is 'perhaps'"
    )
    assert (late.outcome, late.by) == ("undecided", "timeout")


def test_a_config_files_function_is_a_verifier(tmp_path):
    """Workers import it by the name under which the config was loaded."""
    config = config_loading.load(ROOT / "configs/my_verifier.py", TrainConfig)
    settings = config.verification
    with Pool(1, settings.deadline, settings.verifiers) as pool:
        verdicts = pool.verdicts(
            [("It is 7", "7", ROW), ("well " * 20 + "7", "7", ROW)]
        )
    assert [(v.outcome, v.by) for v in verdicts] == [
        ("correct", "rule"),
        ("incorrect", "is_brief"),
    ]
    assert verdicts[1].reason == "21 words on '3 + 4?'"


def in_main(completion, prompt):
    """Return a verdict; defined in a script or a notebook."""
    return Verdict("correct", "")


in_main.__module__ = "__main__"


@pytest.mark.parametrize(
    ("verifiers", "message"),
    [
        (
            (lambda completion, prompt: None,),
            "verifiers: .*<lambda> must be a function",
        ),
        ((by_rule, functools.partial(by_rule)), "partial.* must be a function"),
        ((), "at least one"),
        ((in_main,), "in_main must be a function at the top level of a module"),
    ],
)
def test_verifiers_that_workers_cannot_import_are_refused(verifiers, message):
    for use in (Verification, functools.partial(Pool, 1)):
        with pytest.raises(InputError, match=message):
            use(verifiers=verifiers)


def test_verifiers_read_the_row_of_the_prompt():
    row = {"id": "p2", "accepted": ["yes"]}
    candidate = Candidate("q", "7", "yes", "stop", row)
    with Pool(1, verifiers=(by_label,)) as pool:
        verdict = verify_completions([candidate], pool)[0]
    assert verdict == Verdict("correct", "label of p2", "by_label")


def test_a_verifier_that_cannot_be_imported_raises():
    with (
        Pool(1, verifiers=(unimportable,)) as pool,
        pytest.raises(RuntimeError, match="never ready"),
    ):
        pool.verdicts([("a", "a")])


def test_workers_see_no_accelerator():
    with Pool(1, verifiers=(misbehaving,)) as pool:
        assert pool.verdicts([("devices", "a")])[0].reason == "'' cpu"


def test_a_pair_is_judged_once():
    with Pool(1, verifiers=(misbehaving,)) as pool:
        first = pool.verdicts([("count", "a"), ("count", "a")])
        assert len({*first, *pool.verdicts([("count", "a")])}) == 1


def test_a_pool_is_usable_after_an_interrupted_batch():
    def interrupt(count):
        if count:
            raise KeyboardInterrupt

    with Pool(2, deadline=1.0, verifiers=(misbehaving,)) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.verdicts([("a", "a"), ("hang", "b"), ("hang", "c")], interrupt)
        assert pool.verdicts([("d", "d")])[0].outcome == "correct"


def test_a_pool_works_from_any_thread(pool):
    verdicts = []
    task = lambda: verdicts.extend(pool.verdicts([(r"\boxed{x+1}", "1+x")]))
    threads = [threading.Thread(target=task) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.outcome for verdict in verdicts] == ["correct"] * 3


def test_a_pool_without_workers_raises():
    with Pool(0) as pool:
        assert pool.verdicts([]) == []
        with pytest.raises(RuntimeError, match="no workers"):
            pool.verdicts([("1", "1")])

"""The page of `oreal serve`, in a browser."""

import pytest
from chromium import PROGRAM, Chromium
from served import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="no chromium on this machine"),
]
QUESTION = "max 3 4?"


@pytest.fixture(scope="module")
def served(whole):
    with serving(whole, token_scores=True) as served:
        yield served


@pytest.fixture
def page(served):
    page = Chromium()
    page.open(
        f"{served.url}/", "document.getElementById('model')?.textContent == 'tiny'"
    )
    page.evaluate(
        f"document.getElementById('question').value = {QUESTION!r};"
        "document.getElementById('temperature').value = 0"
    )
    yield page
    page.close()
    assert not page.errors


def solve(page) -> list[list[list[str]]]:
    """Press the button; return text and title of each token of all solutions."""
    page.evaluate("document.getElementById('solve').click()")
    page.wait("!document.getElementById('solve').disabled")
    assert page.evaluate("document.getElementById('status').textContent") == ""
    return page.evaluate(
        "[...document.querySelectorAll('article pre')].map(text =>"
        "[...text.children].map(token => [token.textContent, token.title]))"
    )


def test_solutions_are_those_of_the_api_with_its_token_scores(served, page):
    """Whatever fits in the server's length, which is less than a usual limit."""
    solutions = solve(page)
    text = served.chat(QUESTION, temperature=0)["choices"][0]["message"]["content"]
    fields = {"messages": [{"role": "user", "content": QUESTION}], "text": text}
    tokens = served.client.post("/scores", json=fields).json()["tokens"]
    assert text and len(solutions) == 8
    for solution in solutions:
        assert "".join(token for token, _ in solution) == text
        for (_, title), token in zip(solution, tokens, strict=True):
            assert abs(float(title) - token["score"]) <= 0.0005 + 1e-6


def test_equal_answers_are_one_group_and_a_limit_of_tokens_is_kept(page):
    solve(page)
    answers = "document.getElementById('answers').innerText"
    assert page.evaluate(answers).endswith("8 of 8: 1, 2, 3, 4, 5, 6, 7, 8")
    page.evaluate("document.getElementById('tokens').value = 1")
    assert all(len(solution) <= 1 for solution in solve(page))

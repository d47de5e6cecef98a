"""Final answers of solutions, for the page."""

from oreal_jax.verify import extract
from oreal_jax.verify.rule import canonical


def final_answer(text: str) -> dict[str, str] | None:
    """Return the answer of a solution and its group; None if it has none.

    Solutions are in one group if their answers differ in spelling only.
    """
    answer = extract.answer(text)
    if not isinstance(answer, str):
        return None
    return {"answer": answer, "group": canonical(answer)}

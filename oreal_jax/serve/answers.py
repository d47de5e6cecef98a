"""Final answers and token scores of solutions, for the page."""

from typing import Any

from oreal_jax.data import Chat
from oreal_jax.sampling.session import Session
from oreal_jax.serve.errors import ApiError
from oreal_jax.serve.protocol import chat_job
from oreal_jax.serve.scorer import Scorer
from oreal_jax.serve.text import TextStream
from oreal_jax.verify import extract
from oreal_jax.verify.rule import canonical


def final_answer(text: str) -> dict[str, str] | None:
    """Return the answer of a solution and its group; None if it has none.

    Solutions are in one group if their answers differ only in notation. For an
    equation, the right-hand side is the answer.
    """
    answer = extract.answer(text)
    if not isinstance(answer, str):
        return None
    value = answer.partition("=")[2] if answer.count("=") == 1 else answer
    return {"answer": answer, "group": canonical(value)}


def score_tokens(
    scorer: Scorer, chat: Chat, session: Session, values: dict[str, Any], text: str
) -> list[dict[str, Any]]:
    """Return the tokens of a solution of a chat request, with their scores.

    A character of several tokens is part of the last one's text.

    Raises:
        ApiError: the request is invalid, or longer than the session allows.
    """
    prompt = list(chat_job(values, chat, session).requests[0].prompt)
    tokens = chat.encode_text(text, special=False)
    if len(prompt) + len(tokens) > session.length:
        message = f"text: prompt and text exceed {session.length} tokens"
        raise ApiError(message, param="text")
    stream = TextStream(chat.decode_all, [])
    texts = [stream.add([token])[0] for token in tokens]
    credits = scorer.credits(prompt, tokens) if tokens else []
    pairs = zip(texts, credits, strict=True)
    return [{"text": text, "score": score} for text, score in pairs]

"""Conversion of generated tokens to the text that a client receives."""

from collections.abc import AsyncIterator

import numpy as np

from oreal_jax.data import Chat
from oreal_jax.sampling.session import Piece
from oreal_jax.serve.errors import ApiError
from oreal_jax.serve.protocol import Job
from oreal_jax.serve.replies import Delta, Token
from oreal_jax.serve.text import TextStream
from oreal_jax.serve.worker import Generation


async def deltas(chat: Chat, job: Job, generation: Generation) -> AsyncIterator[Delta]:
    """Yield the text of a job's choices as it is generated, up to stop strings.

    Raises:
        ApiError: the engine failed, or sampled a token without a probability.
    """
    stops = [*chat.stop_strings, *job.stops]
    texts = [TextStream(chat.decode_all, stops) for _ in range(generation.count)]
    async for choice, piece in generation:
        if not np.isfinite(piece.log_probs).all():
            message = "sampled a token with a non-finite log-probability"
            raise ApiError(f"{message}: a bias or penalty is too large", status=500)
        last = piece.finish_reason is not None
        text, count = texts[choice].add(piece.tokens, last=last)
        reason = piece.finish_reason
        if texts[choice].stopped:
            reason = "stop"
            generation.finish(choice)
        yield Delta(choice, text, _tokens(chat, piece, count), reason)


def _tokens(chat: Chat, piece: Piece, count: int) -> list[Token]:
    log_probs = piece.log_probs[:count].tolist()
    pieces = chat.pieces(piece.tokens[:count])
    return [Token(*each) for each in zip(pieces, log_probs, strict=True)]

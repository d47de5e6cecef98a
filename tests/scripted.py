"""A model whose completions are given by a test."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oreal_jax.data import load_tokenizer
from oreal_jax.sampling import Completion


class Script:
    """Replaces `Engine.sample`: records requests, can be interrupted.

    `answer(a, sample)` is the completion of the tiny model's problem "max A B?".
    """

    def __init__(self, model: Path, answer: Callable[[int, int], str]):
        self.tokenizer, self.answer = load_tokenizer(model), answer
        self.requests, self.seeds = [], []
        self.slots, self.prompts = set(), []
        self.patience = 10**9  # completions before an interruption

    def sample(
        self,
        engine,
        params,
        requests,
        samples,
        *,
        step=0,
        renormalise=False,
        on_progress=lambda tokens, finished: None,
        on_finished=lambda *_: None,
    ) -> list[list[Completion]]:
        """As `Engine.sample`."""
        groups = []
        for index, request in enumerate(requests):
            question = self.tokenizer.decode(request.prompt)
            self.slots.add(engine.slots)
            self.prompts.append(question)
            a = int(question.split("max ")[1].split()[0])
            groups.append([])
            for sample in range(samples):
                if self.patience == 0:
                    raise KeyboardInterrupt
                self.patience -= 1
                number = request.first_sample + sample
                self.requests.append((a, number, request.sampling))
                self.seeds.append(request.seed)
                text = self.answer(a, number)
                completion = self.completion(request.sampling.max_tokens, text)
                groups[-1].append(completion)
                on_finished(index, sample, completion)
                on_progress(1, 1)
        return groups

    def completion(self, limit: int, text: str) -> Completion:
        """Return the text, with a stop token if it is within the limit."""
        tokens = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]
        reason = "stop" if len(tokens) <= limit else "length"
        tokens = tokens[:limit]
        return Completion(tokens, np.zeros(len(tokens)), None, reason)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(a: int, sample: int) -> str:
    """Return the scripted model's answer to "max A 7?"."""
    return "It is 7" if (a + sample) % 4 == 0 else f"It is {a}"


def correct(a: int, samples: int) -> list[bool]:
    return ["7" in answer(a, k) for k in range(samples)]

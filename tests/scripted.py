"""A model that says what a test wants, instead of drawing completions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oreal_jax.data import load_tokenizer
from oreal_jax.sampling import Completion


class Script:
    """Stands for `Engine.sample`: notes what it is asked, may be interrupted.

    `says(a, sample)` is the answer to the tiny model's problem "max A B?".
    """

    def __init__(self, model: Path, says: Callable[[int, int], str]):
        self.tokenizer, self.says = load_tokenizer(model), says
        self.asked, self.seeds = [], []
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
        drawn = []
        for place, request in enumerate(requests):
            question = self.tokenizer.decode(request.prompt)
            self.slots.add(engine.slots)
            self.prompts.append(question)
            a = int(question.split("max ")[1].split()[0])
            drawn.append([])
            for sample in range(samples):
                if self.patience == 0:
                    raise KeyboardInterrupt
                self.patience -= 1
                number = request.first_sample + sample
                self.asked.append((a, number, request.sampling))
                self.seeds.append(request.seed)
                text = self.says(a, number)
                drawn[-1].append(self.completion(request.sampling.max_tokens, text))
                on_finished(place, sample, drawn[-1][-1])
                on_progress(1, 1)
        return drawn

    def completion(self, limit: int, text: str) -> Completion:
        """The text, with a stop token if there is room for it."""
        tokens = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]
        reason = "stop" if len(tokens) <= limit else "length"
        kept = tokens[:limit]
        return Completion(kept, np.zeros(len(kept)), None, reason)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def says(a: int, sample: int) -> str:
    """What the scripted model says to "max A 7?"."""
    return "It is 7" if (a + sample) % 4 == 0 else f"It is {a}"


def correct(a: int, samples: int) -> list[bool]:
    return ["7" in says(a, k) for k in range(samples)]

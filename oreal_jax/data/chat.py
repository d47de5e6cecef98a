"""Questions to tokens and back, through the checkpoint's own tokenizer and template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import BadInput


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a model's config.

    Raises:
        BadInput: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{directory}: no usable tokenizer: {reason}") from None


class Chat:
    """A tokenizer's chat template applied to one question.

    `system_prompt` None leaves the system message to the template.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None):
        """Raises BadInput where the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise BadInput(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template"
            )
        self.tokenizer, self.system_prompt = tokenizer, system_prompt

    def encode(self, question: str) -> list[int]:
        """The tokens of a conversation up to where the answer begins."""
        system = [{"role": "system", "content": self.system_prompt}]
        messages = system if self.system_prompt is not None else []
        text = self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)

    def stop_tokens(self, words: Sequence[str] = ()) -> tuple[int, ...]:
        """The tokens that end a completion: the model's own, and one for each word.

        Raises:
            BadInput: a word is not exactly one token.
        """
        tokens = {self.tokenizer.eos_token_id} - {None}
        generation = Path(self.tokenizer.name_or_path) / "generation_config.json"
        if generation.is_file():
            own = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
            tokens |= set(own if isinstance(own, list) else [own]) - {None}
        for word in words:
            pieces = self.tokenizer.encode(word, add_special_tokens=False)
            if len(pieces) != 1:
                raise BadInput(
                    f"stop word {word!r} is {len(pieces)} tokens, must be exactly 1"
                )
            tokens.add(pieces[0])
        return tuple(sorted(tokens))

    def example(self, question: str, solution: str) -> tuple[list[int], list[int]]:
        """Prompt and completion tokens for supervised tuning; the completion ends
        with the tokenizer's end-of-sequence token."""
        completion = self.tokenizer.encode(solution, add_special_tokens=False)
        return self.encode(question), [*completion, self.tokenizer.eos_token_id]

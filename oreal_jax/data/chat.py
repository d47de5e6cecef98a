"""Questions to tokens and back, through the checkpoint's own tokenizer and template."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError
from oreal_jax.files import read_text

# Without one transformers makes a tokenizer that knows no word, and does not say so.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a model's config.

    Raises:
        InputError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in VOCABULARIES):
        names = ", ".join(VOCABULARIES)
        raise InputError(f"{directory}: no usable tokenizer: it has none of {names}")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers raises what its files make it raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{directory}: no usable tokenizer: {reason}") from None


class Chat:
    """A tokenizer's chat template applied to one question.

    `system_prompt` None leaves the system message to the template. `template` is a
    Jinja file that replaces the tokenizer's own. Completions are read up to the first
    of the `stop_strings`. `encode`, `decode` and `pieces` may be called by any thread.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        template: Path | None = None,
        stop_strings: Sequence[str] = (),
    ):
        """Raises InputError where there is no chat template, or one that cannot be read
        or refuses these messages (some know no system message)."""
        if template:
            tokenizer.chat_template = read_text(template)
        if not tokenizer.chat_template:
            raise InputError(
                f"{template or tokenizer.name_or_path}: no chat template in it"
            )
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.stop_strings = stop_strings
        self._pieces: dict[int, str] = {}  # of tokens asked for so far
        self._in_use = threading.Lock()  # some tokenizers fail in two threads at once
        try:
            self.encode("?")
        except Exception as error:  # a template raises what it likes
            raise InputError(
                f"{template or tokenizer.name_or_path}: the chat template with "
                f"system_prompt={system_prompt!r}: {error}"
            ) from None

    def encode(self, question: str) -> list[int]:
        """The tokens of a conversation up to where the answer begins."""
        system = [{"role": "system", "content": self.system_prompt}]
        messages = system if self.system_prompt is not None else []
        text = self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        with self._in_use:
            return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion, without special tokens, up to a stop string."""
        tokens = [int(token) for token in tokens]
        with self._in_use:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        places = [text.find(string) for string in self.stop_strings]
        return text[: min((p for p in places if p >= 0), default=len(text))]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token by itself, special tokens included."""
        known = self._pieces
        with self._in_use:
            for token in set(map(int, tokens)) - known.keys():
                known[token] = self.tokenizer.decode([token])
        return [known[int(token)] for token in tokens]

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token adds to a completion's text; none for special
        tokens, which leave none.

        Byte-level vocabularies spell a byte as a printable letter, others write a space
        as U+2581 and lone bytes as <0x0A>.
        """
        added = self.tokenizer.added_tokens_decoder
        size = max([*self.tokenizer.get_vocab().values(), -1]) + 1
        names = self.tokenizer.convert_ids_to_tokens(range(size))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{self.tokenizer.name_or_path}: stop strings need a fast tokenizer"
            )
        decoder = str(backend.decoder)
        spell = _byte_level if "ByteLevel" in decoder else _plain
        pieces = [spell(name) if name else b"" for name in names]
        for token, entry in added.items():
            pieces[token] = b"" if entry.special else entry.content.encode()
        return pieces

    def stop_tokens(self, words: Sequence[str] = ()) -> tuple[int, ...]:
        """The tokens that end a completion: the model's own, and one for each word.

        Raises:
            InputError: a word is not exactly one known token, or the model's
                generation_config.json is not JSON.
        """
        tokens = {self.tokenizer.eos_token_id} - {None}
        generation = Path(self.tokenizer.name_or_path) / "generation_config.json"
        if generation.is_file():
            try:
                settings = json.loads(generation.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{generation}: not JSON: {error}") from None
            own = settings.get("eos_token_id") if isinstance(settings, dict) else "?"
            several = own if isinstance(own, list) else [own]
            if not all(token is None or type(token) is int for token in several):
                raise InputError(f"{generation}: eos_token_id={own!r}, expected tokens")
            tokens |= set(several) - {None}
        for word in words:
            pieces = self.tokenizer.encode(word, add_special_tokens=False)
            if len(pieces) != 1:
                raise InputError(
                    f"stop word {word!r} is {len(pieces)} tokens, must be exactly 1"
                )
            if pieces[0] == self.tokenizer.unk_token_id:
                raise InputError(f"stop word {word!r} is unknown to the tokenizer")
            tokens.add(pieces[0])
        return tuple(sorted(tokens))

    def example(self, question: str, solution: str) -> tuple[list[int], list[int]]:
        """Prompt and completion tokens for supervised tuning; the completion ends
        with the tokenizer's end-of-sequence token.

        Raises:
            InputError: the tokenizer has no such token.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(f"{self.tokenizer.name_or_path}: no end-of-sequence token")
        completion = self.tokenizer.encode(solution, add_special_tokens=False)
        return self.encode(question), [*completion, end]


def _byte_level(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token if letter in _BYTES)


def _plain(token: str) -> bytes:
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others, in order, as
    the letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()

"""Questions to tokens and back, with the checkpoint's own tokenizer and template."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError, summarize
from oreal_jax.files import read_json, read_text
from oreal_jax.verify.extract import is_thinking_mark

# Without any of these, transformers silently makes a tokenizer without a vocabulary.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        InputError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((directory / name).is_file() for name in VOCABULARIES):
        names = ", ".join(VOCABULARIES)
        raise InputError(f"{directory}: no usable tokenizer: it has none of {names}")
    # AutoTokenizer may take only the vocabulary from tokenizer.json and split text by
    # the rules of the class that belongs to the type of the model.
    has_rules = (directory / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if has_rules else AutoTokenizer
    try:
        return reader.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers passes on errors of many kinds
        reason = summarize(error)
        raise InputError(f"{directory}: no usable tokenizer: {reason}") from None


class Chat:
    """A tokenizer and its chat template, applied to one question.

    `system_prompt` None leaves the system message to the template. `template` is a
    Jinja file that replaces the tokenizer's own. Completions end before the first of
    the `stop_strings`. The methods that encode and decode are thread-safe.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        template: Path | None = None,
        stop_strings: Sequence[str] = (),
    ):
        """Check the template.

        Raises:
            InputError: there is none, or it is invalid or rejects these messages (some
                accept no system message).
        """
        if template:
            tokenizer.chat_template = read_text(template)
        source = template or tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise InputError(f"{source}: no chat template in it")
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.stop_strings = stop_strings
        self._pieces: dict[int, str] = {}
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._hidden = {
            token
            for token in special | set(tokenizer.all_special_ids)
            if not is_thinking_mark(tokenizer.convert_ids_to_tokens(token))
        }
        self._lock = threading.Lock()  # some tokenizers fail in two threads at once
        try:
            self.encode("?")
        except Exception as error:  # templates raise errors of many kinds
            raise InputError(
                f"{source}: the chat template with system_prompt={system_prompt!r}: "
                f"{error}"
            ) from None

    def encode(self, question: str) -> list[int]:
        """Return the tokens of a conversation up to the start of the answer."""
        return self.encode_messages([{"role": "user", "content": question}])

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of messages, each a `role` and `content`, likewise.

        The system prompt precedes them unless they begin with another.
        """
        messages = list(messages)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.encode_text(text, special=False)

    def encode_text(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text, with the tokenizer's own `special` ones."""
        with self._lock:
            return self.tokenizer.encode(text, add_special_tokens=special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return a completion's text up to a stop string, without special tokens.

        Tokens that begin or end thinking are kept: the verifier must know where
        thinking ends, because an answer in it does not count.
        """
        text = self.decode_all(tokens)
        ends = [text.find(string) for string in self.stop_strings]
        return text[: min((end for end in ends if end >= 0), default=len(text))]

    def decode_all(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens as `decode` does, but beyond stop strings too."""
        tokens = [token for each in tokens if (token := int(each)) not in self._hidden]
        with self._lock:
            return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each single token, special tokens included."""
        with self._lock:
            for token in set(map(int, tokens)) - self._pieces.keys():
                self._pieces[token] = self.tokenizer.decode([token])
        return [self._pieces[int(token)] for token in tokens]

    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each token adds to a text; none for special tokens.

        Byte-level vocabularies spell a byte as a printable letter, others a space as
        U+2581 and single bytes as <0x0A>.

        Raises:
            InputError: the tokenizer is not a fast one.
        """
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        size = max([*self.tokenizer.get_vocab().values(), -1]) + 1
        names = self.tokenizer.convert_ids_to_tokens(range(size))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{self.tokenizer.name_or_path}: stop strings need a fast tokenizer"
            )
        spell = _plain_bytes
        if "ByteLevel" in str(backend.decoder):
            values = {letter: byte for byte, letter in bytes_to_unicode().items()}
            spell = lambda name: bytes(values[x] for x in name if x in values)
        pieces = [spell(name) if name else b"" for name in names]
        for token, entry in self.tokenizer.added_tokens_decoder.items():
            pieces[token] = b"" if entry.special else entry.content.encode()
        return pieces

    def stop_tokens(self, words: Sequence[str] = ()) -> tuple[int, ...]:
        """Return the tokens that end a completion: the model's own and one per word.

        The model's own are those of its tokenizer, config.json and
        generation_config.json.

        Raises:
            InputError: a word is not exactly one known token, or a file of the model is
                invalid.
        """
        tokens = {self.tokenizer.eos_token_id}
        for name in ("config.json", "generation_config.json"):
            path = Path(self.tokenizer.name_or_path) / name
            value = read_json(path).get("eos_token_id") if path.is_file() else None
            model_tokens = value if isinstance(value, list) else [value]
            if not all(token is None or type(token) is int for token in model_tokens):
                raise InputError(f"{path}: eos_token_id={value!r}, expected tokens")
            tokens.update(model_tokens)
        for word in words:
            pieces = self.tokenizer.encode(word, add_special_tokens=False)
            if len(pieces) != 1:
                raise InputError(
                    f"stop word {word!r} is {len(pieces)} tokens, must be exactly 1"
                )
            if pieces[0] == self.tokenizer.unk_token_id:
                raise InputError(f"stop word {word!r} is unknown to the tokenizer")
            tokens.add(pieces[0])
        return tuple(sorted(tokens - {None}))

    def example(self, question: str, solution: str) -> tuple[list[int], list[int]]:
        """Return prompt and completion tokens; the latter end with end-of-sequence.

        Raises:
            InputError: the tokenizer has no such token.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(f"{self.tokenizer.name_or_path}: no end-of-sequence token")
        completion = self.tokenizer.encode(solution, add_special_tokens=False)
        return self.encode(question), [*completion, end]


def _plain_bytes(token: str) -> bytes:
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()

"""Questions to tokens and back, with the checkpoint's own tokenizer and template."""

import datetime
import functools
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError, summarize
from oreal_jax.files import read_json, read_text
from oreal_jax.verify.extract import is_thinking_mark

# Without any of these, transformers silently makes a tokenizer without a vocabulary.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Variables that `apply_chat_template` or this module sets.
RESERVED = ("messages", "add_generation_prompt", "tools", "documents", "strftime_now")
ANSWER = "\ue000"  # stands for an answer, to find the text after it
DATE_FILE = "template_date"  # in the model directory of a run: the date of its prompts
UNUSED = range(0xE000, 0x110000)  # characters, first those without meaning


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


def read_date(directory: Path) -> datetime.date | None:
    """Return the date in the prompts of a run, None if it recorded none.

    Raises:
        InputError: the file in its model directory is not a date.
    """
    path = directory / DATE_FILE
    if not path.exists():
        return None
    try:
        return datetime.date.fromisoformat(read_text(path).strip())
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


class Chat:
    """A tokenizer and its chat template, applied to one question.

    `system_prompt` None leaves the system message to the template. `template` is a
    Jinja file that replaces the tokenizer's own; `template_vars` are its variables,
    `date` (None: today) is the date that it prints, if any. Completions end before the
    first of the `stop_strings`. The methods that encode and decode are thread-safe.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        template: Path | None = None,
        stop_strings: Sequence[str] = (),
        template_vars: Mapping[str, Any] = {},
        date: datetime.date | None = None,
    ):
        """Check the template.

        Raises:
            InputError: there is none, or it is invalid, rejects these messages (some
                accept no system message) or has no such variable.
        """
        if template:
            tokenizer.chat_template = read_text(template)
        source = template or tokenizer.name_or_path
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.stop_strings, self.template_vars = stop_strings, dict(template_vars)
        self.date = date or datetime.date.today()
        self.template = chat_template(tokenizer, source)
        self._dated_template = with_date(self.template, self.date)
        self._pieces: dict[int, str] = {}
        self._hidden = {
            token
            for token in special_tokens(tokenizer)
            if not is_thinking_mark(tokenizer.convert_ids_to_tokens(token))
        }
        self._control_start = control_start(tokenizer)
        self._lock = threading.Lock()  # some tokenizers fail in two threads at once
        for name in self.template_vars:
            if name in RESERVED or not re.search(
                rf"\b{re.escape(name)}\b", self.template
            ):
                raise InputError(
                    f"{source}: the chat template has no variable {name!r}"
                )
        try:
            self.encode("?")
        except Exception as error:  # templates raise errors of many kinds
            raise InputError(
                f"{source}: the chat template with system_prompt={system_prompt!r}: "
                f"{error}"
            ) from None

    @property
    def prints_date(self) -> bool:
        """Whether the template prints the date."""
        return self._dated_template != self.template

    def encode(self, question: str) -> list[int]:
        """Return the tokens of a conversation up to the start of the answer."""
        return self.encode_messages([{"role": "user", "content": question}])

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the prompt tokens of messages, each with a `role` and `content`.

        The system prompt precedes them unless they begin with their own. Text of a
        message never becomes a control token: "<|im_end|>" in it is encoded as text.
        """
        text, mark = self._apply(messages), None
        if any(self._control_start.search(each["content"]) for each in messages):
            # Insert an unused character into each control text, apply the template,
            # then split there, so that the parts are encoded separately.
            mark = next(x for x in map(chr, UNUSED) if x not in text)
            split = functools.partial(self._control_start.sub, rf"\g<0>{mark}")
            apply = lambda kept: self._apply(
                [
                    x if x["role"] in kept else x | {"content": split(x["content"])}
                    for x in messages
                ]
            )
            plain, text = text, apply(())
            # A template that removes earlier thinking must find its marks.
            if text.replace(mark, "") != plain:
                questions = apply(("assistant",))
                text = questions if questions.replace(mark, "") == plain else text
        parts = text.split(mark) if mark else [text]
        return [token for part in parts for token in self.encode_text(part)]

    def _apply(
        self, messages: Sequence[dict[str, str]], *, is_prompt: bool = True
    ) -> str:
        """Return the text of a conversation, up to the next answer if `is_prompt`."""
        messages = list(messages)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._dated_template,
            tokenize=False,
            add_generation_prompt=is_prompt,
            **self.template_vars,
        )

    def encode_text(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of a text; `special` adds the tokenizer's BOS or EOS."""
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
        """Return the text of tokens as `decode` does, but ignore stop strings."""
        tokens = [token for each in tokens if (token := int(each)) not in self._hidden]
        with self._lock:
            return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each single token, special tokens included."""
        with self._lock:
            for token in set(map(int, tokens)) - self._pieces.keys():
                self._pieces[token] = self.tokenizer.decode([token])
        return [self._pieces[int(token)] for token in tokens]

    @property
    def size(self) -> int:
        """The highest token id, of added tokens too, plus one."""
        return max([*self.tokenizer.get_vocab().values(), -1]) + 1

    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each token adds to a text; none for special tokens.

        Byte-level vocabularies spell a byte as a printable letter, others a space as
        U+2581 and single bytes as <0x0A>.

        Raises:
            InputError: the tokenizer is not a fast one.
        """
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        names = self.tokenizer.convert_ids_to_tokens(range(self.size))
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
        generation_config.json, and the token that ends a turn in its template.

        Raises:
            InputError: a word is not exactly one known token, or a file of the model is
                invalid.
        """
        tokens = {self.tokenizer.eos_token_id, *self._turn_end[-1:]}
        for name in ("config.json", "generation_config.json"):
            path = Path(self.tokenizer.name_or_path) / name
            value = read_json(path).get("eos_token_id") if path.is_file() else None
            model_tokens = value if isinstance(value, list) else [value]
            if not all(token is None or type(token) is int for token in model_tokens):
                raise InputError(f"{path}: eos_token_id={value!r}, expected tokens")
            tokens.update(model_tokens)
        for word in words:
            pieces = self.encode_text(word)
            if len(pieces) != 1:
                raise InputError(
                    f"stop word {word!r} is {len(pieces)} tokens, must be exactly 1"
                )
            if pieces[0] == self.tokenizer.unk_token_id:
                raise InputError(f"stop word {word!r} is unknown to the tokenizer")
            tokens.add(pieces[0])
        return tuple(sorted(tokens - {None}))

    def example(self, question: str, solution: str) -> tuple[list[int], list[int]]:
        """Return prompt and completion tokens, the latter with the template's turn end.

        Without a special token there, completions end with end-of-sequence.

        Raises:
            InputError: the tokenizer has no such token.
        """
        end = self._turn_end or [self.tokenizer.eos_token_id]
        if end == [None]:
            raise InputError(f"{self.tokenizer.name_or_path}: no end-of-sequence token")
        return self.encode(question), [*self.encode_text(solution), *end]

    @functools.cached_property
    def _turn_end(self) -> list[int]:
        """The tokens that the template puts after an answer, up to the special one.

        Empty if there is no special one. Text after it, such as a line break, belongs
        to the next turn and is not part of completions.
        """
        try:
            turns = [("user", "?"), ("assistant", ANSWER)]
            messages = [{"role": role, "content": text} for role, text in turns]
            text = self._apply(messages, is_prompt=False)
        except Exception:  # templates raise errors of many kinds
            return []  # the template accepts questions only
        tokens = self.encode_text(text.rpartition(ANSWER)[2]) if ANSWER in text else []
        marks = self._hidden - {self.tokenizer.unk_token_id}
        index = next((i for i, token in enumerate(tokens) if token in marks), -1)
        return tokens[: index + 1]


def chat_template(tokenizer: Any, source: Any) -> str:
    """Return the chat template of a tokenizer.

    Raises:
        InputError: it has none; or several, and none of them is the default.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{source}: no chat template")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def special_tokens(tokenizer: Any) -> set[int]:
    """Return the special tokens of a tokenizer."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token for token, entry in added if entry.special}
    return special | set(tokenizer.all_special_ids)


def control_start(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the first character of each control token.

    Control tokens are the special tokens, and added tokens in brackets such as
    "<think>"; other added tokens, such as runs of spaces, are plain text.
    """
    special = special_tokens(tokenizer)
    controls = [
        re.escape(entry.content)
        for token, entry in tokenizer.added_tokens_decoder.items()
        if token in special or re.fullmatch(r"[<\[].+[>\]]", entry.content)
    ]
    return re.compile(f"(?=(?:{'|'.join(controls) or '(?!)'})).", re.DOTALL)


def with_date(template: str, date: datetime.date) -> str:
    """Return a template whose `strftime_now` prints this date.

    That of transformers prints the current time, and a variable cannot replace it.
    """
    if "strftime_now" not in template:
        return template
    letters = "aAbBcdDeFGhHIjmMpRSTuUVwWxXyY"
    directives = [f"%-{x}" for x in "dmyHIMSj"] + [f"%{x}" for x in letters]
    replace = "".join(f".replace({x!r}, {date.strftime(x)!r})" for x in directives)
    return (
        "{%- macro strftime_now(format) -%}{{ format"
        f"{replace}.replace('%%', '%') }}}}{{%- endmacro %}}\n{template}"
    )


def _plain_bytes(token: str) -> bytes:
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()

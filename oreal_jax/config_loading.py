"""Config files, and `--set a.b=value` settings that change plain fields of them.

Custom functions and losses are set in config files, as variants made by
`dataclasses.replace`; `loss=grpo` sets a loss by its name in `losses.presets`.
"""

import ast
import dataclasses
import difflib
import importlib.util
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from oreal_jax.errors import InputError
from oreal_jax.losses import PolicyLoss
from oreal_jax.losses.presets import NAMED

PLAIN = (int, float, str, bool, types.NoneType)
UNIONS = (types.UnionType, typing.Union)


def load(path: Path, kind: type, settings: Sequence[str] = ()) -> Any:
    """Return the `config` of a config file, with `a.b=value` settings applied.

    The file can import from its folder, so that configs can build on each other.

    Raises:
        InputError: no such file, no `config` of this kind, or an invalid setting.
    """
    config: Any = getattr(_import(path), "config", None)
    if not isinstance(config, kind):
        name = "nothing" if config is None else type(config).__name__
        raise InputError(f"{path}: `config` must be a {kind.__name__}, found {name}")
    _check_types(config, str(path))
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected name=value")
        if key == "loss" and text in NAMED:
            config = dataclasses.replace(config, loss=NAMED[text])
        else:
            _add_change(changes, config, key, text)
    return _replace(config, changes)


def _import(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses in the file look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        line = f", line {lines[-1]}" if lines else ""
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}{line}: {kind}{error}") from None
    return module


def _check_types(config: Any, where: str) -> None:
    """Check the plain fields of a config and of the dataclasses in it.

    Raises:
        InputError: names the file, the field and its value.
    """
    try:
        hints = typing.get_type_hints(type(config))
    except NameError:  # of hints that only type checkers can resolve
        hints = {}
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints.get(field.name)
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{where}: {field.name}")
        elif not _matches(value, hint, unknown=True):
            raise InputError(
                f"{where}: {field.name}={value!r}, expected {_describe(hint)}"
            )


def _matches(value: Any, hint: Any, unknown: bool = False) -> bool:
    """Return whether a value has a type; `unknown` for types that are not plain."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in UNIONS:
        return any(_matches(value, part, unknown) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        pairs = zip(value, parts, strict=False)
        return len(value) == len(parts) and all(_matches(*p, unknown) for p in pairs)
    if hint not in PLAIN and not dataclasses.is_dataclass(hint):
        return unknown
    if isinstance(value, bool):
        return hint is bool
    kinds: Any = (int, float) if hint is float else hint
    return isinstance(value, kinds)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return getattr(hint, "__name__", None) or str(hint)


def _add_change(changes: dict[str, Any], config: Any, key: str, text: str) -> None:
    """Add the value in `text` to the nested changes, under the dotted name `key`."""
    *parents, name = key.split(".")
    top = config
    for parent in parents:
        config = _get(config, parent, key, top)
        if not dataclasses.is_dataclass(config):
            raise InputError(f"--set {key}: {parent}={config!r} has no fields")
        if not isinstance(changes.get(parent), dict):
            changes[parent] = {}
        changes = changes[parent]
    _get(config, name, key, top)
    hint = typing.get_type_hints(type(config))[name]
    hint = getattr(hint, "type", hint)  # of an `InitVar`
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    candidates = [value, text]  # the text itself, if a string looks like a number
    if not isinstance(value, tuple | list | dict | set):
        candidates += [(value,), (text,)]  # the only item of a tuple
    matches = [each for each in candidates if _matches(each, hint)]
    if not matches:
        is_plain = not _matches(object(), hint, unknown=True)
        advice = "" if is_plain else ", which only a config file can give"
        if hint is PolicyLoss:
            advice = f" of a config file, or one of {', '.join(NAMED)}"
        raise InputError(
            f"--set {key}={text}: {name} must be {_describe(hint)}{advice}"
        )
    changes[name] = float(matches[0]) if hint is float else matches[0]


def _get(config: Any, name: str, key: str, top: Any) -> Any:
    names = sorted(type(config).__dataclass_fields__)  # with `InitVar`s
    if name not in names:
        message = f"--set {key}: {type(config).__name__} has no field {name!r}; "
        known = list(_dotted_names(top))
        close = [each for each in known if each.endswith(f".{key}")]
        if close := close or difflib.get_close_matches(key, known, 2):
            message += f"did you mean {' or '.join(close)}; "
        raise InputError(f"{message}it has {', '.join(names)}")
    return getattr(config, name)


def _dotted_names(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _dotted_names(value, f"{prefix}{field.name}.")


def _replace(config: Any, changes: dict[str, Any], path: str = "") -> Any:
    """Apply all changes at once, because fields are checked against each other.

    `path` is the dotted name of `config` for error messages.
    """
    values = {
        name: _replace(getattr(config, name), value, f"{path}{name}.")
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    try:
        return dataclasses.replace(config, **values)
    except InputError as error:
        if not path:
            raise
        text = re.sub(r"^\w+: ", "", str(error))  # without the name of the class
        raise InputError(f"config: {path}{text}") from None

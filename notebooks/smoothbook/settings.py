"""Reads settings from YAML and JSON into dataclasses, and says what is wrong with them, where, and what would do.

    read_settings(Row, {"name": "a", "sigma": 0.25}, where="peft.yaml, row a")

`where` stands in front of every message: the file, and the part of it. Every message is that of a ValueError.
"""

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast where libyaml is there


def read_yaml(path: str | Path, error: type[ValueError] = ValueError) -> Any:
    """The content of a YAML file; `error` is raised if it is no YAML, or no text at all, and names the file."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(f"{path.name} is no YAML ({str(problem).splitlines()[0]})") from None


def read_settings(
    cls: type[T], settings: Any, *, where: str, parts: Mapping[str, Mapping[str, type]] | None = None
) -> T:
    """A dataclass from a mapping.

    Parameters
    ----------
    cls : dataclass
        Its fields are the keys. Annotations may be plain types, unions, `Literal`, lists, tuples and dicts of these, and
        dataclasses, which are read from mappings in turn.
    settings : mapping
        As YAML or JSON gave it.
    where : str
    parts : mapping, optional
        Dataclasses by name for fields that are chosen by name and whose settings stand beside the others: with
        `{"attack": {"pgd": PGD}}` the settings `{attack: pgd, epsilon: 1}` give the field `attack` a PGD.

    Raises
    ------
    ValueError
        For a key that is unknown (a near one is named) or missing, a value of another type, and what `cls` refuses.
    """
    check_type(where, dict, settings)
    own, given, chosen = _parameters(cls), dict(settings), {}
    for name, kinds in (parts or {}).items():
        if name in own and given.get(name) is not None:
            check_one_of(f"{where}: {name}", given[name], kinds)
            chosen[name] = kinds[given.pop(name)]
    part_of = {key: name for name, kind in chosen.items() for key in _parameters(kind)}
    check_keys(where, given, [*own, *part_of])
    values = check_keywords(where, cls, {k: v for k, v in given.items() if k not in part_of})
    for name, kind in chosen.items():
        values[name] = read_settings(kind, {k: v for k, v in given.items() if part_of.get(k) == name}, where=where)
    missing = [name for name, p in own.items() if p.default is p.empty and name not in values]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_keywords(where: str, function: Callable, settings: Any, *, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Settings that can be keyword arguments of a function or dataclass, by name and type, as `check_type` returns them."""
    check_type(where, dict, settings)
    known = {name: p for name, p in _parameters(function).items() if name not in set(leave_out)}
    check_keys(where, settings, known)
    return {name: check_type(f"{where}: {name}", known[name].annotation, value) for name, value in settings.items()}


def check_fields(instance: Any) -> None:
    """Whether the fields of a dataclass are of their types, for its `__post_init__`."""
    for field in dataclasses.fields(instance):
        check_type(field.name, field.type, getattr(instance, field.name))


def check_keys(where: str, settings: Iterable, known: Iterable[str]) -> None:
    """Whether all keys are known; the message names a near one, or all."""
    known = list(known)
    for key in settings:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {_remedy(key, known, 'there are')}")


def check_one_of(name: str, value: Any, known: Iterable, *, error: type[ValueError] = ValueError) -> None:
    """Whether a value is among those known; the message names a near one, or all."""
    known = list(known)
    if value not in known:
        raise error(f"{name} {value!r} is unknown; {_remedy(value, known, 'choose one of')}")


def check_type(name: str, wanted: Any, value: Any) -> Any:
    """The value, if it is of a type as annotations have it; a list becomes a tuple, a mapping a dataclass, where that is wanted.

    A whole number will do for a float, a Boolean for no number, and a number that is not finite for nothing.
    """
    if wanted in (inspect.Parameter.empty, Any):
        return value
    options = typing.get_args(wanted) if typing.get_origin(wanted) in (types.UnionType, typing.Union) else (wanted,)
    choices = [choice for t in options if typing.get_origin(t) is typing.Literal for choice in typing.get_args(t)]
    if choices and isinstance(value, str):
        check_one_of(name, value, choices)
        return value
    plain = [str if typing.get_origin(t) is typing.Literal else typing.get_origin(t) or t for t in options]
    if isinstance(value, dict) and (found := next(filter(dataclasses.is_dataclass, plain), None)):
        return read_settings(found, value, where=name)
    also = {float: int, tuple: list}
    allowed = (*plain, *(also[t] for t in plain if t in also))
    if (isinstance(value, bool) and bool not in plain) or not isinstance(value, allowed):
        words = " or ".join("nothing" if t is type(None) else t.__name__ for t in plain)
        text = isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value)
        hint = f"; YAML reads {value} as text, write {float(value)!r}" if text else ""
        raise ValueError(f"{name} must be {words}, got {value!r}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must lie below 2**63, got {value}")
    return _elements(name, options, value)


def _elements(name: str, options: Iterable, value: Any) -> Any:
    """A list, tuple or dict with its elements checked, where the annotation says what they are."""
    for option in options:
        origin, of = typing.get_origin(option) or option, typing.get_args(option)
        if origin is dict and of and isinstance(value, dict):
            keys = [check_type(f"a key of {name}", of[0], key) for key in value]
            return {key: check_type(f"{name}: {key}", of[1], value[key]) for key in keys}
        if origin in (list, tuple) and isinstance(value, list | tuple):
            return origin(check_type(f"{name}[{i}]", of[0] if of else Any, element) for i, element in enumerate(value))
    return value


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """What a function or dataclass takes by name."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind in kinds}


def _remedy(value: Any, known: Iterable, otherwise: str) -> str:
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(names) or 'none'}"

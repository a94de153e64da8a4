"""Settings that come from YAML and JSON: read into dataclasses, with errors that say what is wrong and where."""

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml


class RowError(ValueError):
    """A row that cannot be read; the message names the file, the row and what would do."""


def read_yaml(path: Path, error: type[ValueError] = RowError, loader: type = yaml.SafeLoader) -> typing.Any:
    """What a YAML file holds.

    Raises
    ------
    error
        If it is no YAML, or no text at all; it names the file.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(f"{path.name} is no YAML ({str(problem).splitlines()[0]})") from None


def _check_keys(where: str, settings: dict, known: Sequence[str]) -> None:
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise RowError(f"{where}unknown key {key!r}; {hint}")


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise RowError(f"{name} {value!r} is unknown; {hint}")


# --- checks of arguments, shared by all who take them ------------------------------------------------


def check_type(name: str, wanted: typing.Any, value: typing.Any) -> None:
    """Whether a value read from YAML or JSON is of a type as annotations have it; a list will do for a tuple.

    Raises
    ------
    ValueError
        Also for a number that is not finite.
    """
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    plain = [typing.get_origin(t) or t for t in options]
    also = {float: int, tuple: list}
    allowed = (*plain, *(also[t] for t in plain if t in also))
    if (isinstance(value, bool) and bool not in plain) or not isinstance(value, allowed):
        words = " or ".join("nothing" if t is type(None) else t.__name__ for t in plain)
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
            hint = f"; YAML reads {value} as text, write {float(value)!r}"
        raise ValueError(f"{name} must be {words}, got {value!r}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must lie below 2**63, got {value}")


def check_keywords(what: str, function: Callable, settings: dict, *, leave_out: Iterable[str] = ()) -> None:
    """Whether settings read from a file can be the keyword arguments of a function or dataclass, by name and type.

    Raises
    ------
    ValueError
        Names the setting and what there is.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{what} must map settings to values, got {settings!r}")
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind in kinds and p.name not in set(leave_out)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{what}: unknown key {name!r}; there are {', '.join(known)}")
        check_type(f"{what}: {name}", known[name].annotation, value)

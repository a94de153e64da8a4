"""The one reader of settings: dataclasses from mappings, and errors that name place, key, value and remedy."""

import dataclasses
from typing import Literal

import pytest

from smoothbook.settings import check_keywords, read_settings, read_yaml


@dataclasses.dataclass(frozen=True)
class Inner:
    epsilon: float
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class Other:
    gamma: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["low", "high"] | None = None
    sizes: tuple[int, ...] = ()
    by_name: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    attack: Inner | Other | None = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("bad is no name")


PARTS = {"attack": {"pgd": Inner, "ddn": Other}}


def read(settings):
    return read_settings(Outer, settings, where="f.yaml, row 1", parts=PARTS)


def test_lists_mappings_and_parts_become_what_the_fields_want():
    found = read({"name": "a", "kind": "low", "sizes": [1, 2], "inner": {"epsilon": 1}, "attack": "pgd", "epsilon": 2})
    assert found == Outer("a", "low", (1, 2), inner=Inner(1), attack=Inner(2))
    assert read({"name": "a", "attack": "ddn", "gamma": 0.1}).attack == Other(0.1)
    assert read({"name": "a", "attack": None, "kind": None}) == Outer("a")
    assert type(read({"name": "a", "inner": {"epsilon": 1}}).inner.epsilon) is int  # as written: digests depend on it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([1], "f.yaml, row 1 must be dict, got [1]"),
        ({}, "f.yaml, row 1: name is missing"),
        ({"nam": "a"}, "f.yaml, row 1: unknown key 'nam'; did you mean 'name'?"),
        ({"name": "a", 3: 4}, "unknown key 3; there are name, kind, sizes, by_name, inner, attack"),
        ({"name": 3}, "f.yaml, row 1: name must be str, got 3"),
        ({"name": "bad"}, "f.yaml, row 1: bad is no name"),
        ({"name": "a", "kind": "lo"}, "kind 'lo' is unknown; did you mean 'low'?"),
        ({"name": "a", "kind": 1}, "kind must be str or nothing, got 1"),
        ({"name": "a", "sizes": [1, True]}, "sizes[1] must be int, got True"),
        ({"name": "a", "sizes": 1}, "sizes must be tuple, got 1"),
        ({"name": "a", "sizes": [2**63]}, "sizes[0] must lie below 2**63"),
        ({"name": "a", "by_name": {"x": [1, float("inf")]}}, "by_name: x[1] must be finite, got inf"),
        ({"name": "a", "by_name": {1: []}}, "a key of f.yaml, row 1: by_name must be str, got 1"),
        ({"name": "a", "inner": {"steps": 3}}, "f.yaml, row 1: inner: epsilon is missing"),
        ({"name": "a", "inner": {"epsilon": "1e-3"}}, "epsilon must be float, got '1e-3'; YAML reads 1e-3 as text, write 0.001"),
        ({"name": "a", "inner": {"epsilon": None}}, "inner: epsilon must be float, got None"),
        ({"name": "a", "attack": "fgsm"}, "attack 'fgsm' is unknown; choose one of pgd, ddn"),
        ({"name": "a", "attack": "ddn", "epsilon": 1}, "unknown key 'epsilon'; there are name"),
        ({"name": "a", "epsilon": 1}, "unknown key 'epsilon'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place_and_what_would_do(settings, message):
    with pytest.raises(ValueError) as error:
        read(settings)
    assert message in str(error.value)


def test_keyword_arguments_of_a_function():
    def function(base, *, widths: tuple[int, ...] | None = None, rate: float = 1.0):
        pass

    assert check_keywords("f", function, {"widths": [1, 2], "base": object}) == {"widths": (1, 2), "base": object}
    with pytest.raises(ValueError, match="f: unknown key 'base'"):
        check_keywords("f", function, {"base": 1}, leave_out=("base",))


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"\0"])
def test_what_is_no_yaml_is_named(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml is no YAML"):
        read_yaml(tmp_path / "a.yaml")

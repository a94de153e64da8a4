"""Benchmarks say what they measured, and keep it."""

import json

import numpy as np
import pytest

from smoothkit.bench import _compare
from smoothkit.cli import main


def test_samples_on_known_probabilities():
    """Easy images stop at the first look, hopeless ones too; close ones run on; accuracy stays."""
    easy = _compare(np.array([0.9999, 0.3]), np.array([True, True]), sigma=0.5, r=0.25, kind="hybrid")
    assert easy["mean"] == easy["median"] == 100 and easy["ratio"] == pytest.approx(100_100 / 200)
    assert easy["fixed"] == easy["sequential"] == 0.5
    close = _compare(np.array([0.6915]), np.array([True]), sigma=0.5, r=0.25, kind="hybrid")
    assert close["mean"] > 50_000


def test_samples_on_published_logs(public_data, tmp_path, capsys):
    assert main(["bench", "samples", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "samples-quick.json").read_text())
    assert out.splitlines()[-1] == f"samples ratio={saved['ratio']:.2f}" and saved["ratio"] >= 28
    for row in saved["rows"]:
        assert abs(row["fixed"] - row["sequential"]) <= 0.002
        if row["data"] == "imagenet" and row["sigma"] == "all":
            assert row["ratio"] >= 40


def test_samples_without_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    assert main(["bench", "samples"]) == 2
    assert "needs the published logs" in capsys.readouterr().err

"""Votes -> certificates. The functions need counts only; `Smoothed`, which samples them, brings torch along."""

from typing import TYPE_CHECKING

from smoothkit.certify.fixed import certificates, certify_votes, predict_votes

if TYPE_CHECKING:
    from smoothkit.certify.smoothed import Smoothed

__all__ = ["Smoothed", "certificates", "certify_votes", "predict_votes"]


def __getattr__(name: str):
    if name == "Smoothed":
        from smoothkit.certify.smoothed import Smoothed

        return Smoothed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Votes -> certificates."""

from smoothkit.certify.fixed import certificates, certify_votes, predict_votes
from smoothkit.certify.smoothed import Smoothed

__all__ = ["Smoothed", "certificates", "certify_votes", "predict_votes"]

"""From counts to certificates: NumPy and SciPy, no torch, no sampling."""

from smoothkit.certify.fixed import certify_votes, predict_votes
from smoothkit.certify.sequential import sequential_rule
from smoothkit.certify.table import cascade_certificates, certificates, error_rates

__all__ = ["cascade_certificates", "certificates", "certify_votes", "error_rates", "predict_votes", "sequential_rule"]

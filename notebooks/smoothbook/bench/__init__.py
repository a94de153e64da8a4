"""Benchmarks: ratios measured side by side in one run, saved with machine and versions.

`measure` says how; `samples` is a simulation on probabilities recovered from published logs, and does not depend
on the machine.
"""

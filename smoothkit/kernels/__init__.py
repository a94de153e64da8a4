"""Noise with the same bits on every device, and vote counting.

`noise` explains the format and makes the noise; `philox` is its definition in NumPy, `noise_numba` and `noise_triton` are
faster backends. `noise_exact` is the rounded Gaussian without an approximation. `votes` counts; `votes_triton` does it
on a CUDA device.
"""

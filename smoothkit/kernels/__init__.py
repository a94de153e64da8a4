"""Noise with the same bits on every device, and vote counting.

`philox` and `noise` hold the format and its reference in NumPy; `noise_numba` and `noise_triton` are faster roads to the
same bits. `votes` counts; `votes_triton` does it on a CUDA device.
"""

"""What holds whatever goes in: properties of every public callable, room by room, in one registry.

Properties are written with hypothesis: a function gives a result that keeps its promise, or raises a ValueError or OSError
of one line, whatever number, text, array, JSON or YAML goes in. `make fuzz` tries many inputs, the tests a few.
"""

from properties import (
    adapters,
    certify,
    commands,
    denoise,
    figures,
    images,
    panels,
    reading,
    records,
    sampling,
    sigma,
    tables,
    training,
)
from properties.inputs import PROPERTIES, REFUSALS, TRIED

ROOMS = (
    certify, images, records, sampling, reading, adapters, training, figures, denoise, sigma, tables, panels, commands,
)  # fmt: skip
__all__ = ["PROPERTIES", "REFUSALS", "ROOMS", "TRIED"]

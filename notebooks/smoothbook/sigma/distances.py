"""L2 distances of images with a known rounding error, and exact ones where that error leaves a question open.

Distances are taken by explicit differences in float64. The shortcut |x|² + |y|² - 2 x·y of matrix products loses all
digits between near images: 21% for float32 images of 3,072 values that are 0.055 apart.
"""

import math
from fractions import Fraction

import numpy as np

VALUES_AT_ONCE = 2**20  # of a difference: what stays in the cache
_whole_numbers = np.frompyfunc(int, 1, 1)  # of Python, which have no largest one


def squared_distances(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """|x - points[i]|² as float64 [N], for float32 x [d] and points [N, d]; see `relative_error`."""
    x = x.astype(np.float64)
    out = np.empty(len(points))
    rows = max(1, VALUES_AT_ONCE // max(1, len(x)))
    for low in range(0, len(points), rows):
        difference = points[low : low + rows] - x  # float64: a difference of float32 values rounded at most once
        out[low : low + rows] = np.einsum("ij,ij->i", difference, difference)
    return out


def distances(x: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from x to points rounded down and rounded up: float64 [N] each, the true one between them."""
    d = np.sqrt(squared_distances(x, points))
    error = relative_error(len(x))
    return d * (1 - error), d * (1 + error)


def relative_error(num_values: int) -> float:
    """A bound on the relative error of a distance of `num_values` differences, whatever the order of the sum.

    With u = 2**-53 each square is wrong by 3u at most, and the sum of d of them by (d - 1) u more; the root halves this
    and adds u; `1 - error` and the product with it add 2u. That is (d / 2 + 4) u, and this is four times as much.
    """
    return (num_values + 8) * 2.0**-52


def exact_squared_distance(x: np.ndarray, y: np.ndarray) -> Fraction:
    """|x - y|² of float32 vectors [d] without rounding: each of their values is a whole multiple of 2**-149."""
    a, b = (_whole_numbers(v.astype(np.float64) * 2.0**149) for v in (x, y))
    return Fraction(int((a - b) @ (a - b)), 2**298)


def root_below(square: Fraction) -> float:
    """The square root of a number of at least 0: never above it, two floats below at most, the same on every machine."""
    root = math.sqrt(square)  # of the nearest float
    while Fraction(root) ** 2 > square:
        root = math.nextafter(root, 0.0)
    return root


def inside(x: np.ndarray, points: np.ndarray, radii: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether x lies in the open balls B(points[i], radii[i]): bool [N], decided exactly; `low, high = distances(x, points)`."""
    answer = high < radii
    for i in np.flatnonzero((low < radii) & ~answer):
        answer[i] = exact_squared_distance(x, points[i]) < Fraction(float(radii[i])) ** 2
    return answer


class NormFilter:
    """A map of images to a few numbers that never lengthens a distance: what is far there is far.

    The norms of consecutive segments of an image. By the reverse triangle inequality on each segment,
    | |x_s| - |y_s| | <= |x_s - y_s|, so the distance of two such vectors is a lower bound on that of the images.
    """

    def __init__(self, num_values: int, segments: int = 64) -> None:
        self.starts = np.linspace(0, num_values, min(segments, num_values), endpoint=False).astype(np.intp)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float64 [segments] of a float32 vector [d]."""
        return np.sqrt(np.add.reduceat(x.astype(np.float64) ** 2, self.starts))

    @staticmethod
    def lower_bounds(norms: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Lower bounds on the distances from one image (norms [segments]) to others [N, segments], with room for rounding."""
        difference = kept - norms
        bound = np.sqrt(np.einsum("ij,ij->i", difference, difference))
        # what is rounded is of the size of the images' norms, and theirs is at most this one's plus the bound
        return bound * (1 - 2e-9) - 2e-9 * np.sqrt(norms @ norms)

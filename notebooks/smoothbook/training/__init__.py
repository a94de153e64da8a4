"""Training under noise: losses, schedules of sigma, a fit loop, and a gradient-free one."""

from smoothbook.training.fit import FitSettings, fit
from smoothbook.training.gradient_free import SPSA, GradientFreeSettings, fit_gradient_free
from smoothbook.training.losses import MACER, Consistency, Gaussian, NoiseLevel, SmoothAdv, Stability
from smoothbook.training.run import Fitted, TrainingDiverged
from smoothbook.training.schedules import Curriculum, Fixed, Grid, Mixture, Uniform, crop_and_flip, parse

LOSSES = {
    "gaussian": Gaussian,
    "smoothadv": SmoothAdv,
    "macer": MACER,
    "consistency": Consistency,
    "stability": Stability,
    "noise-level": NoiseLevel,
}

__all__ = [
    "LOSSES", "MACER", "SPSA", "Consistency", "Curriculum", "FitSettings", "Fitted", "Fixed", "Gaussian",
    "GradientFreeSettings", "Grid", "Mixture", "NoiseLevel", "SmoothAdv", "Stability", "TrainingDiverged", "Uniform",
    "crop_and_flip", "fit", "fit_gradient_free", "parse",
]  # fmt: skip

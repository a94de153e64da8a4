"""Denoise, then classify: a denoiser in front of a classifier that never saw noise."""

from smoothbook.denoise.calibrate import Calibration, calibrate, denoise_at
from smoothbook.denoise.chain import DenoisedClassifier, Denoiser, Identity, psnr
from smoothbook.denoise.diffusion import (
    DiffusionDenoiser,
    Timestep,
    alphas_bar_of,
    load_diffusion,
    schedule_sigmas,
    timestep_for,
)
from smoothbook.denoise.trained import Denoising, DnCNN, fit_denoiser, load_denoiser

__all__ = [
    "Calibration", "DenoisedClassifier", "Denoiser", "Denoising", "DiffusionDenoiser", "DnCNN", "Identity", "Timestep", "alphas_bar_of",
    "calibrate", "denoise_at", "fit_denoiser", "load_denoiser", "load_diffusion", "psnr", "schedule_sigmas", "timestep_for",
]  # fmt: skip

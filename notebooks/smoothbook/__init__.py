"""The notebooks' own package: fine-tuning, sigma selection, diffusion denoising, radius visualisation, and the runner.

`smoothkit` holds what certifies; nothing there imports this package.
"""

"""What a fitted pair is good for: telling anomalies, imputing, denoising, moving latents."""

from ppl_vae.uses.anomaly import AnomalyScores, Detection, anomaly_scores, detection
from ppl_vae.uses.arithmetic import (
    Direction,
    analogy,
    analogy_figure,
    attribute_direction,
    shift,
    shift_figure,
)
from ppl_vae.uses.denoising import Denoised, denoise
from ppl_vae.uses.imputation import Imputed, impute

__all__ = [
    "AnomalyScores",
    "Denoised",
    "Detection",
    "Direction",
    "Imputed",
    "analogy",
    "analogy_figure",
    "anomaly_scores",
    "attribute_direction",
    "denoise",
    "detection",
    "impute",
    "shift",
    "shift_figure",
]

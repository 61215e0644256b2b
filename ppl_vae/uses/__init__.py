"""What a fitted pair is good for: telling anomalies, imputing, denoising, moving latents."""

from ppl_vae.uses.anomaly import AnomalyScores, Detection, anomaly_scores, detection
from ppl_vae.uses.denoising import Denoised, denoise
from ppl_vae.uses.imputation import Imputed, impute

__all__ = [
    "AnomalyScores",
    "Denoised",
    "Detection",
    "Imputed",
    "anomaly_scores",
    "denoise",
    "detection",
    "impute",
]

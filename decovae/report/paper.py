"""The paper's Tables 1 to 5, as printed (Jang et al.), to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping

from decovae.report.models import AFTER, BEFORE, Phase

Key = tuple[str, Phase]
"""A decorrelation loss, and whether the decoder was fine-tuned (DFT)."""

LATENTS: Mapping[str, tuple[float, float]] = {"none": (0.2292, 3.22), "sid": (0.1148, 3.37), "vad": (0.0971, 3.97)}
"""Table 1: cosine similarity and effective rank."""

QUALITY: Mapping[Key, tuple[float, ...]] = {
    ("none", BEFORE): (32.80, 0.971, 0.027, 6.426, 6.566, 7.808, 5.424, 6.599),
    ("none", AFTER): (32.99, 0.969, 0.025, 6.243, 6.577, 7.850, 5.356, 6.594),
    ("sid", BEFORE): (33.47, 0.980, 0.024, 6.240, 6.380, 7.719, 4.983, 6.361),
    ("sid", AFTER): (33.77, 0.981, 0.022, 5.822, 6.102, 7.498, 4.431, 6.010),
    ("vad", BEFORE): (33.17, 0.978, 0.025, 6.251, 6.270, 7.651, 4.886, 6.269),
    ("vad", AFTER): (33.64, 0.979, 0.023, 5.946, 6.014, 7.485, 4.413, 5.971),
    ("cov", AFTER): (33.77, 0.963, 0.024, 6.015, 6.334, 7.644, 4.789, 6.256),
}
"""Table 4, and Table 5's row on COV: PSNR, SSIM, LPIPS, average rFID; gFID axial, coronal, sagittal and average.

Tables 2 and 3 take from it the baseline before fine-tuning, and SID and VAD after it; Table 5 all after it."""

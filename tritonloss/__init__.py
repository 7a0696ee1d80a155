"""Exact, stable, fused losses for training object detectors."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():
    # A checkout that is not installed keeps the kernels one folder up.
    __path__.append(str(_Path(__file__).parent.parent))

from ._dispatch import backend, show_config
from ._version import __version__
from .losses.elementwise import (
    focal_star_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)
from .losses.ghm import authentic_smooth_l1_loss, ghm_c_loss, ghm_r_loss
from .losses.prime_sample import carl_loss, iou_hlr, isr_p_weight
from .modules import CARLLoss, GHMCLoss, GHMRLoss

__all__ = [
    "CARLLoss",
    "GHMCLoss",
    "GHMRLoss",
    "__version__",
    "authentic_smooth_l1_loss",
    "backend",
    "carl_loss",
    "focal_star_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "iou_hlr",
    "isr_p_weight",
    "quality_focal_loss",
    "show_config",
    "sigmoid_focal_loss",
    "varifocal_loss",
]

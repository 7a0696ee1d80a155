"""Exact, stable, fused losses for training object detectors."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():
    # A checkout that is not installed keeps the kernels one folder up.
    __path__.append(str(_Path(__file__).parent.parent))

from ._dispatch import backend, show_config
from ._version import __version__
from .losses.boxes import ciou_loss, diou_loss, giou_loss, iou_loss
from .losses.distribution import distribution_expectation, distribution_focal_loss
from .losses.elementwise import (
    class_balanced_weight,
    focal_star_loss,
    generalized_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
    varifocal_loss,
)

__all__ = [
    "__version__",
    "backend",
    "ciou_loss",
    "class_balanced_weight",
    "diou_loss",
    "distribution_expectation",
    "distribution_focal_loss",
    "focal_star_loss",
    "generalized_focal_loss",
    "giou_loss",
    "iou_loss",
    "quality_focal_loss",
    "show_config",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]

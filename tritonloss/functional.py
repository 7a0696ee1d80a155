"""The loss functions: the same objects as in ``tritonloss`` itself."""

from .losses.elementwise import (
    focal_star_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)

__all__ = [
    "focal_star_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "varifocal_loss",
]

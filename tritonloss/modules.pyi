"""Written by tools/stubs.py."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ._levels import Levels, LevelTargets
from .losses.ranking import ALRP, RankSort

class FocalLoss(nn.Module):
    alpha: float | Tensor | None
    gamma: float | Tensor
    label_smoothing: float | Tensor
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        alpha: float | Tensor | None = 0.25,
        gamma: float | Tensor = 2.0,
        label_smoothing: float | Tensor = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class FocalStarLoss(nn.Module):
    gamma: float | Tensor
    beta: float | Tensor
    alpha: float | Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        gamma: float | Tensor = 2.0,
        beta: float | Tensor = 1.0,
        alpha: float | Tensor | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class QualityFocalLoss(nn.Module):
    beta: float | Tensor
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        beta: float | Tensor = 2.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class VarifocalLoss(nn.Module):
    alpha: float | Tensor
    gamma: float | Tensor
    iou_weighted: bool
    detach_weight: bool
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.75,
        gamma: float | Tensor = 2.0,
        iou_weighted: bool = True,
        detach_weight: bool = False,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class GaussianFocalLoss(nn.Module):
    alpha: float | Tensor
    beta: float | Tensor
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 4.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class AsymmetricLoss(nn.Module):
    gamma_pos: float | Tensor
    gamma_neg: float | Tensor
    margin: float | Tensor
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        gamma_pos: float | Tensor = 1.0,
        gamma_neg: float | Tensor = 4.0,
        margin: float | Tensor = 0.05,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class BCELoss(nn.Module):
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class MALLoss(nn.Module):
    gamma: float | Tensor
    alpha: float | Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        gamma: float | Tensor = 1.5,
        alpha: float | Tensor | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: tuple[Levels, Levels],
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: tuple[Levels, Levels],
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class IoUAwareBCELoss(nn.Module):
    alpha: float | Tensor
    gamma: float | Tensor
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.25,
        gamma: float | Tensor = 2.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: tuple[Levels, Levels],
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: tuple[Levels, Levels],
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class SoftmaxFocalLoss(nn.Module):
    alpha: Tensor | None
    gamma: float | Tensor
    ignore_index: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        alpha: Tensor | None = None,
        gamma: float | Tensor = 2.0,
        ignore_index: int = -1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        labels: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        labels: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class DistributionFocalLoss(nn.Module):
    sides: int
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        sides: int = 1,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class DistributionDistillationLoss(nn.Module):
    temperature: float | Tensor
    reduction: str
    class_dim: int
    def __init__(
        self,
        *,
        temperature: float | Tensor = 5.0,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        teacher: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        teacher: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class Integral(nn.Module):
    sides: int
    class_dim: int
    def __init__(
        self,
        *,
        sides: int = 1,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
    ) -> Tensor: ...

class IoULoss(nn.Module):
    mode: str
    eps: float | Tensor
    reduction: str
    class_dim: int
    gradient_to_target: bool
    def __init__(
        self,
        *,
        mode: str = "linear",
        eps: float | Tensor = 1e-07,
        reduction: str = "mean",
        class_dim: int = -1,
        gradient_to_target: bool = False,
    ) -> None: ...
    def forward(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class GIoULoss(nn.Module):
    eps: float | Tensor
    reduction: str
    class_dim: int
    gradient_to_target: bool
    def __init__(
        self,
        *,
        eps: float | Tensor = 1e-07,
        reduction: str = "mean",
        class_dim: int = -1,
        gradient_to_target: bool = False,
    ) -> None: ...
    def forward(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class DIoULoss(nn.Module):
    eps: float | Tensor
    reduction: str
    class_dim: int
    gradient_to_target: bool
    def __init__(
        self,
        *,
        eps: float | Tensor = 1e-07,
        reduction: str = "mean",
        class_dim: int = -1,
        gradient_to_target: bool = False,
    ) -> None: ...
    def forward(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class EIoULoss(nn.Module):
    eps: float | Tensor
    reduction: str
    class_dim: int
    gradient_to_target: bool
    def __init__(
        self,
        *,
        eps: float | Tensor = 1e-07,
        reduction: str = "mean",
        class_dim: int = -1,
        gradient_to_target: bool = False,
    ) -> None: ...
    def forward(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class CIoULoss(nn.Module):
    eps: float | Tensor
    alpha_threshold: float | Tensor
    reduction: str
    class_dim: int
    gradient_to_target: bool
    def __init__(
        self,
        *,
        eps: float | Tensor = 1e-07,
        alpha_threshold: float | Tensor = 0.5,
        reduction: str = "mean",
        class_dim: int = -1,
        gradient_to_target: bool = False,
    ) -> None: ...
    def forward(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

class RankSortLoss(nn.Module):
    delta: float | Tensor
    ignore_index: int
    num_groups: int | None
    process_group: ProcessGroup | None
    capacity: int | None
    gradients_averaged: bool
    class_dim: int
    def __init__(
        self,
        *,
        delta: float | Tensor = 0.5,
        ignore_index: int = -1,
        num_groups: int | None = None,
        process_group: ProcessGroup | None = None,
        capacity: int | None = None,
        gradients_averaged: bool = False,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        group: Levels | None = None,
    ) -> RankSort: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        group: Levels | None = None,
    ) -> RankSort: ...

class APLoss(nn.Module):
    delta: float | Tensor
    interpolated: bool
    ignore_index: int
    num_groups: int | None
    process_group: ProcessGroup | None
    capacity: int | None
    gradients_averaged: bool
    class_dim: int
    def __init__(
        self,
        *,
        delta: float | Tensor = 1.0,
        interpolated: bool = True,
        ignore_index: int = -1,
        num_groups: int | None = None,
        process_group: ProcessGroup | None = None,
        capacity: int | None = None,
        gradients_averaged: bool = False,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        group: Levels | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        group: Levels | None = None,
    ) -> Tensor: ...

class ALRPLoss(nn.Module):
    delta: float | Tensor
    ignore_index: int
    num_groups: int | None
    process_group: ProcessGroup | None
    capacity: int | None
    gradients_averaged: bool
    class_dim: int
    def __init__(
        self,
        *,
        delta: float | Tensor = 1.0,
        ignore_index: int = -1,
        num_groups: int | None = None,
        process_group: ProcessGroup | None = None,
        capacity: int | None = None,
        gradients_averaged: bool = False,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        localization_error: Levels,
        *,
        weight: Levels | None = None,
        group: Levels | None = None,
    ) -> ALRP: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        localization_error: Levels,
        *,
        weight: Levels | None = None,
        group: Levels | None = None,
    ) -> ALRP: ...

class GHMCLoss(nn.Module):
    bins: int
    momentum: float | Tensor
    bias_correction: bool
    normalize: str
    ignore_index: int
    process_group: ProcessGroup | None
    gradients_averaged: bool
    class_dim: int
    amount: Tensor
    updates: Tensor
    def __init__(
        self,
        *,
        bins: int = 10,
        momentum: float | Tensor = 0.0,
        bias_correction: bool = False,
        normalize: str = "nonempty",
        ignore_index: int = -1,
        process_group: ProcessGroup | None = None,
        gradients_averaged: bool = False,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
    ) -> Tensor: ...

class GHMRLoss(nn.Module):
    mu: float | Tensor
    bins: int
    momentum: float | Tensor
    bias_correction: bool
    normalize: str
    process_group: ProcessGroup | None
    gradients_averaged: bool
    class_dim: int
    amount: Tensor
    updates: Tensor
    def __init__(
        self,
        *,
        mu: float | Tensor = 0.02,
        bins: int = 10,
        momentum: float | Tensor = 0.0,
        bias_correction: bool = False,
        normalize: str = "nonempty",
        process_group: ProcessGroup | None = None,
        gradients_averaged: bool = False,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        pred: Levels,
        target: Levels,
        *,
        weight: Levels | None = None,
    ) -> Tensor: ...

class CARLLoss(nn.Module):
    k: float | Tensor
    bias: float | Tensor
    activation: str
    keep_loss: bool
    class_dim: int
    def __init__(
        self,
        *,
        k: float | Tensor = 1.0,
        bias: float | Tensor = 0.2,
        activation: str = "sigmoid",
        keep_loss: bool = False,
        class_dim: int = -1,
    ) -> None: ...
    def forward(
        self,
        logits: Levels,
        labels: Levels,
        box_loss: Levels,
        *,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...
    def __call__(
        self,
        logits: Levels,
        labels: Levels,
        box_loss: Levels,
        *,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor: ...

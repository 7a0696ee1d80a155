"""What a loss sees of a detector: who holds the loss, who trains, who outranks whom.

A :class:`Diagnosis` counts logits on a grid while a model trains; its :class:`Report` works the
figures out and draws them::

    python -m tritonloss.diagnose LOGITS.npz --out diagnosis

does both for logits in a file, and without a file for a recorded detector.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss._levels import Levels, LevelTargets
from tritonloss.distributed import ProcessGroup, all_reduce, parse_sharing

from ._counting import counted
from ._figures import figures_of
from ._report import Report

__all__ = ["Diagnosis", "Report", "diagnose", "recorded"]


class Diagnosis:
    """Counts what a detector predicts, over any number of batches, for a :class:`Report`.

    For heads whose scores are sigmoids. Logits are rounded to the nearest 1/64 and counted as +-32
    from there on, qualities to the nearest 1/100; all figures are exact for these. (For the
    recorded detector that moves the ranking error by 1e-4 of it, and the sorting error by 3 %:
    boxes with nearly equal IoUs are in no wrong order.) An update costs one read of the logits and
    keeps 3 MB, whatever their number.
    On a GPU it waits for nothing, and can be captured in a CUDA graph if it was called once before.
    It may stand in a compiled step; beside one that is compiled with ``mode="reduce-overhead"``,
    call it on the logits that the step returns, for torch records no graph that changes a counter.

    Args:
        ignore_index: label whose rows do not count.

    Attributes:
        counts: int64 ``(102, 4098)`` on the logits' device, None before the first update. Row 0
            holds the negatives, row 1 + k the positives of quality k/100; the columns are the
            logits, -32 to 32, and the last one what is not finite. Counts of several runs may be
            added.

    Example:
        >>> import torch, tritonloss
        >>> diagnosis = tritonloss.Diagnosis()
        >>> for _ in range(3):
        ...     diagnosis.update(torch.zeros(4, 10), torch.tensor([10, 3, 10, -1]))
        >>> report = diagnosis.read()
        >>> report.figures["summary"]["negatives"], report.figures["summary"]["positives"]
        (87, 3)
    """

    def __init__(self, *, ignore_index: int = -1):
        check.is_index("ignore_index", ignore_index)
        self.ignore_index = ignore_index
        self.counts: Tensor | None = None

    def update(
        self,
        logits: Levels,
        targets: LevelTargets,
        *,
        weight: Levels | None = None,
        class_dim: int = -1,
    ) -> None:
        """Count one batch.

        Args:
            logits: ``(..., C)``, float16, bfloat16, float32 or float64, any strides.
            targets: integer labels ``(...)``, C for background; or a pair ``(labels, quality)``
                with the IoU of each predicted box, for the figures about IoUs; or a floating
                tensor ``(..., C)``: > 0 a positive of this quality, 0 a negative, < 0 ignored.
            weight: ``(...)`` or ``(..., C)``, a mask: what is above 0 counts.
            class_dim: where the logits have their classes; with 1 ``(B, C, H, W)`` is read in
                place.

        Logits may be a list of levels, with targets and weight lists of the same length, a pair two
        lists: all are counted, none is copied.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, device or range.
        """
        counts = counted(logits, targets, weight, self.ignore_index, class_dim)
        if self.counts is None:
            self.counts = counts
        elif self.counts.device != counts.device:
            raise ValueError(
                f"logits are on {counts.device}, but those before were on {self.counts.device}"
            )
        else:
            self.counts += counts

    def read(self, *, bins: int = 30, process_group: ProcessGroup | None = None) -> Report:
        """The figures of all batches so far; waits for the GPU.

        Args:
            bins: unit regions of the gradient norm, 1..256.
            process_group: sum over these processes, which must all call.

        Raises:
            RuntimeError: nothing was counted yet.
        """
        check.is_index("bins", bins)
        if not 1 <= bins <= 256:
            raise ValueError(f"bins must be in 1..256; got {bins}")
        if self.counts is None:
            raise RuntimeError("nothing was counted yet: call update(logits, targets) first")
        counts = self.counts
        if parse_sharing(process_group, False).group:
            counts = all_reduce(counts, "the counts of a diagnosis", process_group)
        with torch.device("cpu"):  # whatever the default device is
            return Report(figures_of(counts.cpu(), bins))

    def reset(self) -> None:
        """Begin anew."""
        self.counts = None


def diagnose(
    logits: Levels,
    targets: LevelTargets,
    *,
    weight: Levels | None = None,
    ignore_index: int = -1,
    bins: int = 30,
    class_dim: int = -1,
) -> Report:
    """The report of one batch; the arguments are those of :class:`Diagnosis`.

    Example:
        >>> import torch
        >>> from tritonloss.diagnose import diagnose
        >>> report = diagnose(torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([0, 1, 0]))
        >>> round(report.figures["ranking"]["average_precision"], 4)  # (1/1 + 2/3) / 2
        0.8333
    """
    diagnosis = Diagnosis(ignore_index=ignore_index)
    diagnosis.update(logits, targets, weight=weight, class_dim=class_dim)
    return diagnosis.read(bins=bins)


def recorded() -> Path:
    """Raw outputs of a trained dense detector, an ``.npz`` that the package ships.

    NanoDet-g on three photographs: ``cls_logits (3, 3549, 80)``, ``labels`` (80 = background),
    ``quality``, ``box_logits (3, 3549, 44)``, ``gt_index``, ``gt_boxes``, ``gt_labels``,
    ``gt_image``, and ``centres`` and ``strides`` of the anchors.
    """
    return Path(__file__).parent / "recorded" / "nanodet_g_416.npz"

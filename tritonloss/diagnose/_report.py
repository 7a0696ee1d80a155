"""A report: figures, what they say in words, and the page with the pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from tritonloss._version import __version__

from ._advice import YOURS, advice_of, percent


class Section(NamedTuple):
    """A picture and what it is read by."""

    picture: str
    title: str
    text: str


SECTIONS = (
    Section(
        "scores",
        "Scores",
        "Logits of negatives and positives, in steps of 1/4, on a logarithmic scale. Where the "
        "curves overlap, a threshold cannot tell them apart.",
    ),
    Section(
        "gradient_norms",
        "Gradient norms",
        "g = |p − y| is the gradient of cross entropy for one logit, y being 1 for a positive and "
        "0 for a negative. GHM counts logits in these regions.",
    ),
    Section(
        "loss_shares",
        "Who holds the loss",
        "Share of the focal loss (1 − p_t)^γ CE that the hardest positives, and the hardest "
        "negatives, hold of their own kind; γ = 0 is cross entropy. The larger γ, the fewer "
        "negatives matter.",
    ),
    Section(
        "gradient_shares",
        "Who trains the detector",
        "Share of the whole gradient, the sum of |dL/dx|, by gradient norm and by kind of logit: "
        "cross entropy, focal loss (α = 0.25, γ = 2), quality focal loss (β = 2) and GHM-C.",
    ),
    Section(
        "outranked",
        "Who outranks the positives",
        "Positives by the number FP of negatives with a higher score; a tie counts as half. The "
        "ranking error of Rank & Sort (δ → 0) is the mean over the positives of FP / (rank⁺ + FP), "
        "rank⁺ being the number of positives from this one up, itself a half.",
    ),
    Section(
        "precision",
        "Precision over rank",
        "All logits by falling score: the share of positives down to each positive, and of all "
        "positives that are found by then. The mean precision at the positives is 1 − AP loss for "
        "δ → 0, not interpolated.",
    ),
    Section(
        "sorting",
        "Are better boxes scored higher?",
        "Of the positives with a lower IoU, the share that stands above a positive, by its IoU; a "
        "tie counts as half. 0 is perfect order, 0.5 chance; the line is the share over all pairs "
        "of positives. The sorting error of Rank & Sort (δ → 0) is the mean over the positives of "
        "how much larger 1 − IoU is among all that stand above than among the better ones above.",
    ),
    Section(
        "calibration",
        "Does the score tell the IoU?",
        "Positives by score: mean IoU of their boxes in each tenth of the score, and all of them "
        "by score and IoU. The calibration error is the mean over the positives of |mean score − "
        "mean IoU| of their tenth. Quality focal and varifocal loss train towards the diagonal.",
    ),
)


def _percent(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


class Report:
    """What :meth:`Diagnosis.read` returns: ``figures``, a dict of plain numbers and lists.

    ``str()`` gives the most telling ones and :meth:`advice`; :meth:`write` draws all.
    """

    def __init__(self, figures: dict[str, Any]):
        self.figures: dict[str, Any] = figures

    def __str__(self) -> str:
        rows = self.overview()
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value, _ in rows]
        advice = [f"* {words}" for words in self.advice()]
        return "\n".join([*lines, *self.remarks(), *advice, *([YOURS] if advice else ())])

    def overview(self) -> list[tuple[str, str, str]]:
        """``(what, value, picture)`` of the most telling figures."""
        found, ranking = self.figures["summary"], self.figures["ranking"]
        above = ranking["outranked"]
        easy = dict.fromkeys(("cross entropy", "focal"))
        if self.figures["gradient_shares"]:
            trained = self.figures["gradient_shares"]["by_kind"]
            easy = {name: list(kinds.values())[-1] for name, kinds in trained.items()}
        rows = [
            ("positives", _number(found["positives"]), "scores"),
            ("negatives", _number(found["negatives"]), "scores"),
            ("negatives for each positive", _number(found["negatives_per_positive"]), "scores"),
            ("mean score of positives", _number(found["mean_p_of_positives"]), "scores"),
            ("mean score of negatives", _number(found["mean_p_of_negatives"]), "scores"),
            ("easy negatives (p < 0.1)", _percent(found["easy_negatives"]), "gradient_norms"),
            ("  share of cross entropy's gradient", _percent(easy["cross entropy"]),
             "gradient_shares"),
            ("  share of focal loss' gradient", _percent(easy["focal"]), "gradient_shares"),
            ("negatives above a positive, median",
             _number(above["quantiles"]["50%"] if above else None), "outranked"),
            ("ranking error (Rank & Sort)", _number(ranking["ranking_error"]), "outranked"),
            ("precision, mean at the positives", _number(ranking["average_precision"]),
             "precision"),
        ]  # fmt: skip
        sorting, calibration = self.figures["sorting"], self.figures["calibration"]
        if sorting:
            rows += [
                ("sorting error (Rank & Sort)", _number(sorting["sorting_error"]), "sorting"),
                ("pairs of positives in wrong order", _percent(sorting["violations"]), "sorting"),
                ("calibration error", _number(calibration["error"]), "calibration"),
            ]
        return rows

    def remarks(self) -> list[str]:
        """Sentences on what the figures leave out."""
        found = self.figures["summary"]
        remarks = []
        if found["not_finite"]:
            remarks.append(
                f"{found['not_finite']:,} logits are not finite and stand in no figure: the loss "
                "of their batches is NaN."
            )
        if not found["positives"] + found["negatives"]:
            remarks.append("Nothing was counted: all labels are ignored, or all weights are 0.")
            return remarks
        if found["at_limit"]:
            remarks.append(
                f"{found['at_limit']:,} logits lie at ±{found['limit']} or beyond, and count as "
                f"±{found['limit']}."
            )
        if 0 <= found["lowest_logit"] < found["highest_logit"] <= 1:
            remarks.append(
                "All logits lie between 0 and 1. Are they probabilities? Logits are what the "
                "sigmoid takes."
            )
        if not found["positives"]:
            remarks.append("There is no positive: nothing can be said about ranks.")
        elif not found["has_quality"]:
            remarks.append(
                "All positives have quality 1, as labels alone give them: nothing can be said "
                "about IoUs."
            )
        return remarks

    def advice(self) -> list[str]:
        """What the figures mean for this model, each with the threshold it is held against.

        The thresholds are rules of thumb; that a loss helps, only a training run shows.
        """
        return advice_of(self.figures)

    def write(self, out: str | Path, title: str = "Diagnosis") -> Path:
        """Write ``index.html``, ``report.json`` and the pictures as PNG into a folder.

        Args:
            out: the folder, made if it is absent.
            title: of the page.

        Returns:
            The path of the page, which holds all it shows.

        Raises:
            ImportError: matplotlib or jinja2 is missing: ``pip install tritonloss[viz]``.
        """
        try:
            import jinja2

            from ._pictures import pictures_of
        except ImportError as error:
            raise ImportError(
                f"drawing a report needs {error.name}: pip install 'tritonloss[viz]'"
            ) from error
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        encoded = {}
        for name, figure in pictures_of(self.figures).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            (out / f"{name}.png").write_bytes(buffer.getvalue())
            encoded[name] = base64.b64encode(buffer.getvalue()).decode()
        text = json.dumps(self.figures, indent=1, allow_nan=False)
        (out / "report.json").write_text(text + "\n")
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("tritonloss.diagnose"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["number"] = _number
        page = out / "index.html"
        page.write_text(
            environment.get_template("report.html").render(
                title=title,
                report=self,
                yours=YOURS,
                tables=tables_of(self.figures),
                sections=[s for s in SECTIONS if s.picture in encoded],
                pictures=encoded,
                version=__version__,
            ),
            encoding="utf-8",
        )
        return page


class Table(NamedTuple):
    """The figures behind a picture: a head and rows of words and numbers."""

    head: tuple[str, ...]
    rows: list[tuple]
    note: str = ""  # what it leaves out


SOME = " (some of the rows; report.json has all)"


def tables_of(figures: dict) -> dict[str, Table]:
    """Picture -> its table."""
    scores, norms, losses = (figures[k] for k in ("scores", "gradient_norms", "loss_shares"))
    shares, ranking = figures["gradient_shares"], figures["ranking"]
    found = {
        "scores": Table(
            ("logits from", "to", "negatives", "positives"),
            _by_edges(scores["logit_edges"], scores["negatives"], scores["positives"]),
        ),
        "gradient_norms": Table(
            ("g from", "to", "negatives", "positives"),
            _by_edges(norms["edges"], norms["negatives"], norms["positives"]),
        ),
        "loss_shares": Table(
            ("hardest fraction of the", "", *(f"γ = {g:g}" for g in losses["gammas"])),
            [
                (kind, *row)
                for kind in ("positives", "negatives")
                if losses[kind]
                for row in _every(
                    10, losses[kind]["hardest_fraction"], *losses[kind]["share_of_loss"]
                )
            ],
            SOME,
        ),
    }
    if shares:
        kinds, regions = shares["by_kind"], shares["by_region"]
        rows = [(kind, *(of[kind] for of in kinds.values())) for kind in next(iter(kinds.values()))]
        for a, b, *values in _by_edges(shares["edges"], *regions.values()):
            rows.append((f"g from {a:.3g} to {b:.3g}", *values))
        found["gradient_shares"] = Table(("", *kinds), rows)
    if ranking["outranked"]:
        above, curve = ranking["outranked"], ranking["curve"]
        found["outranked"] = Table(
            ("negatives above, from", "to below", "positives"),
            _by_edges(above["edges"], above["positives"]),
        )
        columns = ("logit", "positives", "rank", "precision", "recall")
        step = len(curve["rank"]) // 40 + 1
        rows = _every(step, *(curve[c] for c in columns))
        found["precision"] = Table(columns, rows, SOME if step > 1 else "")
    if figures["sorting"]:
        sorting, calibration = figures["sorting"], figures["calibration"]
        found["sorting"] = Table(
            ("IoU from", "to", "positives", "worse above", "sorting error"),
            _by_edges(
                sorting["iou_edges"],
                sorting["positives"],
                sorting["violations_by_iou"],
                sorting["error_by_iou"],
            ),
        )
        found["calibration"] = Table(
            ("score from", "to", "positives", "mean score", "mean IoU"),
            _by_edges(
                calibration["score_edges"],
                calibration["positives"],
                calibration["mean_score"],
                calibration["mean_iou"],
            ),
        )
    return found


def _every(step: int, *columns) -> list[tuple]:
    """Every step-th row, and the last one."""
    rows = list(zip(*columns, strict=True))
    return [row for k, row in enumerate(rows) if k % step == 0 or k == len(rows) - 1]


def _by_edges(edges, *columns) -> list[tuple]:
    return list(zip(edges[:-1], edges[1:], *columns, strict=True))

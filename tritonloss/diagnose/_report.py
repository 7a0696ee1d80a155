"""A report: figures, what they say in words, and the page with the pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

from tritonloss._version import __version__


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
        "Positives by the number of negatives with a higher score; a tie counts as half. Ranking "
        "losses count these.",
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
        "tie counts as half. 0 is perfect order, 0.5 chance.",
    ),
    Section(
        "calibration",
        "Does the score tell the IoU?",
        "Positives by score: mean IoU of their boxes in each tenth of the score, and all of them "
        "by score and IoU. Quality focal loss and varifocal loss train towards the diagonal.",
    ),
)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


class Report:
    """What :meth:`Diagnosis.read` returns: ``figures``, a dict of plain numbers and lists.

    ``str()`` gives the most telling ones; :meth:`write` draws all.
    """

    def __init__(self, figures: dict):
        self.figures = figures

    def __str__(self) -> str:
        rows = self.overview()
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, *self.remarks()])

    def overview(self) -> list[tuple[str, str]]:
        """``(what, value)`` of the most telling figures."""
        found, ranking = self.figures["summary"], self.figures["ranking"]
        trained = self.figures["gradient_shares"]["by_kind"]
        easy = {name: list(kinds.values())[-1] for name, kinds in trained.items()}
        rows = [
            ("positives", _number(found["positives"])),
            ("negatives", _number(found["negatives"])),
            ("negatives for each positive", _number(found["negatives_per_positive"])),
            ("easy negatives (p < 0.1)", _percent(found["easy_negatives"])),
            ("  share of cross entropy's gradient", _percent(easy["cross entropy"])),
            ("  share of focal loss' gradient", _percent(easy["focal"])),
            ("mean score of positives", _number(found["mean_p_of_positives"])),
            ("mean score of negatives", _number(found["mean_p_of_negatives"])),
            ("precision, mean at the positives", _number(ranking["average_precision"])),
            ("ranking error (Rank & Sort)", _number(ranking["ranking_error"])),
        ]
        if ranking["outranked"]:
            median = ranking["outranked"]["quantiles"]["50%"]
            rows.append(("negatives above a positive, median", _number(median)))
        if self.figures["sorting"]:
            rows += [
                ("sorting error (Rank & Sort)", _number(self.figures["sorting"]["sorting_error"])),
                ("worse positives ranked above", _percent(self.figures["sorting"]["violations"])),
                ("mean |score − IoU| by score", _number(self.figures["calibration"]["error"])),
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
        if found["at_limit"]:
            remarks.append(
                f"{found['at_limit']:,} logits lie at ±{found['limit']} or beyond, and count as "
                f"±{found['limit']}."
            )
        if not found["positives"]:
            remarks.append("There is no positive: nothing can be said about ranks.")
        elif not found["has_quality"]:
            remarks.append(
                "All positives have quality 1, as labels alone give them: nothing can be said "
                "about IoUs."
            )
        return remarks

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
                (
                    kind,
                    losses[kind]["hardest_fraction"][k],
                    *(curve[k] for curve in losses[kind]["share_of_loss"]),
                )
                for kind in ("positives", "negatives")
                if losses[kind]
                for k in range(0, len(losses[kind]["hardest_fraction"]), 10)
            ],
        ),
        "gradient_shares": Table(
            ("", *shares["by_kind"]),
            [
                (kind, *(kinds[kind] for kinds in shares["by_kind"].values()))
                for kind in next(iter(shares["by_kind"].values()))
            ]
            + [
                (f"g from {a:.3g} to {b:.3g}", *values)
                for a, b, *values in _by_edges(shares["edges"], *shares["by_region"].values())
            ],
        ),
    }
    if ranking["outranked"]:
        above, curve = ranking["outranked"], ranking["curve"]
        found["outranked"] = Table(
            ("negatives above, from", "to below", "positives"),
            _by_edges(above["edges"], above["positives"]),
        )
        columns = ("logit", "positives", "rank", "precision", "recall")
        rows = list(zip(*(curve[c] for c in columns), strict=True))
        found["precision"] = Table(columns, rows[:: max(len(rows) // 40, 1)])
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


def _by_edges(edges, *columns) -> list[tuple]:
    return list(zip(edges[:-1], edges[1:], *columns, strict=True))

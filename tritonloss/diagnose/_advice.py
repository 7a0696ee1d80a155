"""What the figures mean for the model: sentences, each with its figure and its threshold.

The thresholds are rules of thumb, not results: each stands in its sentence, beside the figure.
"""

from __future__ import annotations

FEW = 100  # positives, below which ranks and IoUs are those of a handful of boxes
APART = 2.0  # mean score of positives over that of negatives
FLOODED = 0.1  # mean score of negatives
SHARE = 0.5  # of the gradient, that of easy negatives
HARD_SHARE = 0.1  # of focal loss' gradient, that of negatives with p >= 0.5
PRECISION = 0.5  # mean at the positives
WRONG_ORDER = 0.3  # of the pairs of positives; chance is 0.5
CALIBRATION = 0.1  # mean of abs(score - IoU)

YOURS = (
    "The figures do not tell which loss trains the model. Where the advice names yours, it has not "
    "reached its aim yet: train longer before you change it."
)


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def advice_of(figures: dict) -> list[str]:
    """One sentence or two on each thing that the figures tell."""
    found = figures["summary"]
    if not found["positives"]:
        return []
    return [
        *_data(found),
        *(_gradients(figures["gradient_shares"]["by_kind"]) if found["negatives"] else ()),
        *(_order(figures["ranking"]["average_precision"]) if found["negatives"] else ()),
        *(_quality(figures["sorting"], figures["calibration"]) if figures["sorting"] else ()),
    ]


def _data(found: dict) -> list[str]:
    said = []
    if found["positives"] < FEW:
        said.append(
            f"Only {found['positives']} positives were counted. Below {FEW}, what follows is about "
            "a handful of boxes: count more steps."
        )
    if not found["negatives"]:
        return said
    positive, negative = found["mean_p_of_positives"], found["mean_p_of_negatives"]
    if positive < APART * negative:
        said.append(
            f"Positives have a mean score of {positive:.3g}, negatives of {negative:.3g}. Below "
            f"{APART:g} times that of negatives, the model does not tell them apart yet: look "
            "again after some training."
        )
    if negative > FLOODED:
        said.append(
            f"Negatives have a mean score of {negative:.3g}. Above {FLOODED:g}, a new model floods "
            "the loss with negatives: set the bias of the classifier to log(0.01 / 0.99), so that "
            "all scores begin at 0.01."
        )
    return said


def _gradients(by_kind: dict) -> list[str]:
    def share(loss: str, kind: int) -> float:
        return list(by_kind[loss].values())[kind]  # positives, then negatives, the hard ones first

    easy, focal = share("cross entropy", -1), share("focal", -1)
    said = f"Easy negatives (p < 0.1) hold {percent(easy)} of the gradient of cross entropy"
    if easy <= SHARE:
        said += f", at most {percent(SHARE)}: the balance does not ask for a focal loss."
    elif focal <= SHARE:
        said += (
            f", more than {percent(SHARE)}, and {percent(focal)} of that of focal loss (α = 0.25, "
            "γ = 2): train with a focal loss, or one of its relatives."
        )
    else:
        said += (
            f", and still {percent(focal)}, more than {percent(SHARE)}, of that of focal loss "
            "(α = 0.25, γ = 2): take a larger γ, or a ranking loss, which needs no balance."
        )
    hard = share("focal", 1)
    verdict = (
        f"Above {percent(HARD_SHARE)}, look at some of them: they may be objects without a label, "
        "or good boxes that the assignment calls negative. GHM-C gives them "
        f"{percent(share('GHM-C', 1))}."
        if hard > HARD_SHARE
        else f"Up to {percent(HARD_SHARE)}, objects without a label hold no large part of it."
    )
    return [
        said,
        f"Negatives with p ≥ 0.5 hold {percent(hard)} of the gradient of focal loss. {verdict}",
    ]


def _order(precision: float) -> list[str]:
    said = f"The mean precision at the positives is {precision:.3g}"
    if precision < PRECISION:
        return [
            f"{said}, below {PRECISION:g}: on average more negatives than positives stand above a "
            "positive. Rank & Sort and AP loss train this order itself."
        ]
    return [
        f"{said}, {PRECISION:g} or more: on average more positives than "
        "negatives stand above a positive."
    ]


def _quality(sorting: dict, calibration: dict) -> list[str]:
    said, wrong, error = [], sorting["violations"], calibration["error"]
    if wrong is not None:
        verdict = (
            "NMS keeps worse boxes for better ones. Quality focal, varifocal and Rank & Sort loss "
            "train scores to follow IoUs."
            if wrong > WRONG_ORDER
            else "better boxes are scored higher, as NMS needs it."
        )
        more = "more than" if wrong > WRONG_ORDER else "at most"
        said.append(
            f"{percent(wrong)} of the pairs of positives are in wrong order, {more} "
            f"{percent(WRONG_ORDER)} (chance is 50 %): {verdict}"
        )
    if error > CALIBRATION:
        said.append(
            f"Scores and IoUs of positives differ by {error:.3g} on average, more than "
            f"{CALIBRATION:g}: do not read a score as an IoU. Quality focal and varifocal loss "
            "train it to be one; ranking losses do not."
        )
    else:
        said.append(
            f"Scores and IoUs of positives differ by {error:.3g} on average, at most "
            f"{CALIBRATION:g}: the score tells the IoU."
        )
    return said

"""Maths on loaded tiles, shared by the kernels: every formula stands here once.

All tiles are float32. ``x`` is a logit, ``y`` its target in [0, 1], ``p = sigmoid(x)``.
"""

import triton
import triton.language as tl

# Which parameter is the power of the modulating factor.
POWER = {"focal": 2, "focal_smoothed": 2, "quality": 0, "varifocal": 1, "gaussian": 0}
# Losses with a shorter formula for targets of 0 and 1, ``hard_value``.
HARD = frozenset({"focal", "focal_star", "quality", "varifocal", "gaussian", "asymmetric", "bce"})


def is_hard(kind: str, labels, quality) -> bool:
    """True if the targets are 0 and 1, and the loss has a formula for them."""
    return kind in HARD and labels is not None and quality is None


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], relative error below 2e-7: a polynomial is half a division."""
    series = 0.0792046338 + u * (-0.0300658513 + u * 0.00536483852)
    series = -0.248571649 + u * (0.19153659 + u * (-0.137538105 + u * series))
    return u * (1.0 + u * (-0.499996483 + u * (0.33321324 + u * series)))


@triton.jit
def sigmoid_parts(x):
    """``(p, 1 - p, log1p(exp(-|x|)))``, each with full relative accuracy."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return (
        tl.where(x >= 0, larger, smaller),
        tl.where(x >= 0, smaller, larger),
        log1p_unit(e),
    )


@triton.jit
def bce_of(x, y, log1p_e):
    """Binary cross entropy of logit x: max(x, 0) - x y + log1p(exp(-|x|))."""
    # A product x * y could be fused into the subtraction; where() keeps hard targets exact.
    return tl.where(x >= 0, x * (1.0 - y), -x * y) + log1p_e


@triton.jit
def power(base, log_base, exponent, SQUARE: tl.constexpr):
    """base ** exponent for base in [0, 1].

    SQUARE, an exponent known to be 2, needs no transcendental. A branch at run time would keep the
    whole tile in registers across it, twice as many as without.
    """
    if SQUARE:
        result = base * base
    else:
        result = tl.exp(exponent * log_base)
    return result


@triton.jit
def safe_log(v):
    """log(v) that stays finite at v = 0, so that 0 * log(0) is 0 in an exponent."""
    return tl.log(tl.maximum(v, 1e-37))


# Focal loss (Lin et al. 2017): (y a1 + (1-y) a0) q^gamma BCE(x, t), q = p(1-y) + (1-p)y; t is y,
# or a smoothed y.


@triton.jit
def _focal_parts(x, y, t, gamma, SQUARE: tl.constexpr):
    p, not_p, log1p_e = sigmoid_parts(x)
    q = p * (1.0 - y) + not_p * y
    # log q without underflow for hard targets: -softplus(+-x)
    log_q = tl.where(y > 0.5, tl.minimum(-x, 0.0), tl.minimum(x, 0.0)) - log1p_e
    hard = (y == 0.0) | (y == 1.0)
    log_q = tl.where(hard, log_q, safe_log(q))
    return p, not_p, bce_of(x, t, log1p_e), q, power(q, log_q, gamma, SQUARE)


@triton.jit
def focal_value(x, y, t, a1, a0, gamma, SQUARE: tl.constexpr):
    _, _, bce, _, factor = _focal_parts(x, y, t, gamma, SQUARE)
    return (y * a1 + (1.0 - y) * a0) * factor * bce


@triton.jit
def focal_derivative(x, y, t, a1, a0, gamma, SQUARE: tl.constexpr):
    p, not_p, bce, q, factor = _focal_parts(x, y, t, gamma, SQUARE)
    dq = p * not_p * (1.0 - 2.0 * y)
    dbce = p * (1.0 - t) - not_p * t
    if SQUARE:
        slope = q * (2.0 * dq * bce + q * dbce)
    else:
        # for hard targets dq / q is +-(1-q), which needs no division by 0
        dq_over_q = tl.where(y == 0.0, not_p, tl.where(y == 1.0, -p, dq / tl.maximum(q, 1e-37)))
        slope = factor * (gamma * dq_over_q * bce + dbce)
    return (y * a1 + (1.0 - y) * a0) * slope


# FL* (Lin et al. 2017, appendix): f(x_t) = -log sigmoid(gamma x_t + beta) / gamma, x_t = +-x.


@triton.jit
def focal_star_value(x, y, a1, a0, gamma, beta):
    _, _, l_pos = sigmoid_parts(gamma * x + beta)
    _, _, l_neg = sigmoid_parts(beta - gamma * x)
    f_pos = tl.maximum(-gamma * x - beta, 0.0) + l_pos
    f_neg = tl.maximum(gamma * x - beta, 0.0) + l_neg
    return (y * a1 + (1.0 - y) * a0) * (y * f_pos + (1.0 - y) * f_neg) / gamma


@triton.jit
def focal_star_derivative(x, y, a1, a0, gamma, beta):
    _, q_pos, _ = sigmoid_parts(gamma * x + beta)
    _, q_neg, _ = sigmoid_parts(beta - gamma * x)
    return (y * a1 + (1.0 - y) * a0) * ((1.0 - y) * q_neg - y * q_pos)


# Quality focal loss (Li et al. 2020): |y - p|^beta BCE(x, y).


@triton.jit
def _quality_parts(x, y, beta, SQUARE: tl.constexpr):
    p, not_p, log1p_e = sigmoid_parts(x)
    # p - y without cancellation at either end
    signed = tl.where(x >= 0, (1.0 - y) - not_p, p - y)
    log_d = tl.where(
        (y == 0.0) | (y == 1.0),
        tl.where(y == 0.0, tl.minimum(x, 0.0), tl.minimum(-x, 0.0)) - log1p_e,
        safe_log(tl.abs(signed)),
    )
    return p * not_p, bce_of(x, y, log1p_e), signed, power(tl.abs(signed), log_d, beta, SQUARE)


@triton.jit
def quality_value(x, y, beta, SQUARE: tl.constexpr):
    _, bce, _, factor = _quality_parts(x, y, beta, SQUARE)
    return factor * bce


@triton.jit
def quality_derivative(x, y, beta, SQUARE: tl.constexpr):
    dp, bce, signed, factor = _quality_parts(x, y, beta, SQUARE)
    if SQUARE:
        result = signed * (2.0 * dp * bce + factor)
    else:
        # d|p-y|^beta / dx = beta |p-y|^beta p(1-p) / (p-y), and 0 at p == y
        safe = tl.where(tl.abs(signed) > 1e-37, signed, 1.0)
        slope = tl.where(tl.abs(signed) > 1e-37, beta * dp / safe, 0.0)
        result = factor * (slope * bce + signed)
    return result


# Varifocal loss (Zhang et al. 2021): positives y BCE(x, y), negatives alpha p^gamma BCE(x, 0).


@triton.jit
def _varifocal_parts(x, y, gamma, SQUARE: tl.constexpr):
    p, not_p, log1p_e = sigmoid_parts(x)
    factor = power(p, tl.minimum(x, 0.0) - log1p_e, gamma, SQUARE)
    return p, not_p, bce_of(x, y, log1p_e), factor


@triton.jit
def varifocal_value(x, y, positive, alpha, gamma, iou_weighted, SQUARE: tl.constexpr):
    _, _, bce, factor = _varifocal_parts(x, y, gamma, SQUARE)
    weight = y * iou_weighted + (1.0 - iou_weighted)
    return tl.where(positive, weight, alpha * factor) * bce


@triton.jit
def varifocal_derivative(x, y, positive, alpha, gamma, iou_weighted, detach, SQUARE: tl.constexpr):
    p, not_p, bce, factor = _varifocal_parts(x, y, gamma, SQUARE)
    weight = y * iou_weighted + (1.0 - iou_weighted)
    dbce = p * (1.0 - y) - not_p * y
    dfactor = gamma * not_p * (1.0 - detach)
    return tl.where(positive, weight * dbce, alpha * factor * (dfactor * bce + p))


# Binary cross entropy and authentic smooth L1 (Li et al. 2019), which GHM-C and GHM-R harmonise.


@triton.jit
def bce_value(x, y):
    _, _, log1p_e = sigmoid_parts(x)
    return bce_of(x, y, log1p_e)


@triton.jit
def bce_derivative(x, y):
    p, not_p, _ = sigmoid_parts(x)
    return p * (1.0 - y) - not_p * y


@triton.jit
def asl1_radius(d, mu):
    """sqrt(d^2 + mu^2); the square of neither is formed, so that nothing overflows."""
    larger = tl.maximum(tl.abs(d), mu)
    share = tl.minimum(tl.abs(d), mu) / larger
    return larger * tl.sqrt(1.0 + share * share)


@triton.jit
def asl1_value(x, y, mu):
    # sqrt(d^2 + mu^2) - mu would cancel for small d
    d = x - y
    return d * (d / (asl1_radius(d, mu) + mu))


@triton.jit
def asl1_derivative(x, y, mu):
    return (x - y) / asl1_radius(x - y, mu)


@triton.jit
def region_of(x, y, positive, mu, bins, KIND: tl.constexpr, HARD: tl.constexpr):
    """Unit region of the gradient norm, 0..bins-1, the last one closed at 1."""
    if KIND == "asl1":
        norm = tl.abs(asl1_derivative(x, y, mu))
    elif HARD:
        norm, _, _, _ = _hard_parts(x, positive)
    else:
        tl.static_assert(KIND == "bce", "unknown harmonised loss")
        p, _, _ = sigmoid_parts(x)
        norm = tl.abs(p - y)
    # NaN becomes any integer
    return tl.minimum(tl.maximum((norm * bins).to(tl.int32), 0), bins - 1)


# Labels alone: a target of 0 or 1 at every logit. With z = -x at positives and x elsewhere,
# s = sigmoid(z) and BCE = softplus(z), the losses above are a s^gamma softplus(z): half of
# the instructions that a target in between takes.


@triton.jit
def _hard_parts(x, positive):
    """``(s, 1 - s, softplus(z), log s)``."""
    z = tl.where(positive, -x, x)
    s, not_s, log1p_e = sigmoid_parts(z)
    return s, not_s, tl.maximum(z, 0.0) + log1p_e, tl.minimum(z, 0.0) - log1p_e


# Asymmetric loss (Ridnik et al. 2021): y f(-x, gamma_pos, 0) + (1-y) f(x, gamma_neg, margin),
# f = q^gamma -log(1 - q), q = max(sigmoid(z) - margin, 0).


@triton.jit
def _shifted_focal(z, s, not_s, gamma, margin):
    """f of a logit z that should be low and its derivative; s = sigmoid(z)."""
    easy = s <= margin  # in this direction a NaN stays one
    q = tl.where(easy, 0.0, s - margin)
    rest = tl.where(easy, 1.0, not_s + margin)  # 1 - q
    far = rest > 1e-30  # beyond, there is no margin, and -log(1 - q) is z
    safe = tl.where(far, rest, 1.0)
    bce = tl.where(q < 0.5, log1p_unit(q / safe), tl.where(far, -tl.log(safe), z))
    factor = tl.exp(gamma * safe_log(q))
    through = gamma * not_s * bce / tl.maximum(q, 1e-37) + tl.where(far, not_s / safe, 1.0)
    return factor * bce, tl.where(easy, 0.0, factor * s * through)


@triton.jit
def asymmetric_value(x, y, gamma_pos, gamma_neg, margin):
    p, not_p, log1p_e = sigmoid_parts(x)
    positive = tl.exp(-gamma_pos * (tl.maximum(x, 0.0) + log1p_e))
    positive *= tl.maximum(-x, 0.0) + log1p_e
    negative, _ = _shifted_focal(x, p, not_p, gamma_neg, margin)
    return y * positive + (1.0 - y) * negative


@triton.jit
def asymmetric_derivative(x, y, gamma_pos, gamma_neg, margin):
    p, not_p, log1p_e = sigmoid_parts(x)
    positive = tl.exp(-gamma_pos * (tl.maximum(x, 0.0) + log1p_e))
    positive *= gamma_pos * p * (tl.maximum(-x, 0.0) + log1p_e) + not_p
    _, negative = _shifted_focal(x, p, not_p, gamma_neg, margin)
    return (1.0 - y) * negative - y * positive


@triton.jit
def hard_value(x, positive, p0, p1, p2, p3, KIND: tl.constexpr, SQUARE: tl.constexpr):
    """Loss of each logit under labels; parameters as in ``pointwise_value``."""
    if KIND == "focal_star":
        _, _, value, _ = _hard_parts(tl.where(positive, p2 * x + p3, p2 * x - p3), positive)
        value *= tl.where(positive, p0, p1) / p2
    elif KIND == "asymmetric":
        s, not_s, _, _ = _hard_parts(x, positive)
        gamma, margin = tl.where(positive, p0, p1), tl.where(positive, 0.0, p2)
        value, _ = _shifted_focal(tl.where(positive, -x, x), s, not_s, gamma, margin)
    else:
        s, _, value, log_s = _hard_parts(x, positive)
        if KIND == "focal":
            value *= tl.where(positive, p0, p1) * power(s, log_s, p2, SQUARE)
        elif KIND == "quality" or KIND == "gaussian":
            value *= power(s, log_s, p0, SQUARE)
        elif KIND == "varifocal":
            value *= tl.where(positive, 1.0, p0 * power(s, log_s, p1, SQUARE))
        else:
            tl.static_assert(KIND == "bce", "no formula for targets of 0 and 1")
    return value


@triton.jit
def hard_derivative(x, positive, p0, p1, p2, p3, KIND: tl.constexpr, SQUARE: tl.constexpr):
    """Derivative of ``hard_value`` by the logit."""
    if KIND == "focal_star":
        slope, _, _, _ = _hard_parts(tl.where(positive, p2 * x + p3, p2 * x - p3), positive)
        slope *= tl.where(positive, p0, p1)
    elif KIND == "asymmetric":
        s, not_s, _, _ = _hard_parts(x, positive)
        gamma, margin = tl.where(positive, p0, p1), tl.where(positive, 0.0, p2)
        _, slope = _shifted_focal(tl.where(positive, -x, x), s, not_s, gamma, margin)
    else:
        s, not_s, loss, log_s = _hard_parts(x, positive)
        if KIND == "focal":
            factor = tl.where(positive, p0, p1) * power(s, log_s, p2, SQUARE)
            slope = factor * (p2 * not_s * loss + s)
        elif KIND == "quality" or KIND == "gaussian":
            slope = power(s, log_s, p0, SQUARE) * (p0 * not_s * loss + s)
        elif KIND == "varifocal":
            through = p1 * not_s * (1.0 - p3) * loss + s
            slope = tl.where(positive, s, p0 * power(s, log_s, p1, SQUARE) * through)
        else:
            tl.static_assert(KIND == "bce", "no formula for targets of 0 and 1")
            slope = s
    return tl.where(positive, -slope, slope)


# Gaussian focal loss (Zhou et al. 2019): peaks y = 1: (1-p)^alpha BCE(x, 1); elsewhere
# (1-y)^beta p^alpha BCE(x, 0).


@triton.jit
def _beside_a_peak(y, beta):
    """(1 - y)^beta off the peaks, 1 on them."""
    return tl.where(y == 1.0, 1.0, tl.exp(beta * safe_log(1.0 - y)))


@triton.jit
def gaussian_focal_value(x, y, alpha, beta, SQUARE: tl.constexpr):
    s, _, bce, log_s = _hard_parts(x, y == 1.0)
    return _beside_a_peak(y, beta) * power(s, log_s, alpha, SQUARE) * bce


@triton.jit
def gaussian_focal_derivative(x, y, alpha, beta, SQUARE: tl.constexpr):
    s, not_s, bce, log_s = _hard_parts(x, y == 1.0)
    slope = power(s, log_s, alpha, SQUARE) * (alpha * not_s * bce + s)
    return _beside_a_peak(y, beta) * tl.where(y == 1.0, -slope, slope)


# The pickers: a string chooses the loss, so that every pointwise loss shares one kernel pair.


@triton.jit
def pointwise_value(
    x, y, positive, p0, p1, p2, p3, KIND: tl.constexpr, SQUARE: tl.constexpr, HARD: tl.constexpr
):
    """Loss of each logit; parameters in the order that the public functions pack them.

    SQUARE: the power of KIND's modulating factor is known to be 2. HARD: y is 1 at positives and 0
    elsewhere.
    """
    if HARD:
        value = hard_value(x, positive, p0, p1, p2, p3, KIND, SQUARE)
    elif KIND == "focal":
        value = focal_value(x, y, y, p0, p1, p2, SQUARE)
    elif KIND == "focal_smoothed":
        value = focal_value(x, y, y + p3 * (0.5 - y), p0, p1, p2, SQUARE)
    elif KIND == "focal_star":
        value = focal_star_value(x, y, p0, p1, p2, p3)
    elif KIND == "quality":
        value = quality_value(x, y, p0, SQUARE)
    elif KIND == "asymmetric":
        value = asymmetric_value(x, y, p0, p1, p2)
    elif KIND == "gaussian":
        value = gaussian_focal_value(x, y, p0, p1, SQUARE)
    elif KIND == "bce":
        value = bce_value(x, y)
    elif KIND == "asl1":
        value = asl1_value(x, y, p0)
    else:
        tl.static_assert(KIND == "varifocal", "unknown pointwise loss")
        value = varifocal_value(x, y, positive, p0, p1, p2, SQUARE)
    return value


@triton.jit
def pointwise_derivative(
    x, y, positive, p0, p1, p2, p3, KIND: tl.constexpr, SQUARE: tl.constexpr, HARD: tl.constexpr
):
    """Derivative of each logit's loss by the logit."""
    if HARD:
        slope = hard_derivative(x, positive, p0, p1, p2, p3, KIND, SQUARE)
    elif KIND == "focal":
        slope = focal_derivative(x, y, y, p0, p1, p2, SQUARE)
    elif KIND == "focal_smoothed":
        slope = focal_derivative(x, y, y + p3 * (0.5 - y), p0, p1, p2, SQUARE)
    elif KIND == "focal_star":
        slope = focal_star_derivative(x, y, p0, p1, p2, p3)
    elif KIND == "quality":
        slope = quality_derivative(x, y, p0, SQUARE)
    elif KIND == "asymmetric":
        slope = asymmetric_derivative(x, y, p0, p1, p2)
    elif KIND == "gaussian":
        slope = gaussian_focal_derivative(x, y, p0, p1, SQUARE)
    elif KIND == "bce":
        slope = bce_derivative(x, y)
    elif KIND == "asl1":
        slope = asl1_derivative(x, y, p0)
    else:
        tl.static_assert(KIND == "varifocal", "unknown pointwise loss")
        slope = varifocal_derivative(x, y, positive, p0, p1, p2, p3, SQUARE)
    return slope

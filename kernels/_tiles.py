"""Maths on loaded tiles, shared by the kernels: every formula stands here once.

All tiles are float32. ``x`` is a logit, ``y`` its target in [0, 1], ``p = sigmoid(x)``.
"""

import triton
import triton.language as tl


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], accurate for tiny u: 2 atanh(s), s = u / (2 + u) <= 1/3."""
    s = u / (2.0 + u)
    z = s * s
    series = 1.0 / 11.0 + z * (1.0 / 13.0 + z * (1.0 / 15.0))
    series = 1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0 + z * series))
    return 2.0 * s * (1.0 + z * (1.0 / 3.0 + z * series))


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
def power(base, log_base, exponent):
    """base ** exponent for base in [0, 1]; the common square needs no transcendental."""
    if exponent == 2.0:
        result = base * base
    else:
        result = tl.exp(exponent * log_base)
    return result


@triton.jit
def safe_log(v):
    """log(v) that stays finite at v = 0, so that 0 * log(0) is 0 in an exponent."""
    return tl.log(tl.maximum(v, 1e-37))


# Focal loss (Lin et al. 2017): (y a1 + (1-y) a0) q^gamma BCE(x, y), q = p(1-y) + (1-p)y.


@triton.jit
def _focal_parts(x, y, gamma):
    p, not_p, log1p_e = sigmoid_parts(x)
    q = p * (1.0 - y) + not_p * y
    # log q without underflow for hard targets: -softplus(+-x)
    log_q = tl.where(y > 0.5, tl.minimum(-x, 0.0), tl.minimum(x, 0.0)) - log1p_e
    hard = (y == 0.0) | (y == 1.0)
    log_q = tl.where(hard, log_q, safe_log(q))
    return p, not_p, bce_of(x, y, log1p_e), q, power(q, log_q, gamma)


@triton.jit
def focal_value(x, y, a1, a0, gamma):
    _, _, bce, _, factor = _focal_parts(x, y, gamma)
    return (y * a1 + (1.0 - y) * a0) * factor * bce


@triton.jit
def focal_derivative(x, y, a1, a0, gamma):
    p, not_p, bce, q, factor = _focal_parts(x, y, gamma)
    # (dq/dx) / q = p (1-p) (1-2y) / q; for hard targets +-(1-q), which needs no division by 0
    dq_over_q = p * not_p * (1.0 - 2.0 * y) / tl.maximum(q, 1e-37)
    dq_over_q = tl.where(y == 0.0, not_p, tl.where(y == 1.0, -p, dq_over_q))
    dbce = p * (1.0 - y) - not_p * y
    return (y * a1 + (1.0 - y) * a0) * factor * (gamma * dq_over_q * bce + dbce)


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
def _quality_parts(x, y, beta):
    p, not_p, log1p_e = sigmoid_parts(x)
    # p - y without cancellation at either end
    signed = tl.where(x >= 0, (1.0 - y) - not_p, p - y)
    log_d = tl.where(
        (y == 0.0) | (y == 1.0),
        tl.where(y == 0.0, tl.minimum(x, 0.0), tl.minimum(-x, 0.0)) - log1p_e,
        safe_log(tl.abs(signed)),
    )
    return p * not_p, bce_of(x, y, log1p_e), signed, power(tl.abs(signed), log_d, beta)


@triton.jit
def quality_value(x, y, beta):
    _, bce, _, factor = _quality_parts(x, y, beta)
    return factor * bce


@triton.jit
def quality_derivative(x, y, beta):
    dp, bce, signed, factor = _quality_parts(x, y, beta)
    # d|p-y|^beta / dx = beta |p-y|^beta p(1-p) / (p-y), and 0 at p == y
    safe = tl.where(tl.abs(signed) > 1e-37, signed, 1.0)
    slope = tl.where(tl.abs(signed) > 1e-37, beta * dp / safe, 0.0)
    return factor * (slope * bce + signed)


# Varifocal loss (Zhang et al. 2021): positives y BCE(x, y), negatives alpha p^gamma BCE(x, 0).


@triton.jit
def _varifocal_parts(x, y, gamma):
    p, not_p, log1p_e = sigmoid_parts(x)
    factor = power(p, tl.minimum(x, 0.0) - log1p_e, gamma)
    return p, not_p, bce_of(x, y, log1p_e), factor


@triton.jit
def varifocal_value(x, y, positive, alpha, gamma, iou_weighted):
    _, _, bce, factor = _varifocal_parts(x, y, gamma)
    weight = y * iou_weighted + (1.0 - iou_weighted)
    return tl.where(positive, weight, alpha * factor) * bce


@triton.jit
def varifocal_derivative(x, y, positive, alpha, gamma, iou_weighted, detach):
    p, not_p, bce, factor = _varifocal_parts(x, y, gamma)
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
def region_of(x, y, mu, bins, KIND: tl.constexpr):
    """Unit region of the gradient norm, 0..bins-1, the last one closed at 1."""
    if KIND == "asl1":
        norm = tl.abs(asl1_derivative(x, y, mu))
    else:
        tl.static_assert(KIND == "bce", "unknown harmonised loss")
        p, _, _ = sigmoid_parts(x)
        norm = tl.abs(p - y)
    # NaN becomes any integer
    return tl.minimum(tl.maximum((norm * bins).to(tl.int32), 0), bins - 1)


# The pickers: a string chooses the loss, so that every pointwise loss shares one kernel pair.


@triton.jit
def pointwise_value(x, y, positive, p0, p1, p2, p3, KIND: tl.constexpr):
    """Loss of each logit; parameters in the order that the public functions pack them."""
    if KIND == "focal":
        value = focal_value(x, y, p0, p1, p2)
    elif KIND == "focal_star":
        value = focal_star_value(x, y, p0, p1, p2, p3)
    elif KIND == "quality":
        value = quality_value(x, y, p0)
    elif KIND == "bce":
        value = bce_value(x, y)
    elif KIND == "asl1":
        value = asl1_value(x, y, p0)
    else:
        tl.static_assert(KIND == "varifocal", "unknown pointwise loss")
        value = varifocal_value(x, y, positive, p0, p1, p2)
    return value


@triton.jit
def pointwise_derivative(x, y, positive, p0, p1, p2, p3, KIND: tl.constexpr):
    """Derivative of each logit's loss by the logit."""
    if KIND == "focal":
        slope = focal_derivative(x, y, p0, p1, p2)
    elif KIND == "focal_star":
        slope = focal_star_derivative(x, y, p0, p1, p2, p3)
    elif KIND == "quality":
        slope = quality_derivative(x, y, p0)
    elif KIND == "bce":
        slope = bce_derivative(x, y)
    elif KIND == "asl1":
        slope = asl1_derivative(x, y, p0)
    else:
        tl.static_assert(KIND == "varifocal", "unknown pointwise loss")
        slope = varifocal_derivative(x, y, positive, p0, p1, p2, p3)
    return slope

"""Maths on loaded tiles, shared by the kernels: every formula stands here once.

All tiles are float32. ``x`` is a logit, ``y`` its target in [0, 1], ``p = sigmoid(x)``.
"""

import triton
import triton.language as tl


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


# Focal loss (Lin et al. 2017): (y a1 + (1-y) a0) q^gamma BCE(x, y), q = p(1-y) + (1-p)y.


@triton.jit
def _focal_parts(x, y, gamma, SQUARE: tl.constexpr):
    p, not_p, log1p_e = sigmoid_parts(x)
    q = p * (1.0 - y) + not_p * y
    # log q without underflow for hard targets: -softplus(+-x)
    log_q = tl.where(y > 0.5, tl.minimum(-x, 0.0), tl.minimum(x, 0.0)) - log1p_e
    hard = (y == 0.0) | (y == 1.0)
    log_q = tl.where(hard, log_q, safe_log(q))
    return p, not_p, bce_of(x, y, log1p_e), q, power(q, log_q, gamma, SQUARE)


@triton.jit
def focal_value(x, y, a1, a0, gamma, SQUARE: tl.constexpr):
    _, _, bce, _, factor = _focal_parts(x, y, gamma, SQUARE)
    return (y * a1 + (1.0 - y) * a0) * factor * bce


@triton.jit
def focal_derivative(x, y, a1, a0, gamma, SQUARE: tl.constexpr):
    p, not_p, bce, q, factor = _focal_parts(x, y, gamma, SQUARE)
    dq = p * not_p * (1.0 - 2.0 * y)
    dbce = p * (1.0 - y) - not_p * y
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


@triton.jit
def hard_value(x, positive, p0, p1, p2, p3, KIND: tl.constexpr, SQUARE: tl.constexpr):
    """Loss of each logit under labels; parameters as in ``pointwise_value``."""
    if KIND == "focal_star":
        _, _, value, _ = _hard_parts(tl.where(positive, p2 * x + p3, p2 * x - p3), positive)
        value *= tl.where(positive, p0, p1) / p2
    else:
        s, _, value, log_s = _hard_parts(x, positive)
        if KIND == "focal":
            value *= tl.where(positive, p0, p1) * power(s, log_s, p2, SQUARE)
        elif KIND == "quality":
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
    else:
        s, not_s, loss, log_s = _hard_parts(x, positive)
        if KIND == "focal":
            factor = tl.where(positive, p0, p1) * power(s, log_s, p2, SQUARE)
            slope = factor * (p2 * not_s * loss + s)
        elif KIND == "quality":
            slope = power(s, log_s, p0, SQUARE) * (p0 * not_s * loss + s)
        elif KIND == "varifocal":
            through = p1 * not_s * (1.0 - p3) * loss + s
            slope = tl.where(positive, s, p0 * power(s, log_s, p1, SQUARE) * through)
        else:
            tl.static_assert(KIND == "bce", "no formula for targets of 0 and 1")
            slope = s
    return tl.where(positive, -slope, slope)


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
        value = focal_value(x, y, p0, p1, p2, SQUARE)
    elif KIND == "focal_star":
        value = focal_star_value(x, y, p0, p1, p2, p3)
    elif KIND == "quality":
        value = quality_value(x, y, p0, SQUARE)
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
        slope = focal_derivative(x, y, p0, p1, p2, SQUARE)
    elif KIND == "focal_star":
        slope = focal_star_derivative(x, y, p0, p1, p2, p3)
    elif KIND == "quality":
        slope = quality_derivative(x, y, p0, SQUARE)
    elif KIND == "bce":
        slope = bce_derivative(x, y)
    elif KIND == "asl1":
        slope = asl1_derivative(x, y, p0)
    else:
        tl.static_assert(KIND == "varifocal", "unknown pointwise loss")
        slope = varifocal_derivative(x, y, positive, p0, p1, p2, p3, SQUARE)
    return slope


# Box losses. A box is (x1, y1, x2, y2); sides are clamped at 0, as torch.clamp does: a side of
# exactly 0 still has a gradient. Ties of min and max share the gradient evenly.


@triton.jit
def atan_unit(t):
    """atan(t) for t in [0, 1], relative error below 2e-7."""
    # atan(t) = pi/4 + atan((t - 1) / (t + 1)): the series is needed up to tan(pi/8) only
    large = t > 0.41421357
    u = tl.where(large, (t - 1.0) / (t + 1.0), t)
    z = u * u
    series = -0.14243533 + z * (0.10593813 - z * 0.0607822)
    series = -0.33333315 + z * (0.19998472 + z * series)
    a = u + u * z * series
    return tl.where(large, 0.78539816 + a, a)


@triton.jit
def atan2_right(y, x):
    """atan2(y, x) for x >= 0; 0 at (0, 0)."""
    steep = tl.abs(y) > x
    longer = tl.where(steep, tl.abs(y), x)
    shorter = tl.where(steep, x, tl.abs(y))
    a = atan_unit(shorter / tl.where(longer > 0.0, longer, 1.0))
    a = tl.where(steep, 1.57079633 - a, a)
    return tl.where(y < 0.0, -a, a)


@triton.jit
def direction(w, h):
    """(w, h) scaled to a larger side of 1, and the scale."""
    longer = tl.maximum(w, h)
    scale = tl.where(longer > 1e-30, longer, 1.0)
    return w / scale, h / scale, scale


@triton.jit
def aspect_angle(wp, hp, wt, ht):
    """atan(wt/ht) - atan(wp/hp), and its derivatives by wp and hp."""
    wp, hp, scale = direction(wp, hp)
    wt, ht, _ = direction(wt, ht)
    angle = atan2_right(ht * (wt - wp) + wt * (hp - ht), ht * hp + wt * wp)
    norm = wp * wp + hp * hp
    norm = tl.where(norm > 0.0, norm, 1.0) * scale
    return angle, -hp / norm, wp / norm


@triton.jit
def area_minus(w, h, inner_w, inner_h):
    """w h - inner_w inner_h, for sides that are at least the inner ones: 0 if they are equal."""
    return w * (h - inner_h) + inner_h * (w - inner_w)


@triton.jit
def share_if_smaller(a, b):
    """d min(a, b) / d a."""
    return tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def box_loss(p, t, eps, alpha_threshold, KIND: tl.constexpr):
    """Loss of each pair of boxes, and its derivatives by the corners of p: ``(loss, corners)``."""
    px1, py1, px2, py2 = p
    tx1, ty1, tx2, ty2 = t
    wp = tl.maximum(px2 - px1, 0.0)
    hp = tl.maximum(py2 - py1, 0.0)
    wt = tl.maximum(tx2 - tx1, 0.0)
    ht = tl.maximum(ty2 - ty1, 0.0)
    wi_raw = tl.minimum(px2, tx2) - tl.maximum(px1, tx1)
    hi_raw = tl.minimum(py2, ty2) - tl.maximum(py1, ty1)
    wi = tl.maximum(wi_raw, 0.0)
    hi = tl.maximum(hi_raw, 0.0)

    pred_alone = area_minus(wp, hp, wi, hi)
    target_alone = area_minus(wt, ht, wi, hi)
    area = wp * hp + target_alone
    solid = area >= eps
    union = tl.where(solid, area, eps)
    iou = wi * hi / union
    one_minus_iou = tl.where(solid, pred_alone + target_alone, eps - wi * hi) / union
    loss = one_minus_iou
    # derivatives by the areas of p and of the intersection, through IoU and union
    d_pred = tl.where(solid, iou / union, 0.0)
    d_inter = -1.0 / union - d_pred
    # derivatives by the sides of p alone, by the sides of the hull, by the centre of p
    d_wp = tl.zeros(px1.shape, tl.float32)
    d_hp = d_wp
    d_wc = d_wp
    d_hc = d_wp
    d_x = d_wp
    d_y = d_wp
    wc_raw = tl.maximum(px2, tx2) - tl.minimum(px1, tx1)
    hc_raw = tl.maximum(py2, ty2) - tl.minimum(py1, ty1)
    wc = tl.maximum(wc_raw, 0.0)
    hc = tl.maximum(hc_raw, 0.0)
    if KIND == "giou":
        open_hull = wc * hc >= eps
        hull = tl.where(open_hull, wc * hc, eps)
        gap = tl.where(solid, area_minus(wc, hc, wp, hp) - target_alone, hull - union)
        loss += gap / hull
        d_union = tl.where(solid, 1.0 / hull, 0.0)
        d_pred -= d_union
        d_inter += d_union
        d_hull = tl.where(open_hull, union / hull / hull, 0.0)
        d_wc = d_hull * hc
        d_hc = d_hull * wc
    if KIND == "diou" or KIND == "ciou":
        d_x = ((px1 - tx1) + (px2 - tx2)) * 0.5
        d_y = ((py1 - ty1) + (py2 - ty2)) * 0.5
        far = wc * wc + hc * hc >= eps
        diagonal = tl.where(far, wc * wc + hc * hc, eps)
        penalty = (d_x * d_x + d_y * d_y) / diagonal
        loss += penalty
        d_wc = tl.where(far, -2.0 * penalty / diagonal, 0.0) * wc
        d_hc = tl.where(far, -2.0 * penalty / diagonal, 0.0) * hc
        d_x = d_x / diagonal
        d_y = d_y / diagonal
    if KIND == "ciou":
        angle, angle_wp, angle_hp = aspect_angle(wp, hp, wt, ht)
        v = 0.40528473 * angle * angle
        alpha = tl.where(iou > alpha_threshold, v / tl.maximum(one_minus_iou + v, eps), 0.0)
        loss += alpha * v
        d_wp = alpha * (0.81056947 * angle * angle_wp)
        d_hp = alpha * (0.81056947 * angle * angle_hp)

    d_wp = tl.where(px2 - px1 >= 0.0, d_wp + d_pred * hp, 0.0)
    d_hp = tl.where(py2 - py1 >= 0.0, d_hp + d_pred * wp, 0.0)
    d_wi = tl.where(wi_raw >= 0.0, d_inter * hi, 0.0)
    d_hi = tl.where(hi_raw >= 0.0, d_inter * wi, 0.0)
    d_wc = tl.where(wc_raw >= 0.0, d_wc, 0.0)
    d_hc = tl.where(hc_raw >= 0.0, d_hc, 0.0)
    # the corner of p is that of the intersection with this share, else that of the hull
    x1_in = share_if_smaller(tx1, px1)
    y1_in = share_if_smaller(ty1, py1)
    x2_in = share_if_smaller(px2, tx2)
    y2_in = share_if_smaller(py2, ty2)
    # min and max may drop a NaN: a coordinate that is not finite must not pass unseen
    poison = 0.0 * (px1 + py1 + px2 + py2) + 0.0 * (tx1 + ty1 + tx2 + ty2)
    d_x += poison
    d_y += poison
    corners = (
        d_x - d_wp - d_wi * x1_in - d_wc * (1.0 - x1_in),
        d_y - d_hp - d_hi * y1_in - d_hc * (1.0 - y1_in),
        d_x + d_wp + d_wi * x2_in + d_wc * (1.0 - x2_in),
        d_y + d_hp + d_hi * y2_in + d_hc * (1.0 - y2_in),
    )
    return loss + poison, corners

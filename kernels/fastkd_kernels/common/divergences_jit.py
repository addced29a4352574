# mypy: ignore-errors
"""Formulas of the divergence kernels: running sums of a row, its value and its slopes.

`p` and `t` are the student's and the teacher's probabilities of one query row. Where both are
close, plain formulas subtract large numbers; series (fp32) keep the digits that they lose.
"""

import triton
import triton.language as tl


@triton.jit
def exp_excess(x):
    """`e^x - 1 - x`, never negative."""
    direct = tl.exp(x) - 1.0 - x
    if x.dtype == tl.float64:
        return direct
    else:
        return tl.where(tl.abs(x) < 0.5, exp_excess_series(x), direct)


@triton.jit
def exp_excess_series(x):
    """`x^2/2! + x^3/3! + ... + x^8/8!`, exact in fp32 for |x| < 0.5."""
    term = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320))
    return x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * term))))


@triton.jit
def log_above_one(s, v):
    """`log(1 + v)` for 0 <= v <= 1, given `s = v / (2 + v)`."""
    if v.dtype == tl.float64:
        return tl.log(1.0 + v)
    else:
        # 2 artanh(s), s <= 1/3
        q = s * s
        term = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
        return 2.0 * s * (1.0 + q * (1.0 / 3 + q * (0.2 + q * (1.0 / 7 + q * term))))


@triton.jit
def shift_of(maximum):
    """What to subtract before `exp`: the maximum, and 0 where nothing was seen yet."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def add_exponentials(tile, seen, maximum, total):
    """Online log-sum-exp: the running maximum and sum of each row with one more tile."""
    tile = tl.where(seen, tile, float("-inf"))
    new = tl.maximum(maximum, tl.max(tile, 1))
    shift = shift_of(new)
    exponentials = tl.exp(tile - shift[:, None])
    kept = tl.exp(maximum - shift)
    return new, total * kept + tl.sum(exponentials, 1), exponentials, kept


@triton.jit
def add_two_sums(f, g, seen, state):
    """Both log-sum-exps online; the state is that of `add_divergence`."""
    max_f, sum_f, max_g, sum_g, mean, excess = state
    max_f, sum_f, _, _ = add_exponentials(f, seen, max_f, sum_f)
    max_g, sum_g, _, _ = add_exponentials(g, seen, max_g, sum_g)
    return max_f, sum_f, max_g, sum_g, mean, excess


@triton.jit
def log_sum(total):
    """Log of a row's sum of exponentials; 0 for a row that saw nothing."""
    return tl.log(tl.where(total > 0.0, total, 1.0))


@triton.jit
def add_mean(weights, values, tile_weight, weight, mean):
    """The weighted mean of `values` in a tile, its share of all weight, its step from `mean`."""
    safe = tl.where(tile_weight > 0.0, tile_weight, 1.0)
    tile_mean = tl.where(tile_weight > 0.0, tl.sum(weights * values, 1) / safe, mean)
    merged = weight + tile_weight
    share = tl.where(merged > 0.0, tile_weight / tl.where(merged > 0.0, merged, 1.0), 0.0)
    return tile_mean, share, tile_mean - mean


@triton.jit
def add_divergence(f, g, seen, state):
    """KL(softmax f | softmax g) online, with one more tile of both scores.

    With `d = g - f` and `E` the mean under softmax f, KL = log E[e^d] - E[d]. Both parts are large
    where their difference is small, so the state holds the mean of `d` and the excess
    `sum e^f (e^x - 1 - x)` with `x = d - E[d]`, which is of the order of the result.
    """
    max_f, sum_f, max_g, sum_g, mean, excess = state
    new_f, new_sum_f, weights, kept = add_exponentials(f, seen, max_f, sum_f)
    new_g, new_sum_g, others, _ = add_exponentials(g, seen, max_g, sum_g)
    d = tl.where(seen, g - f, 0.0)
    weight = sum_f * kept
    tile_weight = tl.sum(weights, 1)
    tile_mean, share, step = add_mean(weights, d, tile_weight, weight, mean)
    x = d - tile_mean[:, None]
    # e^f e^x from the exponentials that are there already
    factor = tl.exp(shift_of(new_g) - shift_of(new_f) - tile_mean)
    terms = others * factor[:, None] - weights - weights * x
    if x.dtype != tl.float64:
        terms = tl.where(tl.abs(x) < 0.5, weights * exp_excess_series(x), terms)
    tile_excess = tl.sum(tl.where(seen, terms, 0.0), 1)
    # both parts now around the mean of all
    behind = -share * step
    ahead = step + behind
    excess = kept * excess * tl.exp(behind) + weight * exp_excess(behind)
    excess += tile_excess * tl.exp(ahead) + tile_weight * exp_excess(ahead)
    return new_f, new_sum_f, new_g, new_sum_g, mean - behind, excess


@triton.jit
def divergence_of(state):
    """KL of a finished row."""
    max_f, sum_f, max_g, sum_g, mean, excess = state
    v = excess / tl.where(sum_f > 0.0, sum_f, 1.0)
    near = log_above_one(v / (2.0 + v), v)
    # far apart nothing cancels, and the excess may have overflowed (inf or NaN, so not below 1)
    far = shift_of(max_g) - shift_of(max_f) - mean + (log_sum(sum_g) - log_sum(sum_f))
    return tl.where(v < 1.0, near, far)


@triton.jit
def add_expectation(f, g, seen, state):
    """`E[g]` under softmax f online, with one more tile; the state is that of `add_divergence`."""
    max_f, sum_f, max_g, sum_g, mean, excess = state
    new_f, new_sum_f, weights, kept = add_exponentials(f, seen, max_f, sum_f)
    new_g, new_sum_g, _, _ = add_exponentials(g, seen, max_g, sum_g)
    values = tl.where(seen, g, 0.0)
    _, share, step = add_mean(weights, values, tl.sum(weights, 1), sum_f * kept, mean)
    return new_f, new_sum_f, new_g, new_sum_g, mean + share * step, excess


@triton.jit
def state_of_sink(student, teacher, nothing, KIND: tl.constexpr):
    """The state of `add_divergence` for a row that has seen its sink alone.

    f and g are the sides in the order in which `stream_rows` adds tiles of KIND.
    """
    f = teacher
    g = student
    if KIND == "reverse_kl":
        f = student
        g = teacher
    mean = g - f
    if KIND == "cross_entropy":
        mean = g
    one = nothing + 1.0
    return nothing + f, one, nothing + g, one, nothing + mean, nothing


@triton.jit
def mixture_logs(p, t, x):
    """`log(p / m)`, and `p log(p / m) + t log(t / m)`; m is the mixture, `x = log(p / t)`."""
    high = tl.maximum(p, t)
    low = tl.minimum(p, t)
    some = high > 0.0
    v = tl.where(some, (high - low) / tl.where(some, high + low, 1.0), 0.0)
    # log of the larger probability over the mixture, 1 + v
    larger = log_above_one(v / (2.0 + v), v)
    log_p = larger + tl.minimum(x, 0.0)
    # not log_p - x, which would be rounded by x
    share = p * log_p + t * (larger - tl.maximum(x, 0.0))
    if x.dtype != tl.float64:
        # m ((1 + v) log(1 + v) + (1 - v) log(1 - v))
        q = v * v
        term = 1.0 / 28 + q * (1.0 / 45 + q * (1.0 / 66 + q * (1.0 / 91)))
        even = q * (1.0 + q * (1.0 / 6 + q * (1.0 / 15 + q * term)))
        share = tl.where(v < 0.33, 0.5 * (high + low) * even, share)
    return log_p, share


@triton.jit
def row_terms(log_p, log_t, seen, KIND: tl.constexpr):
    """Parts of the value and of the row constant, summed over the keys of one tile."""
    p = tl.where(seen, tl.exp(log_p), 0.0)
    t = tl.where(seen, tl.exp(log_t), 0.0)
    if KIND == "js":
        logs, share = mixture_logs(p, t, tl.where(seen, log_p - log_t, 0.0))
        return 0.5 * tl.sum(share, 1), tl.sum(p * logs, 1)
    else:
        difference = p - t
        value = tl.sum(difference * difference, 1)
        if KIND == "mse":
            return value, tl.sum(p * difference, 1)
        else:
            # cosine: p and t have length 1 here, and 1 - cos = |p - t|^2 / 2
            return 0.5 * value, tl.sum(p * t, 1)


@triton.jit
def row_slopes(log_p, log_t, constant, seen, KIND: tl.constexpr):
    """`dL/da = p (g - sum p g)`, the sum from `constant`; cross-entropy has the slopes of KL."""
    p = tl.where(seen, tl.exp(log_p), 0.0)
    t = tl.where(seen, tl.exp(log_t), 0.0)
    if KIND == "kl":
        return p - t
    elif KIND == "reverse_kl":
        return p * (tl.where(seen, log_p - log_t, 0.0) - constant)
    elif KIND == "js":
        logs, _ = mixture_logs(p, t, tl.where(seen, log_p - log_t, 0.0))
        return 0.5 * p * (logs - constant)
    elif KIND == "mse":
        return 2.0 * p * (p - t - constant)
    else:
        return p * (constant * p - t)

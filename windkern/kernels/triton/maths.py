"""Device functions shared by the Triton kernels: the same maths as csrc/include/windkern."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(maximum):
    # Hazard: -inf - (-inf) is NaN while all entries so far are masked. Remedy: shift by 0 instead.
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def tanh(x):
    # Near 0 the quotient of exponentials loses relative digits, and the odd series does not. Far from 0 the slope
    # depends on the difference from 1, which is therefore subtracted last.
    limit: tl.constexpr = 0.02 if x.dtype == tl.float64 else 0.15
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = tl.where(size > 0.55, 2.0 * e, 1.0 - e) / (1.0 + e)
    far = tl.where(size > 0.55, 1.0 - far, far)
    x2 = x * x
    series = -1382.0 / 155925.0
    series = 62.0 / 2835.0 + x2 * series
    series = -17.0 / 315.0 + x2 * series
    series = 2.0 / 15.0 + x2 * series
    series = -1.0 / 3.0 + x2 * series
    near = x + x * x2 * series
    return tl.where(size < limit, near, tl.where(x < 0.0, -far, far))


@triton.jit
def one_minus_p(logp):
    """1 - exp(logp) for logp <= 0 without cancellation."""
    terms: tl.constexpr = 20 if logp.dtype == tl.float64 else 11
    x = tl.maximum(logp, -1.0)
    series = x / terms + 1.0
    for k in tl.static_range(terms - 1, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(logp > -1.0, -x * series, 1.0 - tl.exp(logp))


@triton.jit
def careful_exp(x):
    """exp(x) for a finite x to two units in the last place.

    Reason: a GPU's `tl.exp` of float32 rounds x * log2(e) first, which costs 1e-6 at x = 20.
    """
    log2_e: tl.constexpr = 1.4426950216293335  # in float32; the rest comes below
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        high = x * log2_e
        low = tl.fma(x, log2_e, -high) + x * 1.9259629911266175e-08
        result = tl.exp2(high) * (1.0 + low * 0.6931471805599453)
    return result


@triton.jit
def transform_logit(z, bias, slope, cap_in, cap_out, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """z -> cap_out * tanh(cap_in * (z + bias)), or slope * (z + bias); a bias of -inf masks after any transform."""
    y = z
    if HAS_BIAS:
        y = z + bias
    if CAPPED:
        y = cap_out * tanh(y * cap_in)
        if HAS_BIAS:
            y = tl.where(bias == float("-inf"), float("-inf"), y)
    else:
        y = y * slope
    return y


@triton.jit
def relative_slope(y, cap_out):
    """1 - tanh^2 of a transformed logit: the transform's slope over its slope at zero; 0 for a masked entry."""
    # Reason: near saturation 1 - (y / cap_out)^2 is all rounding; this difference is exact there.
    above = tl.minimum((tl.abs(y) - cap_out) / cap_out, 0.0)
    return -above * (2.0 + above)


@triton.jit
def merge(run_max, run_sum, run_entropy, part_max, part_sum, part_entropy):
    """Merge the statistics of one slab or tile into the running ones."""
    new_max = tl.maximum(run_max, part_max)
    shift = finite(new_max)
    old_factor = tl.exp(run_max - shift)
    part_factor = tl.exp(part_max - shift)
    old_gap = tl.where(run_max == float("-inf"), 0.0, run_max - shift)
    part_gap = tl.where(part_max == float("-inf"), 0.0, part_max - shift)
    entropy = old_factor * (run_entropy + run_sum * old_gap) + part_factor * (part_entropy + part_sum * part_gap)
    return new_max, run_sum * old_factor + part_sum * part_factor, entropy, old_factor, part_factor


@triton.jit
def look_at_row(
    z_ptr,
    bias_ptr,
    targets_ptr,
    entropy_ptr,
    row,
    z_stride,
    width,
    start,
    slope,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read a row of a slab, or its next BLOCK columns: return exp(y - maximum), y, its statistics, and its target.

    Hazard: the output that is written later may be the slab. Remedy: the target is read before the reductions, whose
    barriers come before any store.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    z_row = z_ptr + row * z_stride
    column = (tl.load(targets_ptr + row) - start).to(tl.int32)
    has_target = (column >= 0) & (column < width) & (column < BLOCK)
    target = tl.load(z_row + column, mask=has_target, other=0.0)
    z = tl.load(z_row + columns, mask=inside, other=0.0)
    bias, target_bias = z, target
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        target_bias = tl.load(bias_ptr + column, mask=has_target, other=0.0)
    y = transform_logit(z, bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
    y = tl.where(inside, y, float("-inf"))
    target = transform_logit(target, target_bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
    part_max = tl.max(y, 0)
    gap = y - finite(part_max)
    e = tl.exp(gap)
    part_sum = tl.sum(e, 0)
    part_entropy = part_sum * 0.0
    run_entropy = part_entropy
    if ENTROPY:
        part_entropy = tl.sum(tl.where(e > 0.0, e * gap, 0.0), 0)
        run_entropy = tl.load(entropy_ptr + row)
    return e, y, part_max, part_sum, part_entropy, run_entropy, target, column, has_target

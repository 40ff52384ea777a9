"""Cross entropy of rows of logits against one class each. docs/ops/cross_entropy.md derives it.

z are the logits after the softcap. Forward goes over each row once and leaves its maximum m and log(sum(exp(z - m)))
apart: their sum, the log-sum-exp, would round away what z - lse is made of where a class has nearly all probability.
Backward knows both, so it is elementwise: one read of the logits, one write of their gradient.
"""

import triton
import triton.language as tl

from retainops.kernels.points import retain
from retainops.kernels.rows import columns_inside, straight_tile
from retainops.kernels.tiles import load, offsets, store, store_grad
from retainops.kernels.unary import divide, tanh


@triton.jit
def cross_entropy_fwd_kernel(
    X,
    T,
    W,
    WEIGHTS,
    SMOOTHING,
    Z_LOSS,
    CAP,
    LOSS,
    MAX,
    LOGSUM,
    SHARE,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST,
    IGNORE,
    WHOLE: tl.constexpr,
    ALL_CLASSES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    PENALISED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The loss of BLOCK_M rows; their maxima, log-sums and weights for backward.

    Not ALL_CLASSES: the columns are the classes from FIRST on. The places of loss, log-sum and weight then hold the sum
    of the (weighted) logits, that of exp(z - m), and z of the target, so far; what follows from them is the host's.
    """
    i = tl.program_id(0)
    at = straight_tile(i, 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    t = load(T, at, SHAPE, tl.int64, BLOCK_M, 1)
    # Maxima and sums are of what a thread reads at once, in each part of a row: until the end no thread waits.
    access: tl.constexpr = 128 // X.ptr.dtype.element_ty.primitive_bitwidth
    group: tl.constexpr = access if access < BLOCK_N else BLOCK_N
    maxima = tl.full((BLOCK_M, BLOCK_N // group), float("-inf"), DTYPE)
    totals = tl.zeros((BLOCK_M, BLOCK_N // group), DTYPE)
    rests = tl.zeros((BLOCK_M, BLOCK_N // group), DTYPE)
    base = tl.zeros((BLOCK_M, 1), DTYPE)
    for n in range(0, SHAPE[-1], BLOCK_N):
        here = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        x = load(X, here, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        z, _slope = softcapped(x, CAP, here, SHAPE, DTYPE, BLOCK_M, BLOCK_N, CAPPED)
        if not WHOLE:
            z = tl.where(columns_inside(here, SHAPE, BLOCK_N), z, float("-inf"))
        grouped = in_groups(z, BLOCK_M, BLOCK_N, group)
        above = tl.maximum(maxima, tl.max(grouped, axis=2))
        known = finite(above)
        totals = totals * exp_in_sum(maxima - known) + tl.sum(exp_in_sum(grouped - known[:, :, None]), axis=2)
        maxima = above
        if SMOOTHED:
            # Differences from a number near the maximum: a large one in all logits would cancel.
            if ALL_CLASSES:  # noqa: SIM102  (one is known to the compiler, the other to the program)
                if n == 0:
                    base = finite(tl.max(above, axis=1, keep_dims=True))
            terms = weighted(W, z - base, here, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
            if not WHOLE:
                terms = tl.where(columns_inside(here, SHAPE, BLOCK_N), terms, 0.0)
            rests += tl.sum(in_groups(terms, BLOCK_M, BLOCK_N, group), axis=2)
    m = tl.max(maxima, axis=1, keep_dims=True)
    if not ALL_CLASSES:
        before = load(MAX, at, SHAPE, DTYPE, BLOCK_M, 1)
        m = tl.maximum(m, before)
    total = tl.sum(totals * exp_in_sum(maxima - finite(m)), axis=1, keep_dims=True)
    rest = tl.sum(rests, axis=1, keep_dims=True)
    if not ALL_CLASSES:
        total += load(LOGSUM, at, SHAPE, DTYPE, BLOCK_M, 1) * exp_in_sum(before - finite(m))
        rest += load(LOSS, at, SHAPE, DTYPE, BLOCK_M, 1)
    # After the loop: the load waits for that of t, and what waits for it in the program's order waits, too.
    picked = logit_of_target(X, t, CAP, at, FIRST, SHAPE, DTYPE, BLOCK_M, BLOCK_N, CAPPED)
    there = (t >= FIRST) & (t - FIRST < SHAPE[-1])
    if ALL_CLASSES:
        share = tl.full((BLOCK_M, 1), 1.0, DTYPE)
        if W.ptr is not None:
            share = load_class(W, t, there, 0, at, SHAPE, DTYPE, BLOCK_M)
        # What is no class is not looked up: it weighs NaN, and with it the loss and the gradient.
        share = tl.where(t != IGNORE, tl.where(there, share, float("nan")), 0.0)
        logsum = tl.log(total)
        smoothing = load(SMOOTHING, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        loss = (1.0 - smoothing) * share * (logsum - (picked - m))
        if SMOOTHED:
            weights = load(WEIGHTS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
            loss += smoothing / SHAPE[-1] * (weights * (logsum + (m - base)) - rest)
        if PENALISED:
            loss += load(Z_LOSS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N) * ((m + logsum) * (m + logsum))
        store(LOSS, tl.where(t != IGNORE, loss, 0.0), at, SHAPE, BLOCK_M, 1)
        store(LOGSUM, logsum, at, SHAPE, BLOCK_M, 1)
        store(SHARE, share, at, SHAPE, BLOCK_M, 1)
    else:
        store(LOSS, rest, at, SHAPE, BLOCK_M, 1)
        store(LOGSUM, total, at, SHAPE, BLOCK_M, 1)
        store(SHARE, tl.where(there, picked, load(SHARE, at, SHAPE, DTYPE, BLOCK_M, 1)), at, SHAPE, BLOCK_M, 1)
    store(MAX, m, at, SHAPE, BLOCK_M, 1)


@triton.jit
def cross_entropy_bwd_kernel(
    X,
    T,
    W,
    WEIGHTS,
    SMOOTHING,
    Z_LOSS,
    CAP,
    MAX,
    LOGSUM,
    SHARE,
    DLOSS,
    DIVISOR,
    DX,
    DZ,
    DP,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST,
    CLASSES,
    IGNORE,
    WHOLE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    PENALISED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """One tile of dz = p * total - own, whose columns are the classes from FIRST on, of CLASSES in all."""
    tiles_n = (SHAPE[-1] - 1) // BLOCK_N + 1
    column = tl.program_id(0) % tiles_n * BLOCK_N
    at = straight_tile(tl.program_id(0) // tiles_n, column, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    x = load(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    z, slope = softcapped(x, CAP, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, CAPPED)
    m = load(MAX, at, SHAPE, DTYPE, BLOCK_M, 1)
    logsum = load(LOGSUM, at, SHAPE, DTYPE, BLOCK_M, 1)
    dloss = load(DLOSS, at, SHAPE, DTYPE, BLOCK_M, 1)
    if DIVISOR.ptr is not None:
        dloss = divide(dloss, load(DIVISOR, at, SHAPE, DTYPE, BLOCK_M, 1))
    smoothing = load(SMOOTHING, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    t = load(T, at, SHAPE, tl.int64, BLOCK_M, 1)
    kept = t != IGNORE
    hit = (1.0 - smoothing) * load(SHARE, at, SHAPE, DTYPE, BLOCK_M, 1)
    hit = tl.where(kept, dloss * hit, 0.0)  # dloss is inf where the mean is of no row
    place = tl.maximum(tl.minimum(t - FIRST - at[2], BLOCK_N), -1).to(tl.int32)  # in this tile, or beside it
    own = tl.where(tl.arange(0, BLOCK_N)[None, :] == place, hit, 0.0)
    total = hit
    if SMOOTHED:
        each = tl.where(kept, dloss * (smoothing / CLASSES), 0.0)
        own += each * weighted(W, tl.full((1, 1), 1.0, DTYPE), at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        total += each * load(WEIGHTS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if PENALISED:
        z_loss = load(Z_LOSS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        total += tl.where(kept, dloss * (2.0 * z_loss * (m + logsum)), 0.0)
    p = tl.exp((z - m) - logsum)
    dz = p * total - own
    # Not `maximum`, which would give a number for nan.
    retain(DP, -divide(own, tl.where(p < smallest(p), smallest(p), p)), p, at, SHAPE, BLOCK_M, BLOCK_N)
    retain(DZ, dz, z, at, SHAPE, BLOCK_M, BLOCK_N)
    store_grad(DX, dz * slope, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def cross_entropy_mean_kernel(
    LOSS,
    SHARE,
    Y,
    TOTAL,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The sum of the rows' losses or, if there is a SHARE, their mean by its sum, which is left too. One program.

    SUMS: they are sums themselves, of a likelihood and more.
    """
    loss, share = tl.zeros((BLOCK_M, BLOCK_N), DTYPE), tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for n in range(0, SHAPE[-1], BLOCK_N):
        at = straight_tile(0, n, SHAPE, BLOCK_M, BLOCK_N, False)
        loss += load(LOSS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        if SHARE.ptr is not None:
            share += load(SHARE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    at = straight_tile(0, 0, SHAPE, 1, 1, True)
    y = tl.sum(loss, axis=1, keep_dims=True)
    if SHARE.ptr is not None:
        total = tl.sum(share, axis=1, keep_dims=True)
        store(TOTAL, total, at, SHAPE, 1, 1)
        y = divide(y, total)
        if SUMS:  # eager code adds the other part to the mean of the likelihoods, which by 0 is 0 / 0
            y = tl.where(total == 0.0, float("nan"), y)
    store(Y, y, at, SHAPE, 1, 1)


@triton.jit
def logit_of_target(
    X, t, CAP, at, FIRST, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr
):
    """z of each row's target, where that is among these columns."""
    t -= FIRST
    there = (t >= 0) & (t < SHAPE[-1])
    x = load_class(X, t, there, offsets(X, at, SHAPE, BLOCK_M, 1), at, SHAPE, DTYPE, BLOCK_M)
    z, _ = softcapped(x, CAP, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, CAPPED)
    return z


@triton.jit
def load_class(X, t, ok, o, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """X's element of column t in each row, where `ok`; column 0 is at the offsets `o`. Of shape (BLOCK_M, 1)."""
    o = o + tl.zeros((BLOCK_M, 1), tl.int64)
    if X.strides[-1] is not None:
        o += t * X.strides[-1]
    ok = ok & (at[1] + tl.arange(0, BLOCK_M) < SHAPE[-2])[:, None]
    return tl.load(X.ptr + o, mask=ok, other=0.0).to(DTYPE)


@triton.jit
def softcapped(
    x, CAP, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr
):
    """cap * tanh(x / cap) and its derivative; x and 1 without a cap."""
    if CAPPED:
        cap = load(CAP, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        c = tanh(divide(x, cap + tl.zeros_like(x)))
        return cap * c, 1.0 - c * c
    else:
        return x, tl.full((1, 1), 1.0, DTYPE)


@triton.jit
def weighted(W, x, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x times the weights of its classes."""
    if W.ptr is not None:
        x = x * load(W, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    return x


@triton.jit
def in_groups(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """A tile with its neighbours along a dim of their own."""
    return tl.reshape(tl.broadcast_to(x, (BLOCK_M, BLOCK_N)), (BLOCK_M, BLOCK_N // GROUP, GROUP))


@triton.jit
def exp_in_sum(x):
    """exp(x), x <= 0, to be added to a 1. In float32 below 2**-126 it is 0, and so there is no slow path."""
    if x.dtype == tl.float32:
        return tl.exp2(1.4426950408889634 * x)  # 1 / log(2)
    else:
        return tl.exp(x)


@triton.jit
def finite(m):
    """A maximum that can be subtracted: 0 for that of a row of -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def smallest(x):
    """The smallest normal number of x's dtype."""
    if x.dtype == tl.float64:
        return tl.full((1, 1), 2.2250738585072014e-308, x.dtype)
    else:
        return tl.full((1, 1), 1.1754943508222875e-38, x.dtype)

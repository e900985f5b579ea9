"""Batch norm, the addition of a shortcut and ReLU in few passes over memory, in Triton.

Activations are [M, C] (NHWC), in any floating-point format; statistics and sums are in float32. A program takes PER rows and
BC channels, in tiles of BM rows. One kernel leaves a row of partial results for each program, and the next one adds these
ROWS up before it begins, always in the same order.

MODE says what follows the norm: 0, nothing; 1, ReLU; 2, the addition of a shortcut and ReLU.
"""

import triton
import triton.language as tl


@triton.jit
def _channels(C, BC: tl.constexpr):
    """Those of this program, and which of them there are."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return c, c < C


@triton.jit
def statistics(x, part, M, C, PER, BM: tl.constexpr, BC: tl.constexpr):
    """part[0]: means over each program's rows; part[1]: sums of squared distances from them."""
    c, there = _channels(C, BC)
    first = tl.program_id(0) * PER
    last = tl.minimum(first + PER, M)
    # a value near the mean, without which the difference of large squares would lose digits
    shift = tl.load(x + first * C + c, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        inside = (m < last)[:, None] & there[None, :]
        value = (
            tl.load(x + m[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32) - shift[None, :]
        )
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
    count = (last - first).to(tl.float32)
    distance = tl.sum(total, 0) / count
    at = part + tl.program_id(0) * C + c
    tl.store(at, shift + distance, mask=there)
    tl.store(at + tl.num_programs(0) * C, tl.sum(squares, 0) - distance * distance * count, mask=there)


@triton.jit
def normalise(x, shortcut, out, part, saved, weight, bias, running_mean, running_var, M, C, PER, ROWS, momentum, eps,
              MODE: tl.constexpr, TRAINING: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
              BR: tl.constexpr):  # fmt: skip
    """out, by the statistics of `part` or, unless TRAINING, the running ones, which are brought up to date else.

    saved: mean and 1 / deviation, which the backward pass needs."""
    c, there = _channels(C, BC)
    if TRAINING:
        r = tl.arange(0, BR)
        known = (r < ROWS)[:, None] & there[None, :]
        counts = tl.where(r < ROWS, tl.minimum(M - r * PER, PER), 0).to(tl.float32)[:, None]
        partial = part + r[:, None] * C + c[None, :]
        means = tl.load(partial, mask=known, other=0.0)
        mean = tl.sum(means * counts, 0) / M
        squares = tl.sum(tl.load(partial + ROWS * C, mask=known, other=0.0), 0)
        squares += tl.sum((means - mean[None, :]) * (means - mean[None, :]) * counts, 0)
        rstd = 1.0 / tl.sqrt(squares / M + eps)
        if tl.program_id(0) == 0:
            tl.store(saved + c, mean, mask=there)
            tl.store(saved + C + c, rstd, mask=there)
            old = tl.load(running_mean + c, mask=there, other=0.0)
            tl.store(running_mean + c, (1 - momentum) * old + momentum * mean, mask=there)
            old = tl.load(running_var + c, mask=there, other=0.0)
            tl.store(running_var + c, (1 - momentum) * old + momentum * (squares / (M - 1)), mask=there)
    else:
        mean = tl.load(running_mean + c, mask=there, other=0.0)
        rstd = 1.0 / tl.sqrt(tl.load(running_var + c, mask=there, other=1.0) + eps)
    scale = tl.load(weight + c, mask=there, other=0.0) * rstd
    offset = tl.load(bias + c, mask=there, other=0.0) - mean * scale
    first = tl.program_id(0) * PER
    last = tl.minimum(first + PER, M)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        inside = (m < last)[:, None] & there[None, :]
        at = m[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
        if MODE == 2:
            value += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
        if MODE > 0:
            value = tl.where(value > 0, value, tl.where(value == value, 0.0, value))  # NaN stays
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums(g, x, out, masked, part, saved, weight, bias, M, C, PER, MODE: tl.constexpr, BM: tl.constexpr,
                  BC: tl.constexpr):  # fmt: skip
    """part[0]: sums of the gradient behind the ReLU over each program's rows; part[1]: of it times the normalised x.

    MODE 2 leaves that gradient, which is the shortcut's, in `masked`."""
    c, there = _channels(C, BC)
    mean = tl.load(saved + c, mask=there, other=0.0)
    rstd = tl.load(saved + C + c, mask=there, other=0.0)
    if MODE == 1:
        scale = tl.load(weight + c, mask=there, other=0.0) * rstd
        offset = tl.load(bias + c, mask=there, other=0.0) - mean * scale
    first = tl.program_id(0) * PER
    last = tl.minimum(first + PER, M)
    total = tl.zeros([BM, BC], tl.float32)
    along = tl.zeros([BM, BC], tl.float32)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        inside = (m < last)[:, None] & there[None, :]
        at = m[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if MODE == 1:
            gradient = tl.where(value * scale[None, :] + offset[None, :] > 0, gradient, 0.0)
        if MODE == 2:
            gradient = tl.where(tl.load(out + at, mask=inside, other=0.0) > 0, gradient, 0.0)
            tl.store(masked + at, gradient.to(masked.dtype.element_ty), mask=inside)
        total += gradient
        along += gradient * (value - mean[None, :]) * rstd[None, :]
    at = part + tl.program_id(0) * C + c
    tl.store(at, tl.sum(total, 0), mask=there)
    tl.store(at + tl.num_programs(0) * C, tl.sum(along, 0), mask=there)


@triton.jit
def gradient(g, x, dx, part, saved, weight, bias, dweight, dbias, M, C, PER, ROWS, MODE: tl.constexpr,
             BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """dx, and the gradients of weight and bias, by the sums of `part`. In MODE 2 g is what `gradient_sums` has left."""
    c, there = _channels(C, BC)
    r = tl.arange(0, BR)
    known = (r < ROWS)[:, None] & there[None, :]
    partial = part + r[:, None] * C + c[None, :]
    total = tl.sum(tl.load(partial, mask=known, other=0.0), 0)
    along = tl.sum(tl.load(partial + ROWS * C, mask=known, other=0.0), 0)
    if tl.program_id(0) == 0:
        tl.store(dbias + c, total, mask=there)
        tl.store(dweight + c, along, mask=there)
    mean = tl.load(saved + c, mask=there, other=0.0)
    rstd = tl.load(saved + C + c, mask=there, other=0.0)
    scale = tl.load(weight + c, mask=there, other=0.0) * rstd
    if MODE == 1:
        offset = tl.load(bias + c, mask=there, other=0.0) - mean * scale
    slope = rstd * along / M
    first = tl.program_id(0) * PER
    last = tl.minimum(first + PER, M)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        inside = (m < last)[:, None] & there[None, :]
        at = m[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        behind = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if MODE == 1:
            behind = tl.where(value * scale[None, :] + offset[None, :] > 0, behind, 0.0)
        result = scale[None, :] * (behind - (total / M)[None, :] - (value - mean[None, :]) * slope[None, :])
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)

"""3x3 convolutions (padding 1, stride 1 or 2) of few channels, in Triton.

Activations are NHWC in memory (torch's channels_last), weights [C_out, 3, 3, C_in] (channels_last of torch's order).

One product does all three directions. Neighbouring output pixels form groups of GH x GW; a group needs an input patch
of QH x QW pixels. A patch is a row of the left matrix (K = QH*QW*C_in, whole rows of it contiguous in memory), a
group's outputs are the columns (N = GH*GW*C_out), and the weights become a banded [K, N] matrix, gathered with a mask
while it is loaded. Groups make wide tiles out of 16 channels and load each pixel 4 (2 x 2) or 6 (1 x 2) instead of 9
times, for 1.8 or 1.3 times the arithmetic, which is not the limit here. The tap that joins patch row r and group row i
is A0 + A1*r + A2*i: forward with stride s: r - s*i; backward to the input, stride 1: 2 - r + i; stride 2 (groups of
2 x 2): 1 - 2r + i.
"""

import triton
import triton.language as tl


@triton.jit
def patches(x, m, k0, GROUPS, BK: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr,
            HG: tl.constexpr, WG: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, OFF: tl.constexpr,
            QW: tl.constexpr):  # fmt: skip
    """Patches of groups m at k0 .. k0 + BK: [BM, BK], zeros outside of the image."""
    row: tl.constexpr = QW * CI
    y0 = (m // WG) % HG * STEP_H + OFF
    x0 = m % WG * STEP_W + OFF
    start = ((m // (WG * HG) * HI + y0) * WI + x0) * CI
    # BK divides a row, so it lies in one row r of the patch. Told so, the compiler makes vector loads.
    r = k0 // row
    along = tl.max_contiguous(tl.multiple_of(k0 % row + tl.arange(0, BK), BK), BK)
    y = y0[:, None] + r
    xx = x0[:, None] + (along // CI)[None, :]
    inside = (y >= 0) & (y < HI) & (xx >= 0) & (xx < WI) & (m < GROUPS)[:, None]
    return tl.load(x + start[:, None] + r * (WI * CI) + along[None, :], mask=inside, other=0.0)


@triton.jit
def band(w, k, n, CI: tl.constexpr, CO: tl.constexpr, GW: tl.constexpr, QW: tl.constexpr,
         A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, W_CI: tl.constexpr, W_CO: tl.constexpr,
         W_TAP: tl.constexpr):  # fmt: skip
    """The banded weights at rows k and columns n: [BK, BN], zeros where a pixel does not see another."""
    kh = A0 + A1 * (k // (QW * CI))[:, None] + A2 * (n // (GW * CO))[None, :]
    kw = A0 + A1 * (k % (QW * CI) // CI)[:, None] + A2 * (n // CO % GW)[None, :]
    inside = (kh >= 0) & (kh < 3) & (kw >= 0) & (kw < 3)
    offset = (kh * 3 + kw) * W_TAP + (k % CI * W_CI)[:, None] + (n % CO * W_CO)[None, :]
    return tl.load(w + offset, mask=inside, other=0.0)


@triton.jit
def product(x, w, b0, b1, b2, b3, m, n, GROUPS,
            HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, HG: tl.constexpr, WG: tl.constexpr,
            GW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, OFF: tl.constexpr,
            QW: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
            W_CI: tl.constexpr, W_CO: tl.constexpr, W_TAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Patches of groups m x the band's columns n: [BM, BN] in float32. b0 .. b3: the band, where it is RESIDENT."""
    if RESIDENT:
        a = patches(x, m, 0, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW)
        acc = tl.dot(a, b0, out_dtype=tl.float32)
        if CHUNKS > 1:
            a = patches(x, m, BK, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW)
            acc = tl.dot(a, b1, acc)
        if CHUNKS > 2:
            a = patches(x, m, 2 * BK, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW)
            acc = tl.dot(a, b2, acc)
        if CHUNKS > 3:
            a = patches(x, m, 3 * BK, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW)
            acc = tl.dot(a, b3, acc)
    else:
        k = tl.arange(0, BK)
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in tl.range(0, CHUNKS * BK, BK, num_stages=STAGES):
            a = patches(x, m, k0, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW)
            b = band(w, k0 + k, n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
            acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def resident(w, n, CHUNK: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, GW: tl.constexpr, QW: tl.constexpr,
             A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, W_CI: tl.constexpr, W_CO: tl.constexpr,
             W_TAP: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr):  # fmt: skip
    """That part of the band, if it is to stay on the chip and there is one; else what is not used."""
    if RESIDENT and CHUNK < CHUNKS:
        return band(w, CHUNK * BK + tl.arange(0, BK), n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
    else:
        return 0


@triton.jit
def rows(m, CO: tl.constexpr, HG: tl.constexpr, WG: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr):
    """Where groups m begin in memory: [BM, 1]."""
    return (((m // (WG * HG) * HG + (m // WG) % HG) * GH * WG + m % WG) * GW * CO)[:, None]


@triton.jit
def columns(n, CO: tl.constexpr, WG: tl.constexpr, GW: tl.constexpr):
    """Where the columns n of a group lie behind its begin: [1, BN]."""
    return (n // (GW * CO) * (WG * GW * CO) + n % (GW * CO))[None, :]


@triton.jit
def convolve(x, w, y, GROUPS, TILES,
             HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, HG: tl.constexpr, WG: tl.constexpr,
             GH: tl.constexpr, GW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, OFF: tl.constexpr,
             QW: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
             W_CI: tl.constexpr, W_CO: tl.constexpr, W_TAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """y = patches x band."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # if they are to stay on the chip, the loop over tiles is what is pipelined
    b0 = resident(w, n, 0, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    b1 = resident(w, n, 1, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    b2 = resident(w, n, 2, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    b3 = resident(w, n, 3, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), num_stages=STAGES if RESIDENT else 1):
        m = tile * BM + tl.arange(0, BM)
        acc = product(x, w, b0, b1, b2, b3, m, n, GROUPS, HI, WI, CI, CO, HG, WG, GW, STEP_H, STEP_W, OFF,
                      QW, A0, A1, A2, W_CI, W_CO, W_TAP, BM, BN, BK, CHUNKS, RESIDENT, STAGES)  # fmt: skip
        out = rows(m, CO, HG, WG, GH, GW) + columns(n, CO, WG, GW)
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=(m < GROUPS)[:, None])


@triton.jit
def weight_gradient(x, dy, part, GROUPS, TILES, PER,
                    HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
                    HG: tl.constexpr, WG: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, STRIDE: tl.constexpr,
                    QH: tl.constexpr, QW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """part[split, K, N] = patches^T x dy over the groups of one split."""
    NT: tl.constexpr = GH * GW * CO
    KT: tl.constexpr = QH * QW * CI
    split = tl.program_id(0)
    k0 = tl.program_id(1) * BK
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    acc = tl.zeros([BK, BN], tl.float32)
    for tile in tl.range(split * PER, tl.minimum(split * PER + PER, TILES), num_stages=STAGES):
        m = tile * BM + tl.arange(0, BM)
        a = patches(x, m, k0, GROUPS, BK, HI, WI, CI, HG, WG, GH * STRIDE, GW * STRIDE, -1, QW)
        at = dy + rows(m, CO, HG, WG, GH, GW) + columns(n, CO, WG, GW)
        d = tl.load(at, mask=(m < GROUPS)[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), d, acc)
    k = k0 + tl.arange(0, BK)
    kh = (k // (QW * CI))[:, None] - STRIDE * (n // (GW * CO))[None, :]
    kw = (k % (QW * CI) // CI)[:, None] - STRIDE * (n // CO % GW)[None, :]
    used = (kh >= 0) & (kh < 3) & (kw >= 0) & (kw < 3)
    tl.store(part + split * (KT * NT) + k[:, None] * NT + n[None, :], acc, mask=used)


@triton.jit
def weight_gradient_sum(part, dw, SPLITS, CI: tl.constexpr, CO: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr,
                        STRIDE: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
                        BS: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """dw[co, tap, ci] = sum over the splits and over a group's pixels, always in the same order."""
    NT: tl.constexpr = GH * GW * CO
    KT: tl.constexpr = QH * QW * CI
    e = tl.program_id(0) * BE + tl.arange(0, BE)  # (tap, ci, co): co is contiguous in part
    co = e % CO
    ci = e // CO % CI
    tap = e // (CO * CI)
    total = tl.zeros([BE], tl.float32)
    for s0 in range(0, SPLITS, BS):
        s = s0 + tl.arange(0, BS)
        mask = (s < SPLITS)[:, None] & (e < 9 * CI * CO)[None, :]
        for i in tl.static_range(GH):
            for j in tl.static_range(GW):
                k = ((tap // 3 + STRIDE * i) * QW + tap % 3 + STRIDE * j) * CI + ci
                at = k * NT + (i * GW + j) * CO + co
                total += tl.sum(tl.load(part + s[:, None] * (KT * NT) + at[None, :], mask=mask, other=0.0), 0)
    tl.store(dw + (co * 9 + tap) * CI + ci, total, mask=e < 9 * CI * CO)

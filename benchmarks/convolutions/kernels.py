"""3x3 convolutions (padding 1, stride 1 or 2) of few channels, with batch norm's work in the same kernels, in Triton.

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
def _patches(x, table, m, k0, GROUPS, BK: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr,
             HG: tl.constexpr, WG: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, OFF: tl.constexpr,
             QW: tl.constexpr, PROLOGUE: tl.constexpr):  # fmt: skip
    """Patches of groups m at k0 .. k0 + BK: [BM, BK]; PROLOGUE: relu(x*scale + shift), with zeros still outside."""
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
    value = tl.load(x + start[:, None] + r * (WI * CI) + along[None, :], mask=inside, other=0.0)
    if PROLOGUE:
        scale = tl.load(table + along % CI)
        shift = tl.load(table + CI + along % CI)
        value = tl.maximum(value.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
        value = tl.where(inside, value, 0.0).to(x.dtype.element_ty)
    return value


@triton.jit
def _band(w, k, n, CI: tl.constexpr, CO: tl.constexpr, GW: tl.constexpr, QW: tl.constexpr,
          A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, W_CI: tl.constexpr, W_CO: tl.constexpr,
          W_TAP: tl.constexpr):  # fmt: skip
    """The banded weights at rows k and columns n: offsets and which of them are weights at all."""
    kh = A0 + A1 * (k // (QW * CI))[:, None] + A2 * (n // (GW * CO))[None, :]
    kw = A0 + A1 * (k % (QW * CI) // CI)[:, None] + A2 * (n // CO % GW)[None, :]
    inside = (kh >= 0) & (kh < 3) & (kw >= 0) & (kw < 3)
    offset = (kh * 3 + kw) * W_TAP + (k % CI * W_CI)[:, None] + (n % CO * W_CO)[None, :]
    return tl.load(w + offset, mask=inside, other=0.0)


@triton.jit
def _table(part, table, gamma, beta, c, ROWS, COUNT, CO: tl.constexpr, BR: tl.constexpr, EPILOGUE: tl.constexpr,
           EPS: tl.constexpr):  # fmt: skip
    """Add the ROWS partial sums of channels c, always in the same order, into a batch norm's table."""
    first = tl.zeros(c.shape, tl.float32)
    second = tl.zeros(c.shape, tl.float32)
    for r0 in range(0, ROWS, BR):
        r = r0 + tl.arange(0, BR)
        mask = (r < ROWS)[:, None]
        at = part + r[:, None] * CO + c[None, :]
        # .cg: other programs may have written them in this very launch
        first += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        second += tl.sum(tl.load(at + ROWS * CO, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    if EPILOGUE == 1:
        mean = first / COUNT
        rstd = 1.0 / tl.sqrt(tl.maximum(second / COUNT - mean * mean, 0.0) + EPS)
        scale = tl.load(gamma + c) * rstd
        tl.store(table + c, scale)
        tl.store(table + CO + c, tl.load(beta + c) - mean * scale)
        tl.store(table + 2 * CO + c, mean)
        tl.store(table + 3 * CO + c, rstd)
    else:
        scale = tl.load(table + c)
        mean = tl.load(table + 2 * CO + c)
        rstd = tl.load(table + 3 * CO + c)
        slope = -scale * rstd * second / COUNT
        tl.store(table + 4 * CO + c, scale)
        tl.store(table + 5 * CO + c, slope)
        tl.store(table + 6 * CO + c, -scale * first / COUNT - slope * mean)
        tl.store(table + 7 * CO + c, second)
        tl.store(table + 8 * CO + c, first)


@triton.jit
def norm_table(part, table, gamma, beta, ROWS, COUNT, CO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
               EPILOGUE: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """The table from the partial sums, in a launch of its own: BC channels a program."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    _table(part, table, gamma, beta, c, ROWS, COUNT, CO, BR, EPILOGUE, EPS)


@triton.jit
def conv(x, w, y, in_table, z, out_table, gamma, beta, part, counter, GROUPS, TILES, COUNT,
         HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, HG: tl.constexpr, WG: tl.constexpr,
         GH: tl.constexpr, GW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, OFF: tl.constexpr,
         QW: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
         W_CI: tl.constexpr, W_CO: tl.constexpr, W_TAP: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr,
         EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
         RESIDENT: tl.constexpr, STAGES: tl.constexpr, FINISH: tl.constexpr):  # fmt: skip
    """y = patches x band. EPILOGUE 1: sums of y and y^2 for the batch norm that follows (forward). 2: y is the gradient
    behind a ReLU and batch norm of z: mask it, and sum it and its product with the normalised z (backward).

    FINISH says who adds the programs' sums: 0, the last program, from a row for each pixel of a group; 1, the last
    program, from a row a program; 2, `norm_table`."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    out_columns = n // (GW * CO) * (WG * GW * CO) + n % (GW * CO)
    if RESIDENT:  # all weights stay on the chip; the loop over tiles is what is pipelined
        b0 = _band(w, k, n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
        if CHUNKS > 1:
            b1 = _band(w, k + BK, n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
        if CHUNKS > 2:
            b2 = _band(w, k + 2 * BK, n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
        if CHUNKS > 3:
            b3 = _band(w, k + 3 * BK, n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
    first = tl.zeros([BN], tl.float32)
    second = tl.zeros([BN], tl.float32)
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), num_stages=STAGES if RESIDENT else 1):
        m = tile * BM + tl.arange(0, BM)
        if RESIDENT:
            a = _patches(x, in_table, m, 0, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW, PROLOGUE)
            acc = tl.dot(a, b0, out_dtype=tl.float32)
            if CHUNKS > 1:
                a = _patches(
                    x, in_table, m, BK, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW, PROLOGUE
                )
                acc = tl.dot(a, b1, acc)
            if CHUNKS > 2:
                a = _patches(
                    x, in_table, m, 2 * BK, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW, PROLOGUE
                )
                acc = tl.dot(a, b2, acc)
            if CHUNKS > 3:
                a = _patches(
                    x, in_table, m, 3 * BK, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW, PROLOGUE
                )
                acc = tl.dot(a, b3, acc)
        else:
            acc = tl.zeros([BM, BN], tl.float32)
            for k0 in tl.range(0, CHUNKS * BK, BK, num_stages=STAGES):
                a = _patches(
                    x, in_table, m, k0, GROUPS, BK, HI, WI, CI, HG, WG, STEP_H, STEP_W, OFF, QW, PROLOGUE
                )
                b = _band(w, k0 + k, n, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP)
                acc = tl.dot(a, b, acc)
        out_rows = ((m // (WG * HG) * HG + (m // WG) % HG) * GH * WG + m % WG) * GW * CO
        out = out_rows[:, None] + out_columns[None, :]
        valid = (m < GROUPS)[:, None]
        if EPILOGUE == 2:
            raw = tl.load(z + out, mask=valid, other=0.0).to(tl.float32)
            scale = tl.load(out_table + n % CO)
            shift = tl.load(out_table + CO + n % CO)
            mean = tl.load(out_table + 2 * CO + n % CO)
            rstd = tl.load(out_table + 3 * CO + n % CO)
            acc = tl.where(raw * scale[None, :] + shift[None, :] > 0, acc, 0.0)
            second += tl.sum(acc * ((raw - mean[None, :]) * rstd[None, :]), 0)
        if EPILOGUE == 1:
            second += tl.sum(acc * acc, 0)
        if EPILOGUE > 0:
            first += tl.sum(acc, 0)
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=valid)
    if EPILOGUE > 0:
        W: tl.constexpr = BN if FINISH == 0 or BN < CO else CO
        if W < BN:
            first = tl.sum(tl.reshape(first, [BN // W, W]), 0)
            second = tl.sum(tl.reshape(second, [BN // W, W]), 0)
        programs = tl.num_programs(0) * tl.num_programs(1)
        at = part + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * W + tl.arange(0, W)
        tl.store(at, first)
        tl.store(at + programs * W, second)
        if FINISH < 2:
            tl.debug_barrier()  # every thread's partial sums are written before the count goes up
            if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
                c = tl.arange(0, CO)
                BR: tl.constexpr = 256 if FINISH == 1 and CO <= 16 else 128
                _table(part, out_table, gamma, beta, c, programs * W // CO, COUNT, CO, BR, EPILOGUE, EPS)
                tl.store(counter, 0)


@triton.jit
def weight_gradient(x, dy, part, in_table, GROUPS, TILES, PER,
                    HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
                    HG: tl.constexpr, WG: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, STRIDE: tl.constexpr,
                    QH: tl.constexpr, QW: tl.constexpr, PROLOGUE: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """part[split, K, N] = patches^T x dy over the groups of one split."""
    NT: tl.constexpr = GH * GW * CO
    KT: tl.constexpr = QH * QW * CI
    split = tl.program_id(0)
    k0 = tl.program_id(1) * BK
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    columns = n // (GW * CO) * (WG * GW * CO) + n % (GW * CO)
    acc = tl.zeros([BK, BN], tl.float32)
    for tile in tl.range(split * PER, tl.minimum(split * PER + PER, TILES), num_stages=STAGES):
        m = tile * BM + tl.arange(0, BM)
        a = _patches(
            x, in_table, m, k0, GROUPS, BK, HI, WI, CI, HG, WG, GH * STRIDE, GW * STRIDE, -1, QW, PROLOGUE
        )
        rows = ((m // (WG * HG) * HG + (m // WG) % HG) * GH * WG + m % WG) * GW * CO
        d = tl.load(dy + rows[:, None] + columns[None, :], mask=(m < GROUPS)[:, None], other=0.0)
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


@triton.jit
def combine(x, z, out, table, SIZE, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
            RELU: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out = a*x + b*z + d per channel, a, b, d: rows of the table (B -1: b = 1; B -2: no z); ReLU if asked for."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    c = at % C
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * tl.load(table + A * C + c)
    value += tl.load(table + D * C + c)
    if B == -1:
        value += tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    if B >= 0:
        value += tl.load(z + at, mask=mask, other=0.0).to(tl.float32) * tl.load(table + B * C + c)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)

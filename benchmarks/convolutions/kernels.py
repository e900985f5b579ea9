"""Convolutions of few channels with batch norm's sums in the same kernel, in Triton, on the kernels that training uses."""

import triton
import triton.language as tl

from common.core.models.fused.kernels import columns, product, resident, rows


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
def conv(x, w, y, z, out_table, gamma, beta, part, counter, GROUPS, TILES, COUNT,
         HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, HG: tl.constexpr, WG: tl.constexpr,
         GH: tl.constexpr, GW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, OFF: tl.constexpr,
         QW: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
         W_CI: tl.constexpr, W_CO: tl.constexpr, W_TAP: tl.constexpr, EPILOGUE: tl.constexpr,
         EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
         RESIDENT: tl.constexpr, STAGES: tl.constexpr, FINISH: tl.constexpr):  # fmt: skip
    """As `convolve`, and EPILOGUE 1: sums of y and y^2 for the batch norm that follows (forward). 2: y is the gradient
    behind a ReLU and batch norm of z: mask it, and sum it and its product with the normalised z (backward).

    FINISH says who adds the programs' sums: 0, the last program, from a row for each pixel of a group; 1, the last
    program, from a row a program; 2, `norm_table`."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    b0 = resident(w, n, 0, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    b1 = resident(w, n, 1, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    b2 = resident(w, n, 2, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    b3 = resident(w, n, 3, CI, CO, GW, QW, A0, A1, A2, W_CI, W_CO, W_TAP, BK, CHUNKS, RESIDENT)
    first = tl.zeros([BN], tl.float32)
    second = tl.zeros([BN], tl.float32)
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), num_stages=STAGES if RESIDENT else 1):
        m = tile * BM + tl.arange(0, BM)
        acc = product(x, w, b0, b1, b2, b3, m, n, GROUPS, HI, WI, CI, CO, HG, WG, GW, STEP_H, STEP_W, OFF,
                      QW, A0, A1, A2, W_CI, W_CO, W_TAP, BM, BN, BK, CHUNKS, RESIDENT, STAGES)  # fmt: skip
        out = rows(m, CO, HG, WG, GH, GW) + columns(n, CO, WG, GW)
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
        first += tl.sum(acc, 0)
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=valid)
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

"""The narrow convolutions in Triton's interpreter: run with TRITON_INTERPRET=1.

`errors`: prints {what: relative error against torch}. `course FILE`: measures without a clock, and writes FILE.
A process of its own, since Triton looks at that variable when kernels are defined.
"""

import json
import sys
from math import inf, isnan
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the benchmark is no part of the installed packages

from benchmarks.convolutions.measure import Kit, cases
from benchmarks.convolutions.operations import (
    DBETA,
    DGAMMA,
    EPSILON,
    GRAD_A,
    MEAN,
    PLAIN,
    RSTD,
    SCALE,
    SHIFT,
    TABLE_ROWS,
    Fused,
    build,
    candidates,
    normalise,
    through_norm,
)
from common.core.models.fused.tiles import DoesNotFit, Shape

PROCESSORS = 3  # so that a program computes several tiles
SHAPES = [Shape(2, 8, 16, 16), Shape(2, 8, 16, 32, 2), Shape(1, 8, 4, 16), Shape(1, 4, 64, 64)]
EPILOGUES = {"forward": "sums", "dgrad": "behind norm"}


def nhwc(t):
    return t.permute(0, 2, 3, 1).contiguous()


def per_channel(row):
    return row[None, :, None, None]


def run(operation, fused, outputs, *tensors):
    """Twice where the last program counts, since the second launch must find the counter ready."""
    for _ in range(2 if fused.epilogue and fused.finish != "apart" else 1):
        for t in (operation.part, *outputs):  # all of it must be written anew
            t.fill_(torch.nan)
        operation(*tensors)


class Case:
    """Random tensors of one shape, and what torch makes of them."""

    def __init__(self, shape):
        s, self.shape, self.found = shape, shape, {}
        self.w = torch.randn(s.co, s.ci, 3, 3) * 0.1
        self.gy = torch.randn(s.n, s.co, s.out, s.out)
        # relu(batch norm(raw)) is the input; `before` and `after`: the batch norms around the convolution
        self.raw = torch.randn(s.n, s.ci, s.size, s.size, requires_grad=True)
        self.gamma, self.beta = (
            (torch.rand(s.ci) + 0.5).requires_grad_(),
            torch.randn(s.ci).requires_grad_(),
        )
        self.normed = F.batch_norm(self.raw, None, None, self.gamma, self.beta, True, 0.1, EPSILON)
        self.before = self.table(self.raw, self.gamma, self.beta)
        self.after_gamma, self.after_beta = torch.rand(s.co) + 0.5, torch.randn(s.co)

    @staticmethod
    @torch.no_grad()
    def table(raw, gamma, beta):
        table = torch.full((TABLE_ROWS, raw.shape[1]), 7.0)
        table[MEAN] = raw.mean((0, 2, 3))
        table[RSTD] = (raw.var((0, 2, 3), correction=0) + EPSILON).rsqrt()
        table[SCALE] = gamma * table[RSTD]
        table[SHIFT] = beta - table[MEAN] * table[SCALE]
        return table

    def close(self, name, got, want):
        error = ((got - want).abs().max() / want.abs().max()).item()
        self.found[name] = max(self.found.get(name, 0.0), inf if isnan(error) else error)

    def forward(self, tiles, fused):
        s = self.shape
        want = F.conv2d(self.raw, self.w, stride=s.stride, padding=1).detach()
        out, table = torch.empty(s.n, s.out, s.out, s.co), torch.empty(TABLE_ROWS, s.co)
        conv = build("forward", s, tiles, fused, PROCESSORS, "cpu")
        after = (table, self.after_gamma, self.after_beta)
        run(conv, fused, [out, table], nhwc(self.raw.detach()), nhwc(self.w), out, None, *after)
        self.close(f"forward {fused}", out, nhwc(want))
        if fused.epilogue:
            rows = [SCALE, SHIFT, MEAN, RSTD]
            wanted = self.table(want, self.after_gamma, self.after_beta)[rows]
            self.close(f"forward {fused}: table", table[rows], wanted)

    def dgrad(self, tiles, fused):
        s, got = self.shape, torch.empty_like(nhwc(self.raw.detach()))
        behind = fused.epilogue == "behind norm"
        inp = torch.relu(self.normed) if behind else self.raw
        output = F.conv2d(inp, self.w, stride=s.stride, padding=1)
        wanted = torch.autograd.grad(output, [self.raw] + [self.gamma, self.beta] * behind, self.gy, True)
        table, raw = self.before.clone(), nhwc(self.raw.detach())
        more = (raw, table) if behind else ()
        conv = build("dgrad", s, tiles, fused, PROCESSORS, "cpu")
        run(conv, fused, [got, table[GRAD_A:]], nhwc(self.gy), nhwc(self.w), got, *more)
        if behind:
            self.close(f"dgrad {fused}: gamma, beta", table[[DGAMMA, DBETA]], torch.stack(wanted[1:]))
            before_norm, got = got, torch.empty_like(got)
            through_norm(before_norm, raw, got, table)
        self.close(f"dgrad {fused}", got, nhwc(wanted[0]))

    def wgrad(self, tiles, fused):
        s = self.shape
        w = self.w.clone().requires_grad_()
        (want,) = torch.autograd.grad(F.conv2d(self.raw, w, stride=s.stride, padding=1), w, self.gy)
        got = torch.empty(s.co, 3, 3, s.ci)
        gradient = build("wgrad", s, tiles, fused, PROCESSORS, "cpu")
        run(gradient, fused, [got], nhwc(self.raw.detach()), nhwc(self.gy), got)
        self.close(f"wgrad {fused}", got, nhwc(want))

    def normalise(self):
        raw, shortcut = self.raw.detach(), torch.randn_like(self.raw)
        for name, other in (("normalise", None), ("normalise with shortcut", shortcut)):
            out = torch.empty_like(nhwc(raw))
            normalise(nhwc(raw), None if other is None else nhwc(other), out, self.before)
            added = self.normed if other is None else self.normed + other
            self.close(name, out, nhwc(torch.relu(added).detach()))


def fitting(kind, shape):
    """Two different candidates that can compute the shape."""

    def fits(tiles):
        try:
            build(kind, shape, tiles, PLAIN, PROCESSORS, "meta")
        except DoesNotFit:
            return False
        return True

    return list(filter(fits, candidates(kind, shape)))[::3][:2]


class NoClock:
    """Calls once what is to be timed; no time passes."""

    def hot(self, calls):
        calls[0]()
        return 1.0

    def cycled(self, calls, repeats=1):
        return 1.0

    together = cycled


def course(file):
    shapes = [Shape(1, 4, 16, 16), Shape(1, 4, 4, 16)]
    Kit(Path(file), 1000, PROCESSORS, NoClock(), device="cpu", dtype=torch.float32).all(shapes)


def errors():
    found = {}
    for shape in SHAPES:
        case = Case(shape)
        case.normalise()
        for kind, _ in cases([shape]):
            fused = [PLAIN]
            if kind in EPILOGUES:
                fused += [Fused(EPILOGUES[kind], finish) for finish in ("unfolded", "folded", "apart")]
            for tiles in fitting(kind, shape):
                for extra in fused:
                    getattr(case, kind)(tiles, extra)
        found |= {f"{shape} {name}": error for name, error in case.found.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    {"errors": errors, "course": course}[sys.argv[1]](*sys.argv[2:])

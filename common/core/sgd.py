"""SGD without what torch puts around the methods of an optimiser for its compiler and its profiler."""

from __future__ import annotations

from inspect import unwrap

import torch


class SGD(torch.optim.SGD):
    """torch's own, without closures.

    What is left out takes longer than the step of a small network on a CPU, and loads torch's compiler.
    """

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    state_dict = unwrap(torch.optim.SGD.state_dict)
    load_state_dict = unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))
    step.hooked = True  # else torch wraps it again

"""What a CUDA graph does, on a CPU: work is recorded operation by operation, and done again on the same tensors.

As on a GPU, capturing computes nothing, a replay calls no Python, and an operation whose value the host waits for ends the
capture.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
}


class Recording(TorchDispatchMode):
    """Records the operations within it; `kernels` counts those that are no views."""

    def __init__(self):
        super().__init__()
        self.calls, self.kernels = [], 0
        self._before, self._made = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made | self._before.keys():
                self._before[storage.data_ptr()] = storage, storage.clone()
        found = func(*args, **kwargs)
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self._made |= {
            tensor.untyped_storage().data_ptr() for tensor in _tensors(found)
        } - self._before.keys()
        # all of them are kept, so that no memory is used twice
        self.calls.append((func, args, kwargs, found, view))
        self.kernels += not view
        return found

    def undo(self):
        """Put back what there was before."""
        for storage, values in self._before.values():
            storage.copy_(values)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, found, view in self.calls:
            if not view:
                given = {id(tensor) for tensor in _tensors((args, kwargs))}
                for old, new in zip(_tensors(found), _tensors(func(*args, **kwargs))):
                    if id(old) not in given:
                        old.copy_(new)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graphs:
    """In place of `common.core.compute.capture_graph`; counts captures and replays."""

    def __init__(self):
        self.captures, self.replays, self.kernels = 0, 0, []

    def __call__(self, run, pool):
        recording = Recording()
        try:
            with recording:
                run()
        finally:
            recording.undo()
        self.captures += 1
        self.kernels.append(recording.kernels)

        def replay():
            self.replays += 1
            recording.replay()

        return replay

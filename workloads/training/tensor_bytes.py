"""Counting the bytes of live tensors while code runs: an exact peak, the same on every machine.

with TensorBytes(model.parameters()) as counted:
    step()
counted.peak
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """``peak``: the most bytes of storages that were alive at once, looked at after every operator in the block.

    Counted is what operators in the block returned, forward and backward, and the tensors in ``given`` (say weights),
    each storage once however many tensors view it. It is what a caching allocator would have handed out without its
    rounding. Workspace that an operator frees before it returns is not seen, nor is what compiled code allocates.
    Storages on the meta device count by their nominal size: a step that does not fit the machine can be measured too.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._look(list(given))

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        for key, storage in list(self._storages.items()):
            alive = storage()
            if alive is None:
                del self._storages[key], self._sizes[key]
            else:
                self._sizes[key] = alive.nbytes()  # storages are resized too: FSDP2 does it with gathered weights
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._look(result)
        return result

    def _look(self, tensors: Any) -> None:
        grown = False
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                known = self._storages.get(key)
                if known is None or known() is not storage or self._sizes[key] != storage.nbytes():
                    self._storages[key], self._sizes[key], grown = weakref.ref(storage), storage.nbytes(), True
        if grown:
            self.peak = max(self.peak, self.now)

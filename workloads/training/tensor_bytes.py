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

    Counted is what operators in the block made, forward and backward, and the tensors in ``given`` (say weights), each
    storage once however many tensors view it. It is what a caching allocator would have handed out without its
    rounding. Workspace that an operator frees before it returns is not seen, nor is what compiled code allocates.
    Storages on the meta device count by their nominal size: a step that does not fit the machine can be measured too.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._outside: dict[
            int, weakref.ref[torch.UntypedStorage]
        ] = {}  # of tensors from before, which are not counted
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
        for storage in _storages((args, kwargs)):
            if not _is(self._storages, storage):
                self._outside[storage._cdata] = weakref.ref(storage)
        result = func(*args, **(kwargs or {}))
        self._look(result)
        return result

    def _look(self, tensors: Any) -> None:
        grown = False
        for storage in _storages(tensors):
            key = storage._cdata
            if _is(self._outside, storage) or (_is(self._storages, storage) and self._sizes[key] == storage.nbytes()):
                continue
            self._storages[key], self._sizes[key], grown = weakref.ref(storage), storage.nbytes(), True
        if grown:
            self.peak = max(self.peak, self.now)


def _is(known: dict[int, weakref.ref[torch.UntypedStorage]], storage: torch.UntypedStorage) -> bool:
    found = known.get(storage._cdata)
    return found is not None and found() is storage


def _storages(tensors: Any) -> list[torch.UntypedStorage]:
    """What lies behind ``tensors``; behind a DTensor, which claims the size of the whole, this rank's shard."""
    held = [tensor for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)]
    return [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in held]

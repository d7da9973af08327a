"""What makes a GPU's host wait, noticed on the CPU too."""
import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Waited(AssertionError):
    pass


class ByName(TorchFunctionMode):
    """Raises at what is asked of a tensor in Python and makes a GPU's host wait."""

    names = set(
        "item tolist __bool__ __int__ __float__ __index__ __contains__ cpu numpy __array__ "
        "nonzero".split()
    )

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(f, "__name__", "")
        # a torch.device is that of another tensor, which is the CPU here and a GPU there
        words = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str)]
        to_cpu = name == "to" and "cpu" in words
        if name in self.names or to_cpu:
            raise Waited(f"{name} waits for the device")
        return f(*args, **kwargs)


class ByOperator(TorchDispatchMode):
    """The same below autograd: in backward passes, hooks and f-strings."""

    names = set(
        "_local_scalar_dense nonzero masked_select _unique2 equal is_nonzero bincount "
        "unique_consecutive".split()
    )

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        indexed = name in ("index", "index_put_")
        by_mask = indexed and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self.names or by_mask:
            raise Waited(f"{name} waits for the device")
        return f(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_sync():
    """Raises where the host would wait for the device. Sees calls of operators, not their insides;
    those of the kernels run on tensors without memory in test_kernels_compile.py."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ByName(), ByOperator():
            yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")

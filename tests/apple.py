"""An Apple GPU that is not there: tensors that say they are on MPS and compute on the processor.

They refuse float64, as MPS does, and to meet a tensor of the processor. Python is told that their device is
`mps`; torch's own C++ takes them for the processor's, as this build has no other.
"""

from contextlib import contextmanager

import peft
import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS, CPU = torch.device("mps", 0), torch.device("cpu")
# They take indices from the processor, too.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class OnMPS(torch.Tensor):
    """Holds a tensor of the processor."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout)

    def __init__(self, held):
        self.held = held

    device = property(lambda self: MPS)
    is_mps = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnMPS({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `apple_gpu`")


def held(tree):
    """What stands in a nest, all of it on the processor."""
    return tree_map_only(OnMPS, lambda tensor: tensor.held, tree)


class Computing(TorchDispatchMode):
    """Computes on the processor what is asked of either.

    Attributes:
        operations: that MPS was asked for.
    """

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, device = func._schema.name, kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnMPS)]
        # C++ takes our tensors for the processor's, and makes others like them while it goes backwards.
        goes_backwards = torch._C._current_graph_task_id() != -1
        is_ours = bool(ours) if device is None else torch.device(device).type == "mps"
        if name == "aten::copy_":
            is_ours = isinstance(args[0], OnMPS)
        elif ours and name not in INDEXING and not goes_backwards:
            strangers = [tensor for tensor in tensors if not isinstance(tensor, OnMPS) and tensor.dim()]
            assert not strangers, f"{name}: Expected all tensors to be on the same device"
        if is_ours:
            self.operations.add(func)
        plain = held((args, kwargs))
        out = func(*plain[0], **(plain[1] | ({} if device is None else {"device": CPU})))
        if func._schema.is_mutable and name.endswith("_"):  # in place
            return args[0] if func._schema.returns else None
        return tree_map_only(torch.Tensor, OnMPS, out) if is_ours else out


class Move(torch.autograd.Function):
    """From the one to the other."""

    @staticmethod
    def forward(ctx, tensor, to_mps):
        ctx.to_mps = to_mps
        return OnMPS(tensor.detach().clone()) if to_mps else tensor.detach().held.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Move.apply(gradient, not ctx.to_mps), None


class Moving(TorchFunctionMode):
    """Catches what moves a tensor, or makes one from numbers, before C++ looks for an Apple GPU."""

    MAKERS = (torch.tensor, torch.as_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu:
            return self.move(args[0], CPU, None)
        if func is torch.Tensor.to:
            return self.move(args[0], *goal(args[1:], kwargs))
        if func in self.MAKERS and torch.device(kwargs.get("device") or CPU).type == "mps":
            return OnMPS(func(*args, **kwargs | {"device": CPU}))
        if func is torch.Tensor.tolist:
            return held(args[0]).tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], OnMPS):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        return func(*args, **kwargs)

    def move(self, tensor, device, dtype):
        moves = device is not None and device.type != tensor.device.type
        if moves and device.type != "mps":
            tensor = Move.apply(tensor, False)
        if dtype not in (None, tensor.dtype):
            tensor = tensor.to(dtype)
        return Move.apply(tensor, True) if moves and device.type == "mps" else tensor


def goal(args, kwargs):
    """The device and the dtype that `Tensor.to` is given."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for given in args:
        if isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, (str, torch.device)):
            device = given
    return device if device is None else torch.device(device), dtype


def saving(save_pretrained):
    """The library's, told what to save: its tensors have no memory that could be written to a file."""

    def save(self, folder, **how):
        return save_pretrained(self, folder, **how | {"state_dict": held(dict(self.state_dict()))})

    return save


@contextmanager
def apple_gpu():
    """A machine with an Apple GPU; gives the set of operations that it was asked for."""
    computing, no_grad, save = Computing(), torch.no_grad, torch.save
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, computing, Moving():
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch.backends.mps, "is_built", lambda: True)
        for name, value in {"recommended_max_memory": 2**34, "driver_allocated_memory": 2**28}.items():
            patch.setattr(torch.mps, name, lambda value=value: value)
        patch.setattr(torch.mps, "empty_cache", lambda: None)
        # Views of such tensors cannot be made in inference mode.
        patch.setattr(torch.inference_mode, "__enter__", lambda self: no_grad.__enter__(self))
        patch.setattr(torch.inference_mode, "__exit__", lambda self, *error: no_grad.__exit__(self, *error))
        patch.setattr(torch, "save", lambda tree, *file, **how: save(held(tree), *file, **how))
        for kind in (transformers.PreTrainedModel, peft.PeftModel):
            patch.setattr(kind, "save_pretrained", saving(kind.save_pretrained))
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield computing.operations
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)

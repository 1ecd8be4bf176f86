"""Memory: how much is free, and when it ran out."""

import gc

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def free_memory(device: torch.device) -> int:
    """Bytes that nothing uses on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or should_reduce_batch_size(error) or "bad_alloc" in str(error)


def release_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    clear_device_cache()

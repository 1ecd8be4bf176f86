"""Memory: how much is free, and when it ran out."""

import gc
import re
import sys
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def free_memory(device: torch.device) -> int:
    """Bytes that nothing uses on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    if device.type == "mps":
        # An Apple GPU has the machine's memory, and a process a part of it.
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(free, left))
    return free


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on a GPU there, elsewhere in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # what was ever needed stays with it, for the next time
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # Some sandboxes lack it. getrusage tells a program that a large one started its parent's peak.
    if told := re.search(r"^VmHWM:\s+(\d+) kB", _status(), re.MULTILINE):
        return int(told[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def _status() -> str:
    """What Linux tells of this process."""
    return Path("/proc/self/status").read_text() if sys.platform == "linux" else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or should_reduce_batch_size(error) or "bad_alloc" in str(error)


def release_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    clear_device_cache()

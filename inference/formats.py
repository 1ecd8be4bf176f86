"""What a model's folder holds: for which engine, torch's or mlx-lm's, and which weights. Neither is imported
to find out.
"""

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def is_mlx(name: str) -> bool:
    """Did mlx-lm write this folder? It says so in the head of the weights."""
    for file in Path(name).glob("model*.safetensors"):
        # What is damaged is told by whoever reads the weights.
        with suppress(SafetensorError), safe_open(file, framework="numpy") as weights:
            return (weights.metadata() or {}).get("format") == "mlx"
    return False


def reads_with_mlx(name: str) -> bool:
    """Is this model for mlx-lm: in its format, or is there no torch to read any other?

    Raises:
        ValueError: it is, and mlx-lm is not installed.
    """
    if not is_mlx(name) and importlib.util.find_spec("torch"):
        return False
    require_mlx(f"model {name!r}")
    return True


def require_mlx(what: str) -> None:
    """Refuse what cannot be done without mlx-lm.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise ValueError(
            f"{what} needs mlx-lm, which is not installed; pip install -r requirements-mac.txt, and on Linux "
            "also 'mlx[cpu]'"
        )


def require_whole(name: str) -> None:
    """Refuse an adapter: mlx-lm reads another kind than PEFT writes.

    Raises:
        ValueError: the folder holds an adapter alone.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"model {name!r} is an adapter, without the weights that it was trained on; merge them first, "
            f"where torch is: python export.py --run {name} --to {name}-merged --merge"
        )


def weights_stamp(model: str) -> list[Any]:
    """Changes with a model folder's weights: names, sizes and times of its files; empty for a Hub name."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

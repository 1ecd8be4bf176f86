"""Checkpoints: a model folder that anyone can load, and beside
the weights what a run needs to go on as if never stopped.

Written to a temporary folder, flushed to disk, then renamed, the manifest with its checksums last: a folder
under `checkpoints/` is whole or it is not there. What is read back is safetensors and `weights_only` tensors:
nothing that could run code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

MANIFEST = "manifest.json"
STATE = "trainer_state.pt"


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically.

    Args:
        target: where it ends up; what stood there is replaced.
        write: fills the temporary folder that it is given.

    Raises:
        OSError: the disk is full, or not ours to write; what stood at `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(temporary, write)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # A folder cannot be renamed over a full one. Moved aside rather than deleted, the old one stays whole
    # until the new one is there.
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    os.replace(temporary, target)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clear_up(run: Path) -> None:
    """Put right what a kill left in a run's folder, which nobody else may be using: a folder that was moved
    aside and not yet replaced comes back; what was half written goes, and so do weights that were handed to
    servers of the run that is no more.
    """
    for place in (run, run / "checkpoints"):
        for aside in place.glob(".*.old"):
            target = aside.with_name(aside.name[1:].removesuffix(".old"))
            if not target.exists():
                os.replace(aside, target)
        for left in (*place.glob(".*.old"), *place.glob(".*.tmp"), *place.glob(".weights-*")):
            shutil.rmtree(left, ignore_errors=True)


def _fill(temporary: Path, write: Callable[[Path], None]) -> None:
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except SafetensorError as error:  # its own name for what the disk says
        raise OSError(str(error)) from error
    except RuntimeError as error:  # torch's zip writer, likewise
        if "inline_container" not in str(error):
            raise
        raise OSError(f"{STATE} could not be written") from error
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): _checksum(path) for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, temporary / MANIFEST, temporary]:
        _flush(path)


def save_checkpoint(
    folder: Path, save_model: Callable[[Path], None], state: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint and let the oldest beside it go.

    Args:
        folder: `checkpoints/step-000100` of a run.
        save_model: writes the model and its tokenizer into a folder.
        state: tensors, numbers, strings and containers of them: everything else that a resume needs.
        keep: how many checkpoints stay.
    """

    def write(temporary: Path) -> None:
        save_model(temporary)
        torch.save(state, temporary / STATE)

    write_folder(folder, write)
    for old in list_checkpoints(folder.parent.parent)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def latest_checkpoint(run: Path, say: Callable[[str], None] = print, until: int | None = None) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is told and passed over.

    Args:
        run: the run's folder.
        say: tells.
        until: of this step at the latest, where there is one so old; else the oldest.
    """
    folders = list_checkpoints(run)
    if until is not None:
        folders = [f for f in folders if f.name <= f"step-{until:06d}"] or folders[:1]
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return folder
        say(f"checkpoint {folder} is damaged ({damage}); trying the one before it")
    return None


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest: None where it is whole, else what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, checksum in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != checksum:
            return f"{name} is not what was written"
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

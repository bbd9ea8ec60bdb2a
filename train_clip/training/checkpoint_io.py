"""Checkpoints that are whole or absent when written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from train_clip.checkpoints.reading import read_checkpoint, root_cause
from train_clip.errors import UserError
from train_clip.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside the target, synced and renamed; checked before they are loaded."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a local path.

        Args:
            checkpoint: plain data and tensors.
            path: the file's final place.
            storage_options: not used.

        Raises:
            UserError: the path is an address, or cannot be written; a file that was there is as it was.
        """
        if "://" in str(path):
            raise UserError(f"{path}: checkpoints are written to local files only. Give a local --output and copy it.")
        try:
            # Through a file of Python's own: its errors say what is wrong, such as a full disk.
            with replacing(Path(path)) as beside:
                with beside.open("wb") as file:
                    torch.save(checkpoint, file)
                # What cannot be read again is found out now, and not when it is needed.
                torch.load(beside, weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: not written, since it would hold more than plain data, and could not be loaded "
                f"without running code ({root_cause(error)}). Expected tensors, numbers, text, lists and dicts in the "
                "state_dict of every callback, module and data module."
            ) from error
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot be written ({root_cause(error)}). Earlier checkpoints are as they were. Free space or "
                "the permission to write there, and resume from the newest."
            ) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of plain data, every byte of it checked.

        Args:
            path: a local file.
            map_location: as for ``torch.load``.
            weights_only: not used: code in a file is never run.

        Raises:
            UserError: there is no such file, or it is damaged or holds more than plain data.
        """
        return read_checkpoint(Path(path), map_location)

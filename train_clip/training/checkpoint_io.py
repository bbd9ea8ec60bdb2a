"""Checkpoints that are whole or absent: a crash while saving leaves the older file as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from train_clip.errors import UserError
from train_clip.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside the target, synced and renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        """Write a checkpoint to a local path.

        Args:
            checkpoint: plain data and tensors.
            path: the file's final place.
            storage_options: not used.

        Raises:
            UserError: the path is an address.
        """
        if "://" in str(path):
            raise UserError(f"{path}: checkpoints are written to local files only. Give a local --output and copy it.")
        with replacing(Path(path)) as beside:
            torch.save(checkpoint, beside)

"""The running mean of a run's weights in a file of its own: a model's, which whatever reads checkpoints reads.

``last.ckpt`` is that of the newest state, ``best.ckpt`` the one that has scored best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from train_clip.checkpoints.own import LIGHTNING, MODEL, OF_RUN, RUNNING_MEAN
from train_clip.errors import UserError
from train_clip.files import link
from train_clip.training.checkpoint_io import AtomicCheckpointIO

LAST, BEST = "last.ckpt", "best.ckpt"


def write_mean(trainer: L.Trainer, folder: Path, is_best: bool) -> None:
    """Write the mean, whole or not at all; nothing where the run has none. Called on all processes.

    Args:
        trainer: of a ``ContrastiveModule``.
        folder: of the two files.
        is_best: whether it is ``best.ckpt`` too.

    Raises:
        UserError: it cannot be written, or follows a step that was not finite; what was there is as it was.
    """
    module: Any = trainer.lightning_module
    if getattr(module, "ema", None) is None:
        return
    kept = {name: value for name, value in module.state_dict().items() if name.partition(".")[0] not in OF_RUN}
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        LIGHTNING: L.__version__,
        "state_dict": kept | {MODEL + name: value for name, value in module.ema.model.state_dict().items()},
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams) | OF_RUN,
        RUNNING_MEAN: {"momentum": module.ema.momentum, "updates": module.ema.num_updates},
    }
    module.on_save_checkpoint(checkpoint)
    if not trainer.is_global_zero:
        return
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / LAST)
    if is_best:
        try:
            link(folder / LAST, folder / BEST)
        except OSError as error:
            raise UserError(f"{folder / BEST}: {error.strerror}. {folder / LAST} is whole.") from error

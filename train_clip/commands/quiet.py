"""Silences what Lightning says about itself, so that what is left is about the run."""

from __future__ import annotations

import logging
import warnings

# Messages that are about Lightning's products, repeat what the verb prints, or describe how it is meant to be here.
NOT_ABOUT_THE_RUN = (
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
)
WARNINGS_BY_DESIGN = (
    # PyTorch's own renaming, met in Lightning.
    r".*LeafSpec.*is deprecated.*",
    # On a CPU every batch is logged in the display; short epochs are common with few pairs.
    r".*smaller than the logging interval.*",
    # The loader's workers are chosen by the device; see DataOptions.num_workers.
    r".*does not have many workers which may be a bottleneck.*",
    # No validation split where none is held out; ``overfit_batches`` as its documentation says.
    r".*Total length of `list` across ranks is zero.*",
    r".*defined a `validation_step` but have no `val_dataloader`.*",
    r".*requested to overfit but enabled train dataloader shuffling.*",
    # The metrics of a run that is resumed go on in their file (MetricsLog).
    r".*Experiment logs directory .* exists and is not empty.*",
    # A teacher and locked towers stay in eval mode.
    r"Found \d+ module\(s\) in eval mode at the start of training.*",
    # This package's own loaders go on by the count of batches.
    r".*your dataloader is not resumable.*",
)


def quiet() -> None:
    """Drop those messages for the rest of the process."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(NOT_ABOUT_THE_RUN)
    )
    for pattern in WARNINGS_BY_DESIGN:
        warnings.filterwarnings("ignore", message=pattern)

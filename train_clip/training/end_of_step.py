"""What happens once the optimizer has stepped and before anything is saved.

The order is: update and clamp (the module's ``optimizer_step``), position (here), save (checkpoint callbacks, which
Lightning runs after all others; the module's own ``on_train_batch_end`` would come after them).
"""

from __future__ import annotations

from typing import Any

import lightning as L


class EndOfStep(L.Callback):
    """Counts the global batch that has just been trained on: the position in the data."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:  # noqa: ARG002, the hook's form
        """Advance the module's count."""
        pl_module.consumed_batches += 1

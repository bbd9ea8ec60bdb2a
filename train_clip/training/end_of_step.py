"""What happens once the optimizer has stepped and before anything is saved.

The order is: update and clamp (the module's ``optimizer_step``), position (here), save (checkpoint callbacks, which
Lightning runs after all others; the module's own ``on_train_batch_end`` would come after them).
"""

from __future__ import annotations

from typing import Any

import lightning as L


class EndOfStep(L.Callback):
    """Counts the global batches that have been trained on: the position in the data.

    The count is part of a run, not of a model: a checkpoint restores it only where the run is resumed from it
    (``fit(ckpt_path=…)``), and every other ``fit`` starts at 0.
    """

    def __init__(self) -> None:
        self.consumed_batches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002, the hook's form
        """Start at 0; Lightning restores a resumed run's count after this."""
        if stage == "fit":
            self.consumed_batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        """Advance."""
        self.consumed_batches += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"consumed_batches": self.consumed_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.consumed_batches = state_dict["consumed_batches"]

"""Each use of a private part of Lightning, and that the package has no other.

Private parts of PyTorch and transformers that the package uses, and why: ``BORROWED``. A release that renames one turns
these tests red, and not a run.
"""

from __future__ import annotations

import ast
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

import train_clip
from train_clip.gather import WAIT
from train_clip.training import lightning_internals as internals
from train_clip.training.display import MetricsLog

BORROWED = {
    "torch._foreach_lerp_": "one kernel for the EMA of all weights; torch.optim uses it so, and nothing public does it",
    "torch.nn.modules.batchnorm:_BatchNorm": "the class of all BatchNorms, SyncBatchNorm too",
    "torch._dynamo:config": "where the compiler is told how many forms of a block to keep",
    "torch.fx.experimental:_config": "where it is told that equal sizes are no one size",
    "torch.nn:Module.__setstate__": "as documented for subclasses; Optimizer's, by which Muon shares its state",
    "torch.optim:AdamW.step": "its ``_step_supports_amp_scaling`` says that ``found_inf`` holds an update back",
    "transformers:PreTrainedModel._from_config": "a model of a configuration without weights, in a dtype",
}


def own_trainer(**how: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**({"accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 0} | quiet | how))


def calling(hook: str, act: Any) -> L.Callback:
    """A callback that hands a hook's arguments on."""
    callback = L.Callback()
    setattr(callback, hook, act)
    return callback


@pytest.mark.parametrize("name", [name for name in BORROWED if not name.startswith("transformers")])
def test_what_is_borrowed_of_pytorch_is_there(name: str) -> None:
    assert resolve_name(name) is not None
    assert torch.optim.AdamW([torch.zeros(1)], fused=True)._step_supports_amp_scaling is True


def test_a_model_of_a_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    assert callable(transformers.PreTrainedModel._from_config)


def test_the_trainer_of_a_module() -> None:
    """None before, the Trainer during a run."""
    module, seen = BoringModel(), []
    assert internals.trainer_of(module) is None
    trainer = own_trainer(max_epochs=1, callbacks=[calling("on_train_start", lambda *_: seen.append(module))])
    trainer.fit(module)
    assert seen == [module]
    assert internals.trainer_of(module) is trainer


def test_resuming_is_training() -> None:
    """True while a run is fitted, False while it is validated and where there is no Trainer."""
    seen: list[bool] = []

    def look(trainer: L.Trainer, *_: Any, **__: Any) -> None:
        seen.append(internals.resuming(trainer))

    trainer = own_trainer(max_epochs=1, limit_val_batches=1, callbacks=[calling("setup", look)])
    trainer.fit(BoringModel())
    trainer.validate(BoringModel(), verbose=False)
    assert seen == [True, False]
    assert internals.resuming(None) is False


def test_the_scaler_of_16_mixed() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert internals.gradient_scaler(own_trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])) is scaler
    assert internals.gradient_scaler(own_trainer()) is None


@pytest.mark.parametrize("helped", [True, False])
def test_a_run_resumed_at_an_epochs_end_begins_with_the_next(tmp_path: Path, helped: bool) -> None:
    """Two batches an epoch, one of three epochs done, ``max_steps`` set: two epochs are left, not Lightning's one."""
    file, seen = tmp_path / "end.ckpt", []
    save = calling("on_train_epoch_end", lambda trainer, _: trainer.save_checkpoint(file))
    own_trainer(max_epochs=1, callbacks=[save]).fit(BoringModel())
    help_it = calling("on_train_start", lambda trainer, _: internals.begin_next_epoch(trainer) if helped else None)
    count = calling("on_train_batch_end", lambda *arguments: seen.append(arguments[4]))
    trainer = own_trainer(max_epochs=3, max_steps=100, callbacks=[help_it, count])
    trainer.fit(BoringModel(), ckpt_path=file, weights_only=True)
    assert (seen == [0, 1, 0, 1]) == helped


def test_which_batches_step_and_which_is_the_last() -> None:
    """Eight batches, accumulation over 3: the third, the sixth and the last; without a length the loader says so."""
    trainer: Any = SimpleNamespace(is_last_batch=False, num_training_batches=8, accumulate_grad_batches=3)
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    found = []
    for trainer.fit_loop.epoch_loop.batch_idx in range(8):
        found.append(internals.steps_and_ends(trainer))
    assert [place for place, (steps, _) in enumerate(found) if steps] == [2, 5, 7]
    assert [place for place, (_, ends) in enumerate(found) if ends] == [7]
    trainer.is_last_batch, trainer.num_training_batches = True, float("inf")
    trainer.fit_loop.epoch_loop.batch_idx = 3
    assert internals.steps_and_ends(trainer) == (True, True)


def test_a_steps_figures_are_written_before_lightning_writes_them(tmp_path: Path) -> None:
    """In ``on_train_batch_end`` the row is there, once also afterwards."""
    log, lines = MetricsLog(tmp_path, 0), []

    class Logging(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("figure", float(batch_idx))
            return super().training_step(batch, batch_idx)

    def look(trainer: L.Trainer, *_: Any) -> None:
        internals.log_step(trainer)
        lines.append(len(log.file.read_text().splitlines()))

    how = {"logger": log, "log_every_n_steps": 1}
    own_trainer(max_epochs=1, callbacks=[calling("on_train_batch_end", look)], **how).fit(Logging())
    assert lines == [2, 3]
    assert len(log.file.read_text().splitlines()) == 3


def test_children_are_taken_over() -> None:
    """Of the launcher that starts scripts, which then knows of none; another has none."""
    launcher, child = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1), object()
    launcher.procs.append(child)  # type: ignore[arg-type]
    for one, children in ((launcher, [child]), (None, [])):
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=one))
        assert internals.take_children(trainer) == children
    assert launcher.procs == []


def test_waits_are_announced() -> None:
    """Each fetch and each iterator that is made, and nothing else."""
    seen: list[bool] = []

    class Slow(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            for _ in range(2):
                seen.append(WAIT.for_batch)
                yield torch.ones(32)

    class Looking(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert WAIT.since == 0
            return super().training_step(batch, batch_idx)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Slow())

        val_dataloader = train_dataloader

    trainer = own_trainer(max_epochs=2, num_sanity_val_steps=0)
    internals.announce_waits(trainer)
    trainer.fit(Looking())
    assert seen == [True] * 4
    assert WAIT.since == 0


def test_no_other_file_reaches_into_lightning() -> None:
    """No private name is imported of it, and no private attribute is read that its objects have."""
    trainer = own_trainer()
    objects = (trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.strategy, BoringModel())
    private = {name for one in objects for name in dir(one) if name.startswith("_") and not name.endswith("__")}
    private -= set(dir(torch.nn.Module()))
    assert {"_trainer", "_logger_connector", "_restarting"} <= private
    of_bases = {"_trainer", "_experiment"}  # a module's and a logger's, which subclasses might read of themselves
    root, found = Path(train_clip.__file__).parent, []
    for file in set(root.rglob("*.py")) - {Path(internals.__file__)}:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                names = [*node.module.split("."), *(name.name for name in node.names)]
                found += [(file.name, name) for name in names if name.startswith("_")]
            elif isinstance(node, ast.Attribute):
                names = of_bases if ast.unparse(node.value) == "self" else private
                found += [(file.name, ast.unparse(node))] if node.attr in names else []
    assert found == []

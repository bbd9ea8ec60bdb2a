"""Signals under a bare Trainer: the module's own hooks finish the batch, save beside the user's checkpoints, end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from train_clip import CLIPWrapper
from train_clip.training.signals import Stopped

PIXELS = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PAIRS = [(image, f"picture {index}") for index, image in enumerate(PIXELS)]  # 6 batches of 4


def signal_in(hook: str, count: int, number: int = signal.SIGTERM) -> L.Callback:
    """Sends this process a signal the ``count``-th time that a hook is called."""
    left = [count]

    def send(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)

    callback = L.Callback()
    setattr(callback, hook, send)
    return callback


def fit(config: Any, *callbacks: L.Callback, **how: Any) -> CLIPWrapper:
    """Train; stopped, most of the time."""
    resume = how.pop("resume", None)
    module = CLIPWrapper("tiny", config)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 2} | how),
    )
    loader = DataLoader(PAIRS, batch_size=4)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize(
    ("hook", "count", "batches"),
    [
        ("on_train_batch_start", 3, 3),
        ("on_before_backward", 3, 3),
        ("on_after_backward", 3, 3),
        ("on_before_zero_grad", 3, 3),
        ("on_before_optimizer_step", 2, 2),
        ("on_train_batch_end", 5, 5),
        ("on_train_batch_start", 6, 6),
        ("on_train_epoch_end", 1, 6),
        ("on_train_epoch_start", 2, 7),
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_batch_is_finished_and_saved(tiny_config, tmp_path, hook, count, batches, number, code):
    """In whatever part of a batch: that batch is whole in last.ckpt, the process ends with the shells' code."""
    with pytest.raises(Stopped) as stop:
        fit(tiny_config, signal_in(hook, count, number), ModelCheckpoint(tmp_path))
    assert stop.value.code == code
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["EndOfStep"]["consumed_batches"] == saved["global_step"] == batches


def test_a_pending_gradient_is_not_lost(tiny_config, tmp_path):
    """Accumulation of 4 over 6 batches, a signal in the first: saved after the fourth, with its step."""
    with pytest.raises(Stopped):
        fit(tiny_config, signal_in("on_train_batch_start", 1), ModelCheckpoint(tmp_path), accumulate_grad_batches=4)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (saved["callbacks"]["EndOfStep"]["consumed_batches"], saved["global_step"]) == (4, 1)


@pytest.mark.parametrize(("interval", "batches"), [(2, 3), (6, 6)])
def test_a_signal_in_validation_acts_a_batch_later_or_at_the_epochs_end(tiny_config, tmp_path, interval, batches):
    """The next batch is finished where the validation was within the epoch; at its end there is none."""
    module = CLIPWrapper("tiny", tiny_config)
    how: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    send = signal_in("on_validation_batch_start", 1)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[send, ModelCheckpoint(tmp_path)],
        val_check_interval=interval,
        num_sanity_val_steps=0,
        **how,
    )
    with pytest.raises(Stopped):
        trainer.fit(module, DataLoader(PAIRS, batch_size=4), DataLoader(PAIRS[:8], batch_size=4))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["EndOfStep"]["consumed_batches"] == batches


def test_without_checkpoints_nothing_is_saved(tiny_config, tmp_path, monkeypatch, capsys):
    """A Trainer that keeps none: the run ends with the code all the same, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped) as stop:
        fit(tiny_config, signal_in("on_train_batch_start", 2), enable_checkpointing=False)
    assert stop.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_given_back(tiny_config, tmp_path):
    """After a run that ends by itself, by an error or by a signal: what was there before."""
    for send in (L.Callback(), signal_in("on_train_batch_start", 2), crash()):
        before, threads = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], set(answering())
        with contextlib.suppress(Stopped, KeyError):
            fit(tiny_config, send, ModelCheckpoint(tmp_path), max_epochs=1)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        assert signal.set_wakeup_fd(-1) == -1
        for thread in set(answering()) - threads:
            thread.join(5)
            assert not thread.is_alive()


def answering() -> list[threading.Thread]:
    """Threads that answer signals."""
    return [thread for thread in threading.enumerate() if "_act_at_once" in thread.name]


def crash() -> L.Callback:
    def stop(*_: Any) -> None:
        raise KeyError("crash")

    callback = L.Callback()
    callback.on_train_batch_start = stop  # type: ignore[method-assign]
    return callback


def test_another_thread_trains_without_handlers(tiny_config, tmp_path):
    """Python allows handlers in the main thread alone: a run in another one works, and leaves them as they are."""
    before = signal.getsignal(signal.SIGTERM)
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(tiny_config, ModelCheckpoint(tmp_path), max_epochs=1)))
    thread.start()
    thread.join()
    assert done[0].consumed_batches == 6
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_second_signal_acts_at_once(name):
    """A process that handles them and never reads: it lives through the first, and ends at the second."""
    script = (
        "import os, signal, time; from train_clip.training.signals import StopSignals; s = StopSignals(); s.install();"
        f"os.kill(os.getpid(), signal.{name}); time.sleep(1); print('lives', s.received, flush=True);"
        f"os.kill(os.getpid(), signal.{name}); time.sleep(1); print('on')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    number = getattr(signal, name)
    assert ended.stdout == f"lives {int(number)}\n"
    assert ended.returncode == 128 + number


def test_an_earlier_runs_last_checkpoint_stays(tiny_config, tmp_path):
    """Two runs into one folder under a bare Trainer: the second's is last-v1.ckpt; resumed from it, it is replaced."""
    for _ in range(2):
        with pytest.raises(Stopped):
            fit(tiny_config, signal_in("on_train_batch_start", 2), ModelCheckpoint(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last-v1.ckpt"}
    with pytest.raises(Stopped):
        fit(tiny_config, signal_in("on_train_batch_start", 2), ModelCheckpoint(tmp_path), resume=tmp_path / "last.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last-v1.ckpt"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["EndOfStep"]["consumed_batches"] == 4

"""Runs a function in several processes that talk to one another, and brings back what each of them returned."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import distributed, multiprocessing

from train_clip.gather import world

TIMEOUT = 120  # seconds; imports alone take some on a loaded machine

# Processes are forked from a clean one that has imported what takes seconds, where the system can do that. Those on
# CUDA start afresh: a fork cannot use CUDA if an import has so much as counted the devices.
START = {"cpu": "spawn", "cuda": "spawn"}
if "forkserver" in multiprocessing.get_all_start_methods():
    START["cpu"] = "forkserver"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "lightning.pytorch"])


def run(function: Callable[[], Any], folder: Path, processes: int = 2, device: str = "cpu") -> list[Any]:
    """Call a function in each process and return the results in the order of the ranks.

    Args:
        function: at the top of a module, or a ``partial`` of one; takes nothing, returns what ``torch.save`` can write.
        folder: empty, for the rendezvous and the results.
        processes: how many.
        device: ``cpu``, over gloo; or ``cuda``, over nccl with a device each where there are enough, else over gloo on
            those that there are. A process's own is then the current CUDA device.

    Raises:
        TimeoutError: they hang. They are ended, so that the tests go on.
    """
    arguments = (function, str(folder), processes, device)
    context = multiprocessing.start_processes(_child, arguments, processes, join=False, start_method=START[device])
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function}: no result from {processes} processes after {TIMEOUT} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def bare_trainer(**how: Any) -> L.Trainer:
    """A bare Trainer on as many processes as there are, which logs each step and leaves nothing behind by itself."""
    processes = world()[1]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    strategy = "ddp" if processes > 1 else "auto"
    return L.Trainer(accelerator="cpu", devices=processes, strategy=strategy, **(quiet | how))


def _child(rank: int, function: Callable[[], Any], folder: str, processes: int, device: str) -> None:
    torch.set_num_threads(1)
    # As torchrun would have started them, for a Trainer of ``devices=processes``.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test", "MASTER_PORT": "0"}
    os.environ["MASTER_ADDR"] = "localhost"
    backend = "gloo"
    if device == "cuda":
        num_devices = torch.cuda.device_count()
        torch.cuda.set_device(rank % num_devices)
        backend = "nccl" if num_devices >= processes else "gloo"
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        torch.save(function(), Path(folder) / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()

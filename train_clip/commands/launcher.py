"""A process's place in its run, as launchers tell it in the environment: torchrun, srun, jsrun, Lightning's own."""

import os
from typing import TYPE_CHECKING

from train_clip.errors import UsageError

if TYPE_CHECKING:  # what is in the environment is looked at before Lightning is imported, which reads some of it
    import lightning as L

# Variables that hold a place, from 0, and the Trainer's count of such places, which WORLD_SIZE itself holds.
PLACES = dict.fromkeys(("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "WORLD_SIZE"), "world_size")
PLACES |= {"LOCAL_RANK": "num_devices", "NODE_RANK": "num_nodes", "GROUP_RANK": "num_nodes"}
TASKS = "SLURM_NTASKS"


def require_numbers() -> None:
    """Refuse anything but a number where launchers set one."""
    for name in (*PLACES, TASKS):
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise UsageError(f"{name}={value!r}: in the environment, where launchers set a number: unset {name}.")


def is_first() -> bool:
    """Whether this process is its run's first. Lightning's own rank is not yet right on a second host."""
    names = ["LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ["RANK"]
    return not any(int(os.environ.get(name) or 0) for name in names)


def require_own_place(trainer: "L.Trainer") -> None:
    """Refuse the place in another run that a launcher has left in the environment, or say what is waited for."""
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch.utilities import rank_zero_only

    from train_clip.training.lightning_internals import FROM_SLURM

    tasks, elastic = int(os.environ.get(TASKS, "1")), TorchElasticEnvironment.detect()
    if tasks > trainer.world_size == 1 and SLURMEnvironment.detect() and not elastic:
        raise UsageError(f"{TASKS} is {tasks}, and each task would train alone.{FROM_SLURM}")
    places = {name: int(os.environ.get(name, 0)) - (name == "WORLD_SIZE") for name in PLACES}
    if wrong := [name for name, count in PLACES.items() if places[name] >= getattr(trainer, count)]:
        raise UsageError(
            f"{', '.join(f'{name}={os.environ[name]}' for name in wrong)}: does not fit --devices and --num_nodes, by "
            f"which the run has {trainer.world_size} processes. If an earlier launcher (torchrun, srun) has left it in "
            f"the environment: unset {' '.join(wrong)}. Otherwise give --devices and --num_nodes as the launcher does."
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(environment, LightningEnvironment) or trainer.world_size == 1:
        return
    if environment.creates_processes_externally:
        rank_zero_only(print)(
            f"LOCAL_RANK is set: waiting for the other {trainer.world_size - 1} processes, to be started in the same "
            "way. If train-clip is to start them: unset LOCAL_RANK."
        )
    elif trainer.num_nodes == 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # Lightning finds its own

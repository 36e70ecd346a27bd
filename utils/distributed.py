"""One process, or several that torchrun started: to train, or to share pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from models.large.memory import send
from utils.device import pick_device
from utils.errors import UserError

T = TypeVar("T")
ENVIRONMENT = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets it
# How long a process waits for another one that hangs. gloo notices at once when one dies; with NCCL torchrun ends the
# others half a minute later.
TIMEOUT, PATIENT_TIMEOUT = timedelta(minutes=10), timedelta(days=1)


@dataclass
class DistContext:
    """The processes of a run: each has a part of every batch, or of the pictures; the main one tells results."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, device: str, sharing: bool = False) -> "DistContext":
        """Join the processes that torchrun started; without torchrun there is one process.

        With CUDA each process takes the GPU of its local rank. UserError where there is none.

        Args:
            sharing: whether processes only share pictures. They then meet once, at the end, and wait long for that.
        """
        found = pick_device(device)
        missing = [name for name in ENVIRONMENT if name not in os.environ]
        if os.environ.get("WORLD_SIZE", "1") == "1" and missing:
            if (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
                told = f"srun has started {tasks} tasks, which do not know of each other"
                way = "start one a machine, and processes with torchrun (docs/training.md)"
                raise UserError(f"{told}: {way}, or unset SLURM_STEP_NUM_TASKS for one process")
            return cls(found)
        if missing:
            told = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} are not set"
            raise UserError(f"{told}: start several processes with torchrun, or unset WORLD_SIZE")
        if found.type == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            if local >= (count := torch.cuda.device_count()):
                raise UserError(f"process {local} of this machine has no GPU: there are {count}")
            found = torch.device("cuda", local)
            torch.cuda.set_device(found)
        backend = "nccl" if found.type == "cuda" and not sharing else "gloo"
        dist.init_process_group(backend, timeout=PATIENT_TIMEOUT if sharing else TIMEOUT)
        return cls(found, dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, values: Tensor, *numbers: float) -> tuple[list[float], list[float]]:
        """Means over the processes of values `[n]` on the device, and maxima of numbers of the host, the same in all.

        One collective operation and one read of the device, as the host waits at each.
        """
        if self.world_size == 1:
            return values.tolist(), list(numbers)
        table = torch.zeros(self.world_size, len(values) + len(numbers), dtype=torch.float64, device=self.device)
        table[self.rank, : len(values)] = values
        table[self.rank, len(values) :] = send(torch.tensor(numbers, dtype=torch.float64), self.device)
        dist.all_reduce(table)  # zeros but in one row: what every process knows
        means, largest = table.cpu().split((len(values), len(numbers)), dim=1)
        return means.mean(0).tolist(), largest.amax(0).tolist()

    def gather(self, value: object) -> list:
        """The value of every process, by rank: a list that is the same in all of them. Values must be picklable."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this process's: every world_size-th."""
        return items[self.rank :: self.world_size]

    def join(self, found: list[T]) -> list[T]:
        """The results of all processes for their shares, one per item, in the order of all items.

        Raises:
            UserError: another process has ended.
        """
        try:
            parts = self.gather(found)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise UserError("another process of this run has ended: nothing was written") from None
        return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error means that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

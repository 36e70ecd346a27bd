"""One process or many: what a training run asks of `torchrun`."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils import cli

# How long a process waits for one that hangs. One that dies is noticed at once by gloo; with NCCL torchrun ends the
# others half a minute later.
PATIENCE = timedelta(minutes=10)


@dataclass
class Team:
    """The processes of a run; each owns a part of every batch, and only the first writes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str) -> "Team":
        """Meet the other processes that torchrun started; alone if there are none.

        With CUDA each process takes the GPU of its local rank. UserError where there is none.
        """
        found = cli.pick_device(device)
        if "WORLD_SIZE" not in os.environ:
            return cls(found)
        if found.type == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            if local >= (count := torch.cuda.device_count()):
                raise cli.UserError(f"process {local} of this machine has no GPU: there are {count}")
            found = torch.device("cuda", local)
            torch.cuda.set_device(found)
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(found, dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, in place."""
        return self.sum(values).div_(self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, *values: float) -> list[float]:
        """The largest of each number over the processes: the same answer in all of them."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """What every process has, by rank: any values that can be pickled, the same list in all of them."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

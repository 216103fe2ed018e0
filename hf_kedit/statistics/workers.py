"""Several processes that share one piece of work, as started by ``torchrun`` or ``accelerate launch``.

Nothing here happens by itself: a program that is launched many times may well want to edit in one process only, and
a collective call in the library would make that one wait for ever. Who wants to share work asks for it with `join`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process among its fellows.

    Args:
        rank: its number.
        count: how many there are.
        group: process group for tensors on the CPU; ``None`` where there is only one process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace every tensor (on the CPU) by its sum over the processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor, group=self.group)

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any process gives, in the same order everywhere."""
        return list(dict.fromkeys(name for part in self.gather(list(names)) for name in part))

    def share(self, count: int) -> range:
        """Which of ``count`` pieces of work are this process's."""
        return range(self.rank, count, self.count)

    def gather(self, mine: T) -> list[T]:
        """What every process has, in the order of their numbers."""
        if self.count == 1:
            return [mine]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            torch.distributed.barrier(group=self.group)


ALONE = Workers()


def join() -> Workers:
    """Meet the other processes of a ``torchrun`` or ``accelerate launch``; `ALONE` in an ordinary run.

    Raises:
        ConfigError: if the environment announces more processes than can be met.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 and not _initialised():
        return ALONE
    if not torch.distributed.is_available():
        raise ConfigError("WORLD_SIZE is set, but this build of torch has no torch.distributed; run one process")
    if not _initialised():
        torch.distributed.init_process_group("gloo")
    count = torch.distributed.get_world_size()
    if count == 1:
        return ALONE
    default = torch.distributed.get_backend() == "gloo"
    group = torch.distributed.group.WORLD if default else torch.distributed.new_group(backend="gloo")
    return Workers(torch.distributed.get_rank(), count, group)


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local_device() -> str | None:
    """The accelerator of this process, ``"cuda:1"``; ``None`` without one, or in an ordinary run."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None

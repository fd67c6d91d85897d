"""This file is where a rank of the tests' process group runs, without Ray: it trains what it is sent.

Started by the fixture `pair`. The blocks of latents lie in the lease itself, where otherwise references to them are.
"""

import sys
from multiprocessing.connection import Client
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import RayboothError
from training import lease as lease_module
from training.lease import Lease
from training.loop import ResidentBase, train_run
from training.wish import Dropped, Wish


def train(lease: Lease, base: ResidentBase, rank: int, wishes: dict[int, Wish]) -> dict[str, Any]:
    """Train a lease; `wishes` are this rank's, by step (from 0) of this call."""
    events: list[tuple[str, Any]] = []
    asked = 0

    def wish() -> Wish:
        nonlocal asked
        asked += 1
        return wishes.get(asked - 1, Wish.NONE)

    def report(kind: str, payload: Any) -> None:
        events.append((kind, payload))

    try:
        metrics = train_run(lease, base, rank, dist.get_world_size(), report, wish)
    except (RayboothError, Dropped) as error:
        return {"error": error, "events": events}
    return {"metrics": metrics, "events": events}


def main() -> None:
    """`worker.py RANK WORLD STORE ADDRESS`: be a rank until killed."""
    rank, world, store, address = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    lease_module.fetch = list  # type: ignore[attr-defined]
    bases: dict[str, ResidentBase] = {}
    with Client(address) as connection:
        connection.send(rank)
        while True:
            lease, wishes = connection.recv()
            if lease.base_model not in bases:
                cpu = torch.device("cpu")
                bases[lease.base_model] = ResidentBase.load(lease.base_model, lease.base_revision, cpu)
            connection.send(train(lease, bases[lease.base_model], rank, wishes))


if __name__ == "__main__":
    main()

"""This file is where it is found out what a campaign has to work with: gangs, their device and their memory."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.machine import sees_gpu
from cluster.session import cpu_count, gpu_count, resolve_address
from orchestrator.campaign_settings import Schedule
from orchestrator.fits import Room
from training.gang import GangShape
from training.recipe import Cluster

STREAM_CPUS = 3  # logical ones: an actor that encodes, one that draws, a task that reads


@dataclass(frozen=True)
class Site:
    """A machine of our own, or a cluster that was joined."""

    joined: bool
    gangs: int
    """Gangs at a time."""
    device: str
    """`cpu` or `cuda`: what gangs train on and images are drawn with."""
    room: Room
    """Memory for one gang."""
    cpus: int = 0
    """Logical CPUs that a Ray of our own is started with."""

    def shape(self, cluster: Cluster) -> GangShape:
        """The gang that a run asks for."""
        wanted = cluster.gpus_per_worker
        gpus = float(self.device == "cuda") if wanted == "auto" else wanted
        return GangShape(cluster.workers, cluster.cpus_per_worker, gpus, cluster.min_workers)


def survey(clusters: Iterable[Cluster], schedule: Schedule, address: str | None) -> Site:
    """What there is before Ray is started.

    Args:
        clusters: Of the runs, what they ask for.
        schedule: Its number of gangs goes before ours.
        address: Ray cluster to join; `None` is this machine.
    """
    asked = list(clusters)
    joined = resolve_address(address) is not None
    device = "cuda" if sees_gpu() and any(c.gpus_per_worker != 0 for c in asked) else "cpu"
    largest = max((c.workers * c.cpus_per_worker for c in asked), default=1)
    cores = len(os.sched_getaffinity(0))
    fitting = 1 if joined or device == "cuda" else max(1, cores // largest)
    gangs = fitting if schedule.gangs == "auto" else schedule.gangs
    room = Room(None, None) if joined else Room.here(device)
    each = Room(room.cpu // gangs if room.cpu is not None else None, room.gpu)
    cpus = max(gangs * largest, cores) if device == "cuda" else gangs * largest  # GPUs are counted by Ray
    return Site(joined, gangs, device, each, cpus + STREAM_CPUS)


def settled(site: Site, clusters: Iterable[Cluster], schedule: Schedule) -> Site:
    """The same once Ray runs and says what it has: `auto` is as many gangs as that has room for."""
    gpus = gpu_count()
    if not site.joined and site.device == "cpu":
        return site
    device = "cuda" if gpus and any(c.gpus_per_worker != 0 for c in clusters) else "cpu"
    site = replace(site, device=device)
    if schedule.gangs != "auto":
        return site
    shapes = [site.shape(c) for c in clusters] or [GangShape()]
    cpus = max(1, cpu_count() - STREAM_CPUS)
    fits = min(
        min(cpus // (s.workers * s.cpus_per_worker) for s in shapes),
        min(
            (int(gpus // (s.workers * s.gpus_per_worker)) for s in shapes if s.gpus_per_worker), default=cpus
        ),
    )
    return replace(site, gangs=max(1, fits))

"""This file is where a run that cannot fit into memory is refused before work starts, with the settings that would."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

from cluster.errors import UserError
from cluster.machine import gpu_memory_bytes, memory_bytes
from training.ceiling import memory_ceiling
from training.engine import zero_stage
from training.memory import MemoryEstimate, estimate
from training.pipeline import BaseInfo
from training.recipe import Run
from training.section import merge

GPU_CONTEXT = 600_000_000  # bytes that CUDA and its kernels take beside what torch counts
GB = 1e9


@dataclass(frozen=True)
class Room:
    """Memory of this machine in bytes; `None` is unknown, and then nothing is refused for it."""

    cpu: int | None
    gpu: int | None

    @classmethod
    def here(cls, device: str) -> "Room":
        """What this machine has for workers on `device`."""
        gpu = gpu_memory_bytes() if device == "cuda" else None
        return cls(memory_bytes(), gpu - GPU_CONTEXT if gpu is not None else None)


@dataclass(frozen=True)
class Fit:
    """What the workers of a run need, beside what there is."""

    device: str
    workers: int
    estimate: MemoryEstimate
    room: int | None
    """Bytes that one worker may take on its device."""
    room_offloaded: int | None
    """Bytes that one worker on a GPU may take of the memory of the CPU."""

    @property
    def fits(self) -> bool:
        """Whether it is not known to be too much."""
        pairs = ((self.estimate.peak, self.room), (self.estimate.offloaded, self.room_offloaded))
        return all(room is None or need <= room for need, room in pairs)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `raybooth plan --json`, in bytes."""
        return {
            "device": self.device,
            "peak_per_worker": self.estimate.peak,
            "room_per_worker": self.room,
            "parts": asdict(self.estimate),
        }

    def line(self) -> str:
        """The same for people."""
        parts = ", ".join(f"{name} {part / GB:.2f}" for name, part in asdict(self.estimate).items() if part)
        room = f" of {self.room / GB:.1f}" if self.room is not None else ""
        kind = "GPU" if self.device == "cuda" else "CPU"
        return f"about {self.estimate.peak / GB:.2f}{room} GB of {kind} memory a worker ({parts})"


def fit(base: BaseInfo, run: Run, device: str, room: Room) -> Fit:
    """What a run needs on `device`, at the number of workers where that is the most it can come to.

    Args:
        base: Its base.
        run: The run; with `cluster.min_workers` it may have fewer workers, who hold larger shards.
        device: `cpu` or `cuda`.
        room: What there is.
    """
    cluster = run.cluster
    fewest = min(cluster.min_workers or cluster.workers, cluster.workers)
    share = cluster.gpus_per_worker if isinstance(cluster.gpus_per_worker, float) else 1.0
    for workers in sorted({fewest, cluster.workers}):
        cpu = room.cpu // workers if room.cpu is not None else None
        gpu = int(room.gpu * min(share, 1.0)) if room.gpu is not None else None
        found = Fit(
            device, workers, estimate(base, run, device, workers), gpu if device == "cuda" else cpu, cpu
        )
        if not found.fits:
            break
    return found


def check_memory(base: BaseInfo, run: Run, device: str, room: Room) -> Fit:
    """What a run needs.

    Raises:
        UserError: It is more than there is; names the settings that would do, by estimating each.
    """
    found = fit(base, run, device, room)
    if found.fits:
        return found
    raise UserError(
        f"the run needs more memory than there is: {found.workers} x {found.estimate.peak / GB:.1f} GB",
        found.line(),
        _remedies(base, run, device, room),
    )


class Memory:
    """What runs need on one kind of machine, estimated once for those that need the same.

    Args:
        device: `cpu` or `cuda`.
        room: What there is for one gang.
    """

    def __init__(self, device: str, room: Room) -> None:
        self.device, self.room = device, room
        self._known: dict[str, Fit | UserError] = {}
        self._lock = Lock()

    def check(self, base: BaseInfo, run: Run) -> None:
        """Refuse a run that cannot fit; raises as `check_memory` does."""
        if self.room == Room(None, None) or self._surely_fits(base, run):
            return
        alike = run.model_dump(include={"train", "engine", "cluster", "validate_", "prior"})
        for section, settings in _WITHOUT_MEMORY.items():
            alike[section] = {key: value for key, value in alike[section].items() if key not in settings}
        # of the steps it only matters whether samples are drawn and checkpoints saved on the way
        on_the_way = [run.validate_.every < run.train.steps, run.checkpoint.every < run.train.steps]
        key = f"{base.revision} {alike} {on_the_way}"
        with self._lock:  # a second one would take as long as waiting for the first
            if key not in self._known:
                try:
                    self._known[key] = check_memory(base, run, self.device, self.room)
                except UserError as error:
                    self._known[key] = error
            found = self._known[key]
        if isinstance(found, UserError):
            raise UserError(found.what, found.seen, found.do)

    def _surely_fits(self, base: BaseInfo, run: Run) -> bool:
        """Whether there is so much room that it need not be estimated."""
        zero_stage(run.engine, run.train, run.cluster.workers)  # refuses what an estimate refuses
        share = run.cluster.gpus_per_worker if isinstance(run.cluster.gpus_per_worker, float) else 1.0
        rooms = [
            self.room.cpu // run.cluster.workers if self.room.cpu is not None else None,
            self.room.gpu * min(share, 1.0) if self.room.gpu is not None and self.device == "cuda" else None,
        ]
        ceiling = memory_ceiling(base, run, self.device)
        return all(room is None or ceiling <= room for room in rooms)


# Settings that take no memory, of sections that otherwise do.
_WITHOUT_MEMORY = {
    "train": (
        "steps",
        "lr",
        "seed",
        "prompt",
        "weight_decay",
        "warmup_steps",
        "lr_scheduler",
        "max_grad_norm",
        "changes",
    ),
    "prior": ("num_images", "prompt", "negative_prompt", "sampler", "steps", "guidance", "seed"),
}


def _remedies(base: BaseInfo, run: Run, device: str, room: Room) -> str:
    """The settings of which each is enough; else those that are enough together."""
    enough: dict[str, str] = {}
    for setting, value, changes in _savers(run, device):
        if setting not in enough and (alone := fit(base, _changed(run, changes), device, room)).fits:
            enough[setting] = f"{setting}={value} ({alone.estimate.peak / GB:.2f} GB)"
    if enough:
        return f"set {' or '.join(enough.values())}"
    together, named = run, dict[str, str]()
    for setting, value, changes in _savers(run, device):
        together = _changed(together, changes)
        named[setting] = f"{setting}={value}"
        if fit(base, together, device, room).fits:
            return f"set {' and '.join(named.values())} together"
    return "no setting of this run is enough: use a machine with more memory or a smaller base"


def _savers(run: Run, device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Settings that save memory, the cheapest first: what to set, to what, and what that changes."""
    train, engine, workers = run.train, run.engine, run.cluster.workers
    if not engine.gradient_checkpointing:
        yield "engine.gradient_checkpointing", "true", {"engine": {"gradient_checkpointing": True}}
    pairs, parts = -(-train.pairs_per_step // workers), train.accumulation
    while parts < pairs:
        parts = min(4 * parts, pairs)
        yield "train.accumulation", str(parts), {"train": {"accumulation": parts}}
    for stage in (2, 3):
        if train.optimizer.is_sharded and workers > 1 and zero_stage(engine, train, workers) < stage:
            yield "engine.zero_stage", str(stage), {"engine": {"zero_stage": stage}}
    if device == "cuda" and train.optimizer.is_sharded and not engine.offload:
        shards = {} if engine.zero_stage else {"zero_stage": "auto"}  # stage 0 cannot
        yield "engine.offload", "true", {"engine": {"offload": True, **shards}}
    if device == "cpu" and workers > 1:
        yield "cluster.workers", "1", {"cluster": {"workers": 1, "min_workers": None}}
    if train.method == "full":
        yield "train.method", "lora", {"train": {"method": "lora"}}


def _changed(run: Run, changes: dict[str, Any]) -> Run:
    return Run.model_validate(merge(run.model_dump(mode="json", by_alias=True), changes))

"""This file is where the work of a campaign is done: runs are made ready, leased, written down and published."""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.mailbox import SYSTEM, Event
from cluster.objects import StorageError
from cluster.registry import CHAMPION
from cluster.session import check_fits
from cluster.storage import Storage
from orchestrator.campaign_mirror import CampaignMirror
from orchestrator.campaign_settings import Schedule
from orchestrator.crew import Crew, Gang, Kind
from orchestrator.facts import Fact, Failed, Measured, Registered
from orchestrator.fits import Memory
from orchestrator.prepare import destination, one_at_a_time
from orchestrator.recovery import Size
from orchestrator.roster import Outline
from orchestrator.run_record import RunRecord
from orchestrator.site import Site
from orchestrator.spec import parse_run
from orchestrator.supply import Supply, smaller
from training.bank_key import bank_key, calibrated_width, calibration_path
from training.latents import latent_refs
from training.lease import Lease
from training.pipeline import BaseInfo, open_base
from training.prior import prior_images, prior_key
from training.recipe import Run
from training.stream import Pool

DESKS = 4  # threads that write runs down, so that a slow tracking server holds up no gang
IDLE_S = 10.0  # on a cluster of others, until a gang that has nothing to do gives its room back


@dataclass
class _Open:
    """A run that is with a gang, or just was."""

    record: RunRecord
    lock: ExitStack = field(default_factory=ExitStack)


class CampaignWorks:
    """The works of one campaign on Ray.

    Args:
        name: Of the campaign.
        storage: Root.
        schedule: The campaign's.
        site: What there is to work with.
        specs: The spec of a run by its id.
        mirror: MLflow's run of the campaign; `None` where it is not mirrored.
        say: Takes lines for people.
        alias: What a new version is registered as.
    """

    def __init__(
        self,
        name: str,
        storage: Storage,
        schedule: Schedule,
        site: Site,
        specs: Callable[[int], Mapping[str, Any]],
        mirror: CampaignMirror | None,
        say: Callable[[str], None],
        alias: str = CHAMPION,
    ) -> None:
        self._alias = alias
        self._storage, self._site, self._specs, self._mirror, self._say = storage, site, specs, mirror, say
        self._inbox: queue.SimpleQueue[Fact] = queue.SimpleQueue()
        pool = Pool(gpus=1.0 if site.device == "cuda" else 0.0)
        self._supply = Supply(storage, pool, Memory(site.device, site.room), self._inbox.put)
        scratch = None if storage.is_local else storage.full(f"campaigns/{name}/gangs")
        self._crew = Crew(name, site.gangs, schedule.runs_per_gang, scratch, self._heard)
        self._desks = [ThreadPoolExecutor(1, thread_name_prefix="desk") for _ in range(DESKS)]
        self._open: dict[int, _Open] = {}
        self._said: dict[int, list[Event]] = {}
        self._said_lock = threading.Lock()
        self._bases: dict[tuple[str, str | None], BaseInfo] = {}
        self._widths: dict[str, int | None] = {}
        self._keys: dict[int, str | None] = {}
        self._ending: dict[int, Future[None]] = {}
        self._class_latents: dict[tuple[str, int], list[Any]] = {}

    # -- making ready --------------------------------------------------------------------------------------

    def outline(self, run: int, size: Size) -> Outline:
        spec = self._run(run, size)
        wanted = (spec.base.model, spec.base.revision)
        if wanted not in self._bases:
            self._bases[wanted] = open_base(*wanted)
        base = self._bases[wanted]
        key = self._keys[run] = bank_key(spec, base.revision)
        prior = None
        if spec.prior.draws:
            prior = prior_key(base, spec.prior, spec.subject.class_noun, self._site.device)
        can = {Size.CHECKPOINTING} if not spec.engine.gradient_checkpointing else set[Size]()
        if spec.train.accumulation * spec.cluster.workers < spec.train.pairs_per_step:
            can.add(Size.ACCUMULATING)
        shape = self._site.shape(spec.cluster)
        fewest = shape.min_workers or shape.workers
        check_fits(fewest, shape.cpus_per_worker, shape.gpus_per_worker, fixed=not self._site.joined)
        return Outline(Kind(base.revision, shape), key, prior, frozenset(can))

    def width(self, bank_key: str) -> int | None:
        if bank_key not in self._widths:
            with suppress(StorageError):  # then it is measured again
                self._widths[bank_key] = calibrated_width(self._storage, bank_key)
        return self._widths.setdefault(bank_key, None)

    def check(self, run: int, size: Size) -> None:
        self._supply.check(run, lambda: self._run(run, size))

    def draw_first(self, prior_keys: Sequence[str]) -> None:
        self._supply.draw_first(prior_keys)

    def _run(self, run: int, size: Size = Size.AS_ASKED) -> Run:
        return smaller(parse_run(self._specs(run)), size)

    # -- gangs ---------------------------------------------------------------------------------------------

    def staff(self, live: Mapping[Kind, int], active: Mapping[Kind, int]) -> None:
        # On the CPUs of a machine of our own there is room for gangs and encoders. GPUs and clusters have their limits,
        # and one might wait for the other.
        tight = self._site.joined or self._site.device == "cuda"
        self._crew.want(active if tight else live, active)
        if tight and self._supply.busy:
            self._crew.rest(IDLE_S)

    def free(self, kind: Kind) -> int:
        return len(self._crew.idle(kind))

    def train(self, kind: Kind, slots: Sequence[int | None]) -> str:
        gang = self._crew.idle(kind)[0]
        leases = [self._lease(run) if run is not None else None for run in slots]
        if any(leases):
            self._crew.lease(
                gang, [(run, of) if run and of else None for run, of in zip(slots, leases, strict=True)]
            )
        return gang.name

    def measure(self, kind: Kind, run: int) -> None:
        gang: Gang = self._crew.idle(kind)[0]
        lease = self._lease(run)
        if lease:
            room = self._site.room.gpu if self._site.device == "cuda" else self._site.room.cpu
            self._crew.measure(gang, run, lease, room)

    def drop(self, run: int) -> None:
        self._crew.drop(run)

    def leave(self) -> bool:
        return self._crew.leave()

    @property
    def spent(self) -> Mapping[str, float]:
        return self._crew.spent

    def _lease(self, run: int) -> Lease | None:
        """A run as a gang takes it, on record and locked; `None` when it has failed instead."""
        try:
            opened = self._open.get(run) or self._opened(run)
            prepared = opened.record.prepared
            photos = latent_refs(self._storage, prepared.base, prepared.subject_images())
            key = prepared.prior_key(self._site.device)
            of_class = self._of_class(prepared.base, key, prepared.run.prior.num_images) if key else []
            return opened.record.lease(photos, of_class, key)
        except Exception as error:
            # nothing that is checked can be the user's mistake: another process trains it, or storage fails
            self._inbox.put(replace(Failed.of(run, error), kind=SYSTEM))
            return None

    def _opened(self, run: int) -> _Open:
        prepared = self._supply[run].prepared
        lock = ExitStack()
        name = prepared.name
        if ending := self._ending.pop(run, None):  # an attempt before this one may still be written down
            ending.result()
        lock.enter_context(self._storage.lock_or_refuse(f"locks/train-{name}", one_at_a_time(name)))
        try:
            # again, as another process may have trained the subject meanwhile
            goal = destination(self._storage, name, prepared.fingerprint, new_version=False)
            record = RunRecord(self._storage, prepared, goal, lambda text: self._say(f"{name}: {text}"))
            record.becomes("training")
        except BaseException:
            lock.close()
            raise
        opened = self._open[run] = _Open(record, lock)
        self._later(run, lambda: record.track(self._mirror.of_run if self._mirror else None))
        return opened

    def _of_class(self, base: BaseInfo, key: str, images: int) -> list[Any]:
        """The class images' latents, in the object store once for all runs of the class."""
        if (key, images) not in self._class_latents:
            found = latent_refs(self._storage, base, prior_images(self._storage, key, images), images)
            self._class_latents[key, images] = found
        return self._class_latents[key, images]

    # -- writing down --------------------------------------------------------------------------------------

    def publish(self, run: int, metrics: Mapping[str, float]) -> None:
        opened = self._open.pop(run, None)
        if opened is None:  # it failed in the meantime
            return
        record = opened.record
        key = record.prepared.prior_key(self._site.device)

        def act() -> None:
            with opened.lock:
                record.register(metrics, key, self._alias)
                record.succeeded()
            artifact = self._storage.full(record.artifact)
            self._inbox.put(Registered(run, record.version, artifact, metrics, record.mlflow_run_id))

        self._supply.forget(run)
        self._later(run, act)

    def end(self, run: int, state: str, reason: str | None) -> None:
        opened = self._open.pop(run, None)

        def act() -> None:
            if opened:
                with opened.lock:
                    opened.record.ended(state, reason)
            elif self._mirror and state == "failed":
                name = str(self._specs(run).get("subject", {}).get("name", run))
                tracker = self._mirror.of_run(name, {}, {"raybooth.subject": name}, None)
                if tracker:
                    tracker.finish(state, reason)

        self._crew.forget(run)
        self._supply.forget(run)
        self._ending[run] = self._later(run, act)

    def facts(self, wait_s: float) -> list[Fact]:
        found = self._crew.listen()
        with suppress(queue.Empty):
            if not found and wait_s:
                found.append(self._inbox.get(timeout=wait_s))
            while True:
                found.append(self._inbox.get_nowait())
        for fact in found:
            if isinstance(fact, Measured) and (key := self._keys.get(fact.run)):
                self._widths[key] = fact.width
                told = {"width": fact.width, "bank_key": key, "figures": dict(fact.figures)}
                with suppress(StorageError):  # then it is measured again the next time
                    self._storage.write(calibration_path(key), json.dumps(told, indent=2).encode())
        return found

    def close(self) -> None:
        """End what is under way, after everything that was to be written down is."""
        self._supply.close()
        self._crew.close()
        for run in list(self._open):
            self.end(run, "interrupted", None)
        for desk in self._desks:
            desk.shutdown(wait=True)

    def _heard(self, run: int, events: Sequence[Event]) -> None:
        """Have a gang's words written down; those that come while a desk is busy go together."""
        opened = self._open.get(run)
        if opened is None:
            return
        record = opened.record
        with self._said_lock:
            waiting = self._said.setdefault(run, [])
            waiting += events
            if len(waiting) > len(events):
                return

        def act() -> None:
            with self._said_lock:
                said = self._said.pop(run)
            record.heard(said)

        self._later(run, act)

    def _later(self, run: int, act: Callable[[], None]) -> Future[None]:
        """Do something about a run after everything that was to be done about it before."""

        def guarded() -> None:
            try:
                act()
            except Exception as error:
                self._inbox.put(Failed.of(run, error))

        return self._desk(run).submit(guarded)

    def _desk(self, run: int) -> ThreadPoolExecutor:
        return self._desks[run % DESKS]

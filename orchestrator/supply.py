"""This file is where runs are made ready: photos checked, class images drawn, everything encoded, all of it in threads.

Whatever runs have in common is made once: a prior set for all runs of a class, one pipeline of the encoder for as
many sets as there are. A run that cannot be made ready is told of, and the others go on.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.facts import Checked, Fact, Failed, Ready, Registered, Said
from orchestrator.fits import Memory
from orchestrator.prepare import Destination, Prepared, destination, prepare
from orchestrator.recovery import Size
from orchestrator.spec import parse_run
from training.latents import ImageSet, latent_path
from training.pipeline import BaseInfo
from training.prior import draw_priors, prior_count, prior_images
from training.recipe import Run
from training.section import merge
from training.stream import Pool, encode

WAVE = 64  # sets or runs that are worth a pipeline of their own while more runs are being checked
CHECKERS = 2  # threads: a photo is decoded outside of Python's lock

Tell = Callable[[Fact], None]
Need = tuple[str, ...]
"""Photos by where their latents lie, or class images by their key and number."""


@dataclass
class Supplied:
    """A run that was checked."""

    prepared: Prepared
    goal: Destination
    missing: set[Need] = field(default_factory=set)
    prior_drawn: int = 0


@dataclass
class _Prior:
    """A prior set that runs wait for."""

    base: BaseInfo
    run: Run
    """One that asks for the most images."""
    runs: list[int] = field(default_factory=list)


def smaller(run: Run, size: Size) -> Run:
    """A run as it is trained when it needs less memory; the same mathematics."""
    changes: dict[str, Any] = {}
    if size >= Size.CHECKPOINTING:
        changes["engine"] = {"gradient_checkpointing": True}
    if size >= Size.ACCUMULATING:
        pairs = -(-run.train.pairs_per_step // run.cluster.workers)
        changes["train"] = {"accumulation": pairs}
    return parse_run(merge(run.model_dump(mode="json", by_alias=True), changes)) if changes else run


class Supply:
    """The threads that make runs ready.

    Args:
        storage: Root.
        pool: Actors that encode and draw.
        memory: Refuses what cannot fit.
        tell: Takes facts; called from any thread.
    """

    def __init__(self, storage: Storage, pool: Pool, memory: Memory, tell: Tell) -> None:
        self._storage, self._pool, self._memory, self._tell = storage, pool, memory, tell
        self._changed = threading.Condition()
        self._runs: dict[int, Supplied] = {}
        self._checking: set[int] = set()
        self._waiting: dict[Need, list[int]] = {}
        self._to_encode: dict[Need, tuple[BaseInfo, ImageSet]] = {}
        self._to_draw: dict[str, _Prior] = {}
        self._first: Sequence[str] = ()
        self._closed = False
        self._checkers = ThreadPoolExecutor(CHECKERS, thread_name_prefix="check")
        self._threads = [
            threading.Thread(target=self._lasting, args=(line,), name=name, daemon=True)
            for name, line in (("encode", self._encode_all), ("draw", self._draw_all))
        ]
        for thread in self._threads:
            thread.start()

    def __getitem__(self, run: int) -> Supplied:
        return self._runs[run]

    @property
    def busy(self) -> bool:
        """Whether anything is being made ready."""
        with self._changed:
            return bool(self._checking or self._to_encode or self._to_draw or self._waiting)

    def check(self, run: int, spec: Callable[[], Run]) -> None:
        """Check a run in turn; it is told of as `Checked` and then as `Ready`, or as `Failed`."""
        with self._changed:
            self._checking.add(run)
        self._checkers.submit(self._check, run, spec)

    def draw_first(self, keys: Sequence[str]) -> None:
        """The order in which prior sets are drawn."""
        with self._changed:
            self._first = list(keys)

    def forget(self, run: int) -> None:
        """A run is not wanted any more. What others need too is still made."""
        with self._changed:
            self._checking.discard(run)
            known = self._runs.pop(run, None)
            if known is None:
                return
            for need in known.missing:
                self._waiting[need].remove(run)
                if not self._waiting[need]:
                    del self._waiting[need]
                    self._to_encode.pop(need, None)
            self._undraw(run)

    def _undraw(self, run: int) -> None:
        """A run needs no prior set any more; one that nobody needs is not drawn."""
        for key, prior in list(self._to_draw.items()):
            if run in prior.runs:
                prior.runs.remove(run)
                if not prior.runs:
                    del self._to_draw[key]

    def close(self) -> None:
        """Begin nothing more. What is under way ends with Ray's session."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._checkers.shutdown(wait=False, cancel_futures=True)

    # -- checking ------------------------------------------------------------------------------------------

    def _check(self, run: int, spec: Callable[[], Run]) -> None:
        try:
            prepared = prepare(spec(), self._storage)
            self._memory.check(prepared.base, prepared.run)
            goal = destination(self._storage, prepared.name, prepared.fingerprint, new_version=False)
            if goal.state == "succeeded":
                self._tell(_there_already(run, self._storage, prepared, goal))
            else:
                self._want(run, Supplied(prepared, goal))
        except Exception as error:  # of whatever kind: it is this run's alone
            self._tell(Failed.of(run, error))
        finally:
            with self._changed:
                self._checking.discard(run)
                self._changed.notify_all()

    def _want(self, run: int, found: Supplied) -> None:
        prepared, key = found.prepared, found.prepared.prior_key(self._pool.device)
        photos, wanted = prepared.subject_images(), prepared.run.prior.num_images
        need: Need = ("photos", latent_path(prepared.base, photos))
        self._tell(Checked(run, found.goal.version, prepared.fingerprint, key, tuple(prepared.notes)))
        drawn = key is not None and prior_count(self._storage, key) >= wanted
        with self._changed:
            if run not in self._checking or run in self._runs:  # forgotten meanwhile, or checked twice
                return
            self._runs[run] = found
            found.missing.add(need)
            self._waiting.setdefault(need, []).append(run)
            self._to_encode.setdefault(need, (prepared.base, photos))
            if key is not None:
                need = ("prior", key, str(wanted))
                found.missing.add(need)
                self._waiting.setdefault(need, []).append(run)
                if drawn:
                    self._to_encode.setdefault(
                        need, (prepared.base, prior_images(self._storage, key, wanted))
                    )
                else:
                    prior = self._to_draw.setdefault(key, _Prior(prepared.base, prepared.run))
                    prior.runs.append(run)
                    if prior.run.prior.num_images < wanted:
                        prior.run = prepared.run
            self._changed.notify_all()

    # -- encoding and drawing ------------------------------------------------------------------------------

    def _lasting(self, line: Callable[[], None]) -> None:
        while not self._closed:
            try:
                line()
            except Exception as error:  # a defect of ours: without this thread the runs would wait for ever
                with self._changed:
                    needs = list(self._waiting)
                for need in needs:
                    self._failed(need, error)

    def _gathered(self, number: int) -> bool:
        """Whether a pipeline is worth its start: nothing more is coming, or there is enough for one."""
        return not self._checking or number >= WAVE

    def _encode_all(self) -> None:
        """Encode what is wanted of one base, in one pipeline."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._to_encode and self._gathered(len(self._to_encode)))
            )
            if self._closed:
                return
            base = next(iter(self._to_encode.values()))[0]
            needs = [need for need, (of, _) in self._to_encode.items() if of.revision == base.revision]
            sets = [self._to_encode[need][1] for need in needs]
        try:
            encode(
                self._storage,
                base,
                sets,
                self._pool,
                on_set=lambda number: self._made(needs[number]),
                on_error=lambda number, error: self._failed(needs[number], error),
            )
        except Exception as error:
            for need in needs:
                self._failed(need, error)

    def _draw_all(self) -> None:
        """Draw the prior sets that are wanted of one base, in one pipeline, those that are wanted first first."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._to_draw and self._gathered(len(self._runs)))
            )
            if self._closed:
                return
            rank = {key: place for place, key in enumerate(self._first)}
            keys = sorted(self._to_draw, key=lambda key: rank.get(key, len(rank)))
            base = self._to_draw[keys[0]].base
            sets = {
                key: self._to_draw[key] for key in keys if self._to_draw[key].base.revision == base.revision
            }
            asked = [(of.run.prior, of.run.subject.class_noun) for of in sets.values()]
            runs = [of.runs[0] for of in sets.values()]
        keys = list(sets)

        def waits(number: int) -> None:
            noun = asked[number][1]
            self._tell(Said(runs[number], f"the {noun} images are being drawn by another process"))

        def drawn(number: int, images: int) -> None:
            self._drawn(keys[number], base, images, asked[number][0].num_images)

        try:
            draw_priors(self._storage, base, asked, self._pool, on_wait=waits, on_set=drawn)
        except Exception as error:
            with self._changed:
                lost = [need for need in self._waiting if need[0] == "prior" and need[1] in self._to_draw]
                for key in keys:
                    self._to_draw.pop(key, None)
            for need in lost:
                if need[1] in keys:
                    self._failed(need, error)

    def _drawn(self, key: str, base: BaseInfo, images: int, there: int) -> None:
        with self._changed:
            asked = self._to_draw.get(key)
            if asked and asked.run.prior.num_images <= there:
                del self._to_draw[key]
            for need in [n for n in self._waiting if n[:2] == ("prior", key) and int(n[2]) <= there]:
                first = self._runs.get(self._waiting[need][0])
                if first and images:
                    first.prior_drawn, images = images, 0
                self._to_encode.setdefault(need, (base, prior_images(self._storage, key, int(need[2]))))
            self._changed.notify_all()

    # -- what comes of it ----------------------------------------------------------------------------------

    def _made(self, need: Need) -> None:
        ready: list[Ready] = []
        with self._changed:
            self._to_encode.pop(need, None)
            for run in self._waiting.pop(need, []):
                supplied = self._runs[run]
                supplied.missing.discard(need)
                if not supplied.missing:
                    ready.append(Ready(run, supplied.prior_drawn))
        for fact in ready:
            self._tell(fact)

    def _failed(self, need: Need, error: BaseException) -> None:
        with self._changed:
            self._to_encode.pop(need, None)
            runs = self._waiting.get(need, [])[:]
            for run in runs:
                for other in self._runs.pop(run).missing:
                    self._waiting[other].remove(run)
                    if not self._waiting[other]:
                        del self._waiting[other]
                self._undraw(run)
        for run in runs:
            self._tell(Failed.of(run, error))


def _there_already(run: int, storage: Storage, prepared: Prepared, goal: Destination) -> Registered:
    """A run that somebody has trained before, with the very same photos and recipe."""
    entry = Registry(storage).show(prepared.name)["versions"][goal.version]
    artifact = storage.full(entry["artifact"])
    return Registered(run, goal.version, artifact, entry["metrics"], entry["mlflow"]["run_id"])

"""This file is where a study goes its way: from subjects and a space to the best recipe, written down and shown."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from cluster.errors import SystemFailure, UserError
from cluster.objects import StorageError
from cluster.session import gpu_count, session
from cluster.storage import Storage
from orchestrator.bench import Bench, Record, forget, read_trial, study_path
from orchestrator.gate import gained
from orchestrator.population import even_rungs, refuse_idle
from orchestrator.prepare import Prepared, prepare
from orchestrator.progress import Stages
from orchestrator.protocol import SETS, prompts_for
from orchestrator.recipes import recipe_path
from orchestrator.space import draw, every, in_numbers, including, key_of, sections, values_at
from orchestrator.spec import parse_run
from orchestrator.study import rungs, search
from orchestrator.study_mirror import mirror_study
from orchestrator.study_page import write_study_page
from orchestrator.study_spec import StudyOutcome, StudySpec
from training.change_settings import CHANGEABLE
from training.critic import Scores
from training.defaults import base_family
from training.embedders import DEFAULTS, open_embedder
from training.gang import GangShape
from training.prior import draw_priors, prior_images, prior_key
from training.scores import Estimate
from training.section import merge
from training.stream import Pool, encode

DRAWS = 20  # for each member of a population, so that there are as many different ones
SCORED = 4  # prompts of the set that are drawn at a rung


def run_study(spec: StudySpec, storage: Storage, stages: Stages, address: str | None) -> StudyOutcome:
    """Search for the best recipe; the same study again goes on, and does nothing once it is done.

    Args:
        spec: The study.
        storage: Root.
        stages: Shows progress.
        address: Ray cluster to join; `None` starts a private one on this machine.

    Raises:
        UserError: A subject or a setting cannot be used, or there is another study of this name.
        SystemFailure: A worker failed; the same command goes on.
    """
    refusal = UserError(
        f"the study {spec.name} is being run by another process",
        "its lock is held",
        "wait, or give another --name",
    )
    storage.check_writable()
    with storage.lock_or_refuse(f"locks/study-{spec.name}", refusal):
        try:
            return _Study(spec, storage, stages).run(address)
        except StorageError as error:
            raise error.failure() from error


class _Study:
    def __init__(self, spec: StudySpec, storage: Storage, stages: Stages) -> None:
        if (
            spec.population
        ):  # elsewhere texts stay: a trial is known by its values, also those of older studies
            spec = replace(spec, space=in_numbers(spec.space, CHANGEABLE))
        self.spec, self.storage, self.stages = spec, storage, stages
        self.path = study_path(spec.name)
        self.defaults = values_at(spec.runs[0].model_dump(mode="json", by_alias=True), spec.space)
        self.space = including(spec.space, self.defaults)
        self.began = time.monotonic()
        self.keys: dict[str, None] = {}  # of the trials, in the order they were heard of
        self.steps: dict[tuple[str, int], int] = {}  # that each rung took

    def run(self, address: str | None) -> StudyOutcome:
        spec = self.spec
        self._refuse_idle()
        if done := self._agree():
            return StudyOutcome(**done)
        self.keys = dict.fromkeys(self.storage.read_json(f"{self.path}/study.json").get("order", []))
        family = base_family(spec.runs[0].base.model)
        dino, clip = (
            given or known for given, known in zip((spec.dino, spec.clip), DEFAULTS[family], strict=True)
        )
        open_embedder(dino)  # refused now rather than in a trial
        if not open_embedder(clip).reads:
            raise UserError(f"--clip {clip} reads no words", "it embeds pictures alone", "name a CLIP")
        prepared = [prepare(run, self.storage) for run in spec.runs]
        for one in prepared:
            for note in one.notes:
                self.stages.note(f"note: {one.name}: {note}")
        cluster = spec.runs[0].cluster
        cpus = spec.gangs * (cluster.workers * cluster.cpus_per_worker + 1) + 2
        with session(address, cpus, self.storage):
            gpus = float(gpu_count() > 0) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
            shape = GangShape(cluster.workers, cluster.cpus_per_worker, gpus)
            device = "cuda" if gpus else "cpu"
            self._make_ready(prepared, Pool(gpus=float(gpus > 0)), device)
            bench = Bench(
                study=spec.name,
                storage_uri=self.storage.uri,
                specs=tuple(run.model_dump(mode="json", by_alias=True) for run in spec.runs),
                prompts=spec.prompts or self._prompts(family),
                num_images=spec.num_images,
                rungs=even_rungs(spec.budget) if spec.population else rungs(spec.budget),
                dino=dino,
                clip=clip,
                shape=shape,
                device=device,
                population=spec.population,
            )
            recipes = self._recipes()
            number = len(recipes) if spec.search != "optuna" else spec.trials
            total = number * spec.budget * len(spec.runs)
            with self.stages.stage(f"trying {number} recipes", total) as stage:
                search(
                    bench,
                    recipes,
                    self.space if spec.search == "optuna" or spec.population else None,
                    number,
                    spec.scheduler,
                    spec.seed,
                    spec.gangs,
                    key_of(self.defaults),
                    lambda key, row: self._heard(stage, key, row),
                )
        for name in self.storage.names(f"{self.path}/trials") if spec.population else ():
            forget(self.storage, bench, name.removesuffix(".json"))
        return self._end(bench)

    def _refuse_idle(self) -> None:
        """Refuse what could not be tried, before anything is drawn."""
        if self.spec.population:
            refuse_idle(self.spec, self.space, self._recipes())
        for run in self.spec.runs:  # whose changes may come after the last step of a trial
            if run.train.changes:
                budget = {"train": {"steps": self.spec.budget, "stop": None}}
                parse_run(merge(run.model_dump(mode="json", by_alias=True), budget))

    def _agree(self) -> dict[str, Any] | None:
        """Put the study on record, or see that what is there is the same; returns what it found, if it is done."""
        path, told = f"{self.path}/study.json", self.spec.as_json()
        if self.storage.exists(path):
            known = self.storage.read_json(path)
            if known["spec"] != told:
                other = ", ".join(key for key in told if known["spec"].get(key) != told[key])
                raise UserError(
                    f"there is another study {self.spec.name}",
                    f"with other {other}",
                    "give another --name, or the same settings to go on with it",
                )
            done: dict[str, Any] | None = known.get("outcome")
            return done
        self.storage.write_json(path, {"spec": told, "state": "running"})
        return None

    def _make_ready(self, prepared: Sequence[Prepared], pool: Pool, device: str) -> None:
        """Draw class images and encode everything, once for all trials."""
        base = prepared[0].base
        asked = {
            prior_key(base, one.run.prior, one.identity.class_noun, device): (
                one.run.prior,
                one.identity.class_noun,
            )
            for one in prepared
        }
        with self.stages.stage("drawing class images", len(asked)) as stage:
            draw_priors(
                self.storage, base, list(asked.values()), pool, on_set=lambda number, images: stage.advance()
            )
        sets = [prior_images(self.storage, key, prior.num_images) for key, (prior, _) in asked.items()]
        sets += [one.subject_images() for one in prepared]
        with self.stages.stage("encoding", len(sets)) as stage:
            encode(self.storage, base, sets, pool, on_set=lambda number: stage.advance())

    def _prompts(self, family: str) -> tuple[str, ...]:
        """A few of the set, spread over it."""
        prompts = SETS[prompts_for(self.spec.runs[0].subject.class_noun, family)]
        return prompts[:: -(-len(prompts) // SCORED)]

    def _recipes(self) -> list[dict[str, Any]]:
        """What is tried first: the recipe that is varied, then all of a grid or of a random search, and before Optuna
        chooses, what it chose before."""
        spec = self.spec
        if spec.search == "grid":
            found = every(spec.space)[: spec.trials]
        elif spec.search == "random":
            # of a few choices some come twice, and a population is to have as many members as asked for
            found = draw(spec.space, (spec.trials - 1) * (DRAWS if spec.population else 1), spec.seed)
        else:
            found = [record["values"] for key in self.keys if (record := self._record(key))]
        return list({key_of(values): values for values in (self.defaults, *found)}.values())[: spec.trials]

    def _record(self, key: str) -> Record | None:
        return read_trial(self.storage, self.spec.name, key)

    def _heard(self, stage: Any, key: str, row: Mapping[str, Any]) -> None:
        if key not in self.keys:
            self.keys[key] = None
            path = f"{self.path}/study.json"
            self.storage.write_json(path, {**self.storage.read_json(path), "order": list(self.keys)})
        self.steps[key, row["step"]] = int(row["steps_spent"])
        stage.at(sum(self.steps.values()), f"{key} worth {row['worth']:.3f} at step {row['step']}")

    # -- what was found ------------------------------------------------------------------------------------

    def _end(self, bench: Bench) -> StudyOutcome:
        spec, records = self.spec, {key: self._record(key) for key in self.keys}
        trials = {key: record for key, record in records.items() if record and record["rows"]}
        if not trials:
            raise SystemFailure("no trial of the study told anything", "", "run it again")
        rows = [(key, row) for key, record in trials.items() for row in record["rows"]]
        key, best = max(rows, key=lambda one: float(one[1]["worth"]))
        gain = self._gain(best, trials.get(key_of(self.defaults)))
        values = found_at(trials[key], int(best["step"]))
        spent = sum(int(row["steps_spent"]) for _, row in rows)
        number = len(trials) - sum("of" in record for record in trials.values())  # heirs are no members more
        better = bool(gain and gain.low > 0)
        outcome = StudyOutcome(
            study=spec.name,
            state="succeeded",
            trials=number,
            recipe=self.storage.full(recipe_path(spec.name)),
            values=values,
            step=int(best["step"]),
            worth=round(float(best["worth"]), 4),
            gain=gain.as_json() if gain else None,
            better=better,
            pareto=front(trials),
            steps_spent=spent,
            steps_of_grid=number * spec.budget * len(spec.runs),
            seconds=round(time.monotonic() - self.began, 1),
        )
        text = recipe_text(values)
        what = "members of the population" if spec.population else "trials"
        note = f"the best of {number} {what} of the study {spec.name}, worth {outcome.worth}"
        self.storage.write(recipe_path(spec.name), f"# {note}\n{text}".encode())
        page = write_study_page(self.storage, bench, outcome, trials, self.space, key, key_of(self.defaults))
        outcome.page = self.storage.full(page)
        outcome.run_id = mirror_study(spec, outcome, trials, text, self.storage, self.stages.note)
        path = f"{self.path}/study.json"
        told = {**self.storage.read_json(path), "state": "succeeded", "outcome": outcome.as_json()}
        self.storage.write_json(path, told)
        return outcome

    def _gain(self, best: Mapping[str, Any], defaults: Record | None) -> Estimate | None:
        """Over the recipe that was varied at its own number of steps, by the drawings that both have."""
        if not defaults or "subjects" not in defaults["rows"][-1] or "subjects" not in best:
            return None
        theirs = defaults["rows"][-1]["subjects"]
        ours = best["subjects"]
        pairs = [(Scores.from_json(ours[name]), Scores.from_json(theirs[name])) for name in ours]
        return gained(pairs)


def found_at(record: Record, step: int) -> dict[str, Any]:
    """The values of a recipe that ends where a trial was at a rung."""
    return {**record["values"], "train.steps": step}


def recipe_text(values: Mapping[str, Any]) -> str:
    """The YAML of a recipe, as `--recipe` takes it."""
    return str(yaml.safe_dump(sections(values), sort_keys=True))


def front(trials: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The Pareto front: of every trial its best row, if no other trial's is at least as good in likeness, obedience and
    preservation and better in one of them."""
    best = {key: max(record["rows"], key=lambda row: float(row["worth"])) for key, record in trials.items()}
    points = {key: (row["dino"], row["clip_t"], -max(row["drift"], 0.0)) for key, row in best.items()}
    return [
        {
            "trial": key,
            "values": trials[key]["values"],
            **{
                name: round(float(best[key][name]), 4)
                for name in ("worth", "dino", "clip_t", "drift", "step")
            },
        }
        for key, mine in points.items()
        if not any(
            all(theirs[i] >= mine[i] for i in range(3)) and theirs != mine for theirs in points.values()
        )
    ]

"""A population: what it decides, that it decides so again, and that what it finds is a recipe."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from cluster.errors import UserError
from cluster.objects import StorageError
from cluster.storage import Storage
from orchestrator import bench
from orchestrator.population import (
    CHANGES,
    begun_at,
    course_of,
    donor_of,
    even_rungs,
    heir,
    lineage,
    rows_of,
    settings_now,
    split,
)
from orchestrator.progress import Lines
from orchestrator.space import draw, key_of, parse_space
from orchestrator.spec import parse_run
from orchestrator.study import search
from orchestrator.study_spec import StudySpec
from orchestrator.train import train_subject
from orchestrator.trial import Workplace
from orchestrator.tuning import found_at, recipe_text, run_study
from pocket.subject import subject_photos
from training.artifact import open_artifact
from training.gang import GangShape
from training.section import merge

SPACE = parse_space(
    {
        "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "train.lora.rank": [4, 8],
        "prior.weight": [0.5, 1.0, 2.0],
    }
)
DONOR = {"train.lr": 1e-3, "train.lora.rank": 8, "prior.weight": 1.0}


@pytest.mark.parametrize(
    ("steps", "expected"), [(200, (40, 80, 120, 160, 200)), (4, (1, 2, 3, 4)), (2, (1, 2)), (1, (1,))]
)
def test_rungs_of_a_population_are_evenly_spaced(steps: int, expected: tuple[int, ...]) -> None:
    assert even_rungs(steps) == expected


@pytest.mark.parametrize(
    ("worths", "lost", "spared", "lower", "upper"),
    [
        ([3, 1, 2, 4], [], [], [1], [3]),
        ([3, 1, 2, 4], [], [1], [2], [3]),  # the worst one is spared
        ([3, 1, 2, 4], [], [3], [1], [3]),  # one that is spared may be taken over
        ([8, 7, 6, 5, 4, 3, 2, 1], [], [7], [6, 5], [1, 0]),
        ([3, -1, -1, 4, 5], [1, 2], [], [1, 2], [3, 4]),
        ([3, -1, -1, -1, 5], [1, 2, 3], [3], [1, 2], [0, 4]),
        ([-1, -1, -1, -1], [0, 1, 2, 3], [], [], []),
        ([1], [], [], [], []),
        ([1, 1, 1, 1], [], [], [0], [3]),  # ties by their order
    ],
)
def test_the_worst_quarter_and_all_that_are_lost_take_over_from_the_best(
    worths: list[float], lost: list[int], spared: list[int], lower: list[int], upper: list[int]
) -> None:
    found = split(worths, [place in lost for place in range(len(worths))], spared)
    assert found == (lower, upper)


def test_an_heir_follows_from_seed_member_and_step_and_changes_what_can_be_changed() -> None:
    asked = [(seed, member, step) for seed in (0, 1) for member in range(20) for step in (40, 80)]
    found = [heir(SPACE, DONOR, step, seed, member, ()) for seed, member, step in asked]
    assert found == [heir(SPACE, DONOR, step, seed, member, ()) for seed, member, step in asked]
    assert len({key_of(one) for one in found if one}) > 20
    for one, (_, _, step) in zip(found, asked, strict=True):
        assert one
        now = settings_now(one)
        assert {key: one[key] for key in DONOR} == DONOR and begun_at(one) == step
        assert now != DONOR and now["train.lora.rank"] == 8
        assert 1e-4 <= now["train.lr"] <= 1e-2 and now["prior.weight"] in (0.5, 1.0, 2.0)
    donors = [donor_of(member, step, seed, 3) for seed, member, step in asked]
    assert set(donors) == {0, 1, 2}
    assert donors == [donor_of(member, step, seed, 3) for seed, member, step in asked]


def test_no_two_members_train_the_same_history() -> None:
    space = parse_space({"prior.weight": [1.0, 2.0]})
    first = heir(space, {"prior.weight": 1.0}, 10, 0, 1, ())
    assert first == {"prior.weight": 1.0, CHANGES: [{"after": 10, "prior": {"weight": 2.0}}]}
    assert heir(space, {"prior.weight": 1.0}, 10, 0, 2, [key_of(first)]) is None


def test_what_takes_no_effect_any_more_stays_as_the_donor_has_it() -> None:
    for member in range(20):
        found = heir(SPACE, DONOR, 40, 0, member, (), ["prior.weight"])
        assert found and settings_now(found).keys() == DONOR.keys()
        assert found[CHANGES][0].keys() == {"after", "train"}
    assert heir(SPACE, DONOR, 40, 0, 0, (), ["prior.weight", "train.lr"]) is None


def test_a_history_is_told_with_all_that_it_took_over() -> None:
    child = {**DONOR, CHANGES: [{"after": 40, "train": {"lr": 2e-3}}]}
    grandchild = {**child, CHANGES: [*child[CHANGES], {"after": 80, "prior": {"weight": 2.0}}]}  # type: ignore[misc]
    rows = [{"step": step} for step in (40, 80, 120)]
    trials: dict[str, Any] = {
        "a": {"values": DONOR, "rows": rows},
        "b": {"values": child, "rows": rows[1:], "of": "a"},
        "c": {"values": grandchild, "rows": rows[2:], "of": "b"},
    }
    assert lineage("c", trials) == ["a", "b", "c"] and lineage("a", trials) == ["a"]
    assert [(key, row["step"]) for key, row in rows_of("c", trials)] == [("a", 40), ("b", 80), ("c", 120)]
    assert settings_now(grandchild) == {**DONOR, "train.lr": 2e-3, "prior.weight": 2.0}
    assert course_of(grandchild) == {
        "train.lr": "0.001, 0.002 after 40",
        "train.lora.rank": 8,
        "prior.weight": "1, 2 after 80",
    }


def told(storage: Storage, values: dict[str, Any], rungs: int, **shared: Any) -> list[tuple[Any, ...]]:
    """What a trial tells at its rungs from the record, until it says that nothing comes after."""
    about = bench.Bench("night", storage.uri, (), (), 1, (1, 2, 3), "", "", GangShape(), "cpu", **shared)
    trial = Workplace(about).begin(values)
    trial.go_on(rungs)
    found = [trial.step()]
    while not found[-1]["last"]:
        found.append(trial.step())
    return [(row["rung"], row["step"], row["lost"]) for row in found]


def test_a_member_tells_its_rungs_from_the_record_and_one_that_is_lost_waits_to_take_over(
    storage: Storage,
) -> None:
    changed = {**DONOR, CHANGES: [{"after": 1, "train": {"lr": 2e-3}}]}
    for values, steps in ((DONOR, [1, 2]), (changed, [2])):
        record = {"values": values, "state": "failed", "rows": [{"step": step} for step in steps]}
        storage.write_json(bench.trial_path("night", key_of(values)), record)
    assert told(storage, changed, 1, population=True) == [(2, 2, True), (3, 2, True)]
    assert told(storage, DONOR, 0, population=True) == [(1, 1, False), (2, 2, True), (3, 2, True)]
    assert told(storage, DONOR, 0) == [(1, 1, False), (2, 2, True)]  # where nobody takes over it is stopped


# -- studies -------------------------------------------------------------------------------------------------


def raw(base: Path, photos: Path) -> dict[str, Any]:
    return {
        "base": {"model": str(base)},
        "subject": {"name": "one", "class": "dog", "images": [str(photos)]},
        "prior": {"num_images": 2, "steps": 2},
        "train": {"lr": 1e-3, "warmup_steps": 1},
        "validate": {"every": 0, "prompts": []},
    }


@pytest.fixture
def spec(tiny_base: Path, tmp_path: Path) -> StudySpec:
    """Four members of the tiny base and four steps."""
    (tmp_path / "one").mkdir()
    for number, photo in enumerate(subject_photos("robot", 0, 2)):
        photo.save(tmp_path / "one" / f"{number}.png")
    return StudySpec(
        name="night",
        runs=(parse_run(raw(tiny_base, tmp_path / "one")),),
        space=SPACE,
        trials=4,
        search="random",
        scheduler="pbt",
        steps=4,
        num_images=1,
        prompts=("a photo of {subject}",),
        dino="pocket",
        clip="pocket",
    )


@pytest.mark.parametrize(
    ("other", "space", "train", "what"),
    [
        ({"trials": 3}, None, {}, "a population of 3 is too small"),
        ({}, {"prior.weight": [1.0, 2.0]}, {}, "a population of 2 is too small"),
        ({}, {"train.lora.rank": [2, 4, 6, 8]}, {}, "nothing in the space may change during a run"),
        ({}, {"prior.weight": {"low": 0, "high": 2}}, {}, "prior.weight cannot become 0 during a run"),
        ({"search": "optuna"}, None, {}, "--search optuna cannot be had with --scheduler pbt"),
        ({"steps": 1}, None, {}, "a population has nothing to decide"),
        ({}, None, {"lr_scheduler": "cosine"}, "train.lr_scheduler cannot be had with --scheduler pbt"),
        ({}, None, {"changes": [{"after": 1, "train": {"lr": 1e-4}}]}, "train.changes cannot be had with"),
        (
            {},
            {"train.text_encoder.lr": {"low": 1e-5, "high": 1e-3}},
            {},
            "train.changes.0.train.text_encoder.lr takes no effect",
        ),
        ({}, {"train.lr": [1e-4, 1e-3, 1e-2, "fast"]}, {}, "train.lr of the space cannot be used by a"),
        *(
            ({}, {"train.max_grad_norm": one, "train.lr": [1e-4, 1e-3]}, {"max_grad_norm": None}, what)
            for what in ["train.max_grad_norm cannot be changed by a population"]
            for one in ({"low": 0.1, "high": 2}, [0.5, 1.0, 2.0])
        ),
        (
            {"scheduler": "none"},
            None,
            {"changes": [{"after": 9, "train": {"lr": 1e-4}}]},
            "train.changes.0 takes no effect",
        ),
    ],
)
def test_what_a_population_could_not_do_is_refused_before_anything_is_drawn(
    other: dict[str, Any],
    space: dict[str, Any] | None,
    train: dict[str, Any],
    what: str,
    spec: StudySpec,
    storage: Storage,
) -> None:
    runs = tuple(
        parse_run(merge(run.model_dump(mode="json", by_alias=True), {"train": train})) for run in spec.runs
    )
    varied = parse_space(space) if space else spec.space
    with pytest.raises(UserError) as refused:
        run_study(replace(spec, runs=runs, space=varied, **other), storage, Lines(sys.stderr), None)
    assert refused.value.what.startswith(what) and refused.value.do
    assert not storage.exists("studies/night/study.json")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr_scheduler", "cosine"), ("changes", [{"after": 1, "train": {"lr": 1e-4}}])],
)
def test_no_subject_of_a_population_has_a_course_of_its_own(
    setting: str, value: Any, spec: StudySpec, storage: Storage
) -> None:
    own = {"subject": {"name": "two"}, "train": {setting: value}}
    other = parse_run(merge(spec.runs[0].model_dump(mode="json", by_alias=True), own))
    with pytest.raises(UserError, match=f"train.{setting} cannot be had with --scheduler pbt"):
        run_study(replace(spec, runs=(*spec.runs, other)), storage, Lines(sys.stderr), None)


@pytest.mark.parametrize(
    ("scheduler", "expected"), [("pbt", [1e-4, 3e-4, 0.01]), ("none", ["1e-4", "3e-4", 0.01])]
)
def test_a_population_takes_numbers_as_yaml_reads_them_and_other_studies_stay_what_they_were(
    scheduler: str, expected: list[Any], spec: StudySpec, storage: Storage
) -> None:
    space = parse_space(yaml.safe_load("{train: {lr: [1e-4, 3e-4, 0.01], lora: {rank: ['4', 8]}}}"))
    asked = replace(spec, space=space, scheduler=scheduler, dino="./none")
    with pytest.raises(UserError, match=r"\./none"):  # once the study is on record, before anything is drawn
        run_study(asked, storage, Lines(sys.stderr), None)
    known = storage.read_json("studies/night/study.json")["spec"]["space"]
    assert known["train.lr"]["options"] == expected and known["train.lora.rank"]["options"] == ["4", 8]


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_member_takes_over_is_said_so(
    spec: StudySpec, storage: Storage, one_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is taken over changes nothing that has stopped."""
    stopped = {"train": {"text_encoder": {"train": True, "stop_after": 1}}}
    specs = tuple(merge(run.model_dump(mode="json", by_alias=True), stopped) for run in spec.runs)
    space = parse_space({key: {"low": 1e-4, "high": 1e-2} for key in ("train.lr", "train.text_encoder.lr")})
    recipes = draw(space, 4, 0)
    for place, values in enumerate(recipes):  # on record, so that nothing is trained
        row = {"worth": place, "dino": 0, "clip_t": 0, "drift": 0, "steps_spent": 1}
        record = {"values": values, "state": "running", "rows": [{**row, "step": step} for step in (1, 2, 3)]}
        storage.write_json(bench.trial_path("night", key_of(values)), record)
    shared = bench.Bench(
        "night", storage.uri, specs, (), 1, (1, 2, 3), "", "", GangShape(), "cpu", population=True
    )
    heirs = []

    def full(storage: Storage, shared: bench.Bench, old: Any, donor: Any, new: Any, *others: Any) -> None:
        heirs.append((old, donor, new))
        raise StorageError("the checkpoint could not be written", "No space left on device", True)

    monkeypatch.setattr("orchestrator.pbt.take_over", full)
    spared = key_of(recipes[1])
    with pytest.raises(StorageError) as raised:
        search(shared, recipes, space, 4, "pbt", 0, 1, spared, lambda *_: None)
    assert raised.value.full and raised.value.failure().do.startswith("make room there")
    [(old, donor, new)] = heirs
    assert (old, donor) == (recipes[0], recipes[3])
    assert new[CHANGES][0]["train"].keys() == {"lr"}
    assert all(bench.trial_run(shared, one, new) for one in specs)


def records(storage: Storage) -> dict[str, dict[str, Any]]:
    names = storage.names("studies/night/trials")
    return {name.removesuffix(".json"): storage.read_json(f"studies/night/trials/{name}") for name in names}


@pytest.mark.slow
def test_a_population_that_was_broken_off_goes_on_and_its_recipe_trains_what_a_member_was(
    spec: StudySpec,
    storage: Storage,
    tiny_base: Path,
    tmp_path: Path,
    one_ray: None,
    break_off: Callable[[StudySpec, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_off(spec, 10)  # two of four members are at the third rung
    before = records(storage)
    assert any(CHANGES in one["values"] for one in before.values())

    def keeping(storage: Storage, shared: bench.Bench, key: str) -> None:
        if (found := Path(storage.uri) / f"runs/one/night.{key}/checkpoints").exists():
            shutil.copytree(found, tmp_path / "kept" / key)
        bench.forget(storage, shared, key)

    monkeypatch.setattr("orchestrator.tuning.forget", keeping)  # what is there in the end
    outcome = run_study(spec, storage, Lines(sys.stderr), None)
    after = records(storage)
    for key, known in before.items():
        assert after[key]["rows"][: len(known["rows"])] == known["rows"]  # told, not trained again
    # had it decided otherwise than before, there were histories more
    assert sum(row["steps_spent"] for one in after.values() for row in one["rows"]) == 4 * 4
    assert outcome.trials == 4 and outcome.steps_spent == outcome.steps_of_grid == 16
    states = [one["state"] for one in after.values()]
    assert states.count("done") == 4 and states.count("replaced") == 3 == len(states) - 4
    defaults = after[key_of(DONOR)]
    assert [row["step"] for row in defaults["rows"]] == [1, 2, 3, 4]  # it went its own way
    assert not list(Path(storage.uri).glob("runs/*/night.*/checkpoints/*"))
    # the recipe of a member that changed, from its first step
    ends = [key for key, one in after.items() if one["state"] == "done"]
    key = max(ends, key=lambda one: len(after[one]["values"].get(CHANGES, ())))
    assert after[key]["values"][CHANGES]
    recipe = yaml.safe_load(recipe_text(found_at(after[key], 4)))
    run = parse_run(merge(raw(tiny_base, tmp_path / "one"), recipe))
    trained = train_subject(run, storage, Lines(sys.stderr))
    with open_artifact(storage, "one", trained.version) as artifact:
        [file] = artifact.folder.rglob("*.safetensors")
        published = sorted(tensor.numpy().tobytes() for tensor in load_file(file).values())
    state = load_file(tmp_path / "kept" / key / "step_000004" / "state.safetensors")
    assert published == sorted(t.numpy().tobytes() for name, t in state.items() if name.startswith("p/"))
    # and that of the best one is written so
    written = Path(outcome.recipe).read_text()
    assert written.endswith(recipe_text(outcome.values)) and written.startswith("# the best of 4 members")
    assert parse_run(merge(raw(tiny_base, tmp_path / "one"), yaml.safe_load(written)))
    page = Path(outcome.page).read_text("utf-8")
    assert "What the members ended with" in page and "a population of 4" in page
    assert page.count('class="taken"') >= 3

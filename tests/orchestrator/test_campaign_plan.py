"""What a campaign would do is told of every subject and of what they share, and nothing is written for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from PIL import Image

from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.campaign_plan import CampaignPlan, plan_campaign
from orchestrator.manifest import load_campaign
from orchestrator.prepare import prepare, record_path
from training.bank_key import calibration_path

Plan = Callable[..., CampaignPlan]


@pytest.fixture
def manifest(tmp_path: Path, tiny_base: Path) -> Path:
    """Five good dogs, two cats, one with a damaged photo, one with none, and a row that cannot be one."""
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(("ann", "bob", "cid", "dan", "eve", "mia", "tom")):
        (tmp_path / name).mkdir()
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name / "1.png")
        noun = "cat" if name in ("mia", "tom") else "dog"
        rows.append({"name": name, "class": noun, "images": name, "train": {"steps": 10 + number}})
    rows[4]["train"]["lora"] = {"rank": 2}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"\xff\xd8\xff no photo")
    (tmp_path / "none").mkdir()
    rows += [{"name": name, "class": "dog", "images": name} for name in ("bad", "none")]
    rows.append({"name": "row", "class": "dog", "images": "ann", "train": {"stepz": 1}})
    defaults = {"base": {"model": str(tiny_base)}, "prior": {"num_images": 6}}
    prompts = ["a photo of {subject}", "a drawing of {subject}"]
    text = yaml.safe_dump({"name": "night", "defaults": defaults, "subjects": rows, "prompts": prompts})
    (tmp_path / "campaign.yaml").write_text(text)
    return tmp_path / "campaign.yaml"


@pytest.fixture
def plan(manifest: Path, storage: Storage) -> Plan:
    """Foretells it, with `--set` assignments."""
    return lambda *sets: plan_campaign(load_campaign(str(manifest), sets=sets), storage, "cpu")


def test_a_fresh_campaign_is_told_with_what_its_subjects_share(plan: Plan, storage: Storage) -> None:
    planned = plan()
    states = {subject.name: subject.state for subject in planned.subjects}
    assert planned.states == {"new": 7, "refused": 3}
    assert {name for name, state in states.items() if state == "refused"} == {"bad", "none", "row"}
    reasons = {s.name: s.reason["what"] for s in planned.subjects if s.reason}
    assert "1.jpg is damaged" in reasons["bad"] and "no photos in" in reasons["none"]
    assert "train.stepz is not a setting" in reasons["row"]

    assert [(p.class_noun, p.plan.missing, p.subjects) for p in planned.priors] == [
        ("cat", 6, 2),
        ("dog", 6, 5),
    ]
    assert planned.prior_images == 12
    assert planned.steps_left == sum(range(10, 17))
    # six of one rank go together, and the one of another rank alone; the widest bank is assumed
    assert planned.groups == {1: 1, 8: 1} and planned.assumed
    [alone] = [s for s in planned.subjects if s.width == 1]
    assert alone.name == "eve"
    assert planned.images == 7 * 2 * 4
    assert planned.artifact_bytes > 0
    assert [path for path in Path(storage.uri).rglob("*") if path.is_file()] == []
    assert not ray.is_initialized()


def test_the_groups_are_those_of_the_settings_and_of_what_was_measured(
    plan: Plan, storage: Storage, tiny_base: Path
) -> None:
    assert plan("schedule.bank=1").groups == {1: 7}
    planned = plan("schedule.bank=2", "schedule.gangs=3")
    assert planned.groups == {1: 1, 2: 3} and not planned.assumed and planned.gangs == 3
    cats = {s.group for s in planned.subjects if s.class_noun == "cat"}
    assert len(cats) == 1  # runs of one prior set go together
    assert plan("schedule.per_tenant=2").groups == {1: 1, 2: 3}
    for key in {s.bank_key for s in planned.subjects if s.bank_key}:
        storage.write_json(calibration_path(key), {"width": 4})
    measured = plan()
    assert measured.groups == {1: 1, 2: 1, 4: 1} and not measured.assumed


def test_what_is_there_already_is_not_to_be_done(plan: Plan, manifest: Path, storage: Storage) -> None:
    rows = {row.name: row.run for row in load_campaign(str(manifest)).rows}
    fingerprints = {}
    for name in ("ann", "bob"):
        run = rows[name]
        assert run is not None
        fingerprints[name] = prepare(run, storage).fingerprint
    Registry(storage).add("ann", "v1", {"artifact": "artifacts/ann/v1", "fingerprint": fingerprints["ann"]})
    record = {"fingerprint": fingerprints["bob"], "state": "interrupted"}
    storage.write_json(record_path("bob", "v2"), record)
    planned = plan()
    assert planned.states == {"succeeded": 1, "unfinished": 1, "new": 5, "refused": 3}
    assert [(s.state, s.version, s.group) for s in planned.subjects[:2]] == [
        ("succeeded", "v1", None),
        ("unfinished", "v2", 0),
    ]
    assert planned.steps_left == sum(range(11, 17))


def test_a_larger_prior_of_one_subject_is_the_set_of_all(plan: Plan, manifest: Path) -> None:
    raw = yaml.safe_load(manifest.read_text())
    raw["subjects"][2]["prior"] = {"num_images": 9}
    manifest.write_text(yaml.safe_dump(raw))
    planned = plan()
    assert {p.class_noun: p.plan.wanted for p in planned.priors} == {"cat": 6, "dog": 9}


def test_the_plan_is_one_json_object_and_a_table_for_people(plan: Plan) -> None:
    planned = plan()
    told = planned.as_json()
    assert told["campaign"] == "night" and told["prior_sets_to_draw"] == 2
    assert told["subjects"][0]["class"] == "dog"
    lines = planned.lines()
    assert lines[0] == "night: 10 subjects: 7 new, 3 refused"
    assert any(line.startswith("ann ") and "new" in line for line in lines)
    assert any(line.startswith("bad is refused: ") and "damaged" in line for line in lines)

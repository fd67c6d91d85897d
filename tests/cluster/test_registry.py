"""This file is where the record of versions is tested: what is served, promoted, rolled back."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage


def entry(number: int) -> dict[str, Any]:
    return {"artifact": f"artifacts/rex/v{number}", "fingerprint": f"{number:016x}", "method": "lora"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry in which rex has three versions, the last one champion."""
    registry = Registry(Storage(str(tmp_path)))
    for number in (1, 2, 3):
        registry.add("rex", f"v{number}", entry(number))
    return registry


def test_the_last_version_added_is_champion_and_resolved_by_default(registry: Registry) -> None:
    version, found = registry.resolve("rex")
    assert version == "v3"
    assert found["artifact"] == "artifacts/rex/v3"
    assert found["created"].startswith("20")
    assert registry.resolve("rex", "champion") == registry.resolve("rex", "v3")
    assert registry.resolve("rex", "v1")[1]["artifact"] == "artifacts/rex/v1"
    assert registry.names() == ["rex"]


def test_a_version_without_an_alias_is_on_record_but_not_served(registry: Registry) -> None:
    registry.add("rex", "v4", entry(4), alias=None)
    assert registry.resolve("rex")[0] == "v3"
    assert list(registry.show("rex")["versions"]) == ["v1", "v2", "v3", "v4"]


def test_adding_the_same_again_changes_nothing(registry: Registry) -> None:
    registry.promote("rex", "v1")
    before = registry.show("rex")
    registry.add("rex", "v3", entry(3))
    assert registry.show("rex") == before


def test_adding_another_artifact_under_a_known_version_is_refused(registry: Registry) -> None:
    with pytest.raises(UserError) as caught:
        registry.add("rex", "v3", entry(7))
    assert caught.value.what == "rex v3 is on record already"
    assert registry.resolve("rex")[1]["fingerprint"] == f"{3:016x}"


def test_rollback_goes_back_champion_by_champion_and_then_refuses(registry: Registry) -> None:
    assert registry.promote("rex", "v1") == "v1"
    assert [registry.rollback("rex") for _ in range(3)] == ["v3", "v2", "v1"]
    assert registry.resolve("rex")[0] == "v1"
    with pytest.raises(UserError) as caught:
        registry.rollback("rex")
    assert caught.value.what == "rex has no earlier champion to go back to"
    assert "raybooth subjects promote rex VERSION" in caught.value.do


def test_promoting_the_champion_again_leaves_nothing_to_roll_back_over(registry: Registry) -> None:
    registry.promote("rex", "v3")
    assert registry.rollback("rex") == "v2"


def test_history_only_grows(registry: Registry) -> None:
    registry.rollback("rex")
    registry.promote("rex", "v1")
    events = [(event["event"], event["version"]) for event in registry.show("rex")["history"]]
    assert events == [("add", "v1"), ("add", "v2"), ("add", "v3"), ("rollback", "v2"), ("promote", "v1")]


def test_unknown_names_and_versions_are_refused_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(UserError) as caught:
        registry.resolve("rax")
    assert caught.value.what == "there is no subject 'rax'"
    assert caught.value.do == "did you mean rex?"
    with pytest.raises(UserError) as caught:
        registry.promote("rex", "v9")
    assert caught.value.what == "rex has no version 'v9'"
    assert "v1" in caught.value.do


def test_an_empty_registry_says_how_to_train(storage: Storage) -> None:
    with pytest.raises(UserError) as caught:
        Registry(storage).show("rex")
    assert "raybooth train" in caught.value.do
    assert Registry(storage).names() == []


@pytest.mark.parametrize("name", ["../rex", "a/b", "", ".."])
def test_a_name_cannot_leave_the_registry(registry: Registry, name: str) -> None:
    with pytest.raises(UserError):
        registry.add(name, "v1", entry(1))
    with pytest.raises(UserError):
        registry.show(name)


def test_the_record_is_one_plain_json_file(registry: Registry) -> None:
    file = Path(registry.storage.full("registry/rex.json"))
    assert json.loads(file.read_text())["aliases"] == {"champion": "v3"}
    assert [p.name for p in file.parent.iterdir()] == ["rex.json"]


def test_a_candidate_is_served_once_nothing_is_said_against_it(storage: Storage) -> None:
    registry = Registry(storage)
    registry.add("rex", "v1", {"artifact": "a", "fingerprint": "1"}, "candidate")
    assert registry.served() == {}
    assert registry.judge("rex", "v1", []) and registry.served() == {"rex": "v1"}
    registry.add("rex", "v2", {"artifact": "b", "fingerprint": "2"}, "candidate")
    assert not registry.judge("rex", "v2", ["dino is 0.1, and 0.5 is demanded"])
    assert not registry.judge("rex", "v2", [])  # it was judged
    record = registry.show("rex")
    assert record["aliases"] == {"champion": "v1", "candidate": "v2"}
    assert record["versions"]["v2"]["gate"]["objections"] == ["dino is 0.1, and 0.5 is demanded"]
    assert registry.promote("rex", "candidate") == "v2" and registry.rollback("rex") == "v1"

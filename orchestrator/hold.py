"""This file is where a campaign's candidates are evaluated, and served or held back."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cluster.registry import CANDIDATE, CHAMPION, Registry
from cluster.storage import Storage
from orchestrator.batch import OpenRay
from orchestrator.campaign_settings import Gate
from orchestrator.evaluate import evaluate_with
from orchestrator.evaluation import Settings
from orchestrator.gate import objections
from orchestrator.mlflow_tracker import mirror_alias
from orchestrator.progress import Stages
from training.stream import Pool


def hold(
    storage: Storage,
    gate: Gate,
    versions: Sequence[tuple[str, str]],
    stages: Stages,
    pool: Pool,
    ray: OpenRay,
) -> dict[str, Any]:
    """Judge the candidates among versions: those without objection become champions, the others keep their alias.

    One that was judged before is told of and left as it is. One that cannot be evaluated is held back for that, and
    judged again the next time.

    Returns:
        `passed`, a number, and `held_back`, a list of `{name, version, objections}`.

    Raises:
        UserError: An embedder or a prompt cannot be used.
        SystemFailure: A worker failed, or storage cannot be written.
    """
    registry = Registry(storage)
    records = {name: registry.show(name) for name, _ in versions}
    open_ = [
        (name, version)
        for name, version in versions
        if "gate" not in records[name]["versions"][version]
        and records[name]["aliases"].get(CANDIDATE) == version
    ]
    champions = [
        (name, records[name]["aliases"][CHAMPION])
        for name, _ in open_
        if gate.no_worse and CHAMPION in records[name]["aliases"]
    ]
    unknown: dict[tuple[str, str], list[str]] = {}
    if open_:
        settings = Settings(gate.prompts, gate.num_images, dino=gate.dino_model, clip=gate.clip_model)
        found = evaluate_with(storage, [*open_, *champions], settings, stages, pool, ray)
        scores = {(one.subject, one.version): one.scores for one in found.done}
        served = dict(champions)
        for name, version in open_:
            if (name, version) not in scores:
                unknown[name, version] = [f"it could not be evaluated: {found.failed[name, version]}"]
                continue
            champion = scores.get((name, served[name])) if name in served else None
            if registry.judge(name, version, objections(gate, scores[name, version], champion)):
                mlflow = records[name]["versions"][version].get("mlflow") or {}
                if mlflow.get("version"):
                    with suppress(Exception):  # a mirror
                        mirror_alias(mlflow["uri"], name, mlflow["version"])
    held = []
    for name, version in versions:
        verdict = registry.show(name)["versions"][version].get("gate", {"passed": True})
        why = unknown.get((name, version)) or verdict.get("objections")
        if why:
            held.append({"name": name, "version": version, "objections": why})
    return {"passed": len(versions) - len(held), "held_back": held}

"""What OpenAPI promises holds: no crash, no status and no shape that it does not name, whatever is sent."""

import json
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from orchestrator.erasure import Erasure
from orchestrator.trainings import CampaignTrainer
from training.png import encode_png

EXAMPLES = 8  # of each operation
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


class Idle(CampaignTrainer):
    """Puts trainings on record, and leaves them there."""

    def run(self, identity: str) -> None:
        pass


@pytest.fixture
def clients(serve, subjects, base):
    ledger = f"sqlite:///{subjects.uri}/campaigns.db"
    many = {"per_minute": 1e6, "burst": 100_000, "at_once": 100}
    trainer = Idle(subjects, ledger, base.model)
    return serve(trainer=trainer, eraser=Erasure(subjects, ledger), rates=many, limits={"steps": 2})


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_that_is_sent_is_answered_otherwise_than_documented(clients, mode: GenerationMode) -> None:
    _, token = clients.keys.create("schemathesis")
    schema = schemathesis.openapi.from_url(f"{clients.address}/openapi.json")
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()
        tried.append(operation.label)
        with suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked for
            sent(operation.as_strategy(generation_mode=mode), token)()
    assert len(tried) > 15


def sent(strategy, token: str) -> Callable[[], None]:
    """A test that sends what a strategy makes up."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(case=strategy)
    def send(case: schemathesis.Case) -> None:
        case.call_and_validate(headers={"authorization": f"Bearer {token}"}, checks=CHECKS, timeout=60)

    return send


def test_what_is_another_tenants_is_404_on_every_route_there_is(clients) -> None:
    owner, foreign = clients.of(), clients.of("acme")
    about = {"model": "rex", "input": {"prompt": "a dog", "steps": 1, "guidance_scale": 1}}
    done = owner.post("/v1/predictions", json=about, headers={"prefer": "wait=60"}).json()
    photo = encode_png(np.zeros((40, 40, 3), dtype=np.uint8), None)
    photos = [("images", ("a.png", photo, "image/png"))]
    form = {"subject": "ada", "class": "dog", "params": json.dumps({"steps": 1})}
    training = owner.post("/v1/trainings", data=form, files=photos)
    assert training.status_code == 202, training.text
    names = {"predictions": done["id"], "models": "rex", "trainings": training.json()["id"]}
    routes = 0
    for path, methods in owner.get("/openapi.json").json()["paths"].items():
        kind = path.split("/")[2] if path.startswith("/v1/") else ""
        if "{" not in path or kind == "outputs":
            continue
        for method in methods:
            url = path.replace("{id}", names[kind]).replace("{model}", names[kind])
            answer = foreign.request(method.upper(), url)
            assert (answer.status_code, method, url) == (HTTPStatus.NOT_FOUND, method, url)
            routes += 1
    assert routes == 8
    assert owner.get(f"/v1/predictions/{done['id']}").json()["status"] == "succeeded"


def test_every_v1_route_asks_for_a_key_and_documents_its_errors(clients) -> None:
    schema = clients.with_token(None).get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            if path.startswith("/v1/") and not path.startswith("/v1/outputs/"):
                assert about["security"] == [{"HTTPBearer": []}], (method, path)
                assert {"401", "403", "413", "422", "429", "500", "503"} <= set(about["responses"]), (
                    method,
                    path,
                )
            assert about["summary"], (method, path)

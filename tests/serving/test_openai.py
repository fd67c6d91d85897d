"""OpenAI's images contract, spoken by its own client over HTTP."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import openai
import pytest

from cluster.registry import Registry
from cluster.storage import Storage
from training.png import decode_png, png_parameters

PROMPT = "a photo of {subject} on the beach"
FAST = {"steps": 3, "guidance_scale": 1}
WAIT_S = 60


def talk(clients, tenant: str = "default") -> openai.OpenAI:
    _, token = clients.keys.create("openai", tenant)
    http = httpx2.Client(trust_env=False)
    return openai.OpenAI(
        base_url=f"{clients.address}/v1", api_key=token, max_retries=0, http_client=http, timeout=WAIT_S
    )


def test_the_openai_client_draws_a_trained_subject(clients, artist) -> None:
    with talk(clients) as client:
        answer = client.images.generate(
            model="rex", prompt=PROMPT, n=2, size="auto", user="u1", extra_body={**FAST, "seed": 7}
        )
        [again] = client.images.generate(
            model="rex@v1", prompt=PROMPT, size="16x16", extra_body={**FAST, "seed": 8}
        ).data
    assert [image.seed for image in answer.data] == [7, 8]
    png = base64.b64decode(answer.data[0].b64_json)
    assert decode_png(png).shape == (16, 16, 3)
    assert answer.data[0].revised_prompt == "a photo of a zwx dog on the beach"
    assert png_parameters(png)["seed"] == 7
    assert again.b64_json == answer.data[1].b64_json
    assert [(order.subject, order.version) for order in artist.orders] == [("rex", "v1")] * 3


def test_a_prompt_without_the_subject_is_drawn_as_it_is_written(clients) -> None:
    with talk(clients) as client:
        answer = client.images.generate(model="rex", prompt="a red clock", extra_body=FAST)
        pristine = client.images.generate(model="base", prompt="a red clock", extra_body=FAST)
    assert answer.data[0].revised_prompt == pristine.data[0].revised_prompt == "a red clock"


def test_the_guidance_is_what_the_subject_was_validated_with(clients, artist) -> None:
    with talk(clients) as client:
        client.images.generate(model="rex", prompt=PROMPT, extra_body={"steps": 1})
    assert artist.orders[0].request.guidance == 7.5


def test_a_stream_tells_steps_and_previews_and_then_the_image(clients) -> None:
    with talk(clients) as client:
        stream = client.images.generate(
            model="rex",
            prompt=PROMPT,
            stream=True,
            partial_images=1,
            extra_body={**FAST, "steps": 4, "seed": 1},
        )
        events = list(stream)
        alone = client.images.generate(model="rex", prompt=PROMPT, extra_body={**FAST, "steps": 4, "seed": 1})
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["progress", "progress", "partial_image", "progress", "progress", "completed"]
    assert decode_png(base64.b64decode(events[2].b64_json)).shape == (4, 4, 3)
    assert events[-1].b64_json == alone.data[0].b64_json


def test_a_stream_of_several_images_names_each(clients) -> None:
    with talk(clients) as client:
        events = list(client.images.generate(model="base", prompt="a dog", n=3, stream=True, extra_body=FAST))
    done = [event for event in events if event.type == "image_generation.completed"]
    assert sorted(event.index for event in done) == [0, 1, 2]


def test_an_image_by_url_is_read_without_a_key_until_it_expires(clients, clock) -> None:
    with talk(clients) as client:
        first, second = (
            client.images.generate(
                model="rex", prompt=PROMPT, response_format=form, extra_body={**FAST, "seed": 5}
            ).data[0]
            for form in ("url", "b64_json")
        )
    anyone = clients.with_token(None)
    answer = anyone.get(first.url)
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == base64.b64decode(second.b64_json)
    assert anyone.get(first.url.replace("/rex/", "/rax/")).status_code == 403
    clock.now += 25 * 3600
    assert anyone.get(first.url).status_code == 404


def test_the_models_are_the_base_and_the_subjects_that_are_registered(clients, subjects: Storage) -> None:
    with talk(clients) as client:
        assert [model.id for model in client.models.list()] == ["base", "rex"]
        rex = client.models.retrieve("rex")
        assert (rex.version, rex.class_noun, rex.owned_by) == ("v1", "dog", "default")
        with pytest.raises(openai.NotFoundError, match="did you mean rex"):
            client.models.retrieve("rax")


def test_a_promoted_version_is_drawn_at_once_and_a_removed_one_is_gone(
    clients, artist, subjects: Storage, publish
) -> None:
    publish("rex", "v2")
    with talk(clients) as client:
        client.images.generate(model="rex", prompt=PROMPT, extra_body=FAST)
        client.images.generate(model="rex@v1", prompt=PROMPT, extra_body=FAST)
        Registry(subjects).rollback("rex")
        client.images.generate(model="rex@champion", prompt=PROMPT, extra_body=FAST)
        assert [order.version for order in artist.orders] == ["v2", "v1", "v1"]
        subjects.remove("registry/rex.json")
        with pytest.raises(openai.NotFoundError):
            client.images.generate(model="rex", prompt=PROMPT, extra_body=FAST)


def test_mistakes_are_422_and_name_the_field(clients, artist) -> None:
    for field, value in (
        ("n", 11),
        ("n", "many"),
        ("size", "17x17"),
        ("steps", 0),
        ("steps", 101),
        ("seed", 2**31),
        ("sampler", "magic"),
        ("guidance_scale", 0.5),
        ("prompt", "a {thing}"),
        ("prompt", "a dog " * 400),
        ("negative_prompt", "a dog " * 400),
        ("loras", ["x"]),
    ):
        body = {"model": "rex", "prompt": PROMPT, field: value}
        answer = clients.of().post("/v1/images/generations", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, field), error
        assert error["type"] == "invalid_request_error" and error["message"] and error["code"]
    assert artist.orders == []


def test_what_only_a_replica_can_tell_is_422_too(clients) -> None:
    body = {"model": "base", "prompt": "dog " * 40, "steps": 1}
    answer = clients.of().post("/v1/images/generations", json=body)
    assert answer.status_code == 422 and "tokens" in answer.json()["error"]["message"]


def test_nulls_are_as_if_they_were_not_there(clients) -> None:
    body = {"model": "base", "prompt": "a dog", "n": None, "seed": None, "user": None, **FAST}
    assert clients.of().post("/v1/images/generations", json=body).status_code == 200


def test_a_full_queue_is_429_and_says_when_to_ask_again(clients, artist) -> None:
    artist.room = 0
    for stream in (False, True):
        body = {"model": "base", "prompt": "a dog", "stream": stream, **FAST}
        answer = clients.of().post("/v1/images/generations", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        assert answer.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_images_up(clients, artist, stream: bool) -> None:
    artist.hold(2)
    body = {"model": "base", "prompt": "a dog", "n": 2, "stream": stream, **FAST}
    client = clients.of()
    asked = client.stream("POST", "/v1/images/generations", json=body) if stream else cut_off(client, body)
    with asked:
        assert artist.is_held.wait(WAIT_S)
    assert set(artist.outcome().values()) == {"given up"}
    [line] = [
        line for line in client.get("/metrics").text.splitlines() if 'images_total{outcome="aban' in line
    ]
    assert line.endswith(" 2.0")


@contextmanager
def cut_off(client: httpx2.Client, body: dict[str, object]) -> Iterator[None]:
    """A client that asks without a stream, and hangs up at the end of the block."""
    host, port, data = client.base_url.host, client.base_url.port, json.dumps(body).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: {client.headers['authorization']}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((host, port)) as connection:
        connection.sendall(head.encode() + data)
        yield


def test_what_is_not_ready_in_time_is_504(serve, artist) -> None:
    clients = serve(limits={"deadline_s": 0.05})
    artist.hold(1)
    answer = clients.of().post("/v1/images/generations", json={"model": "base", "prompt": "a dog", **FAST})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")
    assert set(artist.outcome().values()) == {"given up"}


def test_requests_at_once_are_answered_each_with_its_own_image(clients) -> None:
    answers: dict[int, str] = {}

    def ask(seed: int) -> None:
        body = {"model": "rex", "prompt": PROMPT, "seed": seed, **FAST}
        answer = clients.of().post("/v1/images/generations", json=body).json()
        answers[seed] = answer["data"][0]["b64_json"]
        assert answer["data"][0]["seed"] == seed

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers.values())) == 4

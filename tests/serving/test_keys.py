"""Keys are kept as hashes, open what their scopes allow, and close when they are withdrawn."""

import json

import pytest

from cluster.errors import UserError
from cluster.storage import Storage
from serving.answers import ApiError
from serving.keys import Keys
from serving.quota import Quota, taken


def test_a_token_is_nowhere_in_the_storage_and_opens_its_key(storage: Storage, clock) -> None:
    keys = Keys(storage, clock)
    key, token = keys.create("ci", "acme", ["images"])
    stored = storage.read(f"keys/{key.id}.json").decode()
    assert token.rpartition("_")[2] not in stored and token not in json.dumps(key.as_json())
    assert "sha256" not in json.dumps(key.as_json())
    opened = Keys(storage, clock).opened_by(token)
    assert opened == key and (opened.tenant, opened.scopes) == ("acme", ("images",))


def test_anything_else_opens_nothing(storage: Storage, clock) -> None:
    keys = Keys(storage, clock)
    _, token = keys.create("a")
    other, _ = keys.create("b")
    wrong = [
        "",
        "rb_",
        token[:-1] + ("A" if token[-1] != "A" else "B"),
        token.replace(token[3:15], other.id),
        token.replace(token[3:15], "0" * 12),
        f"{token} ",
        f"rb_../../registry_{'a' * 43}",
        "é" * 59,
    ]
    assert [keys.opened_by(each) for each in wrong] == [None] * len(wrong)


def test_a_key_ends_when_it_expires_or_is_revoked(storage: Storage, clock) -> None:
    here, elsewhere = Keys(storage, clock, hold_s=5), Keys(storage, clock)
    _, short = here.create("short", expires_s=60)
    key, long = here.create("long")
    assert here.opened_by(short) and here.opened_by(long)
    clock.now += 61
    assert here.opened_by(short) is None and here.opened_by(long)
    elsewhere.revoke(key.prefix)
    assert here.opened_by(long), "a look holds for a while"
    clock.now += 6
    assert here.opened_by(long) is None


def test_a_rotated_key_has_two_tokens_for_a_while(storage: Storage, clock) -> None:
    keys = Keys(storage, clock)
    key, first = keys.create("ci")
    again, second = keys.rotate(key.id, grace_s=100)
    clock.now += 2
    assert again.id == key.id and keys.opened_by(first) and keys.opened_by(second)
    clock.now += 100
    assert keys.opened_by(first) is None and keys.opened_by(second)
    assert [found.id for found in keys.all()] == [key.id]


def test_what_cannot_be_a_key_is_refused(storage: Storage, clock) -> None:
    keys = Keys(storage, clock)
    for tenant, scopes in (("../x", ["images"]), ("", ["images"]), ("acme", ["image"])):
        with pytest.raises(UserError):
            keys.create("x", tenant, scopes)
    for identity in ("signing", "../keys/x", "0" * 12):
        with pytest.raises(UserError):
            keys.revoke(identity)


def test_a_bucket_fills_with_time() -> None:
    quota = Quota.full(per_minute=60, burst=2, at_once=5, now=0.0)
    for now, goes in ((0.0, True), (0.1, True), (0.2, False), (1.1, True), (1.2, False), (100.0, True)):
        try:
            with taken(quota, now):
                assert goes
        except ApiError as error:
            assert not goes and error.status == 429 and error.retry_after_s and error.retry_after_s <= 1
    assert quota.headers() == {
        "x-ratelimit-limit": "60",
        "x-ratelimit-remaining": "1",
        "x-ratelimit-reset": "1",
    }


def test_places_are_given_back_whatever_happened() -> None:
    quota = Quota.full(per_minute=6000, burst=100, at_once=1, now=0.0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), taken(quota, 0.0):
            with pytest.raises(ApiError, match="at a time"), taken(quota, 0.0):
                raise AssertionError
            raise ZeroDivisionError
    assert quota.under_way == 0
    with taken(quota, 0.0) as give_back:
        give_back()
        with taken(quota, 0.0):
            give_back()
            assert quota.under_way == 1
    assert quota.under_way == 0

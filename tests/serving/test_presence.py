"""A process is taken to be gone when it is known to be, or when it was silent for long by the observer's own clock."""

import subprocess
import sys

from cluster.storage import Storage
from serving.presence import PATIENCE, Presence


def test_a_process_that_goes_on_beating_lives_and_a_silent_one_does_not(storage: Storage, clock) -> None:
    here, there = Presence(storage, 10, clock), Presence(storage, 10, clock)
    there.beat()
    for _ in range(3):
        assert here.lives(there.id)
        clock.now += PATIENCE * 10 - 1
        there.beat()
    assert here.lives(there.id)
    clock.now += PATIENCE * 10 + 1
    assert not here.lives(there.id)
    assert storage.names("ingress") == [], "it is forgotten"
    assert here.lives(here.id)


def test_one_that_leaves_is_gone_at_once(storage: Storage, clock) -> None:
    here, there = Presence(storage, 10, clock), Presence(storage, 10, clock)
    there.beat()
    assert here.lives(there.id)
    there.leave()
    assert not here.lives(there.id)


def test_one_that_died_on_this_machine_is_gone_at_once(storage: Storage, clock) -> None:
    script = (
        "import sys; from cluster.storage import Storage; from serving.presence import Presence; "
        "there = Presence(Storage(sys.argv[1]), 3600); there.beat(); print(there.id)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, storage.uri], capture_output=True, text=True, check=True
    )
    assert not Presence(storage, 3600, clock).lives(said.stdout.strip())

"""A private Ray, and what is refused."""

import os

import pytest
import ray

from cluster.errors import UserError
from cluster.mailbox import connect, create, fetch
from cluster.session import cpu_count, gpu_count, node_count, session
from cluster.storage import Storage


@pytest.mark.slow
def test_a_private_ray_has_the_cpus_that_were_asked_for_and_carries_letters(storage: Storage) -> None:
    with session(None, 5, storage):
        assert (cpu_count(), gpu_count() >= 0, node_count()) == (5, True, 1)
        seen = ray.get(ray.remote(lambda: dict(os.environ)).remote())
        assert seen["TOKENIZERS_PARALLELISM"] == "false" and seen["OMP_NUM_THREADS"] == "1"
        box = create("campaign-1")
        assert box.post({"latents": [ray.put("latent rows")]}) == 0
        gang = connect("campaign-1")
        lease = gang.take(gang.resume())
        assert lease is not None and fetch(lease["latents"]) == ["latent rows"]
        for step in range(100):
            gang.report(0, 0, "steps", [{"step": step}])
        gang.report(0, 0, "published", {"version": "v1"})
        assert [e.payload.get("step", "end") for e in box.drain()] == [*range(100), "end"]
        box.stop()
        assert gang.take(1) is None
        box.close()
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_a_clear_mistake(storage: Storage) -> None:
    with pytest.raises(UserError, match="cannot be joined"), session("127.0.0.1:1", 1, storage):
        pass

"""What Ray asks of its helpers is answered in the driver."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from training.gang import _Resizing
from training.household import InProcess, _Coordinator, _housed, keep_house


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int, times: int = 1) -> int:
        self.count += number * times
        return self.count


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_object_of_this_process_is_called_as_an_actor_is() -> None:
    counter = InProcess(Counter())
    assert [ray.get(counter.add.remote(2)), ray.get(counter.add.remote(3, times=2))] == [2, 8]
    assert ray.get(counter.what_it_has_not.remote(1)) is None
    there = pickle.loads(pickle.dumps(counter))
    assert ray.get(there.add.remote(1)) is None and ray.get(counter.add.remote(0)) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_threads_share_one_coordinator_which_starts_no_process() -> None:
    def coordinator(_: int) -> InProcess:
        keep_house()
        return _housed(_Coordinator)

    with ThreadPoolExecutor(8) as threads:
        [shared] = set(threads.map(coordinator, range(64)))
    shared.request_resources.remote("gang", [{"CPU": 1}], expire_after_s=60)
    assert ray.get(shared.get_reserved_resources.remote("gang"))
    _Resizing("gang").before_controller_execute_failure_decision(None)  # an elastic gang counts nodes anew
    started = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert not any("Coordinator" in name for name in started)

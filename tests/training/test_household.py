"""What Ray asks of its helpers is answered in the driver."""

import pickle

import pytest
import ray

from training.household import InProcess


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

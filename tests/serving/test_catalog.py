"""What is known of a model answers without a look at the storage, for as long as it may."""

from pathlib import Path

import pytest

from cluster.storage import Storage
from serving.answers import ApiError
from serving.catalog import Catalog


def test_a_model_is_held_from_the_first_look_until_the_look_is_old(zoo: Storage, tiny_base: Path) -> None:
    now = [100.0]
    catalog = Catalog(zoo, str(tiny_base), lambda: now[0], hold_s=1.0)
    assert catalog.holds("default", "base")
    assert not catalog.holds("default", "lora")
    found = catalog.find("default", "lora")
    for name in ("lora", "lora@champion", f"lora@{found.version}"):
        assert catalog.holds("default", name) and catalog.find("default", name) == found
    now[0] += 1.1
    assert not catalog.holds("default", "lora") and catalog.holds("default", "base")


@pytest.mark.parametrize(
    ("tenant", "model"), [("default", "nobody"), ("default", "lora@v9"), ("acme", "lora"), ("default", "?")]
)
def test_what_is_no_model_is_never_held(zoo: Storage, tiny_base: Path, tenant: str, model: str) -> None:
    catalog = Catalog(zoo, str(tiny_base), lambda: 100.0, hold_s=1.0)
    catalog.find("default", "lora")
    with pytest.raises(ApiError):
        catalog.find(tenant, model)
    assert not catalog.holds(tenant, model)

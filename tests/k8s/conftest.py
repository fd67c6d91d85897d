"""This file is where the overlays are rendered once, and the CRDs are read."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.manifests import Document
from k8s.check.crds import Crds
from k8s.check.render import render

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT.parent / "shared" / "crds"


@pytest.fixture(scope="session")
def overlays() -> Mapping[str, list[Document]]:
    """The objects of every overlay, by its name, as kubectl renders them."""
    found = sorted(path.parent for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
    return {overlay.name: render(overlay) for overlay in found}


@pytest.fixture(scope="session")
def crds() -> Crds:
    """The CRDs of KubeRay, Kueue and the Prometheus operator."""
    if not any(FOLDER.glob("*.yaml")):
        pytest.skip(f"CUSTOM RESOURCES ARE NOT CHECKED: there are no CRDs in {FOLDER}")
    return Crds(FOLDER)

"""This file is where overlays are checked without a cluster, as an API server and the operators would check them.

python -m k8s.check k8s/overlays/prod [OVERLAY...] [--crds FOLDER] [--pinned]
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import UserError
from cluster.kuberay_rules import kuberay_complaints
from cluster.kueue_rules import kueue_complaints
from cluster.manifests import Complaint, Document, load_documents, name_of
from cluster.overlay_policies import overlay_complaints
from cluster.pod_policies import policy_complaints
from k8s.check.core import core_complaints
from k8s.check.crds import Crds
from k8s.check.render import render

SECRETS = Path(__file__).parent.parent / "base" / "secrets.example.yaml"
CRDS = Path("../shared/crds")


def complaints(documents: Sequence[Document], crds: Crds, pinned: bool = False) -> list[Complaint]:
    """Everything that is wrong with what is applied together.

    Args:
        documents: Of one overlay.
        crds: The custom resources.
        pinned: Images must be named by digest.
    """
    found = list(_twice(documents))
    for document in documents:
        found += crds.complaints(document) if crds.knows(document) else core_complaints(document)
    if found:  # rules trust the shape
        return found
    elsewhere = load_documents(SECRETS.read_text(encoding="utf-8"), str(SECRETS))
    namespaces = {d["metadata"]["namespace"] for d in documents if "namespace" in d["metadata"]}
    placed = [
        {**secret, "metadata": {**secret["metadata"], "namespace": namespace}}
        for secret in elsewhere
        for namespace in sorted(namespaces)[:1]
    ]
    found = kuberay_complaints(documents) + kueue_complaints(documents) + policy_complaints(documents, pinned)
    return found + overlay_complaints([*documents, *placed])


def _twice(documents: Sequence[Document]) -> list[Complaint]:
    keys = Counter((d["apiVersion"], name_of(d), d["metadata"].get("namespace")) for d in documents)
    return [Complaint(key[1], "metadata.name", "is there twice") for key, times in keys.items() if times > 1]


def main() -> int:
    """Render, check and count; 1 when there are complaints, 2 when there is nothing to check with."""
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m k8s.check k8s/overlays/kind-cpu k8s/overlays/prod --pinned",
    )
    options.add_argument(
        "overlays", nargs="+", type=Path, metavar="OVERLAY", help="a folder with a kustomization"
    )
    options.add_argument(
        "--crds", type=Path, default=CRDS, help="CRDs of KubeRay, Kueue and Prometheus, as YAML"
    )
    options.add_argument("--pinned", action="store_true", help="images must be named by digest")
    asked = options.parse_args()
    if not any(asked.crds.glob("*.yaml")):
        print(f"there are no CRDs in {asked.crds}. Give their folder with --crds", file=sys.stderr)
        return 2
    crds, failed = Crds(asked.crds), False
    for overlay in asked.overlays:
        try:
            documents = render(overlay)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        found = complaints(documents, crds, asked.pinned)
        for complaint in found:
            print(f"{overlay}: {complaint}", file=sys.stderr)
        failed |= bool(found)
        print(f"{overlay}: {len(documents)} objects, {len(found)} complaints")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

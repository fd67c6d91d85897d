"""Every overlay is accepted by schemas, the operators' rules and our policies, and counted."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from cluster.manifests import Document, load_documents, of_kind
from k8s.check.__main__ import complaints
from k8s.check.core import core_complaints
from k8s.check.crds import Crds

K8S = Path(__file__).parent.parent.parent / "k8s"
OVERLAYS = ("dev", "kind-cpu", "prod")
PINNED = ("prod",)
MUST_HOLD = (
    "Namespace",
    "Role",
    "NetworkPolicy",
    "ResourceQuota",
    "RayJob",
    "RayService",
    "CronJob",
    "Deployment",
)


def test_there_are_the_overlays_that_are_checked(overlays: Mapping[str, list[Document]]) -> None:
    assert tuple(overlays) == OVERLAYS


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_complaints(
    name: str, overlays: Mapping[str, list[Document]], crds: Crds, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = overlays[name]
    assert [str(c) for c in complaints(documents, crds, pinned=name in PINNED)] == []
    assert set(MUST_HOLD) <= {d["kind"] for d in documents}
    custom = sum(map(crds.knows, documents))
    with capsys.disabled():
        print(f"\n  {name}: {len(documents)} objects checked, {custom} of them custom resources")


def test_every_file_is_part_of_an_overlay_or_an_example(overlays: Mapping[str, list[Document]]) -> None:
    rendered = {(d["kind"], d["metadata"]["name"]) for documents in overlays.values() for d in documents}
    for file in K8S.rglob("*.yaml"):
        folder = file.relative_to(K8S).parts[0]
        if (
            folder in ("base", "train", "serve", "mlflow", "components")
            and file.name != "secrets.example.yaml"
        ):
            for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
                if "metadata" in document:  # not a kustomization
                    assert (document["kind"], document["metadata"]["name"]) in rendered, file


def test_the_example_secrets_are_secrets_of_no_value() -> None:
    text = (K8S / "base" / "secrets.example.yaml").read_text(encoding="utf-8")
    secrets = load_documents(text)
    assert [c for secret in secrets for c in core_complaints(secret)] == []
    assert {secret["kind"] for secret in secrets} == {"Secret"}


def test_development_makes_every_secret_that_the_examples_name(
    overlays: Mapping[str, list[Document]],
) -> None:
    examples = load_documents((K8S / "base" / "secrets.example.yaml").read_text(encoding="utf-8"))
    made = {d["metadata"]["name"]: set(d["data"]) for d in of_kind(overlays["kind-cpu"], "Secret")}
    for secret in examples:
        missing = set(secret["stringData"]) - made[secret["metadata"]["name"]] - {"HF_TOKEN"}
        assert missing == set()


def test_no_overlay_but_those_for_development_holds_a_secret(overlays: Mapping[str, list[Document]]) -> None:
    assert of_kind(overlays["prod"], "Secret") == []


def test_lists_of_custom_resources_are_patched_by_json6902_alone() -> None:
    """A strategic merge patch replaces such a list, and loses the pod templates in it."""
    found = 0
    for file in K8S.rglob("kustomization.yaml"):
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert not {"patchesStrategicMerge", "patchesJson6902"} & spec.keys(), file
        for patch in spec.get("patches", ()):
            text = patch.get("patch") or (file.parent / patch["path"]).read_text(encoding="utf-8")
            operations = yaml.safe_load(text)
            assert isinstance(operations, list) and all({"op", "path"} <= o.keys() for o in operations), file
            found += 1
    assert found > 10


def test_the_documents_name_every_component_and_link_to_what_is_there() -> None:
    readme = K8S / "README.md"
    text = readme.read_text(encoding="utf-8")
    for component in (K8S / "components").iterdir():
        assert f"`{component.name}`" in text
    for page in (readme, K8S.parent / "docs" / "kubernetes-reference.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists() or target.endswith("docs/kubernetes.md"), target


def test_the_command_line_says_what_is_wrong_with_a_folder(tmp_path: Path, crds: Crds) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [pod.yaml]\n")
    (tmp_path / "pod.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a, imagee: b}]}\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "k8s.check",
            str(tmp_path),
            "--crds",
            str(K8S.parent.parent / "shared" / "crds"),
        ],
        cwd=K8S.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Pod/a" in done.stderr and "imagee" in done.stderr
    assert "1 objects, 1 complaints" in done.stdout

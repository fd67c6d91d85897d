"""The image without a Docker: what it copies makes the wheel, and versions agree wherever they are written."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.manifests import Document, get, of_kind, ray_cluster
from cluster.overlay_policies import all_pods
from cluster.session import _EVERYWHERE

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "k8s" / "image" / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / "k8s" / "image" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
# of what was found in them: PLATFORM's table of flaws that are mended
FLOORS = {"ray": (2, 56), "pillow": (13, 0), "torch": (2, 10), "diffusers": (0, 38), "mlflow": (3, 17)}


def copied() -> list[str]:
    """What is copied from the project, by every stage."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    assert {"cluster", "training", "serving", "orchestrator", "pocket", "constraints.txt"} <= set(copied())
    for source in copied():
        assert (ROOT / source).exists()
        assert f"!{source}" in IGNORED
    assert IGNORED[1] == "*"


def test_every_stage_that_runs_runs_as_nobody_special() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    last = {stage.split()[2]: re.findall(r"^USER (.+)$", stage, re.MULTILINE) for stage in stages}
    assert last == {"wheel": [], "python": [], "mlflow": ["1000:1000"], "raybooth": ["1000:1000"]}
    assert stages[-1].split()[2] == "raybooth"  # is what is built without --target
    assert ":latest" not in DOCKERFILE and "ADD " not in DOCKERFILE


def test_extras_exist() -> None:
    extras = re.search(r"ARG EXTRAS=(\S+)", DOCKERFILE)
    assert extras and set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_serve_is_told_in_a_pod_what_a_private_ray_tells_it() -> None:
    told = dict(re.findall(r"\b(RAY_SERVE_\w+)=(\S+)", DOCKERFILE))
    assert told == {name: value for name, value in _EVERYWHERE.items() if name.startswith("RAY_SERVE_")}


def test_versions_agree(overlays: Mapping[str, list[Document]]) -> None:
    mlflow = re.search(r"ARG MLFLOW_VERSION=(\S+)", DOCKERFILE)
    assert mlflow
    for documents in overlays.values():
        for document in documents:
            if cluster := ray_cluster(document):
                assert cluster[1]["rayVersion"] == PINS["ray"]
        [migration] = [d for d in of_kind(documents, "Job") if "migrate" in d["metadata"]["name"]]
        assert migration["metadata"]["name"] == f"mlflow-migrate-{mlflow[1].replace('.', '-')}"
    for documents in (overlays["dev"], overlays["kind-cpu"]):
        images = {c["image"] for pod in all_pods(documents) for _, c in pod.containers}
        ours = {image for image in images if image.startswith("raybooth")}
        assert ours == {f"raybooth:{PROJECT['version']}", f"raybooth-mlflow:{PROJECT['version']}"}
    assert tuple(map(int, mlflow[1].split("."))) >= (3, 18)  # of the server


@pytest.mark.parametrize("package", FLOORS)
def test_pins_are_above_what_has_known_flaws(package: str) -> None:
    pin = next(version for name, version in PINS.items() if name.lower() == package)
    assert tuple(map(int, re.findall(r"\d+", pin)[:2])) >= FLOORS[package]


def test_the_nightly_submission_asks_for_its_own_image(overlays: Mapping[str, list[Document]]) -> None:
    for documents in overlays.values():
        [nightly] = [d for d in of_kind(documents, "CronJob") if d["metadata"]["name"] == "nightly"]
        pod = get(nightly, "spec", "jobTemplate", "spec", "template", "spec")
        [container] = pod["containers"]
        assert {"name": "RAYBOOTH_IMAGE", "value": container["image"]} in container["env"]


def test_mlflow_answers_by_the_names_that_it_is_asked_by(overlays: Mapping[str, list[Document]]) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    [server] = [d for d in of_kind(overlays["prod"], "Deployment") if d["metadata"]["name"] == "mlflow"]
    command = get(server, "spec", "template", "spec")["containers"][0]["command"]
    [hosts] = [word.partition("=")[2].split(",") for word in command if word.startswith("--allowed-hosts=")]
    for name in (
        "mlflow:5000",
        "mlflow.raybooth.svc:5000",
        "mlflow.team-a.svc.cluster.local:5000",
        "localhost:5000",
    ):
        assert is_allowed_host_header(hosts, name), name
    for name in ("evil.example", "mlflow.evil.example:5000", "10.0.0.7:5000"):
        assert not is_allowed_host_header(hosts, name), name


@pytest.mark.slow
def test_what_the_image_copies_makes_the_wheel_with_its_weights(tmp_path: Path) -> None:
    build = DOCKERFILE.split("AS python")[0]
    for line in re.findall(r"^COPY (.+)$", build, re.MULTILINE):
        *sources, to = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / to)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "w",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "w").glob("raybooth-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    for part in (
        "orchestrator/cli.py",
        "orchestrator/report.html",
        "serving/app.py",
        "pocket/weights/model_index.json",
    ):
        assert part in held
    packaged = {name.split("/")[0] for name in held if not name.split("/")[0].endswith(".dist-info")}
    assert packaged == {"cluster", "training", "serving", "orchestrator", "pocket"}

"""What the documents tell users to type exists, and every YAML they show is valid."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from orchestrator.campaign_settings import KEYS
from orchestrator.cli import app
from orchestrator.manifest import load_campaign
from orchestrator.service import ServiceSpec
from training.defaults import with_defaults
from training.recipe import Recipe, Run

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{page}.md"
        for page in (
            "campaigns",
            "evaluation",
            "guide",
            "kubernetes",
            "provenance",
            "reliability",
            "search",
            "serving",
        )
    ),
]


def commands() -> list[str]:
    found: list[str] = []
    for page in DOCUMENTS:
        lines = page.read_text(encoding="utf-8").splitlines()
        found += [line.strip().split("  #")[0] for line in lines if line.startswith("    raybooth ")]
        about = {
            "campaigns.md": "campaign run",
            "search.md": "tune",
            "evaluation.md": "evaluate",
            "kubernetes.md": "submit",
            "provenance.md": "generate",
        }.get(page.name, "train")
        inline = re.findall(r"`(--[^`]+)`", "\n".join(lines))
        found += [f"raybooth {about} {options}" for options in inline if "--json" not in options]
    return found


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documents_parses(line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help"}
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= known


@pytest.mark.parametrize("line", commands())
def test_every_setting_in_the_documents_exists(line: str) -> None:
    words = shlex.split(line)
    for setting in [value for flag, value in pairwise(words) if flag == "--set"]:
        path, _, value = setting.partition("=")
        if path.partition(".")[0] in KEYS:
            continue  # of a campaign
        spec: Any = yaml.safe_load(value.replace("...", "host"))
        for key in reversed(path.split(".")):
            spec = {key: spec}
        Recipe.model_validate(with_defaults(spec))


def test_every_yaml_in_the_documents_is_a_run_or_a_service() -> None:
    blocks = [
        b for page in DOCUMENTS for b in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        if block.startswith("# serve.yaml"):
            ServiceSpec.model_validate(yaml.safe_load(block))
        elif "subjects:" not in block:
            Run.model_validate(with_defaults(yaml.safe_load(block)))


def test_every_campaign_in_the_documents_can_be_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "campaigns.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    manifest = tmp_path / "campaign.yaml"
    manifest.write_text(block)
    spec = load_campaign(str(manifest))
    assert [(row.name, row.error) for row in spec.rows] == [("rex", None), ("tom", None)]
    assert spec.rows[1].run is not None and spec.rows[1].run.train.steps == 400


def test_the_documents_link_to_files_that_exist() -> None:
    for page in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_proof_among_the_features_is_a_test_that_is_there() -> None:
    page = ROOT / "docs" / "features.md"
    links = re.findall(r"\]\(([^)\s]+)(?: \"([^\"]*)\")?\)", page.read_text(encoding="utf-8"))
    assert len(links) > 50
    for target, name in links:
        text = (page.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{target} has no {name}"


def test_every_feature_is_proven_or_said_to_be_missing() -> None:
    lines = (ROOT / "docs" / "features.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} == {9}  # the feature, ours, seven others'
    ours = {row[0]: row[1] for row in rows if row[0].strip("-")}
    assert len(ours) > 50
    assert [
        feature
        for feature, said in ours.items()
        if "](../tests/" not in said and not said.startswith(("no", "partly: "))
    ] == []

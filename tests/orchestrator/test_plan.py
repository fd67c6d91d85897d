"""This file is where foretelling a run is tested: against what training would find, and without leaving a trace."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.fits import Room
from orchestrator.plan import Plan, plan_run
from orchestrator.spec import load_run
from training.lora import attach
from training.part_settings import Lora
from training.pipeline import load_text_encoder, load_unet, open_base
from training.pipeline_files import save_pipeline
from training.recipe import Run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three photos."""
    (tmp_path / "rex").mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "rex" / f"{seed}.png")
    return tmp_path / "rex"


@pytest.fixture
def run_of(photos: Path, tiny_base: Path) -> Callable[..., Run]:
    """Makes a run of the three photos on the tiny base, with `--set` assignments."""

    def make(*sets: str) -> Run:
        subject = {"name": "rex", "class": "dog", "images": [str(photos)]}
        flags: dict[str, Any] = {"subject": subject, "base": {"model": str(tiny_base)}}
        return load_run(None, flags, ["prior.num_images=6", "train.steps=40", *sets])

    return make


def trace(storage: Storage) -> list[Path]:
    """Every file under the root."""
    return [path for path in Path(storage.uri).rglob("*") if path.is_file()]


def test_a_fresh_run_has_everything_still_to_do_and_the_plan_leaves_no_trace(
    storage: Storage, run_of: Callable[..., Run]
) -> None:
    plan = plan_run(run_of("data.variants=2", "data.flip=true", "cluster.workers=2"), storage)
    assert (plan.version, plan.state, plan.resume_from, plan.steps) == ("v1", "new", 0, 40)
    assert (plan.photos, plan.training_images, plan.latents_cached) == (3, 12, False)
    assert plan.prior is not None
    assert (plan.prior.wanted, plan.prior.missing, plan.prior.latents_cached) == (6, 6, False)
    assert (plan.workers, plan.identifier, plan.image_size) == (2, "zwx", 16)
    assert plan.artifact == storage.full("artifacts/rex/v1")
    assert trace(storage) == []
    assert not ray.is_initialized()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_of_sd3_is_planned_with_its_own_defaults(
    method: str, storage: Storage, run_of: Callable[..., Run], tiny_sd3: Path
) -> None:
    run = run_of(f"base.model={tiny_sd3}", f"train.method={method}")
    assert (run.prior.sampler, run.validate_.guidance) == ("euler", 7.0)
    plan = plan_run(run, storage)
    assert plan.memory.estimate.peak > plan.memory.estimate.base > 0 and plan.identifier == "zwx"
    copies = load_unet(open_base(str(tiny_sd3))), load_text_encoder(open_base(str(tiny_sd3)))
    whole = sum(p.numel() for model in copies for p in model.parameters())
    assert (plan.trained_parameters < whole / 10) == (method == "lora")
    assert plan.artifact_bytes >= (4 * plan.trained_parameters if method == "lora" else 4 * whole)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.objective.weighting=min_snr", "flow matching"),
        ("train.objective.zero_terminal_snr=true", "flow matching"),
        ("prior.sampler=ddim", "use euler"),
        ("train.new_tokens.count=2", "new_tokens"),
        ("train.lora.targets=[nothing]", "no module of the transformer"),
    ],
)
def test_what_has_no_meaning_for_a_base_of_sd3_is_refused(
    setting: str, said: str, storage: Storage, run_of: Callable[..., Run], tiny_sd3: Path
) -> None:
    with pytest.raises(UserError) as refused:
        plan_run(run_of(f"base.model={tiny_sd3}", setting), storage)
    assert said in str(refused.value) and refused.value.do


def test_the_plan_is_one_json_object_and_a_few_lines_for_people(
    storage: Storage, run_of: Callable[..., Run]
) -> None:
    plan = plan_run(run_of(), storage)
    assert plan.as_json()["prior"]["missing"] == 6
    assert plan.as_json()["state"] == "new"
    lines = plan.lines()
    assert lines[0].startswith("rex v1: lora on ")
    assert any("6 of 6 to draw" in line for line in lines)
    assert any("steps 1 to 40" in line for line in lines)


def test_prior_preservation_that_is_off_plans_no_class_images(
    storage: Storage, run_of: Callable[..., Run]
) -> None:
    assert plan_run(run_of("prior.weight=0"), storage).prior is None


def test_class_images_that_are_there_are_not_drawn_again(
    storage: Storage, run_of: Callable[..., Run]
) -> None:
    fresh = plan_run(run_of(), storage).prior
    assert fresh is not None
    storage.write_json(f"priors/{fresh.key}/manifest.json", {"count": 4, "shards": []})
    planned = plan_run(run_of(), storage).prior
    assert planned is not None
    assert (planned.present, planned.missing) == (4, 2)


def test_an_unfinished_run_goes_on_from_its_last_whole_checkpoint(
    storage: Storage, run_of: Callable[..., Run]
) -> None:
    fingerprint = plan_run(run_of(), storage).fingerprint
    storage.write_json("runs/rex/v1/run.json", {"fingerprint": fingerprint, "state": "training"})
    for step in (10, 20):
        storage.write_json(f"runs/rex/v1/checkpoints/step_{step:06d}/manifest.json", {"files": {}})
    storage.write("runs/rex/v1/checkpoints/step_000030/state.safetensors", b"half")
    plan = plan_run(run_of("checkpoint.every=7"), storage)  # where it stops does not change what it is
    assert (plan.state, plan.version, plan.resume_from) == ("unfinished", "v1", 20)
    assert plan_run(run_of("train.lr=0.5"), storage).version == "v2"


def test_a_trained_run_has_nothing_to_do_unless_a_new_version_is_wanted(
    storage: Storage, run_of: Callable[..., Run]
) -> None:
    done: Plan = plan_run(run_of(), storage)
    entry = {"artifact": "artifacts/rex/v1", "fingerprint": done.fingerprint}
    Registry(storage).add("rex", "v1", entry)
    again = plan_run(run_of(), storage)
    assert (again.state, again.version) == ("succeeded", "v1")
    assert "nothing to do" in again.lines()[0]
    assert plan_run(run_of(), storage, new_version=True).version == "v2"


def test_the_fingerprint_depends_on_photos_and_recipe_and_not_on_the_name_or_the_cluster(
    storage: Storage, run_of: Callable[..., Run], photos: Path
) -> None:
    first = plan_run(run_of(), storage).fingerprint
    assert plan_run(run_of("subject.name=tom", "cluster.workers=2"), storage).fingerprint == first
    assert plan_run(run_of("train.seed=1"), storage).fingerprint != first
    (photos / "2.png").unlink()
    assert plan_run(run_of(), storage).fingerprint != first


def test_lora_parameters_are_those_that_training_attaches(
    storage: Storage, run_of: Callable[..., Run], tiny_base: Path
) -> None:
    plan = plan_run(run_of("train.lora={rank: 3}", "train.text_encoder.train=true"), storage)
    base = open_base(str(tiny_base))
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    attach(unet, text_encoder, Lora(rank=3), True, 0)
    attached = [p for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad]
    assert plan.trained_parameters == sum(p.numel() for p in attached)
    assert plan.artifact_bytes == 4 * plan.trained_parameters


def test_the_size_of_a_full_artifact_is_that_of_the_folder_it_becomes(
    storage: Storage, run_of: Callable[..., Run], tiny_base: Path, tmp_path: Path
) -> None:
    plan = plan_run(run_of("train.method=full"), storage)
    base = open_base(str(tiny_base))
    save_pipeline(base, load_unet(base), load_text_encoder(base), tmp_path / "full")
    size = sum(p.stat().st_size for p in (tmp_path / "full").rglob("*") if p.is_file())
    assert plan.artifact_bytes == pytest.approx(size, rel=0.05)


def _no_unet(base: Path, photos: Path) -> list[str]:
    shutil.rmtree(base / "unet")
    return []


def _only_bin(base: Path, photos: Path) -> list[str]:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    return []


def _not_an_image(base: Path, photos: Path) -> list[str]:
    (photos / "3.jpg").write_bytes(b"<html>")
    return []


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_no_unet, "has no unet"),
        (_only_bin, "has no safetensors weights"),
        (_not_an_image, "3.jpg is not a JPEG, PNG or WebP image"),
        (lambda base, photos: ["subject.identifier=q7j9x"], "the identifier 'q7j9x' is too long"),
        (lambda base, photos: [f"subject.images=[{photos / 'gone'}]"], "gone does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    storage: Storage,
    run_of: Callable[..., Run],
    tiny_base: Path,
    photos: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], list[str]],
    what: str,
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "spoiled"))
    with pytest.raises(UserError) as caught:
        plan_run(run_of(f"base.model={base}", *spoil(base, photos)), storage)
    assert what in caught.value.what
    assert caught.value.do != ""
    assert trace(storage) == []


def test_the_plan_says_what_a_worker_will_take(storage: Storage, run_of: Callable[..., Run]) -> None:
    memory = plan_run(run_of(), storage, room=Room(10**12, None)).as_json()["memory"]
    assert (memory["device"], memory["room_per_worker"]) == ("cpu", 10**12)
    assert memory["peak_per_worker"] == sum(memory["parts"].values())
    lines = plan_run(run_of(), storage).lines()
    assert any(line.startswith("  memory        about 0.") for line in lines)


def test_a_run_that_cannot_fit_is_refused(storage: Storage, run_of: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match="more memory than there is"):
        plan_run(run_of("train.method=full"), storage, room=Room(10**6, None))
    assert trace(storage) == []

"""Batches: each image once, whoever is killed when, with the bytes that `generate` gives."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch

from cluster.errors import SystemFailure, UserError
from cluster.registry import Registry
from cluster.session import session
from cluster.storage import Storage, sha256
from orchestrator.batch import draw_batch
from orchestrator.cli_batch import choose_subjects
from orchestrator.gallery import INDEX, Gallery, Image
from orchestrator.progress import open_stages
from orchestrator.wanted import Wanted
from serving.generate import generate
from training.artifact import FORMAT, KIND, Identity, artifact_path, write_weights
from training.lora import attach
from training.pipeline import load_text_encoder, load_unet, open_base
from training.png import decode_png, encode_png
from training.recipe import Run
from training.resident import DrawWorker
from training.stream import Pool

PROMPTS = ("a photo of {subject} on the beach", "a red clock, {subject}")
PATIENCE_S = 900  # on a machine that is busy elsewhere


def publish(storage: Storage, base_folder: Path, scratch: Path, name: str, method: str, seed: int) -> None:
    """Register `name` v1 as if it had been trained: weights moved far enough that pictures change."""
    base = open_base(str(base_folder))
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    run = Run.model_validate(
        {
            "base": {"model": str(base_folder)},
            "subject": {"name": name, "class": "dog", "images": ["photos"]},
            "train": {"method": method},
            "validate": {"guidance": 3.0},
        }
    )
    if method == "lora":
        attach(unet, text_encoder, run.train.lora, False, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p in unet.parameters():
            if p.requires_grad or method == "full":
                p.data.add_(torch.randn_like(p), alpha=0.2 if method == "lora" else 0.02)
    write_weights(base, run, unet, text_encoder, scratch / name)
    meta = {
        "kind": KIND,
        "format": FORMAT,
        "method": method,
        "base": {"model": base.model, "revision": base.revision},
        "identity": Identity("zwx", "dog", "a {identifier} {class}", (97,)).as_json(),
        "recipe": run.model_dump(mode="json", by_alias=True),
    }
    storage.publish(scratch / name, artifact_path(name, "v1"), meta)
    Registry(storage).add(name, "v1", {"artifact": artifact_path(name, "v1"), "fingerprint": name})


@pytest.fixture(scope="module")
def studio(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage root with rex and ada (LoRA), tom (full) and pip, whose weights are damaged."""
    scratch = tmp_path_factory.mktemp("studio")
    storage = Storage(str(scratch / "storage"))
    for seed, (name, method) in enumerate(
        (("rex", "lora"), ("pip", "lora"), ("tom", "full"), ("ada", "lora"))
    ):
        publish(storage, tiny_base, scratch, name, method, seed)
    damaged = Path(storage.uri, artifact_path("pip", "v1"), "pytorch_lora_weights.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    return storage


def image(**changes: Any) -> Image:
    return replace(
        Image("rex", "v1", "a" * 16, "b" * 16, 4, "{subject}", "a zwx dog", 7, "", 4, 3.0, "ddim"), **changes
    )


def png_of(which: Image) -> bytes:
    pixels = torch.randint(0, 255, (16, 16, 3), generator=torch.Generator().manual_seed(which.seed))
    return encode_png(pixels.byte().numpy(), which.parameters)


def rows_of(storage: Storage, path: str) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(storage.read(path))).to_pylist()
    return rows


# -- the gallery -------------------------------------------------------------------------------------------


def test_a_key_changes_with_everything_that_decides_an_image() -> None:
    values = {str: "other", int: 99, float: 9.5}
    others = [image(**{f.name: values[type(getattr(image(), f.name))]}).key for f in fields(Image)]
    assert len({image().key, *others}) == len(fields(Image)) + 1
    assert image().key == image().key and len(image().key) == 32


@pytest.mark.parametrize("form", ["png", "parquet"])
@pytest.mark.parametrize("root", ["tmp_path", "bucket"])
def test_what_was_written_without_its_manifest_is_taken_over_if_it_is_whole(
    request: pytest.FixtureRequest, root: str, form: str
) -> None:
    storage = Storage(f"{request.getfixturevalue(root)}/images")
    gallery, images = Gallery(storage, form), [image(seed=s) for s in range(4)]
    assert gallery.there("rex-v1", images) == {}
    gallery.add([(i, png_of(i)) for i in images[:2]])
    gallery.add([(i, png_of(i)) for i in images[2:3]])
    storage.remove("manifests/rex-v1")  # as if killed before it
    storage.write(f"rex-v1/{images[3].key}.{form}", b"\x89PNG but not whole")
    found = gallery.there("rex-v1", images)
    assert set(found) == {i.key for i in images[:3]}
    assert [sha256(png_of(i)) for i in images[:3]] == [found[i.key].sha256 for i in images[:3]]
    assert list(gallery.pngs([found[i.key] for i in images[:3]])) == [png_of(i) for i in images[:3]]
    assert f"{images[3].key}.{form}" not in storage.names("rex-v1")
    assert Gallery(storage, form).there("rex-v1", images) == found  # by their manifest now
    assert [row["key"] for row in rows_of(storage, gallery.write_index())] == [i.key for i in images[:3]]
    with pytest.raises(UserError, match="keeps its images as"):
        Gallery(storage, "parquet" if form == "png" else "png").there("rex-v1", images)


def test_an_object_that_is_there_keeps_its_bytes_and_one_that_was_removed_is_wanted_again(
    storage: Storage,
) -> None:
    gallery, one, other = Gallery(storage, "png"), image(seed=1), image(seed=2)
    storage.write(f"rex-v1/{one.key}.png", b"first")
    [kept, drawn] = gallery.add([(one, b"second"), (other, b"other")])
    assert (storage.read(kept.path), kept.sha256) == (b"first", sha256(b"first"))
    storage.remove(drawn.path)
    assert set(gallery.there("rex-v1", [one, other])) == {one.key}
    storage.write(kept.path, b"third")
    with pytest.raises(SystemFailure, match="damaged"):
        list(gallery.pngs([kept]))


def test_subjects_are_chosen_by_name_version_file_or_all(studio: Storage, tmp_path: Path) -> None:
    registry, file = Registry(studio), tmp_path / "names.txt"
    file.write_text("# tonight\nrex, tom@v1\n\nada@champion\n")
    assert choose_subjects("rex,tom@v1,rex", registry) == [("rex", "v1"), ("tom", "v1")]
    assert choose_subjects(str(file), registry) == [("rex", "v1"), ("tom", "v1"), ("ada", "v1")]
    assert [name for name, _ in choose_subjects("all", registry)] == ["ada", "pip", "rex", "tom"]
    for text, match in (("rax", "did you mean rex"), ("rex@v9", "no version"), (" , ", "no subject")):
        with pytest.raises(UserError, match=match):
            choose_subjects(text, registry)
    with pytest.raises(UserError, match="no subject to draw"):
        choose_subjects("all", Registry(Storage(str(tmp_path / "empty"))))


# -- an actor ----------------------------------------------------------------------------------------------


def test_an_actor_loads_each_subject_once_and_a_damaged_one_fails_alone(
    studio: Storage, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.resident

    opened: list[str] = []
    open_artifact = training.resident.open_artifact

    def watched(storage: Storage, name: str, version: str) -> Any:
        opened.append(name)
        return open_artifact(storage, name, version)

    monkeypatch.setattr("training.resident.open_artifact", watched)
    base = open_base(str(tiny_base))
    worker = DrawWorker(base.model, base.revision, "cpu", 4, studio.uri)
    names = ["rex", "rex", "pip", "pip", "tom", "", "ada", "rex"]
    asked = [{"index": 0, "prompt": "a zwx dog", "seed": 3, "steps": 3}]
    columns = {
        "name": names,
        "version": ["v1"] * len(names),
        "label": [""] * len(names),
        "requests": [json.dumps(asked)] * len(names),
    }
    drawn = worker(columns)
    assert opened == ["rex", "pip", "tom", "ada", "rex"]
    assert [bool(error) for error in drawn["error"]] == [name == "pip" for name in names]
    assert json.loads(drawn["error"][2])["what"].endswith("is damaged or missing")
    rex, again, _, _, tom, pristine, ada, after = drawn["png"]
    assert rex == again == after  # nothing of the others is left
    assert len({rex, tom, pristine, ada}) == 4
    alone = DrawWorker(base.model, base.revision, "cpu", 4, studio.uri)
    assert alone({key: column[6:7] for key, column in columns.items()})["png"] == [ada]


# -- batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_ray(studio: Storage) -> Iterator[None]:
    with session(None, 4, studio):
        yield


def never() -> Any:
    raise AssertionError("there is nothing to draw")


@pytest.mark.slow
def test_a_batch_draws_what_generate_draws_and_only_once(
    a_ray: None, studio: Storage, tmp_path: Path
) -> None:
    out, wanted = Storage(str(tmp_path / "out")), Wanted(PROMPTS[:1], num_images=3, seed=5, steps=3)
    subjects, stages = [(name, "v1") for name in ("rex", "pip", "nobody", "tom")], open_stages()
    first = draw_batch(studio, out, subjects, wanted, Pool(), stages)
    assert (first.drawn, first.there) == (6, 0)
    assert {name: type(error) for (name, _), error in first.failed.items()} == dict.fromkeys(
        ("pip", "nobody"), SystemFailure
    )
    for name in ("rex", "tom"):
        told = generate(studio, name, None, PROMPTS[:1], n=3, seed=5, steps=3, out=tmp_path / name)
        ours = [e for e in first.images if e.image.subject == name]
        assert [e.image.seed for e in ours] == told.seeds == [5, 6, 7]
        assert [out.read(e.path) for e in ours] == [path.read_bytes() for path in told.images]
    assert decode_png(out.read(first.sheets["rex", "v1"])).shape[1] > 3 * 144

    healthy = [subject for subject in subjects if subject[0] in ("rex", "tom")]
    again = draw_batch(studio, out, healthy, wanted, Pool(), stages, ray=never)
    assert (again.drawn, again.there, again.failed) == (0, 6, {})
    assert again.images == first.images

    more = draw_batch(studio, out, healthy, replace(wanted, prompts=PROMPTS), Pool(actors=2), stages)
    assert (more.drawn, more.there) == (6, 6)
    index = rows_of(out, INDEX)
    assert {row["key"] for row in index} == {entry.image.key for entry in more.images}
    assert all(sha256(out.read(row["path"])) == row["sha256"] for row in index)

    rows = Storage(str(tmp_path / "rows"))
    table = draw_batch(studio, rows, healthy, replace(wanted, prompts=PROMPTS), Pool(), stages, "parquet")
    pngs = Gallery(out, "png").pngs(more.images)
    assert list(Gallery(rows, "parquet").pngs(table.images)) == list(pngs)
    assert len([name for name in rows.names("rex-v1") if name.endswith(".parquet")]) == 1
    draw_batch(studio, rows, healthy, replace(wanted, prompts=PROMPTS), Pool(), stages, "parquet", never)


@pytest.mark.slow
@pytest.mark.faults
def test_a_batch_that_is_killed_goes_on_and_each_image_is_there_once_with_the_same_bytes(
    a_ray: None, studio: Storage, tmp_path: Path
) -> None:
    steps, environment = 150, {**os.environ, "RAY_AUTH_MODE": "token"}
    options = ["--subjects", "rex,pip,tom,ada", PROMPTS[0], "-n", "4", "--steps", str(steps), "--json"]
    joined = ["--storage", studio.uri, "--address", ray.get_runtime_context().gcs_address]
    for number in range(3):  # on a busy machine the kill may come too late
        out = tmp_path / f"out-{number}"
        command = [sys.executable, "-m", "orchestrator", "batch", *options, "--out", str(out), *joined]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(lambda: any(out.glob("manifests/*/*.json")) or process.poll() is not None)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = {path: path.stat().st_mtime_ns for path in out.glob("*-v1/*.png")}
        if len(before) < 12:
            break
    assert process.returncode == -signal.SIGKILL and 4 <= len(before) < 12

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 3, done.stderr  # pip is damaged
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["state"], answer["images"], answer["there"]) == ("failed", 12, len(before))
    assert [(f["name"], f["reason"]["seen"]) for f in answer["failed"]] == [
        ("pip", "its sha256 is not the manifest's")
    ]
    after = {path: path.stat().st_mtime_ns for path in out.glob("*-v1/*.png")}
    assert len(after) == 12 and before.items() <= after.items()  # nothing was drawn over
    for name in ("rex", "tom", "ada"):
        calm = generate(studio, name, None, PROMPTS[:1], n=4, steps=steps, out=tmp_path / name)
        drawn = sorted(sha256(path.read_bytes()) for path in (out / f"{name}-v1").glob("*.png"))
        assert drawn == sorted(sha256(path.read_bytes()) for path in calm.images)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

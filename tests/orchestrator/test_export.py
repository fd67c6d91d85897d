"""What is exported draws the same picture in the library that it is meant for, and comes back as the same version."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.cli import app
from orchestrator.export import Exported, Format, export
from orchestrator.importing import import_lora
from training.artifact import Identity, artifact_meta, artifact_path, open_artifact, write_weights
from training.draw import Drawer
from training.lora import attach
from training.new_tokens import grow, started
from training.pipeline import end_id, load_text_encoder, load_tokenizer, load_unet, open_base
from training.recipe import Run
from training.request import DrawRequest

PROMPT = "a photo of a zwx dog"
KINDS: dict[str, dict[str, Any]] = {
    "rex": {
        "method": "lora",
        "lora": {"rank": 4, "alpha": 2.0, "targets": ["to_q", "to_v", "conv1", "proj_in"]},
    },
    "text": {"method": "lora", "lora": {"rank": 4}, "text_encoder": {"train": True}},
    "full": {"method": "full"},
    "lokr": {"method": "lora", "lora": {"kind": "lokr", "rank": 4}},
    "oft": {"method": "lora", "lora": {"kind": "oft", "rank": 4}, "text_encoder": {"train": True}},
    "token": {"method": "lora", "lora": {"rank": 4, "alpha": 2.0}, "new_tokens": {"count": 2}},
    "full-token": {"method": "full", "new_tokens": {"count": 1}},
}


@pytest.fixture(scope="module")
def booth(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Artifacts of every kind as if trained, registered; the change of the full one is of rank 3."""
    storage, info = Storage(str(tmp_path_factory.mktemp("booth"))), open_base(str(tiny_base))
    for seed, (name, train) in enumerate(KINDS.items()):
        subject = {"name": name, "class": "dog", "images": ["x"]}
        run = Run.model_validate({"base": {"model": str(tiny_base)}, "subject": subject, "train": train})
        unet, text_encoder = load_unet(info), load_text_encoder(info)
        folder = tmp_path_factory.mktemp(name)
        count = run.train.new_tokens.count
        start = started(text_encoder, "<zwx>", [97], count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if run.train.method == "lora":
                attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed)
                for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
                    nn.init.normal_(p, std=0.3)
            else:
                for layer in (m for m in unet.modules() if isinstance(m, nn.Linear)):
                    low = torch.randn(layer.out_features, 3) @ torch.randn(3, layer.in_features)
                    layer.weight.data.add_(low, alpha=0.03)
            if count:
                moved = {part: torch.randn_like(rows) * 0.3 for part, rows in start.embeddings.items()}
                grow(text_encoder, replace(start, embeddings=moved), end_id(load_tokenizer(info)))
        write_weights(info, run, unet, text_encoder, folder)
        word, initializer_ids = ("<zwx>", (97,)) if count else ("zwx", ())
        identity = Identity(word, "dog", "a {identifier} {class}", (1,), initializer_ids)
        storage.publish(folder, artifact_path(name, "v1"), artifact_meta(info, run, identity, name, None, {}))
        entry = {"artifact": artifact_path(name, "v1"), "fingerprint": name, "method": run.train.method}
        Registry(storage).add(name, "v1", entry)
    return storage


def prompt_of(name: str) -> str:
    return PROMPT.replace("zwx", "<zwx>") if "token" in name else PROMPT


def ours(storage: Storage, name: str, version: str = "v1") -> np.ndarray:
    with open_artifact(storage, name, version) as artifact:
        drawer = Drawer(
            open_base(artifact.manifest["base"]["model"]), artifact.folder, artifact.manifest, "cpu"
        )
        return drawer.draw([DrawRequest(prompt_of(name), 7, steps=4, guidance=5.0)])[0].astype(int)


def theirs(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    image = pipe(prompt, generator=torch.Generator("cpu").manual_seed(7), **call).images[0]
    return (image * 255).round().astype(int)


def loaded(done: Exported, base: Path) -> Any:
    """What diffusers makes of it."""
    path = Path(done.path)
    if done.holds == "lora":
        pipe = StableDiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(path if path.is_dir() else str(path))
    elif path.is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(path)
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=str(base), local_files_only=True, safety_checker=None
        )
    if done.embedding is not None:
        pipe.load_textual_inversion(done.embedding, token=done.prompt.split()[1])
    return pipe


@pytest.mark.parametrize(
    ("name", "wanted", "options", "holds"),
    [
        ("rex", "diffusers", {}, "lora"),
        ("rex", "diffusers", {"merged": True}, "pipeline"),
        ("rex", "kohya", {}, "lora"),
        ("rex", "single-file", {}, "pipeline"),
        ("text", "kohya", {}, "lora"),
        ("text", "comfy", {"merged": True}, "pipeline"),
        ("full", "diffusers", {}, "pipeline"),
        ("full", "comfy", {}, "pipeline"),
        ("full", "diffusers", {"rank": 3}, "lora"),
        ("full", "kohya", {"rank": 3}, "lora"),
        ("lokr", "diffusers", {}, "pipeline"),
        ("oft", "single-file", {}, "pipeline"),
        ("token", "diffusers", {}, "lora"),
        ("token", "diffusers", {"merged": True}, "pipeline"),
        ("token", "kohya", {}, "lora"),
        ("full-token", "single-file", {}, "pipeline"),
        ("full-token", "diffusers", {"rank": 3}, "lora"),
    ],
)
def test_stock_diffusers_draws_what_was_exported(
    booth: Storage,
    tiny_base: Path,
    tmp_path: Path,
    name: str,
    wanted: Format,
    options: dict[str, Any],
    holds: str,
) -> None:
    done = export(booth, name, None, wanted, tmp_path / "out", **options)
    assert (done.holds, done.prompt) == (holds, prompt_of(name).removeprefix("a photo of "))
    apart = np.abs(ours(booth, name) - theirs(loaded(done, tiny_base), prompt_of(name)))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.05
    plain = theirs(StableDiffusionPipeline.from_pretrained(tiny_base))
    assert np.abs(plain - ours(booth, name)).mean() > 3  # it is at work
    if "rank" in options:
        assert done.error is not None and done.error < 1e-4 and done.uncovered == 0


def test_a_smaller_rank_says_what_it_loses(booth: Storage, tmp_path: Path) -> None:
    errors = [
        export(booth, "full", None, "kohya", tmp_path / f"{n}.safetensors", rank=n).error for n in (1, 2, 3)
    ]
    assert errors[0] is not None and errors[1] is not None and errors[2] is not None
    assert 1 > errors[0] > errors[1] > 0.1 > errors[2]


@pytest.mark.parametrize("name", ["rex", "text"])
@pytest.mark.parametrize("wanted", ["kohya", "diffusers"])
def test_what_was_exported_comes_back_as_a_version_that_draws_the_same(
    booth: Storage, tiny_base: Path, tmp_path: Path, name: str, wanted: Format
) -> None:
    done = export(booth, name, None, wanted, tmp_path / "out")
    back = f"{name}-{wanted}"
    told = import_lora(booth, Path(done.path), back, "dog", "zwx", str(tiny_base))
    assert (told["version"], told["rank"], told["already"]) == ("v1", KINDS[name]["lora"]["rank"], False)
    assert import_lora(booth, Path(done.path), back, "dog", "zwx", str(tiny_base))["already"]
    assert import_lora(booth, Path(done.path), back, "dog", "ohwx", str(tiny_base))["version"] == "v2"
    assert np.abs(ours(booth, name) - ours(booth, back)).max() <= 1
    assert Registry(booth).resolve(back, "v1")[1]["identifier"] == "zwx"


def test_a_file_of_several_ranks_and_old_names_comes_in(
    booth: Storage, tiny_base: Path, tmp_path: Path
) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    shape = load_unet(open_base(str(tiny_base))).get_submodule(f"{layer}.to_q").weight.shape
    a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    old = {
        f"unet.{layer}.processor.to_q_lora.down.weight": a,
        f"unet.{layer}.processor.to_q_lora.up.weight": b,
        f"unet.{layer}.processor.to_out_lora.down.weight": torch.randn(3, shape[0]),
        f"unet.{layer}.processor.to_out_lora.up.weight": torch.randn(shape[0], 3),
    }
    save_file(old, tmp_path / "old.safetensors")
    told = import_lora(booth, tmp_path / "old.safetensors", "old", "dog", "zwx", str(tiny_base))
    assert (told["rank"], told["layers"]) == (3, 2)
    with open_artifact(booth, "old", "v1") as artifact:
        kept = load_file(artifact.folder / "pytorch_lora_weights.safetensors")
    stem = f"unet.{layer}.to_q.lora_"
    assert torch.allclose(kept[f"{stem}B.weight"] @ kept[f"{stem}A.weight"], b @ a, atol=1e-5)


def test_kohyas_file_says_what_it_is(booth: Storage, tmp_path: Path) -> None:
    done = export(booth, "rex", "v1", "kohya", tmp_path)
    assert done.path.endswith("rex-v1.safetensors")
    with safe_open(done.path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["modelspec.trigger_phrase"] == "a zwx dog"


@pytest.mark.parametrize(
    ("name", "wanted", "options", "said"),
    [
        ("full", "kohya", {}, "extract one with --rank"),
        ("full", "diffusers", {"merged": True}, "leave out --merge"),
        ("rex", "kohya", {"rank": 4}, "leave out --rank"),
        ("rex", "kohya", {"merged": True}, "--format single-file"),
        ("full", "single-file", {"rank": 4}, "--format kohya"),
    ],
)
def test_what_has_not_the_form_is_refused(
    booth: Storage, tmp_path: Path, name: str, wanted: Format, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export(booth, name, None, wanted, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_there_is_replaced(booth: Storage, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(booth, "rex", None, "diffusers", tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_nowhere_to_q.lora_down.weight": (2, 8)}, "nowhere to put lora_unet_nowhere"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (2, 8)}, "is a LoHa"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 8)}, "lacks a factor"),
        (
            {
                "unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 8),
                "unet.mid_block.attentions.0.proj_in.lora_B.weight": (8, 2),
            },
            "does not fit the base",
        ),
    ],
)
def test_what_is_no_lora_of_the_base_is_refused(
    booth: Storage, tiny_base: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        import_lora(booth, tmp_path / "x.safetensors", "x", "dog", "zwx", str(tiny_base))
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="pickles are not read"):
        import_lora(booth, tmp_path / "x.ckpt", "x", "dog", "zwx", str(tiny_base))


def test_who_exports_is_told_of_velocity_that_a_file_cannot_say(
    booth: Storage, tiny_base_v: Path, tmp_path: Path
) -> None:
    file = Path(export(booth, "rex", None, "kohya", tmp_path / "lora").path)
    import_lora(booth, file, "moving", "dog", "zwx", str(tiny_base_v))
    options = ["--format", "single-file", "--storage", booth.uri, "--out", str(tmp_path)]
    for name, told in (("moving", True), ("rex", False)):
        done = CliRunner().invoke(app, ["export", name, *options, "--json"])
        assert json.loads(done.stdout.splitlines()[-1])["silent_velocity"] == told
        assert ("predicts velocity" in done.stderr) == told
    assert not export(booth, "moving", None, "diffusers", tmp_path / "whole", merged=True).silent_velocity
    assert not export(booth, "moving", None, "kohya", tmp_path / "back").silent_velocity


def test_the_commands_answer_in_json(booth: Storage, tiny_base: Path, tmp_path: Path) -> None:
    run, root = CliRunner(), ["--storage", booth.uri, "--json"]
    file = str(tmp_path / "rex.safetensors")
    done = run.invoke(app, ["export", "rex@v1", "--format", "kohya", "--out", file, *root])
    assert json.loads(done.stdout.splitlines()[-1])["path"] == file
    options = ["--name", "cli", "--class", "dog", "--identifier", "zwx", "--base", str(tiny_base)]
    done = run.invoke(app, ["import", file, *options, *root])
    assert json.loads(done.stdout.splitlines()[-1])["version"] == "v1"
    done = run.invoke(app, ["export", "rex", "--format", "khoya", *root])
    assert done.exit_code == 2 and "kohya" in json.loads(done.stdout.splitlines()[-1])["error"]["do"]

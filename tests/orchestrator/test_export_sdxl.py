"""What is exported of an SDXL draws the same picture in stock diffusers, and comes back as the same version."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.export import Exported, Format, export
from orchestrator.importing import import_lora
from training.artifact import Identity, artifact_meta, artifact_path, open_artifact, write_weights
from training.draw import Drawer
from training.lora import attach
from training.new_tokens import grow, started
from training.pipeline import end_id, load_text_encoder, load_tokenizer, load_unet, open_base
from training.recipe import Run
from training.request import DrawRequest

WORD = "<zwx>"
KINDS: dict[str, dict[str, Any]] = {
    "rex": {"method": "lora", "lora": {"rank": 4, "alpha": 2.0}, "text_encoder": {"train": True}},
    "token": {
        "method": "lora",
        "lora": {
            "rank": 4,
            "alpha": 2.0,
            # every kind of layer that has a name of its own in the original
            "targets": ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut"],
        },
        "new_tokens": {"count": 2},
    },
    "full": {"method": "full", "text_encoder": {"train": True}, "new_tokens": {"count": 1}},
}


@pytest.fixture(scope="module")
def booth(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Artifacts as if trained, registered."""
    storage = Storage(str(tmp_path_factory.mktemp("booth")))
    for name, train in KINDS.items():
        publish(storage, tiny_sdxl, name, train, tmp_path_factory.mktemp(name))
    return storage


def publish(storage: Storage, base: Path, name: str, train: dict[str, Any], folder: Path) -> None:
    """Register an artifact as if trained; `folder` takes it first."""
    info = open_base(str(base))
    subject = {"name": name, "class": "dog", "images": ["x"]}
    run = Run.model_validate({"base": {"model": str(base)}, "subject": subject, "train": train})
    unet, text_encoder = load_unet(info), load_text_encoder(info)
    start = started(text_encoder, WORD, [97], max(1, run.train.new_tokens.count))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if run.train.method == "lora":
            attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed=1)
        else:
            for p in (*unet.parameters(), *text_encoder.parameters()):
                p.data.add_(torch.randn_like(p), alpha=0.02)
        if run.train.new_tokens.count:
            grow(text_encoder, start, end_id(load_tokenizer(info)))
        for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
            nn.init.normal_(p, std=0.3)
    write_weights(info, run, unet, text_encoder, folder)
    word, initializer_ids = (WORD, (97,)) if run.train.new_tokens.count else ("zwx", ())
    identity = Identity(word, "dog", "a {identifier} {class}", (1,), initializer_ids)
    storage.publish(folder, artifact_path(name, "v1"), artifact_meta(info, run, identity, name, None, {}))
    entry = {"artifact": artifact_path(name, "v1"), "fingerprint": name, "method": run.train.method}
    Registry(storage).add(name, "v1", entry)


def prompt_of(name: str) -> str:
    return f"a photo of a {WORD if name in ('token', 'full') else 'zwx'} dog"


def ours(storage: Storage, name: str, prompt: str = "") -> np.ndarray:
    with open_artifact(storage, name, "v1") as artifact:
        base = open_base(artifact.manifest["base"]["model"])
        drawer = Drawer(base, artifact.folder, artifact.manifest, "cpu")
        asked = DrawRequest(prompt or prompt_of(name), 7, steps=4, guidance=5.0)
        return drawer.draw([asked])[0].astype(int)


def theirs(pipe: Any, prompt: str) -> np.ndarray:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    image = pipe(prompt, generator=torch.Generator("cpu").manual_seed(7), **call).images[0]
    return (image * 255).round().astype(int)


def loaded(done: Exported, base: Path) -> Any:
    """What diffusers makes of it."""
    path = Path(done.path)
    if done.holds == "pipeline" and path.is_file():
        pipe = StableDiffusionXLPipeline.from_single_file(
            str(path), config=str(base), local_files_only=True, add_watermarker=False
        )
    else:
        whole = path if done.holds == "pipeline" else base
        pipe = StableDiffusionXLPipeline.from_pretrained(whole, add_watermarker=False)
    if done.holds == "lora":
        pipe.load_lora_weights(path if path.is_dir() else str(path))
    if done.embedding is not None:
        rows = load_file(done.embedding)
        one, two = (pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)
        for key, (text_encoder, tokenizer) in {"clip_l": one, "clip_g": two}.items():
            pipe.load_textual_inversion(rows[key], token=WORD, text_encoder=text_encoder, tokenizer=tokenizer)
    return pipe


@pytest.mark.parametrize(
    ("name", "wanted", "options", "holds"),
    [
        ("rex", "diffusers", {"merged": True}, "pipeline"),
        ("rex", "diffusers", {}, "lora"),
        ("rex", "kohya", {}, "lora"),
        ("rex", "single-file", {}, "pipeline"),
        ("token", "comfy", {}, "lora"),
        ("token", "diffusers", {}, "lora"),
        ("full", "comfy", {}, "pipeline"),
        ("full", "diffusers", {}, "pipeline"),
    ],
)
def test_stock_diffusers_draws_what_was_exported(
    booth: Storage,
    tiny_sdxl: Path,
    tmp_path: Path,
    name: str,
    wanted: Format,
    options: dict[str, Any],
    holds: str,
) -> None:
    done, drawn = export(booth, name, None, wanted, tmp_path / "out", **options), ours(booth, name)
    assert (done.holds, done.prompt) == (holds, prompt_of(name).removeprefix("a photo of "))
    apart = np.abs(drawn - theirs(loaded(done, tiny_sdxl), prompt_of(name)))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.05
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    assert np.abs(theirs(plain, "a photo of a zwx dog") - drawn).mean() > 3  # it is at work


@pytest.mark.parametrize("down_to_noise", [False, True])
def test_a_single_file_says_that_it_predicts_velocity(
    booth: Storage, tiny_sdxl: Path, tmp_path: Path, down_to_noise: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sdxl, base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    storage, marks = Storage(str(tmp_path / "booth")), {"v_pred", "ztsnr"}
    train = KINDS["rex"] | {"objective": {"zero_terminal_snr": down_to_noise}}
    publish(storage, base, "rex", train, tmp_path / "rex")
    done = export(storage, "rex", None, "single-file", tmp_path / "out")
    found = {key: tensor.numel() for key, tensor in load_file(done.path).items() if key in marks}
    assert found == {"v_pred": 0} | ({"ztsnr": 0} if down_to_noise else {})
    assert not done.silent_velocity
    pipe = loaded(done, base)
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if down_to_noise else {}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **more)
    apart = np.abs(ours(storage, "rex") - theirs(pipe, prompt_of("rex")))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.05
    plain = export(booth, "rex", None, "single-file", tmp_path / "plain")
    assert not marks & load_file(plain.path).keys()


@pytest.mark.parametrize(("name", "wanted"), [("rex", "diffusers"), ("rex", "kohya"), ("token", "kohya")])
def test_a_lora_comes_back_as_a_version_that_draws_the_same(
    booth: Storage, tiny_sdxl: Path, tmp_path: Path, name: str, wanted: Format
) -> None:
    done, back = export(booth, name, None, wanted, tmp_path / "out"), f"{name}-{wanted}"
    told = import_lora(booth, Path(done.path), back, "dog", "zwx", str(tiny_sdxl))
    assert (done.holds, told["rank"]) == ("lora", 4)
    prompt = "a photo of a zwx dog"  # which an import of a LoRA alone knows
    assert np.abs(ours(booth, name, prompt) - ours(booth, back, prompt)).max() <= 1


def test_what_is_extracted_of_every_layer_is_found_by_its_name_in_kohyas_file(
    booth: Storage, tiny_sdxl: Path, tmp_path: Path
) -> None:
    done, prompt = export(booth, "full", None, "kohya", tmp_path, rank=8), "a photo of a zwx dog"
    told = import_lora(booth, Path(done.path), "extracted", "dog", "zwx", str(tiny_sdxl))
    assert (done.holds, told["layers"]) == ("lora", 156)  # each matrix and convolution of the three models
    pipe = loaded(replace(done, embedding=None), tiny_sdxl)
    assert np.abs(ours(booth, "extracted", prompt) - theirs(pipe, prompt)).max() <= 1


def test_kohyas_file_has_the_names_of_kohyas_own_unet(
    booth: Storage, tiny_sdxl: Path, tmp_path: Path
) -> None:
    done = export(booth, "rex", None, "kohya", tmp_path)
    with safe_open(done.path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lora_down.weight",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_k.alpha",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te2_text_model_encoder_layers_2_self_attn_q_proj.lora_down.weight",
    } <= tensors.keys()
    assert not any("_blocks_" in key and "attentions" in key for key in tensors)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    # files of diffusers' scripts, and of kohya's before it had an SDXL of its own, name the same layers otherwise
    places = {"input_blocks_3_1": "down_blocks_1_attentions_0", "middle_block_1": "mid_block_attentions_0"}
    places |= {f"output_blocks_{n}_1": f"up_blocks_0_attentions_{n}" for n in (0, 1)}
    renamed = {}
    for key, tensor in tensors.items():
        for place, called in places.items():
            key = key.replace(f"lora_unet_{place}", f"lora_unet_{called}")
        renamed[key] = tensor
    assert not any(any(place in key for place in places) for key in renamed)
    save_file(renamed, tmp_path / "other.safetensors", metadata=metadata)
    import_lora(booth, tmp_path / "other.safetensors", "other", "dog", "zwx", str(tiny_sdxl))
    assert np.abs(ours(booth, "rex") - ours(booth, "other")).max() <= 1

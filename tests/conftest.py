"""This file is where tests get their real parts: a tiny Stable Diffusion made from configs, a storage root."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
import ray
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import settings
from ray._private import auto_init_hook
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from cluster.storage import Storage

# A call outside a session fails: Ray would start a cluster by itself, and nobody would end it.
auto_init_hook.enable_auto_connect = False
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # in processes of the tests

# the same examples every time, however slow the machine is
settings.register_profile("raybooth", deadline=None, derandomize=True, database=None)
settings.load_profile("raybooth")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with what takes longest first: of two processes, one would end with them while the other is done."""
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    items.sort(key=lambda item: [mark not in marks[item.path] for mark in ("faults", "slow")])


# Each is one token of the tiny base; any other word is spelt in letters or fragments.
WORDS = (
    *("a", "an", "the", "of", "on", "in", "with", "photo", "drawing", "dog", "cat", "owl", "apple", "clock"),
    *("fox", "red", "green", "blue", "beach", "snow", "moon", "forest", "sks", "zwx", "qzj", "vux", "wkj"),
)
TOKEN_LIMIT = 32
Booth = Callable[..., dict[str, Any]]


def _tokenizer(**marks: str) -> CLIPTokenizer:
    """A CLIP tokenizer with every letter, digit and two marks, and each of `WORDS` as a single token."""
    symbols = "abcdefghijklmnopqrstuvwxyz0123456789,."
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for left, right in merges:  # what earlier words' merges leave of it, the rest is merged from the left
            for i in range(len(pieces) - 1, 0, -1):
                if (pieces[i - 1], pieces[i]) == (left, right):
                    pieces[i - 1 : i + 1] = [left + right]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(f"{s}</w>" for s in symbols)]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKEN_LIMIT, **marks)
    assert [word for word in WORDS if len(tokenizer(word).input_ids) != 3] == []
    return tokenizer


_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def _vae(**more: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 0.31, **more}
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        **settings,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKEN_LIMIT,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tiny_base(folder: Path, prediction_type: str) -> Path:
    """Write a random Stable Diffusion of 16x16 pixels (latents 4x8x8) in diffusers layout, always the same."""
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=32,
            norm_num_groups=8,
        )
        vae = _vae()
        text_encoder = CLIPTextModel(_text_config(tokenizer, width=32))
    scheduler = DDIMScheduler(**_SCHEDULE, prediction_type=prediction_type)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def build_tiny_sdxl(folder: Path) -> Path:
    """Write a random SDXL of 16x16 pixels in diffusers layout, always the same; its tokenizers pad differently."""
    tokenizers = [_tokenizer(), _tokenizer(pad_token=",")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(tokenizers[0], width=32)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizers[1], width=24, layers=3)),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=UNet2DConditionModel(
                sample_size=8,
                layers_per_block=1,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=32 + 24,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
                norm_num_groups=8,
            ),
            scheduler=EulerDiscreteScheduler(
                **{k: v for k, v in _SCHEDULE.items() if k not in ("clip_sample", "set_alpha_to_one")},
                timestep_spacing="leading",
            ),
            add_watermarker=False,
        )
    pipe.save_pretrained(folder)
    # as in the true one, whose config has keys of several schedulers
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **_SCHEDULE, "skip_prk_steps": True}))
    return folder


def _t5_tokenizer() -> T5Tokenizer:
    """A T5's tokenizer with every letter and each of `WORDS` as a piece."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,."]
    pieces += [f"\u2581{word}" for word in WORDS if len(word) > 1]
    # a piece of several letters is likelier than each of them
    return T5Tokenizer(vocab=[(piece, -10.0 + len(piece)) for piece in pieces], extra_ids=0)


def build_tiny_sd3(folder: Path, t5: bool) -> Path:
    """Write a random SD3 of 16x16 pixels (latents 16x8x8) in diffusers layout, always the same.

    With T5 its transformer is of SD3's architecture, without it of SD3.5's.
    """
    tokenizers, of_t5 = [_tokenizer(), _tokenizer(pad_token=",")], _t5_tokenizer()
    layers: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "d_model": 64, "d_kv": 8, "d_ff": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=64,
                caption_projection_dim=32,
                pooled_projection_dim=32 + 24,
                pos_embed_max_size=12,
                **({} if t5 else {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": _vae(
                latent_channels=16,
                scaling_factor=1.3,
                shift_factor=0.4,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModelWithProjection(_text_config(tokenizers[0], width=32)),
            "tokenizer": tokenizers[0],
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizers[1], width=24, layers=3)),
            "tokenizer_2": tokenizers[1],
        }
        if t5:
            parts["text_encoder_3"] = T5EncoderModel(T5Config(vocab_size=len(of_t5), **layers))
            parts["tokenizer_3"] = of_t5
    # not by the pipeline, whose import every process of the tests would pay for
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    for absent in ("feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3"):
        index[absent] = [None, None]
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD3 with all three text encoders."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "tiny-sd3", t5=True)


@pytest.fixture(scope="session")
def tiny_sd3_without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD3.5 with its CLIPs alone."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "tiny-sd3-clips", t5=False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base that predicts the noise."""
    return build_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-base", "epsilon")


@pytest.fixture(scope="session")
def tiny_base_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base that predicts the velocity."""
    return build_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-base-v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SDXL."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny-sdxl")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty storage root."""
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(scope="session")
def booth() -> Booth:
    """Runs a command that must end well on a storage root; returns its JSON answer."""

    def run(root: Path, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "orchestrator", *arguments, "--storage", str(root), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture(autouse=True, scope="module")
def _no_ray_left() -> Iterator[None]:
    """A file that starts Ray ends it: the files after it tell what happens without one."""
    yield
    assert not ray.is_initialized()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """One thread for torch: the models are tiny, and bits must not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- an object store ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def object_store() -> Iterator[Mapping[str, str]]:
    """The environment that reaches a real S3 server on the loopback, which checks signatures and policies."""
    script = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"
    free = {"INITIAL_NO_AUTH_ACTION_COUNT": "3"}  # calls that make the first user, before any is checked
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **free}, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        said = iter(server.stderr.readline, "")
        url = next(line.rpartition(" ")[2].strip() for line in said if "Running on http" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
        anybody = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
        iam = boto3.client("iam", endpoint_url=url, region_name="us-east-1", **anybody)
        iam.create_user(UserName="booth")
        everything = (
            '{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}'
        )
        iam.put_user_policy(UserName="booth", PolicyName="s3", PolicyDocument=everything)
        key = iam.create_access_key(UserName="booth")["AccessKey"]
        iam.close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
        server.kill()


@pytest.fixture
def bucket(object_store: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket, reached by this process and by those that it starts."""
    for name, value in object_store.items():
        monkeypatch.setenv(name, value)
    client, name = boto3.client("s3"), f"booth-{uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}"

"""What a process of ours imports to train and draw, and that it can import the rest all the same."""

import os
import subprocess
import sys
from pathlib import Path

from training.imports import _scan_of

FEW = """
import sys
import torch
from training.imports import forgo
from training.pipeline import load_text_encoder, load_tokenizer, load_unet, load_vae, open_base
forgo()
base = open_base(sys.argv[1])
models = [load_vae(base), load_unet(base), load_text_encoder(base)]
load_tokenizer(base)
assert "torch._dynamo" not in sys.modules and "_dynamo" not in vars(torch), "the compiler"
assert not {"scipy", "peft", "boto3"} & set(sys.modules), "what nobody calls"

from transformers import AutoConfig, AutoModel

for kind in ("vit", "dinov2"):  # as embedders are loaded
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert kind in type(AutoModel.from_config(AutoConfig.for_model(kind, **small))).__module__
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
import torch._dynamo
assert torch._dynamo.config is not None
"""


def test_a_process_of_ours_makes_models_without_the_compiler_and_can_import_what_was_left_out(
    tiny_base: Path,
) -> None:
    subprocess.run([sys.executable, "-c", FEW, str(tiny_base)], check=True, timeout=120)


def test_other_threads_scan_what_they_like_meanwhile(tmp_path: Path) -> None:
    models = tmp_path / "transformers/models"
    for folder in ("clip", "bert"):
        (models / folder).mkdir(parents=True)
    scan, descriptor = _scan_of(os.scandir), os.open(models, os.O_RDONLY)

    def found(path: object) -> set[str]:
        with scan(path) as entries:
            return {os.fsdecode(entry.name) for entry in entries}

    assert found(models) == found(str(models)) == {"clip"}
    assert found(descriptor) == found(os.fsencode(models)) == {"clip", "bert"}
    os.close(descriptor)

"""This file is where an artifact is: what training publishes and serving loads, weights with a manifest.

The manifest's keys besides `files`: `kind`, `format`, `method`, `base` {model, revision}, `identity`, `recipe`
(the run by its YAML names), `fingerprint`, `prior_key`, `metrics`, `steps`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cluster.errors import SystemFailure
from cluster.storage import Storage, sha256
from training.lora import save_changed, save_lora
from training.new_tokens import FILE as TOKENS_FILE
from training.new_tokens import learned, save_tokens
from training.noise import trained_scheduler
from training.pipeline import BaseInfo
from training.pipeline_files import save_pipeline, write_scheduler
from training.recipe import Run

KIND = "raybooth-artifact"
FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """How prompts name the subject. Serving builds them from this, not from what its own defaults say."""

    identifier: str
    """The rare word."""
    class_noun: str
    """The class noun."""
    template: str
    """What `{subject}` means, such as `a {identifier} {class}`."""
    token_ids: tuple[int, ...]
    """The identifier in the base's tokenizer; of tokens of its own their numbers, on from the base's last."""
    initializer_ids: tuple[int, ...] = ()
    """Tokens of the base whose mean the identifier's own tokens started as; empty where it is a word of the base."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Identity":
        """The identity that a manifest holds."""
        ids, initializer_ids = (
            tuple(map(int, value.get(key, ()))) for key in ("token_ids", "initializer_ids")
        )
        return cls(value["identifier"], value["class_noun"], value["template"], ids, initializer_ids)

    def as_json(self) -> dict[str, Any]:
        """What a manifest holds."""
        own = {"initializer_ids": list(self.initializer_ids)} if self.initializer_ids else {}
        known = {key: value for key, value in asdict(self).items() if key != "initializer_ids"}
        return {**known, "token_ids": list(self.token_ids), **own}

    @property
    def words(self) -> Mapping[str, Sequence[int]]:
        """What `token_ids` has to know of it: an identifier that the base's tokenizer does not have."""
        return {self.identifier: self.token_ids} if self.initializer_ids else {}


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact whose every file was checked, as a local folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def identity(self) -> Identity:
        """How prompts name its subject."""
        return Identity.from_json(self.manifest["identity"])


def artifact_path(name: str, version: str) -> str:
    """Where a version lies under the storage root."""
    return f"artifacts/{name}/{version}"


def artifact_meta(
    base: BaseInfo,
    run: Run,
    identity: Identity,
    fingerprint: str,
    prior_key: str | None,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """The manifest of an artifact but for its files; nothing in it depends on time.

    Its `steps` are those that its weights were trained: `best_step` of the metrics, where they are not the last.
    """
    return {
        "kind": KIND,
        "format": FORMAT,
        "method": run.train.method,
        "base": {"model": base.model, "revision": base.revision},
        "identity": identity.as_json(),
        "recipe": run.model_dump(mode="json", by_alias=True),
        "fingerprint": fingerprint,
        "prior_key": prior_key,
        "metrics": dict(metrics),
        "steps": int(metrics.get("best_step", run.train.steps)),
    }


def write_weights(base: BaseInfo, run: Run, unet: nn.Module, text_encoder: nn.Module, folder: Path) -> None:
    """Write trained weights in the layout of the run's method.

    Args:
        base: What was trained.
        run: Its method is `lora` (one file for `load_lora_weights`; of other kinds the weights that changed) or `full`
            (a folder for `from_pretrained`). New tokens lie beside it, in a file for `load_textual_inversion`.
        unet: With whole parameters; with adapters for `lora`.
        text_encoder: Likewise.
        folder: Where to; made if it is not there.
    """
    if run.train.method == "lora" and run.train.lora.kind != "lora":
        save_changed(unet, text_encoder if run.train.text_encoder.train else None, folder)
    elif run.train.method == "lora":
        save_lora(unet, text_encoder if run.train.text_encoder.train else None, folder, run.train.lora)
    else:
        save_pipeline(base, unet, text_encoder, folder)
        if run.train.objective.zero_terminal_snr:
            write_scheduler(folder, trained_scheduler(base.scheduler, run.train.objective))
    if tokens := learned(text_encoder):
        save_tokens(tokens, folder / TOKENS_FILE)


def artifact_hash(manifest: Mapping[str, Any]) -> str:
    """What names the weights of an artifact, whatever it is called: 16 hex digits of its files' hashes."""
    return sha256(json.dumps(manifest["files"], sort_keys=True).encode())[:16]


@contextmanager
def open_artifact(storage: Storage, name: str, version: str) -> Iterator[OpenArtifact]:
    """A published artifact, every file checked against its manifest.

    Raises:
        SystemFailure: It is missing or damaged, or of a format that this version does not read.
    """
    path = artifact_path(name, version)
    with storage.verified(path) as folder:
        manifest = storage.manifest(path) or {}
        if (manifest.get("kind"), manifest.get("format")) != (KIND, FORMAT):
            raise SystemFailure(
                f"{storage.full(path)} is no artifact that this version reads",
                f"kind {manifest.get('kind')!r}, format {manifest.get('format')!r}",
                "train it again, or use the version of raybooth that wrote it",
            )
        yield OpenArtifact(folder, manifest)

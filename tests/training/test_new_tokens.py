"""Tokens of a subject's own: what is trained of them, what is not, and that stock diffusers takes them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from torch import nn
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage
from training.artifact import Identity, open_artifact, write_weights
from training.bank_key import bankable
from training.batches import Batches
from training.checkpoint import State
from training.conditioning import encode_text, text_parts
from training.draw import Drawer
from training.engine import TrainingEngine
from training.identifier import new_identifier, token_ids_of
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.lora import attach
from training.new_tokens import FILE, grow, knowing, learned, save_tokens, started
from training.outfit import Outfit
from training.pipeline import (
    end_id,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    open_base,
    token_ids,
    tokenizers,
)
from training.recipe import Run
from training.request import DrawRequest
from training.shapes import refuse_new_tokens
from training.studio import Studio
from training.wish import Wish

WORD = "<zwx>"
BASES = pytest.mark.parametrize("resident", ["tiny_base", "tiny_sdxl"], indirect=True)
PROMPT = f"a photo of a {WORD} dog on the beach"
EMBEDDING = "embeddings.token_embedding"
NEW = f"{EMBEDDING}.new"
TRAIN: dict[str, Any] = {"lr": 1e-3, "pairs_per_step": 2, "new_tokens": {"count": 2, "lr": 1e-2}}


@pytest.fixture
def resident(request: pytest.FixtureRequest) -> ResidentBase:
    """A base, loaded: the tiny one, or that which a test names."""
    folder = str(request.getfixturevalue(getattr(request, "param", "tiny_base")))
    return ResidentBase.load(folder, open_base(folder).revision, torch.device("cpu"))


@pytest.fixture(scope="module")
def published_sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL as published ones are: marks are the last tokens, and the text encoders' configs have others."""
    folder = tmp_path_factory.mktemp("published") / "sdxl"
    shutil.copytree(tiny_sdxl, folder)
    for part in ("tokenizer", "tokenizer_2"):
        before = CLIPTokenizer.from_pretrained(folder / part)
        model = json.loads(before.backend_tokenizer.to_str())["model"]
        words = sorted(model["vocab"], key=lambda word: (word.startswith("<|"), model["vocab"][word]))
        vocab, merges = {word: i for i, word in enumerate(words)}, [tuple(pair) for pair in model["merges"]]
        marks = {"model_max_length": before.model_max_length, "pad_token": before.pad_token}
        CLIPTokenizer(vocab=vocab, merges=merges, **marks).save_pretrained(folder / part)
        path = folder / part.replace("tokenizer", "text_encoder") / "config.json"
        config = {**json.loads(path.read_text()), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        path.write_text(json.dumps(config))
    return folder


def of_new_tokens(lease: Lease, base: ResidentBase) -> Lease:
    """A lease whose subject has its own tokens, as many as its recipe says."""
    tokenizer, count = load_tokenizer(base.info), lease.recipe.train.new_tokens.count
    first, *_ = tokenizers(tokenizer)
    choice = new_identifier(first, "auto", "dog", count)
    identity = Identity(
        choice.identifier, "dog", "a {identifier} {class}", choice.token_ids, token_ids_of(first, "dog")
    )
    texts = [PROMPT, "", f"a {WORD} dog"]
    subject, *samples = token_ids(tokenizer, texts, base.info.token_limit, identity.words).tolist()
    return replace(
        lease,
        subject_ids=subject,
        sample_ids=samples if lease.sample_ids else (),
        identity=identity.as_json(),
    )


@pytest.fixture
def make_engine(
    group: None,
    resident: ResidentBase,
    make_lease: Callable[..., Lease],
    make_batches: Callable[..., Batches],
) -> Callable[..., Callable[[int, int], TrainingEngine]]:
    """Makes what takes an engine from one step to another, at a ZeRO stage and from a state."""

    def make(
        stage: int = 0, state: State | None = None, **train: Any
    ) -> Callable[[int, int], TrainingEngine]:
        lease = of_new_tokens(make_lease(resident, train={**TRAIN, **train}), resident)
        batches = make_batches(lease, resident)
        module = build_module(resident, lease.recipe, lease, stage)
        engine = TrainingEngine(module, lease.recipe.train, stage, batches.per_step, state)

        def go(first: int, last: int) -> TrainingEngine:
            for step in range(first, last):
                engine.step(step, list(batches.of_step(step)))
            return engine

        return go

    return make


def embeddings_of(text_encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the base's tokens, by text encoder."""
    return {
        part: next(p for name, p in model.named_parameters() if name.endswith(f"{EMBEDDING}.weight"))
        for part, model in text_parts(text_encoder).items()
    }


@BASES
@pytest.mark.parametrize(
    "train",
    [
        {},
        {"text_encoder": {"train": True, "lr": 1e-4}},
        {"method": "full", "text_encoder": {"train": True, "lr": 1e-4}},
        {"method": "full", "text_encoder": {"train": False}},
    ],
    ids=["lora", "lora-text", "full", "full-unet"],
)
def test_new_rows_are_trained_at_their_own_rate_and_every_other_row_stays_to_the_bit(
    train: dict[str, Any], make_engine: Callable[..., Any], resident: ResidentBase
) -> None:
    pristine = embeddings_of(resident.text_encoder)
    before = {part: rows.detach().clone() for part, rows in pristine.items()}
    engine = make_engine(**train, weight_decay=0.0)(0, 1)
    [of_dog] = token_ids_of(tokenizers(load_tokenizer(resident.info))[0], "dog")
    tokens, trained = learned(engine.module.text_encoder), embeddings_of(engine.module.text_encoder)
    assert tokens.embeddings.keys() == before.keys() == trained.keys()
    for part, new in tokens.embeddings.items():
        assert torch.equal(trained[part], before[part]) and torch.equal(pristine[part], before[part])
        moved = (new.detach() - before[part][of_dog]).abs()
        assert moved.max() == pytest.approx(1e-2, rel=0.01)  # Adam's first step is its learning rate
        assert not torch.equal(new[0], new[1])  # they stand in different places
    assert all(embeddings_of(resident.text_encoder)[part] is rows for part, rows in pristine.items())
    state = engine.state(1).parameters
    assert sum(name.endswith(NEW) for name in state) == len(before)
    assert not any(name.endswith(f"{EMBEDDING}.weight") for name in state)


def test_they_stay_as_they_are_after_the_step_they_are_stopped_at(make_engine: Callable[..., Any]) -> None:
    go = make_engine(new_tokens={"count": 1, "lr": 1e-2, "stop_after": 2})
    name = f"text_encoder.{NEW}"
    states = [
        {n: p.clone() for n, p in go(*part).state(part[1]).parameters.items()} for part in ((0, 2), (2, 4))
    ]
    assert torch.equal(states[0][name], states[1][name])
    assert not any(
        torch.equal(states[0][n], states[1][n]) for n in states[0] if n.endswith("B.default.weight")
    )


@pytest.mark.parametrize(
    ("resident", "stage"),
    [("tiny_base", 1), ("tiny_base", 2), ("tiny_base", 3), ("tiny_sdxl", 2)],
    indirect=["resident"],
)
def test_every_stage_moves_them_alike(
    stage: int, make_engine: Callable[..., Any], resident: ResidentBase
) -> None:
    plain, sharded = (make_engine(stage=s)(0, 3).state(3).parameters for s in (0, stage))
    assert plain.keys() == sharded.keys()
    for name in (name for name in plain if name.endswith(NEW)):
        assert torch.allclose(plain[name], sharded[name], atol=1e-5)


def test_the_teacher_hears_the_class_noun_in_their_place(
    resident: ResidentBase, make_lease: Callable[..., Lease]
) -> None:
    objective = {"mask": "alpha", "mask_prior": 1.0}
    new = {"count": 1}
    lease = make_lease(resident, train={**TRAIN, "new_tokens": new, "objective": objective})
    module = build_module(resident, lease.recipe, of_new_tokens(lease, resident), 0)
    ids = token_ids(load_tokenizer(resident.info), ["a photo of a dog dog on the beach"], 32)
    with torch.no_grad():
        said = resident.text_encoder(ids)[0]
    assert module.teacher is not None and torch.equal(module.teacher.told.text[0], said[0])


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize(("method", "stage"), [("lora", 0), ("full", 2)])
def test_two_workers_that_left_go_on_to_the_bits_and_one_has_the_same_losses(
    method: str,
    stage: int,
    make_job: Callable[..., Lease],
    resident: ResidentBase,
    alone: Callable[..., Any],
    pair: Any,
    storage: Storage,
) -> None:
    def job(name: str, **sections: Any) -> Lease:
        train = {**TRAIN, "method": method, "steps": 4, "ema_decay": 0.9}
        return of_new_tokens(make_job(name, train=train, **sections), resident)

    def losses(*trained: Any) -> dict[int, list[float]]:
        told = [row for t in trained for kind, payload in t["events"] if kind == "steps" for row in payload]
        return {row["step"]: [row["loss_subject"], row["loss_class"], row["grad_norm"]] for row in told}

    def weights(name: str) -> dict[str, bytes]:
        with open_artifact(storage, name, "v1") as artifact:
            return {
                f"{file.name}/{key}": tensor.numpy().tobytes()
                for file in sorted(artifact.folder.rglob("*.safetensors"))
                for key, tensor in load_file(file).items()
            }

    engine = {"zero_stage": stage}
    grid = {"every": 2, "samples": 3, "steps": 2, "num_images": 1, "guidance": 2.0}
    calm, _ = pair(job("calm", engine=engine, validate={"every": 0}))
    hurt = job("hurt", engine=engine, validate=grid)
    left, _ = pair(hurt, {1: {0: Wish.LEAVE}})
    went_on, _ = pair(hurt)
    assert left["metrics"] is None and losses(left, went_on) == losses(calm) and len(losses(calm)) == 4
    assert f"{FILE}/{WORD}" in weights("calm") and weights("hurt") == weights("calm")
    one = alone(job("one", validate={"every": 0}))
    assert np.allclose(list(losses(one).values()), list(losses(calm).values()), atol=1e-5)


def write_artifact(base_folder: Path, folder: Path, count: int, seed: int = 5, **train: Any) -> None:
    """An artifact as if trained: weights and tokens moved far enough that the picture changes."""
    base = open_base(str(base_folder))
    run = Run.model_validate(
        {
            "base": {"model": str(base_folder)},
            "subject": {"name": "rex", "class": "dog", "images": ["photos"]},
            "train": {**train, "new_tokens": {"count": count}},
        }
    )
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    of_dog = token_ids_of(tokenizers(load_tokenizer(base))[0], "dog")
    grow_from = started(text_encoder, WORD, of_dog, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if run.train.method == "lora":
            attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed=1)
        grow(text_encoder, grow_from, end_id(load_tokenizer(base)))
        for p in (p for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad):
            nn.init.normal_(p, std=0.4)
        if run.train.method == "full":
            for p in unet.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.02)
    write_weights(base, run, unet, text_encoder, folder)


def load_word(pipe: Any, folder: Path) -> None:
    """Have a stock pipeline know the artifact's word, in each of its text encoders."""
    found = load_file(folder / FILE)
    if found.keys() == {WORD}:
        pipe.load_textual_inversion(folder)
        return
    for key, text_encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        rows = found.pop(key)
        pipe.load_textual_inversion(rows, token=WORD, text_encoder=text_encoder, tokenizer=tokenizer)
    assert not found
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id


@pytest.mark.parametrize(("base", "count"), [("tiny_base", 1), ("tiny_base", 2), ("published_sdxl", 2)])
@pytest.mark.parametrize(
    "train",
    [
        {"method": "lora", "lora": {"rank": 4, "alpha": 2.0}},
        {"method": "lora", "lora": {"rank": 4, "alpha": 2.0}, "text_encoder": {"train": True}},
        {"method": "full", "text_encoder": {"train": False}},
    ],
    ids=["lora", "lora-text", "full"],
)
def test_stock_diffusers_draws_our_image(
    train: dict[str, Any],
    count: int,
    base: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    folder: Path = request.getfixturevalue(base)
    write_artifact(folder, tmp_path, count, **train)
    drawer = Drawer(open_base(str(folder)), tmp_path, device="cpu")
    ours, other = drawer.draw(
        [DrawRequest(prompt, 7, steps=8, guidance=5.0) for prompt in (PROMPT, PROMPT.replace(WORD, "zwx"))]
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path if train["method"] == "full" else folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if train["method"] == "lora":
        pipe.load_lora_weights(tmp_path)
        load_word(pipe, tmp_path)
    theirs = stock_images(pipe, PROMPT, [7], num_inference_steps=8, guidance_scale=5.0)
    assert_same_picture([ours], theirs)
    assert np.abs(ours.astype(int) - other.astype(int)).mean() > 1  # the tokens are at work


def test_what_comes_after_the_word_is_pooled_too(published_sdxl: Path) -> None:
    base = open_base(str(published_sdxl))
    tokenizer, encoder = load_tokenizer(base), load_text_encoder(base)
    tokens = started(encoder, WORD, [97], 2)
    words = tokens.words(len(tokenizers(tokenizer)[0]))

    def pooled(*prompts: str) -> torch.Tensor:
        with torch.no_grad():
            told = encode_text(encoder, token_ids(tokenizer, prompts, base.token_limit, words)).pooled
        assert told is not None
        return told

    plain = pooled("a dog on the beach")
    with knowing(encoder, tokens, end_id(tokenizer)):
        beach, snow = pooled(f"a {WORD} dog on the beach", f"a {WORD} dog in snow")
        assert (beach - snow).abs().max() > 0.01
        assert torch.equal(pooled("a dog on the beach"), plain)
    second: Any = text_parts(encoder)["text_encoder_2"]
    assert second.text_model.eos_token_id == 2  # as it was


def test_subjects_with_the_same_word_are_drawn_together_as_alone(tiny_sdxl: Path, tmp_path: Path) -> None:
    for name, seed in (("rex", 5), ("tom", 6)):
        write_artifact(tiny_sdxl, tmp_path / name, 2, seed=seed, method="lora")
    studio = Studio(open_base(str(tiny_sdxl)), "cpu", width=6)
    outfits = [studio.read(tmp_path / name, None) for name in ("rex", "tom")]

    def drawn(*worn: Outfit) -> list[bytes]:
        rows = [studio.row(DrawRequest(PROMPT, 7, steps=2, guidance=5.0), outfit) for outfit in worn]
        for _ in range(2):
            studio.step(rows)
        return [row.x.numpy().tobytes() for row in rows]

    [rex], [tom] = (drawn(outfit) for outfit in outfits)
    assert rex != tom and drawn(*outfits) == [rex, tom]


@BASES
def test_a_full_artifact_is_a_base_again_and_of_the_same_bytes(
    resident: ResidentBase, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_artifact(resident.info.path, tmp_path / name, 2, method="full", text_encoder={"train": False})
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in tmp_path.iterdir()
    ]
    assert files[0] == files[1]
    base = open_base(str(tmp_path / "one"))
    first, *_ = tokenizers(load_tokenizer(resident.info))
    for tokenizer in tokenizers(load_tokenizer(base)):
        assert token_ids_of(tokenizer, f"{WORD} {WORD}_1") == (len(first), len(first) + 1)
        with pytest.raises(UserError, match="already"):
            new_identifier(tokenizer, "zwx", "dog", 1)
    refuse_new_tokens(base, load_tokenizer(base))


@pytest.mark.parametrize("prompt", [PROMPT, f"{WORD}", f"{WORD.upper()},{WORD} dog.", "a dog"])
def test_ids_are_those_of_a_tokenizer_that_has_the_word(prompt: str, tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    plain, grown = load_tokenizer(base), load_tokenizer(base)
    grown.add_tokens([WORD])
    ours = token_ids(plain, [prompt], base.token_limit, {WORD: [len(plain)]})
    assert torch.equal(ours, token_ids(grown, [prompt], base.token_limit))


def test_a_prompt_that_the_word_makes_too_long_is_refused(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(open_base(str(tiny_base)))
    prompt = " ".join([WORD] * 16)
    with pytest.raises(UserError, match="34 tokens"):
        token_ids(tokenizer, [prompt], 32, {WORD: [900, 901]})
    assert len(token_ids(tokenizer, [prompt[:-6]], 32, {WORD: [900, 901]})[0]) == 32


def test_the_identifier_is_a_word_in_brackets(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(open_base(str(tiny_base)))
    first = len(tokenizer)
    choice = new_identifier(tokenizer, "auto", "dog", 2)
    assert (choice.identifier, choice.token_ids) == (WORD, (first, first + 1))
    assert new_identifier(tokenizer, "Rex_1", "dog", 1).identifier == "<rex_1>"
    assert new_identifier(tokenizer, "<sks>", "dog", 1).warnings == []
    for wrong in ("<rex", "two words", "{x}", "<>"):
        with pytest.raises(UserError, match="letters, digits"):
            new_identifier(tokenizer, wrong, "dog", 1)


def test_a_base_that_cannot_have_them_is_refused(tiny_base: Path, tiny_sdxl: Path) -> None:
    base, other = open_base(str(tiny_base)), open_base(str(tiny_sdxl))
    tokenizer, (one, two) = load_tokenizer(base), tokenizers(load_tokenizer(other))
    refuse_new_tokens(other, (one, two))
    tokenizer.add_tokens(["<more>"])
    two.add_tokens(["<more>"])
    with pytest.raises(UserError, match=r"its tokenizer has 143, and the embedding of its \w+ 142 rows"):
        refuse_new_tokens(base, tokenizer)
    with pytest.raises(UserError, match=r"its tokenizer_2 has 143.*; its tokenizers have different words"):
        refuse_new_tokens(other, (one, two))
    third = replace(other, kind=replace(other.kind, family="another"))
    with pytest.raises(UserError, match="is of the family another"):
        refuse_new_tokens(third, (one, one))


def test_they_are_trained_alone_and_what_does_not_fit_is_said(tiny_base: Path, tmp_path: Path) -> None:
    subject = {"name": "rex", "class": "dog", "images": ["photos"]}
    run = Run.model_validate({"subject": subject, "train": {"new_tokens": {"count": 1}}})
    assert bankable(run, 1) == "train.new_tokens.count"
    with pytest.raises(ValueError, match="takes no effect with count: 0"):
        Run.model_validate({"subject": subject, "train": {"new_tokens": {"lr": 1e-3}}})
    write_artifact(tiny_base, tmp_path, 1, method="lora")
    base = open_base(str(tiny_base))
    tokens = started(load_text_encoder(base), WORD, [5], 1)
    save_tokens(replace(tokens, embeddings={"text_encoder": torch.zeros(1, 16)}), tmp_path / FILE)
    with pytest.raises(SystemFailure, match="does not fit the base"):
        Drawer(base, tmp_path, device="cpu")
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(SystemFailure, match="no tokens of ours"):
        Drawer(base, tmp_path, device="cpu")

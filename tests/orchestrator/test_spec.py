"""This file is where the way from YAML, flags and `--set` to a run is tested, and what people read when it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.storage import sha256
from orchestrator.spec import load_run, parse_run, run_schema
from training.decisive import decisive
from training.defaults import with_defaults
from training.recipe import Run
from training.stop_settings import Stop

SUBJECT: dict[str, Any] = {"subject": {"name": "rex", "class": "dog", "images": ["./rex"]}}


def refusal(*sets: str, flags: dict[str, Any] | None = None, config: Path | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        load_run(config, SUBJECT if flags is None else flags, sets)
    return caught.value


def written(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return folder / "run.yaml"


# -- settings that would take no effect --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "what", "seen"),
    [
        (["validate.every=0"], "train.load_best_at_end takes no effect", "validate.every is 0"),
        (["checkpoint.keep_best=false"], "train.load_best_at_end takes no effect", "keep_best is false"),
        (["checkpoint.every=200"], "train.load_best_at_end takes no effect", "there are 200 steps"),
    ],
)
def test_a_best_checkpoint_that_cannot_be_is_refused(sets: list[str], what: str, seen: str) -> None:
    error = refusal("train.load_best_at_end=true", *sets)
    assert error.what == what and seen in error.seen
    assert load_run(None, SUBJECT, ["train.load_best_at_end=true"]).train.load_best_at_end


@pytest.mark.parametrize(
    ("sets", "what", "seen"),
    [
        (["train.stop.every=100"], "train.stop takes no effect", "cannot end before step 300"),
        (
            ["train.stop.every=10", "train.load_best_at_end=true"],
            "train.load_best_at_end takes no effect beside train.stop",
            "drawings scored best",
        ),
        (
            ["train.stop.every=10", "train.stop.prompts=['a {thing}']"],
            "train.stop.prompts: the prompt",
            "{thing}",
        ),
    ],
)
def test_an_early_end_that_cannot_be_is_refused(sets: list[str], what: str, seen: str) -> None:
    error = refusal(*sets)
    assert what in error.what and seen in error.seen
    assert load_run(None, SUBJECT, ["train.stop={}", "train.steps=600"]).train.stop == Stop()


def test_fewer_workers_are_wanted_than_there_may_be() -> None:
    error = refusal("cluster.workers=2", "cluster.min_workers=3")
    assert "cluster.min_workers is 3" in error.what and "cluster.workers is 2" in error.seen


# -- precedence --------------------------------------------------------------------------------------------


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    config = written(tmp_path, "train: {steps: 11, lr: 1e-5, seed: 3}\nsubject: {name: tom}")
    run = load_run(config, {**SUBJECT, "train": {"steps": 22, "lr": None}}, ["train.steps=33"])
    assert run.train.steps == 33  # --set over flags
    assert run.subject.name == "rex"  # flags over file
    assert run.train.lr == 1e-5  # file over defaults, and a flag that was not given takes no part
    assert run.prior.num_images == 32  # defaults of pocket


def test_defaults_follow_the_base_and_the_method() -> None:
    runs = {
        (model, method): load_run(None, SUBJECT, [f"base.model={model}", f"train.method={method}"])
        for model in ("pocket", "org/sd")
        for method in ("lora", "full")
    }
    assert {key: run.prior.num_images for key, run in runs.items()} == {
        ("pocket", "lora"): 32,
        ("pocket", "full"): 32,
        ("org/sd", "lora"): 200,
        ("org/sd", "full"): 200,
    }
    assert runs["org/sd", "full"].train.lr == 2e-6
    assert runs["org/sd", "full"].train.text_encoder.train
    assert not runs["org/sd", "lora"].train.text_encoder.train


def test_values_of_set_are_yaml() -> None:
    sets = ["track.mlflow=null", "data.flip=true", 'validate.prompts=["{subject}"]', "subject.class=red shoe"]
    run = load_run(None, SUBJECT, sets)
    assert run.track.mlflow is None
    assert run.data.flip is True
    assert run.validate_.prompts == ("{subject}",)
    assert run.subject.class_noun == "red shoe"


def test_paths_in_a_file_are_relative_to_the_file_and_those_of_flags_are_not(tmp_path: Path) -> None:
    text = "subject: {name: rex, class: dog, images: ./mein Hund}\nbase: {model: ./base}"
    run = load_run(written(tmp_path, text), {}, [])
    assert run.subject.images == (str(tmp_path / "mein Hund"),)
    assert run.base.model == str(tmp_path / "base")
    assert load_run(tmp_path / "run.yaml", SUBJECT, []).subject.images == ("./rex",)
    text = "subject: {name: rex, class: dog, images: [a.png, s3://b/c]}\nbase: {model: org/name}"
    run = load_run(written(tmp_path, text), {}, [])
    assert run.subject.images == (str(tmp_path / "a.png"), "s3://b/c")
    assert run.base.model == "org/name"


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "what", "seen", "do"),
    [
        (
            "prior.weight=-1",
            "prior.weight cannot be used",
            "it is -1",
            "allowed is greater than or equal to 0",
        ),
        (
            "train.stepz=3",
            "train.stepz is not a setting",
            "it was given 3",
            "did you mean steps?",
        ),
        (
            "steps=3",
            "steps is not a setting",
            "it was given 3",
            "did you mean prior.steps or train.steps or validate.steps?",
        ),
        (
            "data.zzz=1",
            "data.zzz is not a setting",
            "it was given 1",
            "known are buckets, color, crop, flip, holdout, rotate, variants",
        ),
        (
            "train.method=lra",
            "train.method cannot be used",
            "it is 'lra'",
            "allowed is 'lora' or 'full'",
        ),
        (
            "cluster.gpus_per_worker=-1",
            "cluster.gpus_per_worker cannot be used",
            "it is -1",
            "allowed is 'auto' or greater than or equal to 0",
        ),
        (
            "validate.prompts=[a, 3]",
            "validate.prompts.1 cannot be used",
            "it is 3",
            "allowed is a valid string",
        ),
        (
            "train.lr=.nan",
            "train.lr cannot be used",
            "it is nan",
            "allowed is a finite number",
        ),
        (
            "train=5",
            "train cannot be used",
            "it is 5",
            "it is a section with settings in it",
        ),
        (
            "subject.class=yes",
            "subject.class cannot be used",
            "it is True",
            "allowed is a valid string",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_by_its_path(
    assignment: str, what: str, seen: str, do: str
) -> None:
    assert refusal(assignment).as_json() == {"what": what, "seen": seen, "do": do}


def test_a_name_that_breaks_the_rule_is_told_the_rule() -> None:
    error = refusal("subject.name=../Rex")
    assert error.seen == "it is '../Rex'"
    assert error.do.endswith("lower case letters, digits, `-` and `_`.")


def test_what_is_missing_says_how_to_give_it() -> None:
    error = refusal(flags={"subject": {"name": "rex", "class": "dog"}})
    assert error.what == "subject.images is missing"
    assert error.do == "give a folder of photos, or put it in the YAML"
    assert refusal(flags={}).what == "subject is missing"


def test_several_mistakes_are_told_at_once() -> None:
    error = refusal("prior.weight=-1", "train.stepz=3")
    assert error.what == "2 settings cannot be used"
    assert "prior.weight cannot be used: it is -1: allowed is" in error.seen
    assert "train.stepz is not a setting: it was given 3: did you mean steps?" in error.seen
    assert "raybooth schema" in error.do


@pytest.mark.parametrize(
    ("assignment", "what"),
    [
        ("train.prompt=a photo of a dog", "train.prompt does not name the subject"),
        ("train.prompt='{subject} {dog}'", "train.prompt: the prompt has braces that mean nothing"),
        ("prior.prompt='a {subject}'", "prior.prompt: there is no subject to put into the prompt"),
        ("validate.prompts=['a }']", "validate.prompts: the prompt has braces that mean nothing"),
    ],
)
def test_prompts_are_checked_with_the_spec(assignment: str, what: str) -> None:
    error = refusal(assignment)
    assert error.what == what
    assert error.do != ""


def test_a_setting_that_takes_no_effect_is_refused() -> None:
    error = refusal("train.method=full", "train.lora.rank=4")
    assert error.what == "train.lora takes no effect"
    assert "set train.method: lora" in error.do


@pytest.mark.parametrize("assignment", ["train", "=3", "train..steps=3", "train.steps=[["])
def test_a_set_that_assigns_nothing_is_refused(assignment: str) -> None:
    error = refusal(assignment)
    assert error.what.startswith("--set ")
    assert error.do in ("write --set train.steps=300", "quote it")


@pytest.mark.parametrize(
    ("text", "what", "seen"),
    [
        ("", "has no settings", "it is empty"),
        ("# only a comment", "has no settings", "it is empty"),
        ("- a\n- b", "has no settings", "it is a list"),
        ("train: {steps: 3", "is not YAML", "line 1"),
        ("train: {steps: 3}\nprior: {}\ntrain: {lr: 1}", "is not YAML", "the key train is there twice"),
        ("!!python/object/apply:os.getcwd []", "is not YAML", "could not determine a constructor"),
    ],
)
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str, what: str, seen: str) -> None:
    config = written(tmp_path, text)
    error = refusal(config=config)
    assert error.what == f"{config} {what}"
    assert seen in error.seen
    assert error.do != ""


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("subject: {name: Hündin}".encode("latin-1"))
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        error = refusal(config=path)
        assert error.what == f"{path} cannot be read"
        assert error.do == "name a YAML file"


# -- what is published -------------------------------------------------------------------------------------


def test_the_schema_describes_every_setting() -> None:
    schema = run_schema()
    assert schema["properties"]["subject"] and schema["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        for key, setting in section["properties"].items():
            assert setting.get("description"), f"{name}.{key} has no docstring"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_dumped_run_is_a_spec_of_the_same_run(method: str) -> None:
    run = load_run(None, SUBJECT, ["train.steps=7", f"train.method={method}"])
    assert parse_run(run.model_dump(mode="json", by_alias=True)) == run


def test_reading_a_spec_needs_no_torch_and_no_ray() -> None:
    script = "import sys, orchestrator.spec; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(torch|ray|pyarrow|diffusers)\b", loaded)


@pytest.mark.parametrize(
    ("raw", "fingerprint"),
    [
        ({}, "d4b66a503e131fc1"),
        ({"base": {"model": "x"}}, "7c4a05741cd7d791"),
        ({"train": {"method": "full", "seed": 3}, "data": {"flip": True}}, "36bb95af5ad52748"),
    ],
)
def test_settings_that_came_later_change_nothing_about_what_an_earlier_recipe_decides(
    raw: dict[str, Any], fingerprint: str
) -> None:
    subject = {"name": "rex", "class": "dog", "images": ["x"]}
    run = Run.model_validate(with_defaults({"subject": subject, **raw}))
    assert sha256(json.dumps(decisive(run), sort_keys=True).encode())[:16] == fingerprint


def test_settings_that_came_later_decide_where_they_are_used() -> None:
    subject = {"name": "rex", "class": "dog", "images": ["x"]}
    runs = [
        Run.model_validate({"subject": subject, **raw})
        for raw in ({}, {"prior": {"target": "base"}}, {"train": {"objective": {"offset_noise": 0.1}}})
    ]
    assert len({json.dumps(decisive(run), sort_keys=True) for run in runs}) == 3


def test_an_objectives_setting_that_takes_no_effect_is_refused() -> None:
    error = refusal("train.objective.snr_gamma=1")
    assert "snr_gamma" in str(error) and "leave it out" in str(error)
    assert "huber_c" in str(refusal("train.objective.huber_c=0.2"))
    assert load_run(None, SUBJECT, ["train.objective.weighting=min_snr", "train.objective.snr_gamma=1"])


@pytest.mark.parametrize(
    ("sets", "what", "seen"),
    [
        (["optimizer.name=lion", "optimizer.eps=1.0e-6"], "train.optimizer cannot be used", "'eps': 1e-06"),
        (
            ["optimizer.name=adafactor", "optimizer.betas=[0.9, 0.99]"],
            "train.optimizer cannot be used",
            "betas",
        ),
        (["optimizer.d_coef=2"], "train.optimizer cannot be used", "d_coef"),
        (["optimizer.name=prodigy", "lr=1e-4"], "train.lr is too low for prodigy", "train.lr is 0.0001"),
        (
            ["optimizer.name=prodigy", "text_encoder.train=true", "text_encoder.lr=0.5"],
            "two learning rates cannot be had with prodigy",
            "train.text_encoder.lr 0.5",
        ),
        (
            ["optimizer.name=adamw-schedulefree", "ema_decay=0.99"],
            "train.ema_decay cannot be had with train.optimizer.name: adamw-schedulefree",
            "an average already",
        ),
        (
            ["optimizer.name=adamw-schedulefree", "lr_scheduler=cosine"],
            "train.lr_scheduler: cosine cannot be had with train.optimizer.name: adamw-schedulefree",
            "stands in for a schedule",
        ),
        (
            ["optimizer.name=prodigy", "text_encoder.train=true", "text_encoder.stop_after=5"],
            "train.text_encoder.stop_after cannot be had with train.optimizer.name: prodigy",
            "goes on moving",
        ),
        (
            ["optimizer.name=prodigy", "new_tokens.count=2", "new_tokens.lr=5e-4"],
            "two learning rates cannot be had with prodigy",
            "train.new_tokens.lr 0.0005",
        ),
        (
            ["optimizer.name=adamw-schedulefree", "new_tokens.count=2", "new_tokens.stop_after=5"],
            "train.new_tokens.stop_after cannot be had with train.optimizer.name: adamw-schedulefree",
            "goes on moving",
        ),
    ],
)
def test_an_optimizers_setting_that_it_cannot_use_is_refused(sets: list[str], what: str, seen: str) -> None:
    error = refusal(*(f"train.{each}" for each in sets))
    assert error.what == what and seen in error.seen and error.do


@pytest.mark.parametrize("name", ["adamw-8bit", "adafactor", "prodigy", "adamw-schedulefree"])
def test_an_optimizer_that_needs_whole_parameters_is_refused_where_they_are_cut(name: str) -> None:
    for setting in ("engine.zero_stage=2", "engine.offload=true"):
        error = refusal(f"train.optimizer.name={name}", setting)
        assert (
            error.what.startswith(f"{setting.partition('=')[0]} cannot be had") and "adamw, lion" in error.do
        )


def test_prodigy_multiplies_what_it_finds_by_one() -> None:
    run = load_run(None, SUBJECT, ["train.optimizer.name=prodigy", "train.text_encoder.train=true"])
    assert (run.train.lr, run.train.text_encoder.lr) == (1.0, 1.0)

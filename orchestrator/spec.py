"""This file is where what the user wrote becomes a run, or one message that names every mistake in it.

Precedence is defaults < file < flags < `--set`. Paths in a file are relative to the file, those of flags to
where the command runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cluster.errors import UserError, did_you_mean
from orchestrator.document import anchor_run, parse_document
from training.changes import course, refuse_idle_changes
from training.defaults import with_defaults
from training.optimizer_settings import refuse_sharding
from training.part_settings import Lora
from training.prompt import render_prompt
from training.recipe import Run
from training.section import merge

LEAST_OF_PRODIGY = 0.1  # a rate such as AdamW's would have it learn nothing; diffusers warns of it likewise


def load_run(config: Path | None, flags: Mapping[str, Any], sets: Sequence[str]) -> Run:
    """The run that a file, flags and `--set` describe together.

    Args:
        config: `run.yaml`; `None` where there is none.
        flags: Sections as in the YAML; a flag that was not given is `None` and takes no part.
        sets: `a.b.c=VALUE` each, with VALUE in YAML.

    Raises:
        UserError: A setting cannot be used; it names its path, what was seen and what is allowed.
    """
    raw: Mapping[str, Any] = read_config(config) if config else {}
    raw = merge(raw, given(flags))
    for assignment in sets:
        raw = merge(raw, assigned(assignment))
    return parse_run(raw)


def parse_run(raw: Mapping[str, Any]) -> Run:
    """A run from its sections, laid over the defaults of its base and method; raises as `load_run` does."""
    try:
        run = Run.model_validate(with_defaults(raw))
    except ValidationError as error:
        raise explained(error) from None
    if run.train.method == "full" and run.train.lora != Lora():
        raise UserError(
            "train.lora takes no effect",
            "train.method is full, which trains the weights themselves",
            "remove train.lora, or set train.method: lora",
        )
    text = run.train.text_encoder
    if text.stop_after is not None and not (text.train and text.stop_after < run.train.steps):
        raise UserError(
            "train.text_encoder.stop_after takes no effect",
            "the text encoder is not trained" if not text.train else f"there are {run.train.steps} steps",
            "leave it out, or set train.text_encoder.train: true and fewer steps",
        )
    stop, steps = run.train.new_tokens.stop_after, run.train.steps
    if stop is not None and stop >= steps:
        raise UserError(
            "train.new_tokens.stop_after takes no effect",
            f"it is {stop}, and there are {steps} steps",
            "leave it out, or set it to fewer steps",
        )
    _check_prompts(run)
    refuse_idle_changes(run)
    for _, train in course(run.train):
        _check_optimizer(run.model_copy(update={"train": train}))
    _check_accumulation(run)
    _check_workers(run)
    _check_best(run)
    _check_stop(run)
    return run


def run_schema() -> dict[str, Any]:
    """The JSON schema of `run.yaml`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Run.model_json_schema(by_alias=True)}


def read_config(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, its relative paths made absolute.

    Raises:
        UserError: It cannot be read, is empty, is not YAML, gives a key twice, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", str(error), "name a YAML file") from error
    raw = parse_document(text, str(path)).raw
    anchor_run(raw, str(path.resolve().parent))
    return raw


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`flags` without those that are `None`, section by section."""
    parts = ((k, given(v) if isinstance(v, Mapping) else v) for k, v in flags.items())
    return {key: value for key, value in parts if value is not None}


def assigned(assignment: str) -> dict[str, Any]:
    """The sections that one `a.b.c=VALUE` of `--set` makes."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {assignment} assigns nothing", "", "write --set train.steps=300")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path} has no value", " ".join(str(error).split()), "quote it") from error
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _check_prompts(run: Run) -> None:
    """Every prompt can be rendered, and the training prompt names the subject."""
    noun = run.subject.class_noun
    named = [("train.prompt", run.train.prompt, "x"), ("prior.prompt", run.prior.prompt, None)]
    named += [("train.templates", prompt, "x") for prompt in run.train.templates]
    named += [("validate.prompts", prompt, "x") for prompt in run.validate_.prompts]
    named += (
        [("train.stop.prompts", prompt, "x") for prompt in run.train.stop.prompts] if run.train.stop else []
    )
    for path, prompt, identifier in named:
        try:
            render_prompt(prompt, noun, identifier)
        except UserError as error:
            raise UserError(f"{path}: {error.what}", error.seen, error.do) from None
    looked = run.train.stop.prompts if run.train.stop else ()
    naming = {
        "train.prompt": (run.train.prompt,),
        "train.templates": run.train.templates,
        "train.stop.prompts": looked,
    }
    for path, prompts in naming.items():
        for prompt in prompts:
            if "{subject}" not in prompt:
                raise UserError(f"{path} does not name the subject", repr(prompt), "say {subject} in it")
    if run.train.captions == "files" and run.train.templates:
        raise UserError(
            "train.templates takes no effect",
            "train.captions is files, which gives each photo a prompt of its own",
            "leave one of them out",
        )


def _check_optimizer(run: Run) -> None:
    """The optimizer takes the rates and stages that the run gives it."""
    train, name = run.train, run.train.optimizer.name
    refuse_sharding(train.optimizer, run.engine.zero_stage, run.engine.offload)
    without = f"cannot be had with train.optimizer.name: {name}"
    text, tokens = train.text_encoder, train.new_tokens
    beside = (
        ("train.text_encoder", text.train, text.lr, text.stop_after),
        ("train.new_tokens", tokens.count > 0, tokens.lr, tokens.stop_after),
    )
    for path, _, lr, stop_after in (part for part in beside if part[1]):
        if name in ("prodigy", "adamw-schedulefree") and stop_after is not None:
            seen = "it goes on moving what has a rate of 0"
            raise UserError(f"{path}.stop_after {without}", seen, "leave it out")
        if name == "prodigy" and lr != train.lr:
            seen = f"train.lr is {train.lr:g} and {path}.lr {lr:g}, and it finds one rate for both"
            raise UserError(
                "two learning rates cannot be had with prodigy", seen, f"set {path}.lr: {train.lr:g}"
            )
    if name == "prodigy" and train.lr < LEAST_OF_PRODIGY:
        seen = f"train.lr is {train.lr:g}, which multiplies the rate that it finds by itself"
        raise UserError("train.lr is too low for prodigy", seen, "set train.lr: 1, or leave it out")
    if name == "adamw-schedulefree" and train.ema_decay is not None:
        seen = "what it publishes is an average already"
        raise UserError(f"train.ema_decay {without}", seen, "leave it out")
    if name == "adamw-schedulefree" and train.lr_scheduler != "constant":
        seen = "its average stands in for a schedule; a warm-up it takes"
        raise UserError(f"train.lr_scheduler: {train.lr_scheduler} {without}", seen, "leave it out")


def _check_accumulation(run: Run) -> None:
    """Every micro-batch gets a pair."""
    train, workers = run.train, run.cluster.workers
    pairs = -(-train.pairs_per_step // workers)
    if train.accumulation > pairs:
        raise UserError(
            f"train.accumulation is {train.accumulation}, more than the pairs of a worker",
            f"train.pairs_per_step is {train.pairs_per_step} over {workers} workers: {pairs} each",
            "lower it or raise train.pairs_per_step",
        )


def _check_workers(run: Run) -> None:
    fewest, workers = run.cluster.min_workers, run.cluster.workers
    if fewest is not None and fewest > workers:
        raise UserError(
            f"cluster.min_workers is {fewest}, more than the workers asked for",
            f"cluster.workers is {workers}",
            "lower it or raise cluster.workers",
        )


def _check_best(run: Run) -> None:
    """The best checkpoint is known and still there at the end."""
    if not run.train.load_best_at_end:
        return
    if run.validate_.every == 0:
        seen, do = "validate.every is 0, so that no checkpoint has a validation loss", "set validate.every"
    elif not run.checkpoint.keep_best:
        seen, do = "checkpoint.keep_best is false", "set checkpoint.keep_best: true"
    elif run.checkpoint.every >= run.train.steps:
        seen = f"checkpoint.every is {run.checkpoint.every}, and there are {run.train.steps} steps"
        do = "lower checkpoint.every, so that there are checkpoints to choose from"
    else:
        return
    raise UserError("train.load_best_at_end takes no effect", seen, do)


def _check_stop(run: Run) -> None:
    """There are looks enough to run out of patience before the steps are over."""
    stop = run.train.stop
    if stop is None:
        return
    if run.train.load_best_at_end:
        raise UserError(
            "train.load_best_at_end takes no effect beside train.stop",
            "train.stop publishes the weights whose drawings scored best",
            "leave one of them out",
        )
    fewest = stop.every * (stop.patience + 1)
    if fewest >= run.train.steps:
        raise UserError(
            "train.stop takes no effect",
            f"with every: {stop.every} and patience: {stop.patience} a run cannot end before step {fewest}, and there "
            f"are {run.train.steps}",
            "lower train.stop.every or patience, or set more train.steps",
        )


# What people type for a setting that has no default.
_FLAGS = {
    "subject.images": "a folder of photos",
    "subject.class": "--class NOUN, such as --class dog",
    "subject.name": "--name NAME",
}


# -- pydantic's errors, for people -------------------------------------------------------------------------


def explained(error: ValidationError, model: type[BaseModel] = Run) -> UserError:
    """One error out of pydantic's list about a `model`; several alternatives of one setting become one line."""
    mistakes: dict[str, tuple[str, str, str]] = {}
    for detail in error.errors(include_url=False):
        path, field = setting_at(detail["loc"], model)
        what, seen = f"{path} cannot be used", f"it is {detail['input']!r}"
        _, expected, wants = detail["msg"].partition(", unable")[0].partition("Input should be ")
        if detail["type"] == "extra_forbidden":
            mistake = (
                f"{path} is not a setting",
                f"it was given {detail['input']!r}",
                suggestion(path, model),
            )
        elif detail["type"] == "missing":
            mistake = (
                f"{path} is missing",
                "",
                f"give {_FLAGS.get(path, f'--set {path}=...')}, or put it in the YAML",
            )
        elif detail["type"] == "value_error":
            mistake = (what, seen, detail["msg"].removeprefix("Value error, "))
        elif detail["type"] == "model_type":
            mistake = (what, seen, "it is a section with settings in it")
        elif path in mistakes:
            mistake = (what, seen, f"{mistakes[path][2]} or {wants}")
        else:
            mistake = (what, seen, f"allowed is {wants}" if expected else str(field and field.description))
        mistakes[path] = mistake
    if len(mistakes) == 1:
        return UserError(*next(iter(mistakes.values())))
    lines = "; ".join(": ".join(part for part in mistake if part) for mistake in mistakes.values())
    return UserError(
        f"{len(mistakes)} settings cannot be used", lines, "`raybooth schema` lists all settings"
    )


def setting_at(loc: Sequence[str | int], model: type[BaseModel] = Run) -> tuple[str, FieldInfo | None]:
    """A setting's path as it is in the YAML, without the names of union members, and its field."""
    path: list[str] = []
    fields: dict[str, FieldInfo] | None = _fields(model)
    field: FieldInfo | None = None
    for part in loc:
        if fields is not None:
            field = fields.get(str(part))
            fields = _fields(field.annotation) if field else None
            path.append(str(part))
        elif isinstance(part, int):
            path.append(str(part))
            listed = [one for one in get_args(field.annotation) if _fields(one)] if field else []
            fields = _fields(listed[0]) if listed else None
    return ".".join(path), field


def _fields(model: Any) -> dict[str, FieldInfo] | None:
    """The settings of a section by their YAML key; `None` for what is not a section."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _all_paths(model: Any, prefix: str = "") -> Iterator[str]:
    for key, field in (_fields(model) or {}).items():
        yield prefix + key
        yield from _all_paths(field.annotation, f"{prefix}{key}.")


def suggestion(path: str, model: Any) -> str:
    """The nearest setting in the same section, else those of the same name elsewhere, else what there is."""
    section, _, key = path.rpartition(".")
    beside = [p.rpartition(".")[2] for p in _all_paths(model) if p.rpartition(".")[0] == section]
    elsewhere = [p for p in _all_paths(model) if p.rpartition(".")[2] == key]
    near = did_you_mean(key, beside)
    return near if "did you mean" in near or not elsewhere else f"did you mean {' or '.join(elsewhere)}?"

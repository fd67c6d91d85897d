"""This file is where recipes that a study found are registered by name, and read for `--recipe`."""

from pathlib import Path
from typing import Any

from cluster.errors import UserError, did_you_mean
from orchestrator.document import parse_document
from orchestrator.spec import read_config

FOLDER = "recipes"


def recipe_path(name: str) -> str:
    """Where a registered recipe lies: sections of run.yaml without a subject."""
    return f"{FOLDER}/{name}.yaml"


def read_recipe(recipe: str, storage: str) -> dict[str, Any]:
    """The sections of a recipe.

    Args:
        recipe: A YAML file, or the name of a registered one.
        storage: The root where it may be registered.

    Raises:
        UserError: There is none, or it holds what is no recipe's.
    """
    file = Path(recipe).expanduser()
    if file.suffix in (".yaml", ".yml") or file.is_file():
        raw = read_config(file)
    else:
        from cluster.storage import Storage

        root = Storage(storage)
        try:
            raw = parse_document(root.read(recipe_path(recipe)).decode(), root.full(recipe_path(recipe))).raw
        except FileNotFoundError:
            known = [name.removesuffix(".yaml") for name in root.names(FOLDER)]
            raise UserError(
                f"there is no recipe {recipe}",
                f"{root.uri} has {len(known)} recipes",
                did_you_mean(recipe, known) or "search for one: raybooth tune, or name a YAML file",
            ) from None
    if "subject" in raw or "subjects" in raw:
        raise UserError(f"{recipe} is no recipe", "it names a subject", "give it as --config")
    return dict(raw)

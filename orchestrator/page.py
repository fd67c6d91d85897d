"""This file is where pages are rendered: the door to Jinja. A page is one file that needs no network."""

from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render_page(
    template: str, facts: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> bytes:
    """A page as UTF-8.

    Args:
        template: File name of a template in this package.
        facts: What it names; text is escaped.
        filters: What it calls.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= dict(filters or {})
    text = resources.files("orchestrator").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(dict(facts)).encode()


def as_markup(text: str) -> Markup:
    """Text that is markup already, such as a plot, and is not escaped."""
    return Markup(text)

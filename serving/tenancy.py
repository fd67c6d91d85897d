"""This file is where a tenant's name for a subject becomes the one it has in storage, and back.

Subjects of the tenant `default`, which is the operator, are stored by their plain names: those that the command line
trains. Those of any other tenant end on a hash of the tenant's name, so that two tenants may each have a `rex`, neither
can find out that the other has one, and no record has to be kept.
"""

import re

from cluster.storage import sha256

OPERATOR = "default"
NAME = r"[a-z0-9][a-z0-9_-]{0,47}"
"""A tenant's name for a subject; with its mark it is still a subject's name."""

_MARKED = re.compile(r"--[0-9a-f]{10}$")


def stored_name(tenant: str, name: str) -> str:
    """The name in storage of a tenant's subject; it need not be there."""
    return name if tenant == OPERATOR else f"{name}{_mark(tenant)}"


def shown_name(tenant: str, stored: str) -> str | None:
    """A tenant's name of a stored subject; `None` when it is another tenant's."""
    if tenant == OPERATOR:
        return None if _MARKED.search(stored) else stored
    mark = _mark(tenant)
    return stored.removesuffix(mark) if stored.endswith(mark) and stored != mark else None


def is_free(tenant: str, name: str) -> bool:
    """Whether a tenant may call a subject so: the operator's names must not look like another tenant's."""
    return tenant != OPERATOR or not _MARKED.search(name)


def _mark(tenant: str) -> str:
    return f"--{sha256(tenant.encode())[:10]}"

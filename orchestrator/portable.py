"""This file is where a campaign becomes one file that any machine can run: for a cluster that sees neither our disk
nor our flags."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cluster.errors import UserError
from orchestrator.manifest import CampaignSpec, Row

MOST_BYTES = 1_000_000  # of a ConfigMap, which etcd takes up to 1 MiB
MOST_TOLD = 5


def portable_manifest(spec: CampaignSpec) -> str:
    """The campaign as one campaign.yaml: rows of any source, flags and `--set` are written out in it.

    Rows that cannot be used stay in it, and fail there by themselves, as they would here.

    Args:
        spec: The campaign.

    Raises:
        UserError: It names what only this machine has, or is too large to travel inside a Kubernetes object.
    """
    _check_reachable(spec)
    settings = spec.settings.model_dump(mode="json", by_alias=True)
    settings.pop("track")  # is in the defaults
    document: dict[str, Any] = {
        "name": settings.pop("name"),
        "defaults": spec.defaults,
        **settings,
        "subjects": [_plain(row.written) for row in spec.rows],
    }
    if not document["defaults"]:
        del document["defaults"]
    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(_plain(document), Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    if (size := len(text.encode())) > MOST_BYTES:
        raise UserError(
            "the manifest is too large to travel inside the job",
            f"{size / 1e6:.1f} MB for {len(spec.rows)} subjects, and {MOST_BYTES / 1e6:.0f} MB is the most",
            "put it into the object store and submit its URI, without --set: "
            "raybooth submit s3://BUCKET/campaign.yaml",
        )
    return text


def _check_reachable(spec: CampaignSpec) -> None:
    here = [row for row in spec.rows if any("://" not in place for place in _photos(row))]
    if here:
        told = ", ".join(f"{row.name} ({next(iter(_photos(row)))})" for row in here[:MOST_TOLD])
        more = f" and {len(here) - MOST_TOLD} more" if len(here) > MOST_TOLD else ""
        raise UserError(
            f"{len(here)} subjects have photos on this machine, which the cluster does not see",
            f"{told}{more}",
            "put them into the object store and name them by their URI: images: s3://BUCKET/rex/",
        )
    bases = {row.run.base.model for row in spec.rows if row.run}
    if homes := sorted(base for base in bases if base.startswith("~")):
        raise UserError(
            "the base lies in a home folder, which the cluster does not have",
            homes[0],
            "name a hub id, or the absolute path of a folder in the image",
        )


def _photos(row: Row) -> Sequence[str]:
    return row.run.subject.images if row.run else ()


def _plain(value: Any) -> Any:
    """Without types that YAML has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value

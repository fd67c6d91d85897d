"""This file is where objects of Kubernetes itself are checked, strictly, by the schemas of one of its versions."""

import json
from functools import cache

import kubernetes_validate
from jsonschema import ValidationError

from cluster.manifests import Complaint, Document, name_of

VERSION = "1.37"


def core_complaints(document: Document) -> list[Complaint]:
    """What is wrong with an object; that no schema knows it is a complaint too, where the tool would only warn."""
    return list(_complaints(json.dumps(document, sort_keys=True, default=str)))


@cache
def _complaints(text: str) -> tuple[Complaint, ...]:
    """The tool reads its schemas anew each time, which is most of a check."""
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except ValidationError as error:
        path = ".".join(map(str, error.absolute_path))
        return (Complaint(name_of(document), path, error.message[:300]),)
    except kubernetes_validate.SchemaNotFoundError:
        kind = f"{document['kind']} of {document['apiVersion']}"
        return [
            Complaint(name_of(document), "apiVersion", f"neither Kubernetes {VERSION} nor a CRD has {kind}")
        ]
    return []

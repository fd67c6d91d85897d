"""This file is where a run is mirrored in Weights & Biases: its settings, figures, pictures and end.

What cannot be reached is never waited for twice and never fails a run: the run is then kept in a folder that `wandb
sync` sends later.
"""

import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.tracking import discreet, figures

REACH_S = 20.0  # that a server gets to answer when a run begins
FINISH_S = 60.0  # that it gets to take what is left when a run ends; W&B's own is without end
_unreached = set[str]()  # servers
_STEP = "step"  # what W&B shows figures over: its own counts calls, and a validation comes after its step


class WandbTracker:
    """One W&B run; goes on with `run_id` when there is one.

    WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL and `wandb login` are honoured. Figures of a step that the run has already
    are not logged again. A run in a folder, which cannot be gone on with, is begun anew in its place.

    Args:
        project: `PROJECT` or `ENTITY/PROJECT`.
        folder: Local; takes W&B's own files, and all of an offline run.
        run_name: Name of the run in W&B.
        params: Flat settings.
        tags: Lineage; W&B keeps it with the settings.
        run_id: The run to go on with.
        note: Told, for people, when W&B cannot be reached.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        folder: Path,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None,
        note: Callable[[str], None],
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # standard error is ours
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError(
                "track.wandb is set, but wandb is not installed", str(error), "pip install 'raybooth[wandb]'"
            ) from error
        self._wandb = wandb
        entity, _, name = project.rpartition("/")
        folder.mkdir(parents=True, exist_ok=True)
        for before in (folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(before)  # all that it holds is told again
        given: dict[str, Any] = {
            "entity": entity or None,
            "project": name,
            "dir": str(folder),
            "name": run_name,
            "config": {
                key: discreet(str(v)) if isinstance(v, str) else v for key, v in {**params, **tags}.items()
            },
            "reinit": "create_new",  # a campaign has several runs at once in one process
            "settings": wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,  # the machine of this process is not the one that trains
                init_timeout=REACH_S,
                finish_timeout=FINISH_S,
            ),
        }
        self._run: Any
        mode = os.environ.get("WANDB_MODE", "online")  # W&B itself reads it once in a process
        server = os.environ.get("WANDB_BASE_URL", "")
        mode = "offline" if server in _unreached and mode == "online" else mode
        if mode in ("offline", "dryrun", "disabled"):
            given["mode"] = mode
            self._run = wandb.init(**given)
        else:
            try:
                self._run = wandb.init(**given, id=run_id, resume="allow")
            except Exception as error:
                if not isinstance(error, wandb.errors.AuthenticationError | wandb.errors.UsageError):
                    _unreached.add(server)  # nothing of this process waits for it again
                self._run = wandb.init(**given, mode="offline")
                said = discreet(([*str(error).strip().splitlines(), type(error).__name__])[0])
                note(f"W&B cannot be reached ({said}): kept in {folder / 'wandb'}, `wandb sync` sends it")
        self._last = int(self._run.summary.get(_STEP) or 0)
        self._run.define_metric("*", step_metric=_STEP)

    @property
    def run_id(self) -> str | None:
        """W&B's id of a run that can be gone on with; `None` of one in a folder."""
        return None if self._run.offline or self._run.disabled else str(self._run.id)

    @property
    def url(self) -> str | None:
        """Where the run is shown; `None` of one in a folder."""
        return str(self._run.url) if self.run_id else None

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        for row in rows:
            step = int(row[_STEP] or 0)
            if step > self._last:
                self._run.log({_STEP: step, **dict(figures(row))})

    def image(self, name: str, png: bytes, step: int) -> None:
        if step > self._last:
            from PIL import Image

            with Image.open(io.BytesIO(png)) as picture:
                self._run.log({_STEP: step, name: self._wandb.Image(picture, caption=f"step {step}")})

    def register(self, name: str, version: str, storage: Storage, path: str, alias: str) -> None:
        """Say where the artifact is; models are kept by us and by MLflow."""
        self._run.summary["raybooth.artifact"] = discreet(storage.full(path))
        self._run.summary["raybooth.alias"] = alias

    def finish(self, state: str, reason: str | None = None) -> None:
        self._run.summary["raybooth.state"] = state
        if reason:
            self._run.notes = discreet(reason)
        self._run.finish(exit_code=int(state != "succeeded"))

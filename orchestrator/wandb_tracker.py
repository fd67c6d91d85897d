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

from cluster.storage import Storage
from orchestrator.tracking import PREFIXES, discreet, figures

REACH_S = 20.0  # that a server gets to answer when a run begins
FINISH_S = 60.0  # that it gets to take what is left when a run ends; W&B's own is without end
_unreached = set[str]()  # servers
_STEP = "step"  # what W&B shows figures over, behind the prefix of their kind: its own step counts calls


class WandbTracker:
    """One W&B run; goes on with `run_id` when there is one.

    WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL and `wandb login` are honoured. Steps, validations, scores and pictures
    have a count of steps each: of a run that goes on every one is logged that it does not have yet, and no other. A run
    in a folder, which cannot be gone on with, is begun anew in its place.

    Args:
        project: `PROJECT` or `ENTITY/PROJECT`.
        folder: Local; takes W&B's own files, and all of an offline run.
        run_name: Name of the run in W&B.
        params: Flat settings.
        tags: Lineage; W&B keeps it with the settings.
        run_id: The run to go on with.
        note: Told, for people, when W&B cannot be reached.
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
        import wandb

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
        later = f"kept in {folder / 'wandb'}, `wandb sync` sends it"
        if server in _unreached and mode == "online":
            mode = "offline"
            note(f"W&B did not answer before: {later}")
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
                note(f"W&B cannot be reached ({said}): {later}")
        self._last: dict[str, int] = {}  # step that the run has, by the name of the count
        self._defined = set[str]()

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
            kinds: dict[str, dict[str, float]] = {}
            for key, value in figures(row):
                kinds.setdefault(_kind(key), {})[key] = value
            for kind, values in kinds.items():
                if self._is_new(kind, step := int(row["step"] or 0)):
                    self._log(kind, step, values)

    def image(self, name: str, png: bytes, step: int) -> None:
        if self._is_new(f"{name}_", step):
            from PIL import Image

            with Image.open(io.BytesIO(png)) as picture:
                self._log(f"{name}_", step, {name: self._wandb.Image(picture, caption=f"step {step}")})

    def register(self, name: str, version: str, storage: Storage, path: str, alias: str) -> None:
        """Say where the artifact is; models are kept by us and by MLflow."""
        self._run.summary["raybooth.artifact"] = discreet(storage.full(path))
        self._run.summary["raybooth.alias"] = alias

    def _is_new(self, kind: str, step: int) -> bool:
        """Whether the run has nothing of a kind of this step yet."""
        if kind not in self._last:
            self._last[kind] = int(self._run.summary.get(f"{kind}{_STEP}") or 0)
        return step > self._last[kind]

    def _log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        count = f"{kind}{_STEP}"
        for key in {**values, count: step}.keys() - self._defined:
            self._run.define_metric(key, **({"hidden": True} if key == count else {"step_metric": count}))
            self._defined.add(key)
        self._run.log({count: step, **values})

    def finish(self, state: str, reason: str | None = None) -> None:
        self._run.summary["raybooth.state"] = state
        if reason:
            self._run.notes = discreet(reason)
        self._run.finish(exit_code=int(state != "succeeded"))


def _kind(figure: str) -> str:
    """The prefix of a figure's name, of those that there are."""
    return next((prefix for prefix in PREFIXES.values() if prefix and figure.startswith(prefix)), "")

"""This file is where the command that serves reads its options."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="serve.yaml; flags win over it.", metavar="FILE")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The base that is served: pocket, a folder, or a hub id.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 8000 by default.")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Processes that draw, neither more nor less.")
    ] = None,
    min_replicas: Annotated[int | None, typer.Option(min=0, help="The fewest.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="The most.")] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each replica; none draws on the CPU.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Ask nobody for a key: on the loopback alone.")
    ] = False,
    ledger: Annotated[
        str,
        typer.Option(
            "--ledger",
            envvar="RAYBOOTH_LEDGER",
            help="Database of the record that trainings go on.",
            metavar="URI",
        ),
    ] = "",
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", help="Where trainings are tracked.", metavar="URI")
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            "--address", envvar="RAY_ADDRESS", help="Ray cluster to join; none starts a private local one."
        ),
    ] = "",
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve images of every registered subject over HTTP: OpenAI's images contract, predictions, trainings.

    The first start prints a token, once; `raybooth keys create` makes more.

    Examples:

      raybooth serve --base pocket

      raybooth serve --config serve.yaml --min-replicas 0 --max-replicas 8 --gpus 1 --address auto --storage s3://b/booth
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.ledger import ledger_uri
        from orchestrator.service import first_token, run_service, service_spec

        fewest, most = (replicas, replicas) if replicas else (min_replicas, max_replicas)
        counts = {"min": fewest, "max": most, "gpus": gpus}
        flags: dict[str, Any] = {"base": base, "host": host, "port": port, "auth": "off" if no_auth else None}
        flags = {key: value for key, value in flags.items() if value is not None}
        if counts := {key: value for key, value in counts.items() if value is not None}:
            flags["replicas"] = counts
        spec = service_spec(config, flags)
        root = Storage(storage_root(storage))
        root.check_writable()
        token = first_token(spec, root)

        output.say(f"starting to serve {spec.base}; Ray and the models take half a minute ...")

        def up(url: str) -> None:
            output.say(f"serving {spec.base} at {url}: {url}/openapi.json says what can be asked")
            if token:
                output.say(f"your token, which is shown only now: {token}")
            print_ready(as_json, {"state": "serving", "url": url, "token": token or None})

        run_service(spec, root, ledger_uri(root.uri, ledger or None), mlflow, address or None, up)
        output.result = {"state": "stopped"}


def print_ready(as_json: bool, said: dict[str, Any]) -> None:
    """A line of JSON for a program that waits until it can ask."""
    import json

    if as_json:
        print(json.dumps(said), flush=True)

"""This file is where the commands that serve on Kubernetes read their options."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_output import DebugOption, JsonOption, reporting
from orchestrator.cli_submit import (
    ConfigName,
    Context,
    DryRun,
    Image,
    Namespace,
    PodStorage,
    PullSecret,
    SecretName,
    ServiceAccount,
    Spot,
    connect,
    default_image,
    end,
    print_yaml,
    ray_version,
)

app = typer.Typer(no_args_is_help=True, help="See and end services that were deployed to Kubernetes.")

Service = Annotated[str, typer.Argument(help="Name of the service.", metavar="NAME")]


def deploy(
    config: Annotated[
        Path | None, typer.Argument(help="serve.yaml; the base pocket without one.", metavar="FILE")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the service.")] = "booth",
    namespace: Namespace = "",
    base: Annotated[str, typer.Option("--base", help="The base that is served; wins over the file.")] = "",
    memory: Annotated[
        int | None, typer.Option(help="GiB of each worker pod; estimated by default.", min=1)
    ] = None,
    redis: Annotated[
        str,
        typer.Option("--redis", help="Keeps it serving when its head is lost.", metavar="HOST:PORT"),
    ] = "",
    redis_secret: Annotated[
        str, typer.Option("--redis-secret", help="Secret with the key password.", metavar="NAME")
    ] = "raybooth-redis",
    spot: Spot = False,
    image: Image = "",
    storage: PodStorage = "",
    env_config: ConfigName = "raybooth",
    env_secret: SecretName = "raybooth",
    service_account: ServiceAccount = "raybooth",
    pull_secret: PullSecret = "",
    context: Context = "",
    dry_run: DryRun = "none",
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it serves.")] = False,
    wait_minutes: Annotated[float, typer.Option(help="How long --wait waits.", min=0.1)] = 30.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve images of every registered subject on Kubernetes, as a RayService; again brings it up to date.

    A change gets a cluster of its own, which takes over when it serves. Keys are made with `raybooth keys create`.

    Examples:

      raybooth deploy serve.yaml --namespace team-a --redis redis:6379 --wait

      raybooth deploy --base pocket --dry-run=client | kubectl apply -f -
    """
    with reporting(as_json, debug) as output:
        from cluster.errors import UserError
        from orchestrator.rayjob import JobOptions
        from orchestrator.rayservice import Redis, render_service, service_size
        from orchestrator.rollout import deploy as hand_over
        from orchestrator.rollout import follow_service
        from orchestrator.service import service_spec

        if dry_run == "client" and wait:
            raise UserError("--wait takes no effect", "--dry-run=client makes nothing", "leave one out")
        spec = service_spec(config, {"base": base} if base else {})
        size = service_size(spec, memory)
        api = None if dry_run == "client" else connect(namespace, context)
        options = JobOptions(
            namespace=api.namespace if api else namespace or "default",
            image=image or default_image(),
            ray_version=ray_version(),
            spot=spot,
            service_account=service_account,
            config=env_config,
            secret=env_secret,
            storage=storage or None,
            pull_secret=pull_secret or None,
        )
        document = render_service(name, spec, size, options, Redis(redis, redis_secret) if redis else None)
        called = document["metadata"]["name"]
        output.say(f"{called} serves {spec.base}; {size.line()}")
        if api is None:
            output.result = {"service": called, "state": "rendered", "objects": [document]}
            if not as_json:
                print_yaml([document])
            return
        if dry_run == "server":
            there = api.create(document, dry_run=True) is None
            output.say(f"RayService {called} {'is there already' if there else 'would be made'}")
            output.result = {"service": called, "state": "checked"}
            return
        state, done = hand_over(api, document)
        output.say(f"service {called} in {api.namespace} is {done}: {state.line()}")
        if wait:
            state = follow_service(
                api, called, lambda seen: output.say(f"  {seen.line()}"), wait_minutes * 60
            )
            end(output, state)
        output.result = {
            **state.as_json(),
            "done": done,
            "url": f"http://{called}-serve-svc.{api.namespace}:8000",
        }
        output.say(f"  in the cluster: {output.result['url']}")


@app.command("status")
def status(
    service: Service = "booth",
    namespace: Namespace = "",
    context: Context = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say where a service stands, and what to do if it does not come up.

    Example:

      raybooth services status booth --namespace team-a
    """
    with reporting(as_json, debug) as output:
        from orchestrator.rayjob import job_name
        from orchestrator.rollout import service_state_of

        state = service_state_of(connect(namespace, context), job_name(service))
        output.result = state.as_json()
        output.say(state.line())


@app.command("delete")
def delete(
    service: Service,
    namespace: Namespace = "",
    context: Context = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """End a service and its pods. Subjects, keys and predictions stay in the storage.

    Example:

      raybooth services delete booth --namespace team-a
    """
    with reporting(as_json, debug) as output:
        from orchestrator.rayjob import job_name
        from orchestrator.rollout import service_state_of

        api, name = connect(namespace, context), job_name(service)
        if not api.delete("RayService", name):
            service_state_of(api, name)  # says that there is none
        output.result = {"service": name, "namespace": api.namespace, "state": "stopping"}
        output.say(f"{name} is ended; subjects, keys and predictions stay")

"""This file is where the command that submits a campaign to Kubernetes reads its options."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli_campaign import ClassNoun, Manifest, Name
from orchestrator.cli_output import DebugOption, JsonOption, Output, reporting
from orchestrator.cli_train import BaseModel, Sets

if TYPE_CHECKING:
    from cluster.kuberay import KubeApi

Namespace = Annotated[
    str,
    typer.Option(
        "--namespace", "-n", envvar="RAYBOOTH_NAMESPACE", help="Namespace; that of the kubeconfig by default."
    ),
]
Context = Annotated[
    str, typer.Option("--context", help="Context of the kubeconfig; its current one by default.")
]
Image = Annotated[
    str,
    typer.Option("--image", envvar="RAYBOOTH_IMAGE", help="Image of all pods, with a tag or a digest."),
]
DryRun = Annotated[
    Literal["none", "client", "server"],
    typer.Option(
        "--dry-run",
        help="client prints the YAML and asks no cluster; server has the cluster check it and makes nothing.",
    ),
]
Spot = Annotated[bool, typer.Option("--spot/--no-spot", help="Whether workers may be put on spot nodes.")]
ServiceAccount = Annotated[str, typer.Option("--service-account", help="Account of the pods.")]
ConfigName = Annotated[
    str, typer.Option("--env-config", help="ConfigMap with the pods' environment.", metavar="NAME")
]
SecretName = Annotated[
    str, typer.Option("--env-secret", help="Secret with the pods' environment.", metavar="NAME")
]
PodStorage = Annotated[
    str,
    typer.Option("--storage", help="Storage root, instead of the one in the ConfigMap.", metavar="URI"),
]
PullSecret = Annotated[
    str, typer.Option("--pull-secret", help="Secret for the image's registry.", metavar="NAME")
]


def submit(
    manifest: Manifest,
    name: Name = "",
    namespace: Namespace = "",
    queue: Annotated[
        str,
        typer.Option("--queue", help="LocalQueue of Kueue; without one it starts at once.", metavar="NAME"),
    ] = "",
    priority: Annotated[
        str, typer.Option("--priority", help="WorkloadPriorityClass of Kueue.", metavar="NAME")
    ] = "",
    gangs: Annotated[
        int | None, typer.Option(help="Gangs at a time; schedule.gangs by default.", min=1)
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="What is trained on; auto is a GPU, except for the base pocket."),
    ] = "auto",
    memory: Annotated[
        int | None, typer.Option(help="GiB of each worker pod; estimated by default.", min=1)
    ] = None,
    spot: Spot = True,
    image: Image = "",
    class_noun: ClassNoun = "",
    base: BaseModel = "",
    sets: Sets = None,
    hours: Annotated[
        float | None, typer.Option(help="Hours after which the job is ended; no limit by default.", min=0.01)
    ] = None,
    retries: Annotated[
        int, typer.Option(help="New clusters after one is lost with its head.", min=0, max=20)
    ] = 2,
    keep: Annotated[
        float, typer.Option("--keep-hours", help="Hours that the job's pods are kept after its end.", min=0)
    ] = 1.0,
    storage: PodStorage = "",
    env_config: ConfigName = "raybooth",
    env_secret: SecretName = "raybooth",
    service_account: ServiceAccount = "raybooth",
    pull_secret: PullSecret = "",
    context: Context = "",
    dry_run: DryRun = "none",
    again: Annotated[
        bool,
        typer.Option("--again", help="Run it again although it has succeeded: for photos that have changed."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for its end, and exit as it did.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Submit a campaign to Kubernetes as a RayJob, with the pods that it needs.

    The same command again changes nothing while it runs, and goes on after it has failed. Photos lie in an object
    store. `raybooth jobs` lists, shows, follows and cancels.

    Examples:

      raybooth submit campaign.yaml --namespace team-a --queue gpu

      raybooth submit s3://bucket/tonight.parquet --class dog --gangs 8 --hours 6 --wait --json

      raybooth submit campaign.yaml --dry-run=client | kubectl apply -f -
    """
    with reporting(as_json, debug) as output:
        from cluster.errors import UserError
        from orchestrator.cli_train import base_flags
        from orchestrator.jobsize import job_size
        from orchestrator.manifest import load_campaign
        from orchestrator.portable import portable_manifest
        from orchestrator.rayjob import JobOptions, render_job

        if dry_run == "client" and wait:
            raise UserError("--wait takes no effect", "--dry-run=client makes nothing", "leave one out")
        spec = load_campaign(manifest, name or None, class_noun or None, base_flags(base), sets or [])
        size = job_size(spec, device, gangs, memory)
        api = None if dry_run == "client" else connect(namespace, context)
        options = JobOptions(
            namespace=api.namespace if api else namespace or "default",
            image=image or default_image(),
            ray_version=ray_version(),
            queue=queue or None,
            priority=priority or None,
            spot=spot,
            service_account=service_account,
            config=env_config,
            secret=env_secret,
            storage=storage or None,
            pull_secret=pull_secret or None,
            hours=hours,
            retries=retries,
            keep_s=int(keep * 3600),
        )
        as_it_lies = "://" in spec.source and not (name or class_noun or base or sets)
        carried = None if as_it_lies else portable_manifest(spec)
        documents = render_job(spec.name, spec.source, carried, size, options)
        for row in spec.rows:
            if row.error:
                output.say(f"{row.name} will fail: {row.error}")
        output.say(f"{spec.name}: {len(spec.rows)} subjects; {size.line()}")
        if api is None:
            output.result = {
                "campaign": spec.name,
                "state": "rendered",
                "size": size.as_json(),
                "objects": documents,
            }
            if not as_json:
                print_yaml(documents)
            return
        if dry_run == "server":
            for document in documents:
                there = api.create(document, dry_run=True) is None
                told = "is there already" if there else "would be made"
                output.say(f"{document['kind']} {document['metadata']['name']} {told}")
            output.result = {"campaign": spec.name, "state": "checked", "size": size.as_json()}
            return
        # of a manifest that the pods read nobody here knows whether it has changed
        _launch(output, api, documents, again or as_it_lies, wait)


def _launch(output: Output, api: "KubeApi", documents: list[dict[str, Any]], again: bool, wait: bool) -> None:
    from orchestrator.launch import follow, launch

    state, made = launch(api, documents, again)
    job = documents[0]["metadata"]["name"]
    output.say(f"job {job} in {api.namespace}: {'submitted' if made else 'is there already'}, {state.line()}")
    if not wait:
        where = f"--namespace {api.namespace}"
        output.say(f"  see it:   raybooth jobs status {job} -w {where}")
        output.say(f"  its log:  raybooth jobs logs {job} -f {where}")
        output.result = {**state.as_json(), "created": made}
        return
    state = follow(api, job, lambda seen: output.say(f"  {seen.line()}"))
    end(output, state)
    output.result["created"] = made


def end(output: Output, state: Any) -> None:
    """Report a state that was waited for; one that failed is an error."""
    if state.state == "failed":
        raise state.failure()
    output.result, output.exit_code = state.as_json(), state.exit_code
    output.say(state.line())


def connect(namespace: str, context: str) -> "KubeApi":
    """The cluster that options name; raises `UserError` when there is none, or no client for it."""
    try:
        from cluster.kuberay import KubeApi
    except ModuleNotFoundError as error:
        from cluster.errors import UserError

        raise UserError(
            "the Kubernetes client is not installed",
            str(error),
            "pip install 'raybooth[kubernetes]'; --dry-run=client needs none",
        ) from error
    return KubeApi.connect(namespace or None, context or None)


def default_image() -> str:
    """The image of this very version, by the name that `k8s/` gives it."""
    from importlib.metadata import version

    return f"raybooth:{version('raybooth')}"


def ray_version() -> str:
    """Of Ray, which must be the image's."""
    from importlib.metadata import version

    return version("ray")


def print_yaml(documents: list[dict[str, Any]]) -> None:
    """Write objects to stdout, for kubectl: long texts line by line, nothing by reference to what stands above."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    print(yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=120), end="")

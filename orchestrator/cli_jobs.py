"""This file is where the commands over submitted campaigns read their options."""

from typing import Annotated

import typer

from orchestrator.cli_output import DebugOption, JsonOption, reporting
from orchestrator.cli_submit import Context, Namespace, connect, end

app = typer.Typer(
    no_args_is_help=True, help="See, follow and cancel campaigns that were submitted to Kubernetes."
)

Job = Annotated[str, typer.Argument(help="Name of the job, or of its campaign.", metavar="NAME")]


@app.command("list")
def show_all(
    namespace: Namespace = "", context: Context = "", as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the campaigns of a namespace, the newest first.

    Example:

      raybooth jobs list --namespace team-a
    """
    with reporting(as_json, debug) as output:
        from orchestrator.launch import jobs

        api = connect(namespace, context)
        found = jobs(api)
        output.result = {"namespace": api.namespace, "jobs": [state.as_json() for state in found]}
        for state in found:
            output.say(f"{state.facts['job']}  {state.line()}")
        if not found:
            output.say(f"there is no job in {api.namespace}")


@app.command("status")
def status(
    job: Job,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until it has ended, and exit as it did.")
    ] = False,
    namespace: Namespace = "",
    context: Context = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say where a submitted campaign stands, and what to do if it does not go on.

    Examples:

      raybooth jobs status night --namespace team-a

      raybooth jobs status night --watch --json
    """
    with reporting(as_json, debug) as output:
        from orchestrator.launch import follow, state_of
        from orchestrator.rayjob import job_name

        api = connect(namespace, context)
        if watch:
            end(output, follow(api, job_name(job), lambda seen: output.say(seen.line())))
            return
        state = state_of(api, job_name(job))
        output.result = state.as_json()
        output.say(state.line())


@app.command("logs")
def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it has ended.")] = False,
    namespace: Namespace = "",
    context: Context = "",
    debug: DebugOption = False,
) -> None:
    """Print what the driver of a submitted campaign prints, of its newest attempt.

    Example:

      raybooth jobs logs night -f --namespace team-a
    """
    with reporting(False, debug):
        from orchestrator.launch import log_lines
        from orchestrator.rayjob import job_name

        for line in log_lines(connect(namespace, context), job_name(job), follow):
            print(line, flush=True)


@app.command("cancel")
def stop(
    job: Job,
    namespace: Namespace = "",
    context: Context = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """End a submitted campaign and its pods. What trains is saved first; submitting it again goes on.

    Example:

      raybooth jobs cancel night --namespace team-a
    """
    with reporting(as_json, debug) as output:
        from orchestrator.launch import cancel
        from orchestrator.rayjob import job_name

        api, name = connect(namespace, context), job_name(job)
        cancel(api, name)
        output.result = {"job": name, "namespace": api.namespace, "state": "stopping"}
        output.say(f"{name} is ended: what trains is saved first")

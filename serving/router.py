"""This file is where Ray Serve asks which replica an image goes to."""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.affinity import Load, ranked
from serving.protocol import PRISTINE, ImageOrder


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Sends a subject's images to a replica that has the subject in memory; see `ranked`."""

    # A replica that draws is slow to say how busy it is, and Serve's 0.1 s would count that as no answer.
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 10.0

    def initialize_state(self, busy: int) -> None:
        """Called by Serve with what the deployment's configuration says."""
        self._busy = busy

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas to try, one after the other."""
        if pending_request:
            pending_request.routing_context.should_backoff = (
                True  # else a full house is asked without a pause
            )
        order = next(iter(pending_request.args), None) if pending_request else None
        is_subject = isinstance(order, ImageOrder) and order.subject != PRISTINE
        subject = f"{order.subject}@{order.version}" if is_subject and order else ""
        by_name = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        loads = {name: self._load(replica, subject) for name, replica in by_name.items()}
        return [[by_name[name]] for name in ranked(subject, loads, self._busy)]

    def _load(self, replica: RunningReplica, subject: str) -> Load:
        ongoing: Any = self._replica_queue_len_cache.get(replica.replica_id)
        resident = replica.routing_stats.get("resident", ())
        return Load(int(ongoing or 0), subject in resident)

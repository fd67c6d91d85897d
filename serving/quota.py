"""This file is where it is decided how often and how much at a time one key may ask. It has no clock of its own."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from serving.answers import ApiError

MOST_KEYS = 10_000  # that are remembered; one forgotten starts with a full bucket


@dataclass
class Quota:
    """The bucket of one key: a request takes a token, and tokens come back with time."""

    per_minute: float
    burst: int
    at_once: int
    tokens: float
    filled: float
    """When `tokens` was so."""
    under_way: int = 0

    @classmethod
    def full(cls, per_minute: float, burst: int, at_once: int, now: float) -> "Quota":
        """A key that has asked nothing yet."""
        return cls(per_minute, burst, at_once, float(burst), now)

    def fill(self, now: float) -> None:
        """What came back since the last look."""
        self.tokens = min(float(self.burst), self.tokens + max(now - self.filled, 0.0) * self.per_minute / 60)
        self.filled = now

    def take(self, now: float) -> None:
        """One request begins.

        Raises:
            ApiError: 429: too many in the last while, or too many at this moment.
        """
        self.fill(now)
        if self.under_way >= self.at_once:
            said = (
                f"too many requests at a time. {self.under_way} of this key are being answered, and it may have "
                f"{self.at_once}. Wait for one of them"
            )
            raise ApiError(429, said, "too_many_at_once", retry_after_s=1)
        if self.tokens < 1:
            wait = (1 - self.tokens) * 60 / self.per_minute
            said = (
                f"too many requests. This key may ask {self.per_minute:g} times a minute. Wait {wait:.1f} s"
            )
            raise ApiError(429, said, retry_after_s=wait)
        self.tokens -= 1
        self.under_way += 1

    def leave(self) -> None:
        """One request ends."""
        self.under_way -= 1

    def headers(self) -> dict[str, str]:
        """How things stand, for the client."""
        missing = self.burst - self.tokens
        return {
            "x-ratelimit-limit": f"{self.per_minute:g}",
            "x-ratelimit-remaining": str(int(self.tokens)),
            "x-ratelimit-reset": f"{missing * 60 / self.per_minute:.0f}",
        }


class Quotas:
    """The buckets of all keys."""

    def __init__(self) -> None:
        self._quotas: OrderedDict[str, Quota] = OrderedDict()

    def of(self, key: str, per_minute: float, burst: int, at_once: int, now: float) -> Quota:
        """A key's bucket; made full when it was not seen before, and adjusted when its rates have changed."""
        quota = self._quotas.setdefault(key, Quota.full(per_minute, burst, at_once, now))
        quota.per_minute, quota.burst, quota.at_once = per_minute, burst, at_once
        self._quotas.move_to_end(key)
        while len(self._quotas) > MOST_KEYS:
            self._quotas.popitem(last=False)
        return quota


@contextmanager
def taken(quota: Quota, now: float) -> Iterator[Callable[[], None]]:
    """Hold a place for one request; raises as `Quota.take`.

    Yields:
        What gives the place back before the block ends, once however often it is called.
    """
    quota.take(now)
    with ExitStack() as place:
        place.callback(quota.leave)
        yield place.close

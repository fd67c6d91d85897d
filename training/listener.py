"""This file is where a worker hears what is wished of the run that it trains, while it trains."""

import threading
from collections.abc import Callable
from contextlib import suppress

from cluster.mailbox import DROP, MailboxClient
from training.wish import Wish


class Listener:
    """Wishes of the campaign and of the platform; called once per step, which costs nothing.

    One worker of a gang listens, for all of them: what it wishes, they agree on. A thread waits in the mailbox.

    Args:
        mailbox: Of the campaign.
        reclaimed: Whether the platform has announced that it takes away a node of the gang.
    """

    def __init__(self, mailbox: MailboxClient, reclaimed: Callable[[], bool]) -> None:
        self._mailbox, self._reclaimed = mailbox, reclaimed
        self._wish, self._left = Wish.NONE, False
        self._lease = 0
        self._drops: set[tuple[int, int]] = set()  # lease and slot
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def begin(self, lease: int) -> None:
        """Listen for a lease; what was wished of another one is forgotten."""
        with self._lock:
            self._wish, self._left, self._lease = Wish.NONE, False, lease

    def of_one(self) -> Wish:
        """The same of a lease of one run: that it is to be dropped is said every time."""
        return Wish.DROP if self._drops and 0 in self.dropped() else self()

    def dropped(self) -> frozenset[int]:
        """The slots of the lease that are to be ended."""
        if not self._drops:
            return frozenset()
        with self._lock:
            return frozenset(slot for lease, slot in self._drops if lease == self._lease)

    def __call__(self) -> Wish:
        """What was wished of all runs of the lease since the last call."""
        if not self._left and self._reclaimed():
            self._left = True  # said once: a run that ends before it can be left is published
            return Wish.LEAVE
        with self._lock:
            wish, self._wish = self._wish, Wish.NONE
        return wish

    def _listen(self) -> None:
        heard = 0
        with suppress(Exception):  # the mailbox is gone, and its campaign with it
            while True:
                words = self._mailbox.asked(heard)
                heard += len(words)
                with self._lock:
                    for word in words:
                        wish, *about = word.split()
                        if wish == DROP:
                            self._drops.add((int(about[0]), int(about[1])))
                        else:
                            self._wish = max(self._wish, Wish[wish.upper()])

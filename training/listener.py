"""This file is where a worker hears what is wished of the run that it trains, while it trains."""

import threading
from collections.abc import Callable
from contextlib import suppress

from cluster.mailbox import MailboxClient
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
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def begin(self) -> None:
        """Forget what was wished of another run."""
        with self._lock:
            self._wish, self._left = Wish.NONE, False

    def __call__(self) -> Wish:
        """What was wished since the last call."""
        if not self._left and self._reclaimed():
            self._left = True  # said once: a run that ends before it can be left is published
            return Wish.LEAVE
        if self._wish is Wish.NONE:
            return Wish.NONE
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
                    self._wish = max(self._wish, *(Wish[word.upper()] for word in words))

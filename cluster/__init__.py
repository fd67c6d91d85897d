"""Where work runs and what lasts: Ray session, mailbox, storage, registry."""

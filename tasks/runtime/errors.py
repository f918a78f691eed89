"""The exceptions that end a stage."""

from __future__ import annotations


class StageError(Exception):
    """An error that the user can correct; the message is one sentence that says what is wrong and what to do."""


class Preempted(BaseException):
    """SIGTERM arrived: save what is needed to continue, then exit with `stage.PREEMPTED`."""

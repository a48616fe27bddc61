"""Exceptions for expected exits."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct: one line that names file, row, key or flag and the remedy; exit code 2."""


class Preempted(Exception):
    """The machine is being preempted and everything is saved: the same command resumes the run."""


class Lost(Exception):
    """Another process of this job was lost or did not start: all have to be restarted together."""

"""The two ways a command ends badly, and the exit code of each."""


class UserError(Exception):
    """A mistake in what the user typed or configured: says what, where and what to type instead (exit code 2)."""

    exit_code = 2


class Failure(Exception):
    """Work that was asked for correctly and did not succeed (exit code 1)."""

    exit_code = 1

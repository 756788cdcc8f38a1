"""Why something failed, in one line."""

from workbench.errors import Failure, UserError


def reason(error: BaseException, line: int = 0) -> str:
    """One line of what ``error``, or the cause that Ray wrapped in it, says, after its class; the class alone where it
    says nothing."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, BaseException):
        cause = error
    text = (str(cause).strip().splitlines() or [""])[line]
    if isinstance(cause, UserError | Failure):
        return text
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__

"""The one exception for the user's input; our own slips are plain assertions."""


class UserError(Exception):
    """Something the user can mend: what happened, the likely cause, and the cure.

    The command line prints it as one paragraph on stderr and exits with code 2 (:data:`EXIT_CODE`).
    """

    EXIT_CODE = 2

    def __init__(self, what: str, *, cause: str = "", cure: str = "") -> None:
        super().__init__(what)
        self.what, self.cause, self.cure = what, cause, cure

    def __str__(self) -> str:
        lines = [self.what]
        if self.cause:
            lines.append(f"  Cause: {self.cause}")
        if self.cure:
            lines.append(f"  Cure:  {self.cure}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:  # keeps cause and cure when it crosses a process boundary
        return (_rebuild, (type(self), self.what, self.cause, self.cure))


def _rebuild(cls: type[UserError], what: str, cause: str, cure: str) -> UserError:
    return cls(what, cause=cause, cure=cure)

"""Exceptions that a user can act on. The command line prints them as one line, exit code 2."""


class UserError(ValueError):
    """Something that a user asked for cannot be done. The message says in one line what, and how to change it."""


class NonFiniteError(UserError):
    """A gradient is NaN or infinite. It is raised before the parameters change."""

"""Errors that a user can fix. The command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """A request cannot be fulfilled. The message says in one line what is wrong and how to fix it."""


class NonFiniteError(UserError):
    """A gradient is NaN or infinite. Raised before the parameters change."""

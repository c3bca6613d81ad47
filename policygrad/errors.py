"""The one exception that means: the user can mend this. The command line prints it as one line, exit code 2."""


class UserError(ValueError):
    """Something a user asked for cannot be done. The message says what, and how to mend it, in one line."""

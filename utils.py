"""What every process of a run needs: errors for users, distributed set-up, checkpoints, logging."""


class UserError(Exception):
    """The user's input cannot be used; the message is one line that names the thing and the mend.

    ``main.py`` prints it without a traceback and exits with code 2.
    """

"""The two ways a run ends badly, told apart by what a person can do about them."""


class UserError(Exception):
    """Something in the options or the input is wrong; nothing was started (exit code 2).

    The message is one line: what is wrong, where, and what to do.
    """


class StageError(Exception):
    """A stage failed after work had begun (exit code 1); finished stages are kept.

    The message is one line and names the stage's log.
    """

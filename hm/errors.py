"""The exceptions that are no fault of the code."""


class UserError(ValueError):
    """A wrong setting or input. The message is one sentence: the setting, its value, the remedy.

    Entry points print the message without a traceback and exit with status 2.
    """


class Interrupted(Exception):
    """Training was asked to stop; a checkpoint holds every step that was done."""

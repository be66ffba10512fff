"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A wrong setting or input. The message is one sentence: the setting, its value, the remedy.

    Entry points print the message without a traceback and exit with status 2.
    """

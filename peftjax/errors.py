"""The one exception a user's mistake raises: its text names the thing and the remedy."""


class PeftError(ValueError):
    """Input that peftjax cannot use: a wrong pattern, shape, file, option or combination.

    The command line prints its text as one sentence and exits with code 2.
    """

"""The one exception a user's mistake raises: its text names the thing and the remedy."""

_START, _END = 1000, 500  # characters of a text that are shown


class PeftError(ValueError):
    """Input that peftjax cannot use: a wrong pattern, shape, file, option or combination.

    The command line prints its text as one sentence and exits with code 2. A text that shows a value or a
    name of any length is cut in the middle.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(_cut(str(text)))


class LostProcess(PeftError):
    """Another process of the run is gone, and this one cannot go on; the command line exits with 1."""


def _cut(text: str) -> str:
    left_out = len(text) - _START - _END
    if left_out <= 0:
        return text
    return f"{text[:_START]} ... ({left_out} characters) ... {text[-_END:]}"

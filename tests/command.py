"""Commands as a user runs them, for the tests."""

import pytest

from peftjax.cli.main import main


def run(capsys, *arguments):
    """What the command prints."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line that a command ends with on bad input."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("peftjax: ")
    return lines[-1]

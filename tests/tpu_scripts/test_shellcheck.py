"""All scripts pass shellcheck, which the lint extra installs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cluster import ROOT

# That of this environment alone: another version says other things.
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed: pip install '.[lint]'")
def test_shellcheck_is_silent():
    scripts = [
        *ROOT.glob("tpu_scripts/**/*.sh"),
        ROOT / "tests" / "tpu_scripts" / "fake_tool.sh",
        ROOT / ".ci" / "run",
    ]
    assert len(scripts) > 10
    done = subprocess.run([SHELLCHECK, *scripts], cwd=ROOT / "tpu_scripts", capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0

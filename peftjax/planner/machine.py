"""The machines a step can be compiled for, none of which has to be there.

    "cpu"                        the CPU of this process
    "h100", "h200"               one NVIDIA GPU, from the description beside this file
    "h100:8", "h200:8", ...      so many of them in one host
    "v5e:2x2", "v6e:4x4", ...    one chip of a TPU topology: "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2",
                                 "tpu7x:2x2x1" and larger

A TPU needs its compiler, a GPU NVIDIA's; both install without the hardware, see `docs/guides/memory.md`. The
variables of libtpu are set here while it starts, and autotuning (which needs a GPU) is turned off for the one
compilation. Only attention "flash" for a GPU needs cuDNN.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata, resources
from importlib.util import find_spec

import jax

from peftjax.core import compat
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest

GPUS = ("h100", "h200")
GPU = re.compile(rf"({'|'.join(GPUS)})(:([1-9]\d*))?")
TPU = re.compile(r"(v\d+[a-z]*|tpu\w+):\d+(x\d+)+")
TPU_EXAMPLES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu would otherwise ask the cloud's metadata server for, without effect on the topology; and a
setting that lets several processes compile at once."""


@dataclass(frozen=True)
class Machine:
    """A device to compile for.

    Attributes:
        name: as it was asked for.
        platform: as `lower` knows it, "cpu", "cuda" or "tpu".
        devices: its devices, of which a program for one takes the first.
        options: of the compiler.
    """

    name: str
    platform: str
    devices: tuple[jax.Device, ...]
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def device(self) -> jax.Device:
        """The device of a program for one."""
        return self.devices[0]


def find_machine(name: str) -> Machine:
    """The target of that name.

    Raises:
        PeftError: the name is unknown, or the compiler is not installed.
    """
    if name == "cpu":
        return Machine(name, "cpu", tuple(jax.devices("cpu")))
    if found := GPU.fullmatch(name):
        return _gpu(name, found[1], int(found[3] or 1))
    if TPU.fullmatch(name):
        return _tpu(name)
    known = ("cpu", *GPUS, *TPU_EXAMPLES)
    raise PeftError(
        f"no target is called {name!r}; closest: {nearest(name, known)} (GPUs of a host: type:N, TPU chips: "
        "type:AxB or type:AxBxC)"
    )


def gpu_description(name: str) -> str:
    """What the compiler needs to know of a GPU: the text of a `GpuTargetConfigProto`."""
    return (resources.files("peftjax.planner") / f"{name}.pbtxt").read_text()


def _gpu(name: str, kind: str, count: int) -> Machine:
    plugin = next((p for p in ("cuda13", "cuda12") if _is_installed(f"jax_plugins.xla_{p}")), None)
    wanted = plugin or "cuda13"
    install = (
        f"pip install --no-deps jax-{wanted}-pjrt=={jax.__version__} jax-{wanted}-plugin=={jax.__version__} "
        "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt"
    )
    if plugin is None:
        raise PeftError(f"target {name!r} needs NVIDIA's compiler: {install}")
    found = metadata.version(f"jax-{plugin}-pjrt")
    if found != jax.__version__:
        raise PeftError(f"target {name!r}: jax-{plugin}-pjrt is {found} and jax {jax.__version__}: {install}")
    devices = compat.topology_devices(
        "cuda", name, topology=f"1x1x{count}", target_config=gpu_description(kind)
    )  # one partition of one host
    return Machine(name, "cuda", devices, {"xla_gpu_autotune_level": 0})


def _tpu(name: str) -> Machine:
    if not _is_installed("libtpu"):
        raise PeftError(f"target {name!r} needs the TPU's compiler: pip install libtpu")
    with _defaults(LIBTPU):
        try:
            devices = compat.topology_devices("tpu", name)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PeftError(
                f"libtpu refuses the topology {name!r} ({reason}); closest: {nearest(name, TPU_EXAMPLES)}"
            ) from error
    return Machine(name, "tpu", devices)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent
        return False


@contextmanager
def _defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with these variables where it does not set them; afterwards as before."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)

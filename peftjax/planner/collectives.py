"""The collectives of a compiled step, read from its text: how many run, and what they bring each device.

Every turn of a loop is counted, by the trip count that the compiler notes, or else by the number that the
loop's condition compares with and the step of what it counts, from 0; a loop without either counts once. A
collective that a TPU's compiler has spread over others' work is written down several times under one channel,
and counts once; those of a device's own code (`shard_map`) all have channel 1, and are told apart by their
result and where they are from. Bytes are those of a device's result, of a reduce-scatter those of its
operand. Of n devices at least

    (n - 1) / n of them    all-gather, reduce-scatter, all-to-all: a device has its own part
    all of them            all-reduce, collective-permute

pass its links, in one direction, whatever the algorithm.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_NUMBER = re.compile(r"^\s*%?([\w.\-]+) = [su]\d+\[\].* constant\((\d+)\)")
_COMPARED = re.compile(r"^\s*ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\)")
_ELEMENT = re.compile(r"^\s*%?([\w.\-]+) = .* get-tuple-element\([^)]*\), index=(\d+)")
_SUM = re.compile(r"^\s*%?([\w.\-]+) = .* add\(%?([\w.\-]+), %?([\w.\-]+)\)")
_RESULT = re.compile(r"^\s*ROOT .* tuple\((.*)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\w+)?\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=\d+")
_OF_SHARD_MAP = "channel_id=1"
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")  # [groups, devices of one]
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}")  # its axes; those of a group
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_TAKEN = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")  # an axis, or a part of one: (before it) its size


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        shapes: of the arrays of its result.
        nbytes: what one run of it brings a device.
        runs: how often it runs in a call of the program.
        group: devices that take part; 2 where the text does not say.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    runs: int
    group: int = 2

    @property
    def crossing(self) -> float:
        """Bytes of one run that pass a device's links at least, in one direction."""
        if self.kind in ("all-reduce", "collective-permute"):
            return float(self.nbytes * (self.group > 1))
        return self.nbytes * (self.group - 1) / self.group


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in a call of a program.

    Attributes:
        runs: how many run.
        nbytes: what they bring a device.
        crossing: bytes that pass its links at least, in one direction.
    """

    runs: int
    nbytes: int
    crossing: float = 0.0


def by_kind(text: str) -> dict[str, Traffic]:
    """The collectives of a compiled program, those of a kind together.

    Args:
        text: `compiled.as_text()`.
    """
    found: dict[str, Traffic] = {}
    for one in collectives(text):
        so_far = found.get(one.kind, Traffic(0, 0))
        found[one.kind] = Traffic(
            so_far.runs + one.runs,
            so_far.nbytes + one.runs * one.nbytes,
            so_far.crossing + one.runs * one.crossing,
        )
    return found


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
        text: `compiled.as_text()`.
    """
    bodies, entry = _computations(text)
    found: dict[str, Collective] = {}

    def walk(name: str, runs: int) -> None:
        for line in bodies.get(name, ()):
            if one := _COLLECTIVE.match(line):
                channel = _CHANNEL.search(line)
                own = str(len(found)) if channel is None else channel[0]
                if own == _OF_SHARD_MAP and (origin := _ORIGIN.search(line)):
                    own = f"{one[2]} {_ARRAY.findall(one[1])} {origin[1]}"
                if own not in found or runs < found[own].runs:
                    found[own] = _read(one, runs)
            for called, times in _called(line, bodies):
                walk(called, runs * times)

    walk(entry, 1)
    return list(found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _called(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    if loop := _WHILE.search(line):
        trips = _TRIPS.search(line)
        yield loop[2], int(trips[1]) if trips else _trips(bodies.get(loop[1], ()), bodies.get(loop[2], ()))
        return
    for name in _CALLED.findall(line):
        yield name, 1
    if branches := _BRANCHES.search(line):
        for name in branches[1].split(","):
            yield name.strip().lstrip("%"), 1


def _trips(condition: Sequence[str], body: Sequence[str]) -> int:
    """The turns of a loop, by the one whole number of its condition; 1 where that is not one."""
    bounds = list(_numbers(condition).values())
    return math.ceil(bounds[0] / _step(condition, body)) if len(bounds) == 1 else 1


def _step(condition: Sequence[str], body: Sequence[str]) -> int:
    """What a turn adds to the element of the loop's state that is compared; 1 where that is not found."""
    elements = {found[1]: int(found[2]) for line in condition if (found := _ELEMENT.match(line))}
    compared = next((found for line in condition if (found := _COMPARED.match(line))), None)
    result = next((found for line in body if (found := _RESULT.match(line))), None)
    if compared is None or compared[1] not in elements or result is None:
        return 1
    name = re.findall(r"%([\w.\-]+)", result[1])[elements[compared[1]]]
    added = next((found for line in body if (found := _SUM.match(line)) and found[1] == name), None)
    numbers = _numbers(body)
    return 1 if added is None else numbers.get(added[2]) or numbers.get(added[3]) or 1


def _numbers(lines: Sequence[str]) -> dict[str, int]:
    """The whole numbers among the lines of a computation, by name."""
    return {found[1]: int(found[2]) for line in lines if (found := _NUMBER.match(line))}


def _read(found: re.Match[str], runs: int) -> Collective:
    result, kind, started, rest = found.groups()
    arrays = [
        (name, tuple(map(int, filter(None, sizes.split(","))))) for name, sizes in _ARRAY.findall(result)
    ]
    if started:  # the operands are in the result too, and on a TPU counters
        arrays = [array for array in arrays if array[0] not in ("u32", "s32") or array[1]]
        arrays = arrays[len(arrays) // 2 :] or arrays
    nbytes = sum(math.ceil(_bits(name) * math.prod(shape) / 8) for name, shape in arrays)
    group = _group(rest)
    if kind == "reduce-scatter":
        nbytes *= group
    return Collective(kind, tuple(shape for _, shape in arrays), nbytes, runs, group)


def _group(text: str) -> int:
    """The devices that take part in a collective; 2 where that is not said."""
    if counted := _COUNTED.search(text):
        return int(counted[1])
    if listed := _LISTED.search(text):
        return len(listed[1].split(","))
    if named := _OF_MESH.search(text):
        sizes = dict(_AXIS.findall(named[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in _TAKEN.findall(named[2]))
    return 2


def _bits(name: str) -> int:
    """Of a number of an HLO type, such as "bf16" or "s4"."""
    bits = re.search(r"\d+", name)
    return 8 if name == "pred" or bits is None else int(bits[0])

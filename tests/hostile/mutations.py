"""Damage to files: of their bytes, and of the values in them. Everything is drawn by hypothesis."""

import json
import math

from hypothesis import strategies as st

HOSTILE = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, math.nan, math.inf, -0.0),
    *(
        "",
        "(",
        "*",
        "[a",
        r"(?:\w|\w\w|/)*[!?]",
        "all-linear",
        "..",
        "/",
        "a/b",
        "\0",
        "x" * 5000,
        "0",
        "ß\u2028",
    ),
    *([], [[]], [None], ["head"], [0, 1], ["("], {}, {"a": 1}, {"": {}}, {"head": 2}, {"name": "lora"}),
]


def places(value, at=()):
    """The paths of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from ([at] if at else [])
    for key, part in inner:
        yield from places(part, (*at, key))


def changed(draw, value):
    """A JSON value with one part of it removed, replaced, renamed, wrapped or repeated."""
    value = json.loads(json.dumps(value))
    found = list(places(value))
    if not found or draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from(HOSTILE))
    *parents, last = draw(st.sampled_from(found))
    parent = value
    for key in parents:
        parent = parent[key]
    what = draw(
        st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap", "deep", "number"])
    )
    if what == "remove":
        del parent[last]
    elif what == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["", "x", last.upper(), "name"]))] = parent.pop(last)
    elif what == "wrap":
        parent[last] = draw(st.sampled_from([[parent[last]], {"a": parent[last]}, str(parent[last])]))
    elif what == "deep":
        for _ in range(draw(st.sampled_from([20, 300, 900]))):
            parent[last] = [parent[last]]
    elif what == "number":
        parent[last] = draw(st.one_of(st.integers(), st.floats()))
    else:
        parent[last] = draw(st.sampled_from(HOSTILE))
    return value


def damaged_json(draw, content):
    """A JSON text with changed values, or damaged as bytes."""
    if draw(st.integers(0, 4)) == 0:
        return damaged_bytes(draw, content)
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        value = changed(draw, value)
    return json.dumps(value).encode()


def damaged_lines(draw, content):
    """Lines of JSON, one of them damaged."""
    lines = content.splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = damaged_json(draw, lines[number])
    return b"\n".join(lines) + b"\n"


def damaged_bytes(draw, content):
    """Bytes cut off, put in, removed or repeated."""
    start, end = sorted(draw(st.integers(0, len(content))) for _ in range(2))
    piece = draw(
        st.sampled_from([b"\0", b"\xff", b'"', b"{", b"[" * 2000, b"\n", b",", b": ", b"- ", b"\xef\xbb\xbf"])
    )
    what = draw(st.sampled_from(["cut", "insert", "remove", "repeat", "over"]))
    return {
        "cut": content[:start],
        "insert": content[:start] + piece + content[start:],
        "remove": content[:start] + content[end:],
        "repeat": content[:end] + content[start:],
        "over": content[:start] + piece + content[start + len(piece) :],
    }[what]


def damaged_tensors(draw, content):
    """A safetensors file with a changed header, or damaged as bytes."""
    if draw(st.booleans()):
        return damaged_bytes(draw, content)
    end = 8 + int.from_bytes(content[:8], "little")
    header = damaged_json(draw, content[8:end])
    size = draw(st.sampled_from([len(header)] * 4 + [0, 2**40, 2**63]))
    return size.to_bytes(8, "little") + header + content[end:]

"""A YAML file of options: read strictly, so that a line of it cannot mean something else than it says."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from peftjax.core.errors import PeftError
from peftjax.io.files import require_file

_LARGEST = 2**20  # bytes
Scalar = str | bool | int | float | None


class _Strict(yaml.SafeLoader):
    """Refuses aliases, which can make a short file endless, and names that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "an alias has no use here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                message = f"{key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads '1e-3', which has no point, as a text.
_Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_options(file: Path) -> dict[str, Scalar | list[Scalar]]:
    """The options of a YAML file by name, each a value or a list of values.

    Raises:
        PeftError: the file cannot be read or is no mapping of names to such values.
    """
    require_file(file)
    try:
        if file.stat().st_size > _LARGEST:
            raise PeftError(f"the options file {file} is larger than {_LARGEST:,} bytes")
        options = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PeftError(
            f"cannot read the options file {file}: {getattr(error, 'strerror', error)}"
        ) from error
    except ValueError as error:
        raise PeftError(f"the options file {file} is not YAML: {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise PeftError(f"the options file {file} must hold options by name, such as 'rank: 8'")
    for name, value in options.items():
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, Scalar):
                raise PeftError(
                    f"{file}: {str(name)[:60]!r} is a {type(part).__name__}; an option is a text, a number, "
                    "true, false or a list of those"
                )
    return options


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: when it is not YAML, nests too deeply, or has an alias or one name twice.
    """
    try:
        return yaml.load(text, _Strict)  # a SafeLoader: no objects are made
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except (TypeError, AttributeError, OverflowError, LookupError) as error:  # PyYAML's own on odd tags
        raise ValueError(f"a value cannot be read ({str(error)[:100]})") from error

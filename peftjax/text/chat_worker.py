"""The process in which a chat template runs, with bounds on its memory, processor time and text.

It is started by its path and imports nothing of peftjax. It reads a JSON line with the source, answers with
one, and then answers each conversation, a line, with its text or the error.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY = 2**30  # bytes
SECONDS = 20
LETTERS = 2**24
START_NAME, END_NAME = "peftjax_generation_start", "peftjax_generation_end"


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    clock = [datetime.now()]
    template = None
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            given = json.loads(line)
            if template is None:
                template, answer = _compile(given["source"], clock)
            else:
                clock[0] = datetime.fromisoformat(given["now"])
                answer = {"text": template.render(given["variables"])}
                if len(answer["text"]) > LETTERS:
                    answer = {"error": f"its text is longer than {LETTERS} characters"}
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
        except Exception as error:  # A program of somebody else can fail in every way.
            answer = {"error": (str(error) or type(error).__name__)[:1000]}
        print(json.dumps(answer), flush=True)


def _compile(source: str, clock: list[datetime]) -> tuple[Any, dict[str, Any]]:
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_extension(), "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: clock[0].strftime(form)
    names = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), {"marks": START_NAME in names}


def _to_json(value: Any, **options: Any) -> str:
    """JSON as it stands: Jinja's own filter escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _generation_extension() -> type:
    """The tag `{% generation %}`: its body, between two variables that `render` fills."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.Name(name, "load")]) for name in (START_NAME, END_NAME))
            return nodes.Scope([start, *body, end]).set_lineno(line)

    return Generation


if __name__ == "__main__":
    _serve()

"""Chat templates, rendered in a child process under limits.

A chat template is a program that came with a model. Jinja's sandbox keeps it from Python's internals, but
not from `'a' * 10**9` or endless loops, and no list of forbidden operations would be complete. So a child
renders. It has a limit on memory (on Linux) and on output, and is killed when it takes too long. It inherits
no environment variables but those with which Python finds its libraries, so no secrets. One child serves
all renders of one template.

This file is also the child's program. It imports only Jinja and the standard library, and starts in a
fraction of a second. Requests and replies are lines of JSON, strictly in turn.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from datetime import date, datetime
from multiprocessing.connection import wait

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY_LIMIT = 1 << 29  # bytes of address space
OUTPUT_LIMIT = 1 << 24  # characters of one rendered conversation
NEEDED = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPLATLIBDIR", "__PYVENV_LAUNCHER__", "SYSTEMROOT")
"""Variables without which some Pythons do not start; so are all that begin with `DYLD_`."""


class TemplateError(ValueError):
    """The template does not compile, refuses a conversation, or ran over a limit."""


class OutputLimitError(TemplateError):
    """The rendered conversation is longer than anything that could be trained on."""


class StoppedError(TemplateError):
    """It ran for too long, or its process died. No fault of one conversation: the next would fare alike."""


class TemplateProcess:
    """Renders one chat template.

    Args:
        source: the Jinja template.
        variables: what every render sees, such as bos_token.
        today: what `strftime_now` tells the template.
        time_limit: seconds for one call of `render`.
    """

    def __init__(self, source: str, variables: dict[str, str], today: date, time_limit: float):
        self._template = {"source": source, "variables": variables, "today": today.isoformat()}
        self._time_limit = time_limit
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(self, jobs: list[dict]) -> list[str]:
        """One text per job; a job holds variables of the template: messages, tools and so on."""
        with self._lock:
            reply = self._ask(json.dumps({**self._template, "jobs": jobs}))
        if "error" in reply:
            raise (OutputLimitError if reply.get("long") else TemplateError)(reply["error"])
        return reply["texts"]

    def _ask(self, request: str) -> dict:
        if self._child is None:
            try:
                self._child = _Child()
            except OSError as error:
                raise StoppedError(f"the chat template's process does not start: {error}") from None
            weakref.finalize(self, _stop, self._child)
        child, line = self._child, ""
        with contextlib.suppress(BrokenPipeError):  # the child is gone: there is no line to read either
            child.stdin.write(request + "\n")
            child.stdin.flush()
        overdue = not wait([child.stdout], self._time_limit)
        if not overdue:
            line = child.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        _stop(child)
        self._child = None
        if overdue:
            raise StoppedError(f"the chat template ran for more than {self._time_limit:g} s and was stopped")
        child.told.seek(0)
        said = " ".join(child.told.read().decode(errors="replace").split())[-500:]
        raise StoppedError(f"the chat template's process ended with code {child.returncode}{said and ': ' + said}")


class _Child(subprocess.Popen):
    """What it writes on stderr, by which nobody waits, is in the file `told`."""

    def __init__(self):
        self.told = tempfile.TemporaryFile()  # noqa: SIM115  (closed when the child is forgotten)
        kept = {name: value for name, value in os.environ.items() if name in NEEDED or name.startswith("DYLD_")}
        super().__init__(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.told,
            encoding="ascii",
            env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the parent; the child ends when its input does
        )


def _stop(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()
    child.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # a request it never read; the file is closed all the same
        child.stdin.close()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the body, between two variables that a job may give."""

    tags = {"generation"}  # noqa: RUF012  (jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line)
            for name in ("generation_start", "generation_end")
        )
        return [start, *body, end]


@functools.cache
def compile_template(source: str, today: date) -> jinja2.Template:
    """The template in the environment that chat templates are written for, with a fixed date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    midnight = datetime(today.year, today.month, today.day)
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": midnight.strftime}
    return environment.from_string(source)


def _serve() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            template = compile_template(request["source"], date.fromisoformat(request["today"]))
            texts = [_render(template, {**request["variables"], **job}) for job in request["jobs"]]
            reply = {"texts": texts}
        except OutputLimitError as error:
            reply = {"error": str(error), "long": True}
        except MemoryError:
            reply = {"error": f"the chat template needs more than {MEMORY_LIMIT >> 20} MiB of memory"}
        except Exception as error:  # whatever a foreign program raises is its message to the user
            raised = type(error) is jinja2.TemplateError  # by itself, with `raise_exception`
            words = "refuses this" if raised else f"fails with {type(error).__name__}"
            reply = {"error": f"the chat template {words}: {error}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _render(template: jinja2.Template, variables: dict) -> str:
    pieces, length = [], 0
    for piece in template.generate(**variables):
        length += len(piece)
        if length > OUTPUT_LIMIT:
            raise OutputLimitError(f"more than {OUTPUT_LIMIT} characters")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    _serve()

import os
import sys
import time
from datetime import date

import pytest

from jaxft.data.template_process import TemplateError, TemplateProcess


def process(source: str, time_limit: float = 20.0) -> TemplateProcess:
    return TemplateProcess(source, {"bos_token": "<s>"}, date(2024, 7, 26), time_limit)


def test_renders_as_transformers_does():
    source = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "    {{ m.content | tojson }}|{{ namespace(x=1).x }}|{{ strftime_now('%d %b %Y %H') }}\n{% endfor %}"
    )
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": "<é\ue000>"}]
    assert process(source).render([{"messages": messages}]) == ['<s>\n    "<é\ue000>"|1|26 Jul 2024 00\n']


def test_generation_blocks_come_between_variables():
    source = "a{%- generation %}b{% endgeneration %}c"
    jobs = [{}, {"generation_start": "[", "generation_end": "]"}]
    assert process(source).render(jobs) == ["abc", "a[b]c"]


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ 'a' * 10**9 }}", "MiB of memory"),
        ("{{ 'a' | center(10**10) }}", "MiB of memory"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "of memory",
        ),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}aaaaaaaaaaaa{% endfor %}{% endfor %}",
            "characters",
        ),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "^the chat template refuses this: roles must alternate"),
        ("{{ 'a' + eos_token }}", "^the chat template fails with UndefinedError: 'eos_token' is undefined"),
        ("{% if x", "TemplateSyntaxError"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_hostile_and_broken_templates_are_refused(source, reason):
    if reason == "MiB of memory" and not os.path.exists("/proc"):
        pytest.skip("memory is limited on Linux only")
    with pytest.raises(TemplateError, match=reason):
        process(source).render([{"messages": []}])


def test_endless_loop_is_stopped_and_the_next_render_works():
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    renderer = process("{% if stuck %}" + loops + "{% endif %}done", time_limit=1.5)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"more than 1\.5 s"):
        renderer.render([{"stuck": True}])
    assert time.monotonic() - started < 10
    assert renderer.render([{}]) == ["done"]


def test_a_child_that_dies_is_reported_and_replaced():
    renderer = process("done")
    renderer.render([{}])
    renderer._child.kill()
    renderer._child.wait()
    with pytest.raises(TemplateError, match="ended with code -9"):
        renderer.render([{}])
    assert renderer.render([{}]) == ["done"]


def test_no_secret_reaches_the_child(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary")
    renderer = process("done")
    renderer.render([{}])
    if os.path.exists("/proc"):
        with open(f"/proc/{renderer._child.pid}/environ", "rb") as environment:
            assert b"canary" not in environment.read()


@pytest.fixture
def python(tmp_path, monkeypatch):
    """`python(lines)`: sys.executable is a program of the shell that does this."""

    def make(lines: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return make


def test_the_child_gets_what_python_needs_to_start_and_no_secret(python, tmp_path, monkeypatch):
    needed = {"LD_LIBRARY_PATH": "/opt/lib", "PYTHONHOME": sys.base_prefix, "DYLD_FALLBACK_LIBRARY_PATH": "/x"}
    for name, value in {**needed, "HF_TOKEN": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "LD_PRELOADED": "x"}.items():
        monkeypatch.setenv(name, value)
    python(f'env > "{tmp_path}/env"; exec "{sys.executable}" "$@"')
    assert process("done").render([{}]) == ["done"]
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert found.items() >= needed.items()
    assert {*found} - {*needed} <= {"PYTHONPATH", "PWD", "_", "SHLVL", "OLDPWD"}


@pytest.mark.parametrize(
    "lines, message",
    [
        ("echo 'libpython3.so: cannot open shared object file' >&2; exit 127", "code 127: libpython3.so: cannot open"),
        ("echo one >&2; echo two >&2; exit 1", "code 1: one two"),
        ("exit 3", "code 3"),
        ("head -c 200000 /dev/zero | tr '\\0' x >&2; exit 4", "code 4: " + "x" * 500),
    ],
)
def test_a_child_that_cannot_start_says_why(python, lines, message):
    python(lines)
    with pytest.raises(TemplateError) as error:
        process("done").render([{}])
    assert str(error.value).startswith(f"the chat template's process ended with {message}")


def test_a_python_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateError, match=r"process does not start: .*No such file or directory: '/nowhere/python'"):
        process("done").render([{}])

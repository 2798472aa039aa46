import os
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
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
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

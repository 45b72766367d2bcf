"""Chat templates: the model's own, and hostile ones."""

from __future__ import annotations

import resource
import signal
import time

import pytest

from llambo.worker.llama import prompt as prompts
from llambo.worker.llama.prompt import BadPrompt, Template, memory_limit

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def template(source: str = CHATML) -> Template:
    return Template(source, bos="<s>", eos="</s>")


def test_a_template_is_filled_in() -> None:
    assert template().render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template("{{ bos_token }}{{ messages[0].content | tojson }}").render(HELLO) == '<s>"Hello"'
    assert template("{% generation %}{{ messages[0].role }}{% endgeneration %}").render(HELLO) == "user"


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ missing.attribute.again }}",
    "{{ range(10 ** 9) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * (10 ** 9) * 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ 'x'.ljust(10 ** 10) }}{{ '{:>9999999999}'.format('x') }}",
    "{% set n = namespace(v='x') %}{% for i in range(200) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
    "{% set n = namespace(v=3) %}{% for i in range(200) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "{{ 'x' | center(10 ** 10) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages | map(attribute='__class__') | list | first | attr('__base__') }}",
    "{{ '%s' | format(messages.__init__) }}{{ '{0.__class__}'.format(messages) }}",
    "{{ messages[10 ** 30] }}",
    "{{ strftime_now(1) }}",
    "{% if %}",
    "{{ (" + "(" * 500 + "1" + ")" * 500 + ") }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_fails_and_that_is_all(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RENDER_S", 0.3)
    began = time.monotonic()
    try:
        text = template(source).render(HELLO)
    except BadPrompt as error:
        assert "chat template" in str(error)  # noqa: PT017  # both outcomes are right
    else:
        assert "class '" not in text and "subclass" not in text and "root:" not in text
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert resource.getrlimit(resource.RLIMIT_AS) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def test_percent_still_means_what_it_means() -> None:
    source = "{{ 7 % 4 }} {{ '%s: %03d' % ('x', 7) }} {{ '%-20s|' % 'x' }}"
    assert template(source).render(HELLO).split() == ["3", "x:", "007", "x", "|"]


def test_a_limit_on_memory_is_an_error_and_over_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory_limit(10**8):
        bytearray(10**10)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(2 * 10**8)) == 2 * 10**8

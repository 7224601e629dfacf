"""A chat template is untrusted code: whatever it does, the command ends and names the template."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_cli import bounded
from qlora_cli.data.rendering import render_timer
from qlora_cli.data.rows.column_formats import RowLayout
from qlora_cli.data.rows.examples import Conversation, RowError
from qlora_cli.data.tokenizing.encode import Encoder, TextTokenizer
from qlora_cli.data.tokenizing.tokens import RowTokenizer
from qlora_cli.errors import ModelError
from qlora_cli.events import Noted
from qlora_cli.hardware.counters import peak_host_bytes
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.objectives import DataFormat
from qlora_cli.tokenizing import template_rendering
from qlora_cli.tokenizing.chat_template import choose_chat_template
from qlora_cli.tokenizing.template_rendering import (
    TemplateRefusalError,
    render,
    render_all,
    try_template,
    within_limits,
)
from qlora_cli.units import GIB
from tests.conftest import Recorder
from tests.unit.tokenizing.test_tokenizer import write_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ITSELF = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
FOR_HOURS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MANY_CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
OF_A_SCHEMA = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% macro f(v) %}{% if v is mapping %}{{ f(v.a) }}{% endif %}{% endmacro %}{{ f(tools[0]) }}"
)
# Single operations that take gigabytes before any counter can run.
AT_ONCE = (
    "'x' * 10**9",
    "[0] * 10**9",
    "10**(10**11)",
    "'%1000000000d' % 1",
    "'%.1000000000f' % 1.5",
    "'{:>1000000000}'.format(1)",
    "'%1000000000d'|format(1)",
    "'x'.ljust(10**9)",
    "'x'.rjust(10**9)",
    "'x'.zfill(10**9)",
    "'\\t'.expandtabs(10**9)",
    "'x'|center(10**9)",
    "'x\\ny'|indent(10**9)",
    "messages|tojson(indent=10**9)",
    "[1]|batch(10**9, 0)|list",
    "'a'.replace('', 'x' * 10**9)",
    "('x' * 10**6)|replace('x', 'x' * 10**6)",
    "(['x' * 10**6] * 10**6)|join",
    "1|round(10**10, 'ceil')",
    "(1).to_bytes(10**10, 'big')",
)
BIT_BY_BIT = (
    "{% set all = namespace(x='x') %}{% for i in range(60) %}{% set all.x = all.x ~ all.x %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}a{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}{% endset %}",
)
MEMORY = [*(f"{{{{ {operation} }}}}" for operation in AT_ONCE), *BIT_BY_BIT]
# Operations that Python can't interrupt, or that overflow the stack; the first two already while compiling.
DOUBLED = "{% set ns=namespace(a=(), b=()) %}{% for i in range(60) %}{% set ns.a=(ns.a,ns.a) %}"
NEVER_ENDS = (
    "{{ ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 1000] * 9999)|sum(start=[])|length }}",
    "{% if messages|length == 40 %}{{ ([range(9999)|list]*9999)|sum(start=[]) }}{% endif %}",
    DOUBLED + "{% endfor %}{% set d={ns.a:1} %}",
    DOUBLED + "{% set ns.b=(ns.b,ns.b) %}{% endfor %}{{ ns.a==ns.b }}",
    DOUBLED + "{% endfor %}{{ ns.a|tojson }}",
    DOUBLED + "{% endfor %}{% if tools %}{{ 1 in ns.a|list or {ns.a: 1} }}{% endif %}",
)
OVERFLOWS = (
    "{% set ns=namespace(a=()) %}{% for i in range(60000) %}{% set ns.a=(((((ns.a,),),),),) %}{% endfor %}"
    "{% set d={ns.a:1} %}"
)
DEEP = "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"


@pytest.fixture(autouse=True)
def _no_cached_trials() -> None:
    try_template.cache_clear()


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path / "model")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "model")
    return loaded


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the time of a conversation, only for endless templates: on a busy machine, any other may take as long."""
    monkeypatch.setattr(template_rendering, "LONGEST_SECONDS", 0.3)
    monkeypatch.setattr(bounded, "REPEAT_SECONDS", 0.1)


def assert_refused(tokenizer: PreTrainedTokenizerBase, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=message):
        render(tokenizer, CHAT)
    with pytest.raises(ModelError, match=message):
        render_all(tokenizer, [CHAT])
    with pytest.raises(ModelError, match=message):
        RowTokenizer(tokenizer, LossOn.COMPLETIONS, frozenset()).tokenize([Conversation(messages=CHAT, trained=(1,))])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("template", [FOR_HOURS, MANY_CALLS])
def test_a_template_that_does_not_end_is_an_error_of_the_template(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    assert_refused(tokenizer, template, r"the chat template did not end within 0 s, for 2 messages of \d+ characters")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ITSELF, r"the chat template recurses endlessly, .*\(RecursionError\)"),
        (DEEP, "the chat template recurses endlessly, nests too deeply"),
        ("{{ 'x' * 2001 }}", r"the chat template writes 2,001 characters for 2 messages of \d+ characters"),
    ],
)
def test_a_template_that_nests_or_writes_too_much_is_an_error_of_the_template(
    tokenizer: PreTrainedTokenizerBase, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_rendering, "LONGEST_TEXT", 2000)
    assert_refused(tokenizer, template, message)


@pytest.mark.parametrize(
    "template",
    [
        "{% if 1e308 * 10 %}x{% endif %}",
        "{% set x = -1e999 %}{{ x }}",
        "{{ messages[1e999] }}",
        "{{ cycler() }}",
        "{% set n = namespace(x=1) %}{% for i in range(16) %}{% set n.x = n.x * 10**300 %}{% endfor %}{{ n.x }}",
    ],
)
def test_an_error_within_a_template_refuses_the_messages(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateRefusalError):
        render(tokenizer, CHAT)
    assert render_all(tokenizer, [CHAT]) is None


@pytest.mark.parametrize("number", ["9" * 5000, f"0x{'F' * 5000}", f"0b{'1' * 20_000}", "10**5000"])
@pytest.mark.parametrize("template", ["{{{{ {} }}}}", "{{% set x = {} %}}", "{{% if [{}] %}}{{% endif %}}"])
def test_a_number_that_cannot_be_written_is_an_error_that_names_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, number: str, template: str
) -> None:
    (tmp_path / "a.jinja").write_text(template.format(number))
    with pytest.raises(ModelError, match=r"a\.jinja: the chat template can't be compiled: Exceeds the limit"):
        choose_chat_template(tokenizer, str(tmp_path / "a.jinja"))


# A time limit that strikes within a callback of garbage collection, such as one of Hypothesis, is lost, and repeated.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("template", MEMORY)
def test_an_operation_that_needs_much_memory_is_an_error_before_it_gets_it(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_DATA)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    used = peak_host_bytes()
    for tools in (None, [{"function": {"name": "f"}}]):  # it is no fault of the tools
        with pytest.raises(ModelError, match=r"takes too much memory|did not end within"):
            render(tokenizer, CHAT, tools=tools)
    with pytest.raises(ModelError, match=r"takes too much memory|did not end within"):
        render_all(tokenizer, [CHAT, CHAT])
    assert peak_host_bytes() - used < GIB
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_a_template_with_expensive_constants_is_named_when_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.jinja").write_text("{{ ('x' * 2 * 10**8).encode() }}")
    with pytest.raises(ModelError, match=r"a\.jinja: the chat template .* takes too much time or memory"):
        choose_chat_template(tokenizer, str(tmp_path / "a.jinja"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_limits_grow_with_the_length_of_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + m.content|trim }}{% endfor %}"
    )
    widest = "\U0001f642" * 2**24  # characters as the longest row has, of four bytes each
    assert len(render(tokenizer, [{"role": "user", "content": widest}])) == 6 + 2 * len(widest)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_a_stricter_limit_of_the_user_is_retained() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    own = (8 * GIB, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, own)
    try:
        within = within_limits(lambda: resource.getrlimit(resource.RLIMIT_DATA), num_characters=GIB)
        assert within == resource.getrlimit(resource.RLIMIT_DATA) == own
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_one_failing_conversation_of_a_batch_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}a"
    with_x = [{"role": "user", "content": "x"}]
    assert render_all(tokenizer, [CHAT, CHAT]) == ["a", "a"]
    assert render_all(tokenizer, [CHAT, with_x]) is None
    assert render_all(tokenizer, [with_x, CHAT]) is None
    with pytest.raises(TemplateRefusalError, match="no x"):
        render(tokenizer, with_x)


def test_a_file_that_nests_too_deeply_is_named_when_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "deep.jinja").write_text(DEEP)
    with pytest.raises(ModelError, match=r"deep\.jinja: the chat template nests too deeply to be compiled"):
        choose_chat_template(tokenizer, str(tmp_path / "deep.jinja"))


def test_tools_that_a_template_cannot_iterate_over_are_an_error_of_their_row(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = OF_A_SCHEMA
    schema: dict[str, Any] = {"a": 1}
    for _ in range(400):
        schema = {"a": schema}
    with pytest.raises(TemplateRefusalError, match="recurses too deeply for what its tools"):
        render(tokenizer, CHAT, tools=[schema])
    conversation = Conversation(messages=CHAT, trained=(1,), tools=[schema])
    (row,) = RowTokenizer(tokenizer, LossOn.ALL, frozenset()).tokenize([conversation])
    assert isinstance(row, RowError)
    assert "the chat template refuses it: it recurses too deeply" in str(row)


def test_the_previous_signal_handler_is_restored_and_no_alarm_follows(
    tokenizer: PreTrainedTokenizerBase, request: pytest.FixtureRequest
) -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    try:
        tokenizer.chat_template = "{{ messages[0].content }}"
        assert render(tokenizer, CHAT) == "hi"
        request.getfixturevalue("soon")
        tokenizer.chat_template = FOR_HOURS
        with pytest.raises(ModelError):
            render(tokenizer, CHAT)
        time.sleep(0.5)
        assert rung == []
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_conversation_is_rendered_outside_of_the_main_thread(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template, outputs = "{{ messages[1].content }}", []
    thread = threading.Thread(target=lambda: outputs.append(render(tokenizer, CHAT)))
    thread.start()
    thread.join()
    assert outputs == ["yes"]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a conversation so much time that an interrupt comes first, even on a busy machine."""
    monkeypatch.setattr(template_rendering, "LONGEST_SECONDS", 60.0)


@pytest.mark.usefixtures("late")
def test_an_interrupt_stops_a_template_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FOR_HOURS
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    begin = time.monotonic()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        render(tokenizer, CHAT)
    assert time.monotonic() - begin < template_rendering.LONGEST_SECONDS - 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("template", NEVER_ENDS)
def test_a_template_with_an_operation_that_does_not_end_is_named_when_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    (tmp_path / "a.jinja").write_text(template)
    with pytest.raises(ModelError, match=r"a\.jinja: the chat template can't be rendered: one operation .* not end"):
        choose_chat_template(tokenizer, str(tmp_path / "a.jinja"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_template_that_overflows_the_stack_is_named_when_it_is_read_without_output(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jinja").write_text(OVERFLOWS)
    with pytest.raises(ModelError, match=r"a\.jinja: the chat template can't be rendered: it ends the process by SIG"):
        choose_chat_template(tokenizer, str(tmp_path / "a.jinja"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
def test_a_template_that_is_slow_or_refuses_the_trial_is_not_an_error() -> None:
    for text in ("{{ raise_exception('no') }}", FOR_HOURS, ITSELF, "{{ 'x' * 10**9 }}", "{{ messages[1] + 1 }}"):
        try_template(text)


def test_a_trial_restores_handlers_timers_and_signals() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGINT)]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try_template("{{ messages[0].content }}")
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGINT)] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_operation_that_cannot_be_interrupted_finally_ends_the_process_and_shows_where() -> None:
    script = (
        "from qlora_cli import bounded\n"
        "bounded.LAST_RESORT_SECONDS = 0.2 / bounded._num_cores()\n"
        "def never_ends():\n"
        "    value = ()\n"
        "    for _ in range(60):\n"
        "        value = (value, value)\n"
        "    return hash(value)\n"
        "bounded.within_seconds(never_ends, 0.1 / bounded._num_cores())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGPROF
    assert "in never_ends" in done.stderr
    assert "in within_seconds" in done.stderr


@pytest.mark.usefixtures("late")
def test_an_interrupt_stops_a_trial_at_once_and_leaves_no_process() -> None:
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before, begin = psutil.Process().children(), time.monotonic()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        try_template(NEVER_ENDS[2])
    assert time.monotonic() - begin < template_rendering.LONGEST_SECONDS - 1
    assert psutil.Process().children() == before


SLOW = (
    "{% for i in range(40000) %}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.content != '' %}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_slow_template_is_reported_once(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, is_plain: bool
) -> None:
    monkeypatch.setattr(render_timer, "SLOW_SECONDS", 0.02)
    monkeypatch.setattr(render_timer, "SECONDS_PER_ROW", 0.0005)
    tokenizer.chat_template, recorder = SLOW, Recorder()
    asked = [] if is_plain else [{"role": "user", "content": "more"}, {"role": "assistant", "content": "</think>"}]
    rows = [Conversation(messages=[*CHAT, *asked], trained=(1,)) for _ in range(20)]
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset(), reporter=recorder)
    encoder = Encoder(
        RowLayout(format=DataFormat.MESSAGES, columns={"messages": "messages"}), DataSettings(dataset="rows"), text
    )
    tokenized = encoder.tokenizer.tokenize(rows)
    assert not any(isinstance(row, RowError) for row in tokenized)
    (event,) = recorder.events
    assert isinstance(event, Noted)
    assert re.search(r"the chat template is slow: 0 s so far, with \d rows? done; Ctrl-C stops it", event.message)


def test_a_fast_template_is_not_reported_as_slow_over_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(render_timer, "SLOW_SECONDS", 0.0)
    recorder = Recorder()
    measured = render_timer.RenderTimer(recorder)
    measured.row_done()
    for _ in range(100):
        with measured.measured():
            pass
    assert recorder.events == []

"""`qlora generate` as scripts and users see it: the answer, headings, keys of --json, stdin, mistakes, a pipe."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.answering.answers import Answer, GenerationReport, PromptAnswers
from qlora_cli.cli.app import app
from qlora_cli.cli.rendering import answer_text
from tests.conftest import RunQlora
from tests.support.models.adapters import adapt, settings_of, train_steps
from tests.support.models.loading import save_model
from tests.support.processes.forks import pipe_without_reader
from tests.support.processes.light_commands import LightQlora

CPU = ("--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "8")


def qlora_generate(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    """Run the command in this process, which has imported torch already."""
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def answered(*arguments: str | Path, stdin: str | bytes | None = None) -> dict[str, Any]:
    done = qlora_generate(*CPU, *arguments, "--json", stdin=stdin)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def only(report: dict[str, Any]) -> dict[str, Any]:
    """Return the one answer to the one prompt."""
    ((answer,),) = (given["answers"] for given in report["answers"])
    only_answer: dict[str, Any] = answer
    return only_answer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes answers, on a tiny random base."""
    directory = tmp_path_factory.mktemp("adapter")
    model = adapt(save_model(directory / "base"), settings_of())
    train_steps(model, learning_rate=5e-2)
    model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return directory / "adapter"


# ---- what is shown


def test_the_answer_alone_is_on_stdout_and_all_else_on_stderr(base_model: Path) -> None:
    done = qlora_generate(base_model, "--prompt", "hello", *CPU)
    assert done.exit_code == 0, done.output
    assert done.stdout == only(answered(base_model, "--prompt", "hello"))["text"] + "\n"
    assert "the answer (base) was truncated after 8 tokens: --max-new-tokens" in done.stderr


def test_on_a_terminal_the_answer_is_written_as_it_comes(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = qlora_generate(base_model, "--prompt", "hello", *CPU)
    written: list[str] = []
    tell = answer_text.AnswerPrinter.text

    def listen(printer: answer_text.AnswerPrinter, piece: str) -> None:
        written.append(piece)
        tell(printer, piece)

    monkeypatch.setattr(answer_text.AnswerPrinter, "text", listen)
    monkeypatch.setattr(answer_text, "to_terminal", lambda: True)
    streamed = qlora_generate(base_model, "--prompt", "hello", *CPU)
    assert streamed.stdout == whole.stdout
    assert "".join(written) + "\n" == whole.stdout
    assert len(written) > 3
    assert "was truncated" in streamed.stderr


def test_several_prompts_become_headings_of_their_answers(base_model: Path) -> None:
    done = qlora_generate(base_model, "--prompt", "hello", "--prompt", "[b]why", *CPU)
    hello, why = answered(base_model, "--prompt", "hello", "--prompt", "[b]why")["answers"]
    assert done.stdout == (f"hello\n{hello['answers'][0]['text']}\n\n\n[b]why\n{why['answers'][0]['text']}\n\n")
    assert "the answer (base) to prompt 1 of 2 was truncated" in done.stderr


def test_compared_answers_stand_under_headings_with_a_verdict(adapter: Path) -> None:
    done = qlora_generate(adapter, "--prompt", "hello", "--compare", *CPU)
    assert done.exit_code == 0, done.output
    base, changed = answered(adapter, "--prompt", "hello", "--compare")["answers"][0]["answers"]
    assert done.stdout == (
        f"base\n{base['text']}\n\nadapter\n{changed['text']}\n\nthe answers differ: base / adapter\n"
    )


def test_json_has_exactly_the_keys_of_the_report(adapter: Path) -> None:
    report = answered(adapter, "--prompt", "hello", "--compare")
    assert set(report) == {field.name for field in fields(GenerationReport)}
    (given,) = report["answers"]
    assert set(given) == {field.name for field in fields(PromptAnswers)}
    assert {frozenset(answer) for answer in given["answers"]} == {frozenset(field.name for field in fields(Answer))}
    assert [answer["source"] for answer in given["answers"]] == ["base", "adapter"]
    assert (report["model"], report["adapter"], report["merged"]) == (str(adapter), str(adapter), None)
    assert report["base_model"] == str(adapter.parent / "base")
    assert given["differ"] is True
    assert all(answer["tokens_per_second"] > 0 for answer in given["answers"])


# ---- every flag changes something


def test_a_prompt_on_stdin_is_the_same_prompt(base_model: Path) -> None:
    def asked(*prompts: str, stdin: str | None = None) -> list[tuple[str, str]]:
        flags = [part for prompt in prompts for part in ("--prompt", prompt)]
        given = answered(base_model, *flags, stdin=stdin)["answers"]
        return [(each["prompt"], each["answers"][0]["text"]) for each in given]

    assert asked("-", stdin="two\nlines\n") == asked("two\nlines")
    assert [prompt for prompt, _ in asked("a", "-", stdin="b")] == ["a", "b"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--system", "You are a pirate."),
        ("--temperature", "1.5"),
        ("--chat-template", "plain.jinja"),
        ("--max-new-tokens", "3"),
    ],
)
def test_a_flag_reaches_the_answer(base_model: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "plain.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    flags = tuple(str(tmp_path / flag) if flag.endswith(".jinja") else flag for flag in flags)
    before, after = (only(answered(base_model, "--prompt", "hello", *more)) for more in ((), flags))
    keys = ("text", "num_prompt_tokens", "num_new_tokens")
    assert [before[key] for key in keys] != [after[key] for key in keys]


def test_seed_top_p_and_top_k_shape_what_is_drawn(base_model: Path) -> None:
    def drawn(*flags: str) -> str:
        text: str = only(answered(base_model, "--prompt", "hello", *flags))["text"]
        return text

    hot = ("--temperature", "1.5")
    greedy = drawn()
    assert drawn(*hot) == drawn(*hot, "--seed", "0") != drawn(*hot, "--seed", "1")
    assert drawn(*hot, "--top-k", "1") == drawn(*hot, "--top-p", "0.000001") == greedy != drawn(*hot)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--prompt: is missing. What to answer"]),
        (["--prompt", " "], ["--prompt: is empty"]),
        (["--prompt", "-", "--prompt", "-"], ["--prompt: - is given twice"]),
        (["--prompt", "a", "--top-k", "5"], ["--top-k: has no effect", "Give --temperature above 0"]),
        (["--prompt", "a", "--temperature", "-1", "--max-new-tokens", "0"], ["--temperature: must be", "2 problems"]),
        (["--prompt", "a", "--temperature", "warm"], ["--temperature: expected a number, got 'warm'"]),
        (["--prompt", "a", "--compare"], ["--compare: there is nothing to compare", "has no adapter"]),
        (["--prompt", "a", "--merged", "m"], ["--merged: has no effect without --compare"]),
        (["--prompt", "a", "--compare", "--merged", "m"], ["--merged: m is no directory", "qlora merge RUN"]),
        (["--prompt", "a", "--max-new-tokens", "600"], ["more than the 512 positions", "Use --max-new-tokens 500"]),
        (["--prompt", "a", "--new-tokens", "<a>"], ["no such option: --new-tokens"]),
    ],
)
def test_a_mistake_is_reported_on_stderr_and_as_one_object_on_stdout(
    base_model: Path, arguments: list[str], expected: list[str]
) -> None:
    done = qlora_generate(base_model, "--device", "cpu", *arguments, "--json")
    assert done.exit_code == 2, done.output
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    for text in expected:
        assert text.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_a_system_prompt_that_the_template_drops_is_refused(base_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "drops.jinja"
    template.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}")
    done = qlora_generate(base_model, "--prompt", "a", "--system", "Be brief.", "--chat-template", template, *CPU)
    assert done.exit_code == 2
    assert "does not write a system prompt" in done.stderr


def test_stray_bytes_on_stdin_are_a_mistake(base_model: Path) -> None:
    done = qlora_generate(base_model, "--prompt", "-", *CPU, stdin=b"a\xff")
    assert done.exit_code == 2
    assert "UTF-8" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["./no", "--prompt", "a"], ["./no", "--prompt", "a", "--top-p", "2"]]
)
def test_help_and_wrong_input_are_answered_without_torch(light_qlora: LightQlora, arguments: list[str]) -> None:
    done = light_qlora("generate", *arguments)
    assert (done.code, done.heavy) == (0 if arguments == ["--help"] else 2, []), done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly(run_qlora: RunQlora, base_model: Path) -> None:
    with pipe_without_reader() as pipe:
        done = run_qlora("generate", base_model, "--prompt", "hello", *CPU, descriptors={1: pipe})
    assert done.code == 141
    assert "Traceback" not in done.stderr

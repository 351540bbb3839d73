"""``minipaged chat``: its commands with a stand-in for the model, real keys in a pseudo-terminal, and a real model."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager

import pytest

from minipaged import LLM, SamplingParams, cli
from minipaged.cli import chat_command, screen
from minipaged.cli.chat_models import ContextFull, LocalModel, Question
from minipaged.cli.chat_session import Chat
from minipaged.cli.keyboard import LIBEDIT, PASTE_BEGINS, PASTE_ENDS, messages
from minipaged.errors import InvalidRequest
from tests.chat_stub import Echo, Hostile
from tests.text.tokenizers_for_tests import byte_level

try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

# --- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def say(monkeypatch, capsys):
    """``say(*lines, args=(), model=None)`` -> (exit code, stdout, stderr, the conversations sent to the model)."""

    def say(*lines: str, args: tuple[str, ...] = (), model: Echo | None = None):
        model = model or Echo()
        monkeypatch.setattr(chat_command, "load", lambda *_, **__: None)
        monkeypatch.setattr(chat_command, "LocalModel", lambda llm: model)
        todo = iter(lines)

        def type_one(prompt):
            try:
                return next(todo)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", type_one)
        monkeypatch.setattr(sys, "argv", ["minipaged", "chat", *args])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        return leaving.value.code, captured.out, captured.err, [question.messages for question in model.asked]

    return say


def contents(messages) -> list[str]:
    return [message["content"] for message in messages]


def test_chat_keeps_the_conversation(say):
    code, out, _, asked = say("one", "", "two", args=("--system", "Be brief."))
    assert code == 0
    assert "You said 'one' \nYou said 'two' \n" in out
    assert contents(asked[1]) == ["Be brief.", "one", "You said 'one' ", "two"]
    assert [m["role"] for m in asked[1]] == ["system", "user", "assistant", "user"]


def test_reset_and_exit(say):
    code, out, _, asked = say("one", "/help", "/clear", "two", "/quit", "three", args=("--system", "S"))
    assert code == 0
    assert "/reset" in out
    assert [contents(messages) for messages in asked] == [["S", "one"], ["S", "two"]]


def test_a_system_prompt_can_be_given_changed_and_removed(say):
    lines = ("one", "/system Be kind.", "/system", "two", '/system ""', "three")
    _, out, _, asked = say(*lines, args=("--system", "Be \udcff brief."))
    assert out.count("System prompt: Be kind.") == 2
    assert [messages[0]["content"] for messages in asked] == ["Be � brief.", "Be kind.", "one"]
    assert contents(asked[1])[1:] == ["one", "You said 'one' ", "two"], "the conversation continues"


def test_retry_undo_and_set(say):
    lines = ("/retry", "/undo", "one", "/retry", "two", "/undo", "/set temperature 0.25", "/set max_tokens 2", "three")
    model = Echo()
    _, out, err, asked = say(*lines, "/set temperature default", "/set", args=("--seed", "7"), model=model)
    assert err.count("\n") == 2 and "/retry has nothing" in err and "/undo has nothing" in err
    assert [contents(messages)[-1] for messages in asked] == ["one", "one", "two", "three"]
    assert contents(asked[3]) == ["one", "You said 'one' ", "three"]
    assert [q.sampling["seed"] for q in model.asked] == [7, 8, 8, 8], "another answer, which repeats as well"
    assert model.asked[3].sampling == {"seed": 8, "temperature": 0.25, "max_tokens": 2}
    assert out.rstrip("> \n").endswith("sampling: {'seed': 7, 'max_tokens': 2}\nmax_tokens 2, seed 7")


@pytest.mark.parametrize(
    "setting", ["temperature", "temperature warm", "top_p 3", "top_k nan", "beams 4", "n 2", "max_tokens 0", "stop x"]
)
def test_what_cannot_be_set_changes_nothing(say, setting):
    model = Echo()
    code, _, err, _ = say(f"/set {setting}", "one", model=model)
    assert code == 0 and err.count("\n") == 1 and model.asked[0].sampling == {}


def test_settings_may_be_written_in_several_ways(say):
    model = Echo()
    say("/set temperature\t0.3", "one", "/set temperature=0.4", "two", "/set temperature default", "three", model=model)
    assert [question.sampling for question in model.asked] == [{"temperature": 0.3}, {"temperature": 0.4}, {}]


def test_a_folder_of_nobody_is_one_line(say):
    code, _, err, asked = say("/save ~nosuchuser/x.json", "/load ~nosuchuser/x.json", "one")
    assert code == 0 and err.count("\n") == 2 and len(asked) == 1


def test_an_answer_that_was_cut_says_so_and_goes_on(say, tmp_path):
    lines = ("/more", "a b c d", "/more", "/more", "/more", f"/save {tmp_path / 'talk.json'}")
    code, out, err, asked = say(*lines, args=("--max-tokens", "2"))
    assert code == 0 and err.count("nothing to go on with") == 2, "before an answer, and after its end"
    assert out.count("[cut: max_tokens is 2; /more goes on]") == 2
    assert [contents(messages) for messages in asked[1:]] == [
        ["a b c d", "You said 'a "],
        ["a b c d", "You said 'a b c "],
    ]
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert contents(saved) == ["a b c d", "You said 'a b c d' "]


def test_a_full_context_drops_the_oldest_turns_and_says_which(say):
    model = Echo()
    model.context = 20
    lines = ("one " * 4, "two " * 5, "three", "four " * 30, "/undo", "five")
    _, out, err, asked = say(*lines, args=("--system", "S"), model=model)
    notices = re.findall(r"\[the context is full: .*\]", out)
    assert notices[0] == "[the context is full: the model no longer sees 1 turn: “one one one one”]"
    assert contents(asked[-1])[0] == "S", "the system prompt stays"
    assert "two two two two two" not in out.partition(notices[0])[0].rpartition("> ")[2]
    assert "too long (/reset forgets the conversation)" in err and err.count("\n") == 1, "four alone is too long"
    assert contents(asked[-1])[-1] == "five"


def test_a_path_is_no_command(say):
    lines = (
        "/home/me/x.py explain",
        "/tmp is full",
        "/etc/hosts",
        "/etc",
        "/foo",
        "/sytem Be kind.",
        " /exit",
        "/exit now",
    )
    _, out, _, asked = say(*lines)
    assert [contents(m)[-1] for m in asked] == ["/home/me/x.py explain", "/tmp is full", "/etc/hosts", "/etc", "/exit"]
    assert "There is no /foo; /help lists" in out and "did you mean /system?" in out and "/exit stands alone" in out


def test_thinking_is_switched(say):
    model = Echo()
    say("one", "/no-think", "two", "/think", "three", model=model)
    assert [q.template for q in model.asked] == [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    model = Echo()
    model.context = 100  # such a model does not think
    code, _, err, asked = say("/no-think", "one", model=model)
    assert code == 0 and "it cannot think" in err and model.asked[0].template == {}
    assert say(args=("--no-think",), model=model)[0] == 2


def test_a_conversation_is_saved_and_goes_on_elsewhere(say, tmp_path):
    file = tmp_path / "a talk.json"
    say("one", f"/save {file}", args=("--system", "S"))
    _, out, _, asked = say(f"/load {file}", "two")
    assert "Loaded 2 messages" in out
    assert [(m["role"], m["content"]) for m in asked[0]] == [
        ("system", "S"), ("user", "one"), ("assistant", "You said 'one' "), ("user", "two"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "[" * 100_000, '{"messages": [{"role": "king", "content": "x"}]}']
)
def test_what_cannot_be_loaded_changes_nothing(say, tmp_path, content):
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_text(content)
    code, _, err, asked = say("one", f"/load {file}", "/save", "two")
    assert code == 0 and err.count("\n") == 2
    assert len(asked[1]) == 3


def test_commands_work_on_whatever_was_loaded(say, tmp_path):
    file, question, answer = (
        tmp_path / "talk.json",
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    )
    asked = []
    for loaded in ([question], [answer], [question, answer, question, question], []):
        file.write_text(json.dumps({"messages": loaded}))
        lines = (f"/load {file}", "/retry", "/undo", "/undo", "/undo", "/more", f"/load {file}", "/more")
        code, _, err, more = say(*lines)
        assert code == 0 and "Traceback" not in err
        asked += [contents(one) for one in more]
    assert asked == [["q"], ["a"], ["q", "a", "q", "q"]]


def test_half_a_character_cannot_be_saved_and_harms_no_file(say, tmp_path):
    saved, broken = tmp_path / "talk.json", tmp_path / "broken.json"
    broken.write_text('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    code, _, err, _ = say("one", f"/save {saved}", f"/load {broken}", f"/save {saved}")
    assert code == 0 and "is not a saved conversation" in err and "one" in saved.read_text()


def test_messages_of_several_lines(say):
    lines = ["one \\", "two", '"""first', "  second", 'third"""', "/nonsense"]
    code, out, _, asked = say(*lines)
    assert [messages[-1]["content"] for messages in asked] == ["one \ntwo", "first\n  second\nthird"]
    assert code == 0 and "There is no /nonsense" in out


def test_control_characters_of_an_answer_are_shown_and_not_executed(say):
    _, out, _, _ = say("hello", model=Hostile())
    assert "red ␛[31m title ␛]0;owned␇ �2J overwritten␈ end\n" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)


def test_errors_of_a_server_are_shown_too(capsys):
    cli.options.fail("bad \x1b]0;x\x07\n gateway\x9b")
    assert capsys.readouterr().err == "minipaged: bad ␛]0;x␇ gateway�\n"


@pytest.mark.parametrize(("at_once", "begun"), [(True, "one "), (False, "one two ")])
def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(say, at_once, begun):
    class Interrupted(Echo):
        stops_at_once = at_once

        def answer(self, question):
            self.asked.append(question)
            yield "one ", None
            signal.raise_signal(signal.SIGINT)
            yield "two ", None
            yield "three", "stop"

    code, _, _, asked = say("hello", "/more", model=Interrupted())
    assert code == 0 and contents(asked[1]) == ["hello", begun]


@pytest.mark.parametrize("markers", [(PASTE_BEGINS, PASTE_ENDS), tuple(LIBEDIT.values())], ids=["none", "libedit"])
def test_pasted_lines_without_readline(monkeypatch, markers):
    begin, end = markers
    lines = iter([f"{begin}def f():", "\treturn 1", f"{end}", f"see {begin}a{end}", f"{begin}/exit", f"x{end}!"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    entered = messages()
    assert [next(entered) for _ in range(3)] == ["def f():\n\treturn 1", "see a", "/exit\nx!"]


# --- the window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 1000], ids="pieces of {}".format)
def test_words_are_wrapped(monkeypatch, capsys, size):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(screen, "_window", lambda: 12)
    text = "The quick brown  fox.\n    indented code\n\n" + "x" * 30 + " 你好世界你好世界 é́é end"
    printer = screen.Printer()
    for start in range(0, len(text), size):
        printer.write(text[start : start + size])
    printer.end()
    assert capsys.readouterr().out.split("\n") == [
        "The quick", "brown  fox.", "    indented", "code", "",
        "x" * 12, "x" * 12, "x" * 6 + " 你好", "世界你好世界", "é́é end", "",
    ]  # fmt: skip


# --- real keys ----------------------------------------------------------------------------------------------------


class Terminal:
    """A command in a pseudo-terminal, with the text that a user sees and types."""

    def __init__(self, *command, columns=60, **options):
        self._file, follower = os.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], stdin=follower, stdout=follower, stderr=follower,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **options,
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def type(self, text):
        os.write(self._file, text if isinstance(text, bytes) else text.encode())

    def until(self, text):
        """Reads until ``text`` appears, returns the output before it, and drops both."""
        while text not in self.seen:
            assert select.select([self._file], [], [], 60)[0], self.seen
            try:
                self.seen += os.read(self._file, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(self.seen) from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def leave(self, key):
        """Types a key until the chat has ended: what comes before Python waits for keys is seen with the next one."""
        for _ in range(20):
            self.type(key)
            try:
                return self.process.wait(3)
            except subprocess.TimeoutExpired:
                pass
        raise AssertionError(self.seen)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._file)


@contextmanager
def terminal(*command, state, **options):
    env = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm-256color", "INPUTRC": os.devnull}
    opened = Terminal(*command, env=env, **options)
    try:
        opened.until("/help lists the commands.")
        opened.until("> ")
        yield opened
    finally:
        opened.close()


@pytest.mark.skipif(not readline or "libedit" in (readline.__doc__ or ""), reason="these keys are GNU readline's")
def test_a_chat_in_a_terminal(tmp_path):
    with terminal("tests.chat_stub", state=tmp_path) as chat:
        chat.type("\x1b[200~def f():\n\n    return 'x'\x1b[201~ what?\r")  # pasted lines are one message
        assert "You said" in chat.until("def f():\\n\\n")
        assert "what?" in chat.until("context: ")
        chat.until("> ")
        chat.type(b"one \xff two\r")  # not UTF-8
        chat.until("You said 'one \ufffd two'")
        chat.until("> ")
        chat.type("/home/me/x.py explain\r")
        chat.until("a path: /home/me/x.py explain")
        chat.until("> ")
        chat.type(" ".join(["paragraph"] * 20) + "\r")
        answer = chat.until("[21 tokens").rpartition("You said")[2]  # behind what readline echoed
        lines = answer.split("\r\n")
        assert len(lines) > 3 and all(
            set(line.split()) <= {"paragraph", "'paragraph", "paragraph'", "\x1b[2m"} for line in lines
        )
        assert all(len(line) <= 60 for line in lines)
        chat.until("> ")
        chat.type("forever\r")
        chat.until("on and on and")
        chat.type("\x03")
        assert "stopped; /more goes on; " in chat.until("> ")
        chat.type("/undo\r")
        chat.until("Took the last message")
        chat.until("> ")
        chat.type("\x1b[A\x1b[A\r")  # twice up: the message before /undo
        chat.until("on and on and")
        chat.type("\x03")
        chat.until("> ")
        assert chat.leave("\x04") == 0
    history = tmp_path / "minipaged" / "chat_history"
    assert "explain" in history.read_text(errors="replace") and history.stat().st_mode & 0o077 == 0


def test_ctrl_c_at_the_prompt_leaves(tmp_path):
    with terminal("tests.chat_stub", state=tmp_path) as chat:
        chat.type("hel")
        assert chat.leave("\x03") != 0


# --- a real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", device="cpu", max_model_len=160, num_blocks=40)


def ask(model: LocalModel, messages, **question) -> str:
    return "".join(text for text, _ in model.answer(Question(messages, **question)))


USER = [{"role": "user", "content": "What is a block table?"}]
GREEDY = {"temperature": 0, "ignore_eos": True}


def test_more_goes_on_as_if_the_answer_had_not_been_cut(llm):
    model = LocalModel(llm)
    whole = llm.chat(USER, SamplingParams(max_tokens=24, **GREEDY)).outputs[0]
    begun = ask(model, USER, sampling={"max_tokens": 9} | GREEDY)
    assert (model.usage.output, model.context) == (9, 160)
    messages = [*USER, {"role": "assistant", "content": begun}]
    rest = ask(model, messages, sampling={"max_tokens": 15} | GREEDY, continues=True)
    assert begun + rest == whole.text
    prompt = len(whole.token_ids) - 24 + len(llm.render_chat(USER))
    assert model.usage.prompt == prompt + 9 and model.usage.cached == (prompt + 9 - 1) // 16 * 16
    # The same without what this process remembers, as after /load.
    assert begun + ask(LocalModel(llm), messages, sampling={"max_tokens": 15} | GREEDY, continues=True) == whole.text
    params = SamplingParams(max_tokens=15, **GREEDY)
    assert begun + llm.chat(messages, params, continue_final_message=True).outputs[0].text == whole.text
    streamed = llm.stream_chat(messages, params, continue_final_message=True)
    assert begun + "".join(delta.text for delta in streamed) == whole.text


def test_room_for_an_answer(llm):
    model = LocalModel(llm)
    long = [{"role": "user", "content": "word " * 130}]
    size = len(llm.render_chat(long))
    assert 120 < size < 159, "more than three quarters of the context"
    with pytest.raises(ContextFull):
        ask(model, long, can_shrink=True)
    assert ask(model, long, can_shrink=True, sampling={"max_tokens": 2}) is not None, "it needs no more room"
    ask(model, long, sampling={"ignore_eos": True})  # nothing can be left out: whatever room there is
    assert model.usage.prompt == size and size + model.usage.output == 160, "no limit but the context"
    with pytest.raises(InvalidRequest, match="needs room for one more"):
        ask(model, [{"role": "user", "content": "word " * 200}])


def test_a_chat_of_many_turns_forgets_the_oldest(llm, capsys):
    Chat(LocalModel(llm), "Be brief.", {"temperature": 0}, {}).run([f"What is a block table? {i}" for i in range(9)])
    out, err = capsys.readouterr()
    assert err == "" and "the model no longer sees 1 turn: “What is a block table? 0”" in out
    assert not llm.engine.has_unfinished()


def test_variables_of_a_chat_template(monkeypatch):
    tokenizer = byte_level()
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        tokenizer.chat_template + "{% if enable_thinking is false %}<think></think>{% endif %}",
    )
    llm = LLM.__new__(LLM)
    llm.tokenizer = tokenizer
    assert llm.render_chat(USER, chat_template_kwargs={"enable_thinking": True}) == llm.render_chat(USER)
    quick = llm.render_chat(USER, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(quick).endswith("<|assistant|><think></think>")
    for wrong in ({"thinking": False}, {"tokenize": True}, {"messages": []}, {3: 4}, ["enable_thinking"]):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            llm.render_chat(USER, chat_template_kwargs=wrong)
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        llm.render_chat(USER, continue_final_message=True)

"""The command line, in this process if possible, otherwise (for signals and imports) in a subprocess."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from minipaged import SamplingParams, cli, doctor
from minipaged.cli import chat_command, generate_command, serve_commands, visualize_command
from minipaged.cli.screen import shown
from minipaged.errors import InvariantViolation, StepFailed
from minipaged.outputs import CompletionOutput, Delta
from tests.checkpoints import save_llama
from tests.text.tokenizers_for_tests import byte_level
from visualizer.scenarios import DEMO_SETTINGS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model, with a tokenizer and a chat template."""
    tokenizer = byte_level()
    directory = tmp_path_factory.mktemp("babbler")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    save_llama(
        directory,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        **ends,
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


SAMPLING = "sampling: temperature 1 — the default\n"


def stub(**methods):
    """A stand-in for the LLM of a model that states no sampling parameters."""
    return SimpleNamespace(default_params=SamplingParams(), generation_config=None, **methods)


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*args)`` -> (exit code, stdout, stderr)."""

    def run(*args: str):
        monkeypatch.setattr(sys, "argv", ["minipaged", *args])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        return leaving.value.code, captured.out, captured.err

    return run


def run_without(package: str, *args: str) -> tuple[int, str]:
    """Exit code and stderr when ``package`` cannot be imported. Runs in a subprocess, because modules that are imported
    again in this process would replace those that other tests hold and patch."""
    code = f"import sys; sys.modules[{package!r}] = None; from minipaged.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    return done.returncode, done.stderr


def start(*args: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "minipaged", *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def read_until(process: subprocess.Popen, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        byte = process.stdout.read(1)
        assert byte, process.stderr.read().decode()
        seen += byte
    return seen


def interrupt(process: subprocess.Popen) -> None:
    """Sends Ctrl-C; checks the exit code and that no traceback is printed."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors


# --- in general -------------------------------------------------------------------------------------------


def test_version(run):
    assert run("--version") == (0, "minipaged 0.2.0\n", "")


def test_help_imports_nothing_slow():
    code = """
import sys
from minipaged.cli import main
sys.argv = ["minipaged", "--help"]
try:
    main()
except SystemExit:
    pass
print("SLOW", {"torch", "transformers", "gradio", "plotly"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout and "SLOW set()" in done.stdout


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["generate", "x", "--temperature", "-1"], "temperature must be a number between 0 and 100"),
        (["generate", "x", "-n", "0"], "n must be a whole number of at least 1"),
        (["generate", "x", "--top-p", "0"], "top_p must be above 0"),
        (["generate", "x", "--stop", ""], "none of them empty"),
        (["generate", "x", "--device", "abacus"], "device must be one of"),
        (["generate", "x", "--memory", "infinite"], "memory must be one of paged, orca-max"),
        (["visualize", "--memory", "orca-max", "--preemption", "swap"], "neither shares prefixes nor preempts"),
        (["generate", "x", "--model", "/no/such/place"], "no directory"),
        (["chat", "--memory", "infinite"], "memory must be one of"),
        (["chat", "--attention", "magic"], "attention must be one of"),
        (["chat", "--url", "http://127.0.0.1:1/v1", "--kv-dtype", "int8"], "the server's business"),
        (["generate", "x", "--kv-dtype", "int3"], "kv_dtype must be one of"),
        (["serve", "--port", "0", "--memory", "infinite"], "memory must be one of"),
        (["serve", "--port", "0", "--eviction", "belady"], "eviction must be one of lru, fifo"),
        (["visualize", "--eviction", "fifo", "--memory", "orca-max"], "neither shares prefixes nor preempts"),
        (["generate", "x", "--num-speculative-tokens", "3"], "no effect without speculate"),
        (["chat", "--speculate", "prompt-lookup", "--num-speculative-tokens", "0"], "at least 1"),
        (["serve", "--port", "0", "--speculate", ""], "name a draft model"),
        (["serve", "--port", "0", "--max-concurrent", "0"], "max_concurrent is too small"),
        (["serve", "--port", "0", "--api-key", ""], "an API key must not be empty"),
        (["bench", "serve", "--lengths", "novels"], "lengths must be one of"),
        (["bench", "serve", "--rate", "-1"], "must be positive"),
        (["batch", "/no/such/file", "-o", "/tmp/never-written.jsonl"], "cannot be read"),
        (["batch", "x", "-o", "y", "--schedule", "lifo"], "schedule must be one of fcfs, batchllm"),
        (["batch", "x", "-o", "y", "--schedule", "batchllm", "--memory", "orca-max"], 'needs memory="paged"'),
        (["chat", "--max-tokens", "0"], "max_tokens must be a whole number"),
        (["visualize", "--block-size", "0"], "block_size must be"),
        (["chat", "--kv-memory", "2gib"], "--kv-memory must be a number of bytes, or a number and one of MB, GB, MiB"),
        (["generate", "x", "--kv-memory", "0"], "--kv-memory must be a"),
        (["generate", "x", "--kv-memory", "1000"], "kv_memory = 1000 holds no KV block"),
        (["generate", "x", "--num-blocks", "0"], "num_blocks must be a whole number of at least 1"),
        (["visualize", "--max-model-len", "1"], "max_model_len must be a whole number of at least 2"),
        *(
            ([*command, "--kv-memory", "1GiB", "--num-blocks", "9"], "--kv-memory and --num-blocks exclude each other")
            for command in (
                ["chat"],
                ["generate", "x"],
                ["serve", "--port", "0"],
                ["visualize"],
                ["batch", "x", "-o", "y"],
            )
        ),
        (["chat", "--url", "http://127.0.0.1:1/v1", "--num-blocks", "5"], "the server's business"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(run, args, complaint):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert complaint in err and err.count("\n") == 1 and err.startswith("minipaged: ")


@pytest.mark.parametrize("args", [["generate"], ["generate", "x", "--min-p", "much"], ["dance"], ["--nope"]])
def test_wrong_usage_is_exit_code_2(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "Usage" in err and "Traceback" not in err


@pytest.mark.parametrize("args", [["serve"], [], ["generate", "x", "--no-such-option"]])
def test_of_torchruns_processes_the_first_alone_complains(monkeypatch, capsys, run, args):
    """The other ranks exit with 0; otherwise torchrun would kill rank 0 before it has printed the error."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert ("No such option" if len(args) > 1 else "only 'generate' goes with torchrun") in err
    monkeypatch.setenv("RANK", "1")
    cli.main()
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize("error", [StepFailed("the step failed: out of memory", []), InvariantViolation("block 3")])
def test_what_went_wrong_while_running_is_one_line_and_exit_code_1(monkeypatch, run, error):
    def stream(*args):
        raise error

    monkeypatch.setattr(generate_command, "load", lambda *args, **given: stub(stream=stream))
    code, out, err = run("generate", "x")
    assert (code, out.strip(), err) == (1, "", f"{SAMPLING}minipaged: {error}\n")


# --- generate ---------------------------------------------------------------------------------------------


def test_generate_streams_what_generate_returns(run, checkpoint):
    args = [
        "generate",
        "The quick",
        "--model",
        checkpoint,
        "--seed",
        "3",
        "--max-tokens",
        "12",
        "--device",
        "cpu",
    ]
    code, streamed, _ = run(*args)
    assert code == 0
    code, out, _ = run(*args, "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["prompt"] == "The quick" and answer["model"] == checkpoint
    (output,) = answer["outputs"]
    assert shown(output["text"]) + "\n" == streamed
    assert run(*args, "--memory", "orca-pow2")[:2] == (0, streamed)
    assert len(output["token_ids"]) <= 12
    assert output["finish_reason"] in ("stop", "length")
    assert output["cumulative_logprob"] < 0


def test_one_line_tells_the_size_of_the_pool(run):
    args = ["generate", "Once", "--max-tokens", "2", "--device", "cpu"]
    code, _, told = run(*args)
    line = "KV cache: 64 blocks of 16 tokens, 1,024 tokens in all; it takes 4 MiB at most, 0 MiB of them now\n"
    line += "sampling: temperature 0.8 — from generation_config.json\n"
    assert code == 0 and told.endswith(line), "for one user"  # another line may tell that the C++ is compiled
    assert "192 blocks" in run(*args, "-n", "3")[2], "for three samples"
    assert "48 blocks" in run(*args, "--kv-memory", "3MiB")[2]
    assert "5 blocks" in run(*args, "--num-blocks", "5", "--max-num-seqs", "2")[2]
    assert "16 blocks" in run(*args, "--max-num-seqs", "2", "--max-model-len", "128")[2]


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("chat", {"max_num_seqs": 1}),
        ("chat --max-num-seqs 3 --num-blocks 7", {"max_num_seqs": 3, "num_blocks": 7}),
        ("generate x", {"max_num_seqs": 1}),
        ("generate x -n 4 --kv-memory 2GiB", {"max_num_seqs": 4, "kv_memory": 2 << 30}),
        ("generate x -n 4 --max-model-len 99", {"max_num_seqs": 4, "max_model_len": 99}),
        ("serve --port 0 --kv-memory 1GB --max-model-len 50", {"kv_memory": 10**9, "max_model_len": 50}),
    ],
)
def test_the_size_of_the_pool_reaches_the_engine(monkeypatch, run, command, known):
    asked: dict = {}

    def load(*_, **settings):
        asked.update(settings)
        raise StepFailed("enough", [])

    for module in (chat_command, generate_command, serve_commands):
        monkeypatch.setattr(module, "load", load)
    assert run(*command.split())[0] == 1
    names = ("num_blocks", "kv_memory", "max_num_seqs", "max_model_len")
    assert {name: asked[name] for name in names if name in asked} == {
        name: known[name] for name in names if name in known
    }


def test_generate_without_a_seed_differs_from_run_to_run(run, checkpoint):
    args = ["generate", "The", "--model", checkpoint, "--max-tokens", "20"]
    assert run(*args)[1] != run(*args)[1]


def test_sampling_options_reach_the_engine(monkeypatch, run):
    asked = {}

    def generate(prompt, params):
        asked.update(prompt=prompt, params=params)
        return [SimpleNamespace(outputs=[])]

    monkeypatch.setattr(generate_command, "load", lambda *_, **__: stub(generate=generate))
    options = "-n 2 --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --max-tokens 9 --stop a --stop b --seed 4"
    assert run("generate", "Hi", *options.split(), "--repetition-penalty", "1.2")[0] == 0
    params = asked["params"]
    assert (params.n, params.temperature, params.top_p, params.top_k) == (2, 0.5, 0.9, 7)
    assert params.repetition_penalty == 1.2
    assert (params.min_p, params.max_tokens, params.stop, params.seed) == (0.1, 9, ("a", "b"), 4)


def test_samples_stand_under_rules_and_their_brackets_are_no_markup(monkeypatch, run):
    texts = ["[red]one[/red] [/]", "two"]
    outputs = [CompletionOutput(i, text, [1], None, None, "stop") for i, text in enumerate(texts)]
    llm = stub(generate=lambda prompt, params: [SimpleNamespace(outputs=outputs)])
    monkeypatch.setattr(generate_command, "load", lambda *_, **__: llm)
    code, out, _ = run("generate", "Hi", "-n", "2")
    assert code == 0
    assert "[red]one[/red] [/]\n" in out and "1 of 2" in out and "2 of 2" in out


def test_streamed_brackets_are_no_markup(monkeypatch, run):
    deltas = [Delta(0, "[bold]", [1], None), Delta(0, "[/x]", [2], "stop")]
    monkeypatch.setattr(generate_command, "load", lambda *_, **__: stub(stream=lambda *_: iter(deltas)))
    assert run("generate", "Hi") == (0, "[bold][/x]\n", SAMPLING)


def test_control_characters_are_shown_and_not_executed(monkeypatch, run):
    texts = ["red \x1b", "[31m \x9b2J", "\x1b]0;title\x07 \x7f\ttab\r\n", "end"]
    outputs = [CompletionOutput(0, "".join(texts), [1], None, None, "stop")]
    llm = stub(
        stream=lambda *_: iter([Delta(0, text, [1], None) for text in texts]),
        generate=lambda *_: [SimpleNamespace(outputs=outputs)],
        engine=SimpleNamespace(config=SimpleNamespace(model="m")),
    )
    monkeypatch.setattr(generate_command, "load", lambda *_, **__: llm)
    visible = "red ␛[31m �2J␛]0;title␇ ␡\ttab\nend\n"
    assert run("generate", "Hi")[1] == visible
    assert run("generate", "Hi", "-n", "2")[1].endswith(visible)
    exact = run("generate", "Hi", "--json")[1]
    assert json.loads(exact)["outputs"][0]["text"] == "".join(texts)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", exact)


def test_a_terminal_that_knows_no_unicode(checkpoint):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start("generate", "🙂", "--model", checkpoint, "--json", "--max-tokens", "2", env=env)
    out, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b'"prompt": "?"' in out


def test_ctrl_c_while_generating(checkpoint, tmp_path):
    endless = shutil.copytree(checkpoint, tmp_path / "endless")
    weights = load_file(endless / "model.safetensors")
    end = json.loads((endless / "config.json").read_text())["eos_token_id"]
    weights["lm_head.weight"][end] = 0  # greedy decoding always chooses another token
    save_file(weights, endless / "model.safetensors", {"format": "pt"})
    process = start("generate", "The", "--model", str(endless), "--max-tokens", "8000", "--temperature", "0")
    assert process.stdout.read(1)
    interrupt(process)


# --- chat: tests/test_chat_command.py has more -------------------------------------------------------------


def test_chat_with_a_model_that_cannot(run, tmp_path):
    save_llama(tmp_path)
    code, _, err = run("chat", "--model", str(tmp_path))
    assert code == 2 and "no chat template" in err


def test_ctrl_c_at_the_prompt_of_a_chat(checkpoint):
    process = start("chat", "--model", checkpoint)
    read_until(process, b"> ")
    interrupt(process)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_without_its_packages_the_server_says_what_to_install(package):
    code, err = run_without(package, "serve")
    assert code == 2 and package in err and "pip install fastapi uvicorn" in err


# --- visualize --------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The arguments that the visualizer was launched with; ``model`` and ``settings`` are the LLM's."""
    seen: dict = {}

    def launch(make_llm, **options):
        make_llm()
        seen.update(options)

    monkeypatch.setitem(sys.modules, "visualizer.app", SimpleNamespace(launch=launch))
    monkeypatch.setattr(visualize_command, "load", lambda model, **given: seen.update(model=model, settings=given))
    return seen


def test_no_command_starts_the_visualizer_and_says_what_else_there_is(run, launched):
    _, out, _ = run()
    assert "minipaged --help" in out
    assert launched["model"] == "tiny"
    assert (launched["host"], launched["port"]) == ("127.0.0.1", 7860)


def test_sharing_is_asked_for(run, launched):
    run("visualize")
    assert launched["share"] is False
    run("visualize", "--share")
    assert launched["share"] is True and launched["host"] == "127.0.0.1"


def test_the_pages_pool_can_be_sized_in_bytes(run, launched, tmp_path):
    run(*"visualize --kv-memory 4MiB --max-num-seqs 3 --max-model-len 99".split())
    changes = {"device": "auto", "dtype": "auto", "kv_memory": 4 << 20, "max_num_seqs": 3, "max_model_len": 99}
    assert launched["settings"] == {name: v for name, v in DEMO_SETTINGS.items() if name != "num_blocks"} | changes
    plugin = tmp_path / "plugin.py"
    plugin.write_text("SETTINGS = {'kv_memory': '1MiB'}\n")
    run("visualize", "--plugin", str(plugin))
    assert launched["settings"]["kv_memory"] == "1MiB" and "num_blocks" not in launched["settings"]


def test_visualize_hands_on_what_was_given(run, launched):
    code, _, _ = run(*"visualize --model m --port 8000 --block-size 4 --num-blocks 32 --eviction mark-0".split())
    assert code == 130  # because launch returns only on Ctrl-C
    assert (launched["model"], launched["port"]) == ("m", 8000)
    assert launched["settings"] == DEMO_SETTINGS | {
        "device": "auto",
        "dtype": "auto",
        "block_size": 4,
        "num_blocks": 32,
        "eviction": "mark-0",
    }


@pytest.mark.parametrize("package", ["gradio", "plotly"])
def test_visualize_without_its_packages_says_what_to_install(package):
    code, err = run_without(package, "visualize")
    assert code == 2 and "pip install" in err and package in err


def test_a_port_in_use_is_one_line(run):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = run("visualize", "--port", port)
    assert code == 2 and port in err and err.count("\n") == 1


def test_ctrl_c_in_the_visualizer(checkpoint):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    process = start("visualize", "--model", checkpoint, "--port", port)
    read_until(process, f"http://127.0.0.1:{port}".encode())
    interrupt(process)


# --- where the output goes --------------------------------------------------------------------------------


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="THIS SYSTEM HAS NO /dev/full")


@FULL
@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("experiments list > /dev/full", 1, "minipaged: the output cannot be written: No space left on device\n"),
        ("--version > /dev/full", 1, "minipaged: the output cannot be written: No space left on device\n"),
        ("--version >&-", 2, "minipaged: stdout is closed, so there is nowhere to print; redirect it to a file\n"),
        ("experiments list | head -c 1 > /dev/null", 0, ""),
    ],
)  # fmt: skip
def test_output_that_cannot_be_written_is_one_line(command, code, says):
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m minipaged {command}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, says)


def test_experiments_make_their_folder_before_they_measure(run, tmp_path, monkeypatch):
    monkeypatch.setattr("minipaged.cli.experiments_commands._run", lambda *args: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    code, _, err = run("experiments", "run", "waste", "--out", str(tmp_path / "file" / "results"))
    assert code == 2 and "cannot be written" in err
    code, _, err = run("experiments", "run", "weight", "--out", str(tmp_path / "results"))
    assert code == 2 and "no experiment 'weight'" in err and not (tmp_path / "results").exists()


@FULL
def test_a_batch_neither_reads_nor_continues_a_device(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    code, _, err = run("batch", str(prompts), "-o", "/dev/full")
    assert code == 2 and "/dev/full is no file" in err
    code, _, err = run("batch", "/dev/full", "-o", str(tmp_path / "out.jsonl"))
    assert code == 2 and "/dev/full is a device" in err


# --- doctor -----------------------------------------------------------------------------------------------


def test_doctor_says_what_is_missing_and_what_that_means(monkeypatch, run):
    def version(package):
        if package in ("gradio", "triton"):
            raise doctor.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "_embedded_model", lambda: doctor.Check("embedded model", True, "fine"))
    code, out, _ = run("doctor")
    assert code == 0  # neither is needed by the engine
    lines = {line.split()[1]: line for line in out.splitlines()}
    assert lines["gradio"].startswith("missing") and "pip install gradio" in lines["gradio"]
    assert lines["triton"].startswith("missing") and "plain torch" in lines["triton"]
    assert lines["torch"].startswith("ok") and "1.2.3" in lines["torch"]
    assert {"python", "cpu", "chromium", "embedded"} <= set(lines)


def test_doctor_speaks_json(monkeypatch, run):
    monkeypatch.setattr(
        doctor, "checks", lambda: iter([doctor.Check("torch", True, "2.13"), doctor.Check("g++", False, "no")])
    )
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["can_run"] and found["checks"]["g++"] == {"ok": False, "detail": "no"}
    monkeypatch.setattr(doctor, "checks", lambda: iter([doctor.Check("torch", False, "none")]))
    code, out, _ = run("doctor", "--json")
    assert code == 1 and not json.loads(out)["can_run"]


def test_python_dash_m_visualizer_is_the_command():
    done = subprocess.run([sys.executable, "-m", "visualizer", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "minipaged visualize" in done.stdout


def test_completion_can_be_installed(run):
    code, out, _ = run("--help")
    assert code == 0 and "--install-completion" in out


def test_doctor_fails_when_the_engine_cannot_run(monkeypatch, run):
    def broken(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr("minipaged.models.loader.load_model", broken)
    code, out, _ = run("doctor")
    assert code == 1 and "disk on fire" in out


def test_the_embedded_model_answers():
    process = start("chat", "--seed", "1", "--max-tokens", "20")
    out, errors = process.communicate(b"Hello\n/exit\n")
    assert process.returncode == 0, errors.decode()
    assert len(out.split(b"> ")[1].strip()) > 0

"""A process that is forked while an LLM runs in a thread: using the LLM there raises, instead of waiting for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Each child has an alarm, which would kill it: exit status -14.
PROGRAM = """
import multiprocessing, os, signal, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of fork() with threads
from minipaged import LLM, SamplingParams
from minipaged.engine_thread import EngineLoop
from minipaged.errors import UsedAfterFork

llm = LLM("tiny", num_blocks=64, device="cpu", attention="torch")
held, params = threading.Event(), SamplingParams(max_tokens=8, temperature=0)
stream = llm.stream("Once upon a time", params)
step = llm.engine.step
def slow_step():
    held.set()
    asked.wait()
    return step()
llm.engine.step, asked = slow_step, threading.Event()
running = threading.Thread(target=llm.generate, args=("There was", params))
running.start()
held.wait()  # from here on the thread holds the lock
loop = EngineLoop(LLM("tiny", num_blocks=8, device="cpu", attention="torch"))
loop.start()

def child(use):
    signal.alarm(20)
    try:
        use()
        return "nothing was raised"
    except UsedAfterFork as error:
        assert str(os.getpid()) in str(error) and "spawn" in str(error), error
        return "raised"

def use_stream():
    try:
        next(stream)
    finally:
        stream.close()

uses = {
    "generate": lambda: llm.generate("Hello"),
    "token ids": lambda: llm.generate([1, 2]),
    "stream": lambda: next(llm.stream("Hello")),
    "the parent's stream": use_stream,
    "another engine": lambda: llm.build_engine(llm.engine.config),
    "another LLM": lambda: LLM("tiny", num_blocks=8, device="cpu", attention="torch"),
    "the engine": lambda: loop.engine.add_request("a", [1]),
    "a step": lambda: loop.engine.step(),
    "a command": lambda: loop.call(lambda: 1),
    "an abort": lambda: loop.abort("x"),
    "stop": lambda: loop.stop(),
    "nothing": lambda: None,
}
for name, use in uses.items():
    pid = os.fork()
    if not pid:
        try:
            said = child(use)
        except BaseException as error:
            said = repr(error)
        os.write(1, f"{name}: {said}\\n".encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, name

def in_pool(prompt):
    signal.alarm(20)
    return llm.generate(prompt)

with multiprocessing.get_context("fork").Pool(1) as pool:
    try:
        pool.apply(in_pool, ("Hello",))
    except UsedAfterFork:
        print("pool: raised")

asked.set()
running.join()
print("parent:", len(list(stream)) > 0, loop.call(lambda: 1).result())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_using_an_llm_in_a_forked_process_raises():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "generate: raised",
        "token ids: raised",
        "stream: raised",
        "the parent's stream: raised",
        "another engine: raised",
        "another LLM: raised",
        "the engine: raised",
        "a step: raised",
        "a command: raised",
        "an abort: raised",
        "stop: nothing was raised",
        "nothing: nothing was raised",
        "pool: raised",
        "parent: True 1",
    ]

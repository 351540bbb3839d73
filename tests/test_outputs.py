"""Outputs that callers get are snapshots: they do not change when the engine's lists grow."""

import ast
from pathlib import Path

import pytest

from minipaged import errors, outputs
from minipaged.outputs import CompletionOutput, RequestOutput, differences


def test_an_output_keeps_the_tokens_of_its_step():
    tokens, prompt = [1, 2, 3, 4], [1, 2]
    output = RequestOutput("r", "ab", prompt, [CompletionOutput(0, "cd", tokens, None, None, None, start=2)], False)
    tokens.append(5)
    (completion,) = output.outputs
    assert completion.token_ids == [3, 4] and completion.token_ids is completion.token_ids
    completion.token_ids.append(6)
    output.prompt_token_ids.append(7)
    assert (tokens, prompt) == ([1, 2, 3, 4, 5], [1, 2])


def test_tokens_are_copied_when_they_are_first_read():
    output = CompletionOutput(0, "", [1, 2], None, None, None)
    assert "token_ids" not in vars(output)
    assert output.token_ids == [1, 2] and "token_ids" in vars(output)


def test_outputs_are_equal_by_their_values_and_have_no_hash():
    whole, part = (
        CompletionOutput(0, "a", [7], None, None, "stop"),
        CompletionOutput(0, "a", [1, 7, 8], None, None, "stop", 1, 2),
    )
    assert whole == part and whole != CompletionOutput(0, "a", [8], None, None, "stop")
    assert RequestOutput("r", None, [1], [whole], True) == RequestOutput("r", None, [1], [part], True)
    assert RequestOutput("r", None, [1], [whole], True) != RequestOutput("r", None, [1], [whole], False)
    assert whole != (0, "a", [7], None, None, "stop")
    with pytest.raises(TypeError, match="unhashable"):
        hash(whole)


def test_they_print_as_they_are_made():
    completion = CompletionOutput(0, "a", [7], None, None, "stop")
    text = (
        "CompletionOutput(index=0, text='a', token_ids=[7], logprobs=None, cumulative_logprob=None, "
        "finish_reason='stop')"
    )
    assert repr(completion) == text
    assert repr(RequestOutput("r", None, [1], [completion], True)) == (
        f"RequestOutput(request_id='r', prompt=None, prompt_token_ids=[1], outputs=[{text}], finished=True, "
        "prompt_logprobs=None)"
    )


def test_differences_are_told_once():
    tokens, seen = [1, 2], {}
    first = RequestOutput("r", None, [1], [CompletionOutput(0, "a", tokens, None, None, None, start=1)], False)
    assert [(delta.text, delta.token_ids) for delta in differences(first, seen)] == [("a", [2])]
    assert list(differences(first, seen)) == []
    tokens.append(3)
    then = RequestOutput("r", None, [1], [CompletionOutput(0, "ab", tokens, None, None, "stop", start=1)], True)
    assert [(delta.text, delta.token_ids) for delta in differences(then, seen)] == [("b", [3])]


@pytest.mark.parametrize("module", [errors, outputs])
def test_errors_and_outputs_stand_alone(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in imported if name.startswith("minipaged")]

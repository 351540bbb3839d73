"""The server's API with OpenAI's Python client."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from minipaged import SamplingParams
from minipaged.server.service import Limits
from tests.server.conftest import HTTP, PATIENCE, Running, in_thread, run_async, until

openai = pytest.importorskip("openai", reason="OPENAI'S CLIENT IS NOT INSTALLED: pip install openai")

HELLO = [{"role": "user", "content": "The quick brown fox"}]


def client_of(server: Running, key: str = "none", kind: Any = openai.OpenAI) -> Any:
    own = {"http_client": HTTP} if kind is openai.OpenAI else {}
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **own)


@pytest.fixture
def client(server) -> Any:
    return client_of(server)


def chat(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(**({"model": "babbler", "messages": HELLO, "max_tokens": 6} | options))


def complete(client: Any, **options: Any) -> Any:
    return client.completions.create(**({"model": "babbler", "prompt": "The quick", "max_tokens": 6} | options))


# --- requests and their answers ---------------------------------------------------------------------------------


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["babbler"]
    assert client.models.retrieve("babbler").owned_by == "minipaged"
    assert client.models.list().data[0].max_model_len == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/nothing")


def test_an_answer_is_continued_and_the_template_gets_its_variables(client, llm, monkeypatch) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The quick"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    answer = chat(client, messages=begun, temperature=0, extra_body=body)
    expected = llm.chat(begun, SamplingParams(temperature=0, max_tokens=6), continue_final_message=True)
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    template = llm.tokenizer.chat_template + "{% if not enable_thinking | default(true) %}brown fox{% endif %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    quick = chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert quick.usage.prompt_tokens > chat(client).usage.prompt_tokens


@pytest.mark.parametrize(
    "body",
    [
        {"continue_final_message": True},  # the last message is the user's
        {"continue_final_message": True, "add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"enable_thinkng": False}},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        {"chat_template_kwargs": [1]},
    ],
)
def test_wrong_uses_of_the_template_are_refused(client, body) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, extra_body=body)


def test_a_chat_is_what_the_engine_says(client, llm) -> None:
    answer = chat(client, seed=3, temperature=0.7)
    expected = llm.chat(HELLO, SamplingParams(seed=3, temperature=0.7, max_tokens=6))
    (choice,) = answer.choices
    (output,) = expected.outputs
    assert (choice.message.role, choice.message.content) == ("assistant", output.text)
    assert choice.finish_reason == output.finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(output.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens <= answer.usage.prompt_tokens
    again = chat(client, messages=[*HELLO, answer.choices[0].message, *HELLO], seed=3)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens, "a client's own message object can be sent back"


def test_a_stream_adds_up_to_the_whole(client) -> None:
    options = {"n": 3, "seed": 5, "max_tokens": 7, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **options)
    texts, ends, logprobs = [""] * 3, [None] * 3, [[], [], []]
    usage, roles = None, []
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **options):
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert roles == ["assistant"] * 3
    assert len({*texts}) > 1


def test_usage_says_what_came_from_the_prefix_cache(client, llm) -> None:
    prompt = [7, 11, 13] * 20
    block_size = llm.engine.memory.block_size
    first, second = (complete(client, prompt=prompt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // block_size * block_size > 0
    *_, last = complete(client, prompt=[prompt, prompt], stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == 2 * second.prompt_tokens_details.cached_tokens


def test_a_stream_without_usage_has_none(client) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in chat(client, stream=True))


def test_many_prompts_as_text_and_as_tokens(client, llm) -> None:
    texts = ["The quick", "Paged attention", "Hello"]
    options = {"temperature": 0, "n": 2}
    answer = complete(client, prompt=texts, **options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=6))
    expected = [output.outputs[0].text for output in outputs for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    tokens = complete(client, prompt=[llm.encode(text) for text in texts], **options)
    assert [choice.text for choice in tokens.choices] == expected
    one = complete(client, prompt=llm.encode(texts[1]), temperature=0)
    assert one.choices[0].text == expected[2]
    streamed = [""] * 6
    for chunk in complete(client, prompt=texts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_logprobs_of_completions_and_of_an_echoed_prompt(client, llm) -> None:
    prompt = llm.encode("The quick brown")
    (choice,) = complete(client, prompt="The quick brown", echo=True, logprobs=3, temperature=0).choices
    lp = choice.logprobs
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=3)
    expected = llm.generate("The quick brown", params)[0]
    assert choice.text == "The quick brown" + expected.outputs[0].text
    tokens = prompt + expected.outputs[0].token_ids
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset) == len(tokens)
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    everything = expected.prompt_logprobs + expected.outputs[0].logprobs
    for token, mine, theirs in list(zip(tokens, lp.token_logprobs, everything, strict=True))[1:]:
        assert mine == pytest.approx(theirs[token], abs=1e-4)
    for piece, offset in zip(lp.tokens, lp.text_offset, strict=True):
        if piece.startswith("bytes:"):
            continue  # part of a character
        assert piece == llm.tokenizer.eos_token or choice.text[offset:].startswith(piece)


def test_special_tokens_do_not_move_the_offsets_of_a_stream(client, llm) -> None:
    asked = {"logprobs": 0, "temperature": 0, "extra_body": {"ignore_eos": True}}
    asked["logit_bias"] = {str(llm.tokenizer.eos_token_id): 5.0}
    whole = complete(client, **asked).choices[0].logprobs
    assert llm.tokenizer.eos_token in whole.tokens[:-1], "it should be followed by other tokens"
    parts = [chunk.choices[0].logprobs for chunk in complete(client, stream=True, **asked)]
    assert [offset for part in parts if part for offset in part.text_offset] == whole.text_offset


def test_an_echoed_prompt_can_be_scored_without_generating(client) -> None:
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "The quick" and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        complete(client, max_tokens=0)


def test_an_echo_is_streamed_first(client) -> None:
    pieces = [chunk.choices[0].text for chunk in complete(client, echo=True, stream=True, temperature=0)]
    assert pieces[0] == "The quick"
    assert "".join(pieces) == complete(client, echo=True, temperature=0).choices[0].text


def test_best_of_gives_the_likeliest_per_token(client, llm) -> None:
    answer = complete(client, best_of=4, n=2, seed=1)
    outputs = llm.generate("The quick", SamplingParams(n=4, seed=1, max_tokens=6, logprobs=0))[0].outputs
    ranked = sorted(outputs, key=lambda out: -out.cumulative_logprob / len(out.token_ids))
    assert [choice.text for choice in answer.choices] == [out.text for out in ranked[:2]]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == sum(len(out.token_ids) for out in outputs), "all computed tokens count"


def test_sampling_parameters_have_their_effect(client, llm) -> None:
    token = llm.encode("fox")[0]
    forced = complete(client, logit_bias={str(token): 1e6}, max_tokens=4)
    assert forced.choices[0].text == llm.tokenizer.decode([token] * 4)
    for penalty in ({"frequency_penalty": 100}, {"presence_penalty": 100}):
        varied = complete(client, logit_bias={str(token): 60}, max_tokens=4, **penalty)
        assert varied.choices[0].text != forced.choices[0].text, penalty
    greedy = complete(client, temperature=0, max_tokens=12).choices[0].text
    repeating = complete(client, temperature=0, max_tokens=12, extra_body={"repetition_penalty": 0.01})
    assert repeating.choices[0].text != greedy
    assert complete(client, temperature=50, max_tokens=12, extra_body={"top_k": 1}).choices[0].text == greedy
    assert complete(client, temperature=50, max_tokens=12, top_p=1e-9).choices[0].text == greedy
    assert complete(client, temperature=50, max_tokens=12, extra_body={"min_p": 1.0}).choices[0].text == greedy
    stop = greedy[3:6]
    stopped = complete(client, temperature=0, max_tokens=12, stop=stop)
    assert stopped.choices[0].text == greedy[: greedy.index(stop)] and stopped.choices[0].finish_reason == "stop"
    assert complete(client, seed=7).choices[0].text == complete(client, seed=7).choices[0].text
    long = chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=17, extra_body={"ignore_eos": True})
    assert long.usage.completion_tokens == 17 and long.choices[0].finish_reason == "length"


def test_what_openai_calls_bookkeeping_is_taken_and_the_rest_refused_by_name(client) -> None:
    chat(client, user="me", metadata={"a": "b"}, store=False, service_tier="auto", response_format={"type": "text"})
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for options, param in (
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"extra_body": {"beam_width": 2}}, "beam_width"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [image]}]}, "messages.0.content"),
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            chat(client, **options)
        assert refusal.value.param == param, options
    assert "'messages.0.content': content[0] is an image (type 'image_url')" in str(refusal.value)
    parts = [{"type": "text", "text": "The quick "}, {"type": "text", "text": "brown fox"}]
    in_parts = chat(client, messages=[{"role": "user", "content": parts}], temperature=0)
    assert in_parts.choices[0].message.content == chat(client, temperature=0).choices[0].message.content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "gpt-9"}, "no model 'gpt-9'"),
        ({"n": 9}, "max_num_seqs"),
        ({"n": 0}, "n must be"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 3}, "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "at most 20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "the same thing"),
        ({"stream_options": {"include_usage": True}}, "without stream"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "assistant", "content": "I first"}]}, "the user speaks first"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "needs room for one more"),
        ({"logit_bias": {"ten": 1}}, "token ids"),
        ({"logit_bias": {"99999": 1}}, "not in the vocabulary"),
        ({"stop": [""]}, "none of them empty"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_with_words(client, options, words, stream) -> None:
    more = {"stream": True} if stream and "stream_options" not in options else {}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=words):
        chat(client, **options, **more)


def test_keys(start) -> None:
    server = start(keys=("first", "second"))
    for key in ("first", "second"):
        assert chat(client_of(server, key)).choices
    for key in ("third", "firs", "firstt"):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            chat(client_of(server, key))


# --- concurrent requests ----------------------------------------------------------------------------------------


def test_64_clients_at_once_get_what_each_would_get_alone(server, llm) -> None:
    prompts = [f"The {word} {number}" for word in ("quick", "lazy") for number in range(32)]
    params = [SamplingParams(seed=i, max_tokens=2 + i % 4) for i in range(64)]
    expected = [output.outputs[0].text for output in llm.generate(prompts, params)]

    async def one(client: Any, i: int) -> str:
        options = {"model": "babbler", "prompt": prompts[i], "seed": i, "max_tokens": 2 + i % 4}
        if i % 2:
            return (await client.completions.create(**options)).choices[0].text
        stream = await client.completions.create(stream=True, **options)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody() -> list[str]:
        async with client_of(server, kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    assert run_async(everybody()) == expected


def test_overload_is_told_and_passes(start) -> None:
    server = start(limits=Limits(max_queue=2), max_num_seqs=2)
    server.hold()
    client = client_of(server)
    long = {"max_tokens": 500, "extra_body": {"ignore_eos": True}}  # none ends before the fifth arrives
    accepted = [in_thread(lambda: chat(client, **long)) for _ in range(4)]
    until(lambda: len(server.service._jobs) == 4)
    server.server.thread.call(lambda: None).cancel()  # a cancelled command must not matter
    refused = in_thread(lambda: chat(client))
    until(lambda: server.let() or refused.done())  # the engine's thread runs commands between steps
    with pytest.raises(openai.RateLimitError) as refusal:
        refused.result(0)
    assert refusal.value.response.headers["retry-after"] == "1"
    server.release()
    assert all(answer.result(PATIENCE).choices for answer in accepted)
    assert chat(client, n=2).choices, "requests are accepted again"
    with pytest.raises(openai.BadRequestError, match="4 are the most"):
        complete(client, prompt=["a"] * 5)


def test_so_many_connections_are_answered_at_once(start) -> None:
    server = start(limits=Limits(max_concurrent=1))
    server.hold()
    client = client_of(server)
    first = in_thread(lambda: chat(client))
    until(lambda: server.service._jobs)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError):
            chat(client, stream=stream)
    server.release()
    assert first.result(PATIENCE).choices
    until(server.idle)
    assert chat(client).choices


# --- disconnecting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n": 3}])
def test_closing_a_stream_frees_its_blocks_with_the_next_step(server, client, options) -> None:
    stream = chat(client, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}, **options)
    for _ in range(5):
        next(stream)
    server.hold()
    until(server.engine.block_tables)
    stream.close()
    until(lambda: not server.service._jobs, "the server did not notice")
    server.let()  # the step in progress
    until(lambda: not server.engine.block_tables(), "the blocks are still held")
    assert not server.engine.has_unfinished()


def test_hanging_up_while_waiting_for_the_whole_frees_the_blocks(server, client) -> None:
    server.hold()
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.2), max_tokens=1500)
    until(lambda: not server.service._jobs)
    server.let()
    until(server.idle)


# --- failures in the engine -------------------------------------------------------------------------------------


def test_a_failed_step_is_a_500_for_its_batch_and_the_server_goes_on(server, client) -> None:
    server.hold()
    whole = in_thread(lambda: chat(client))
    stream = in_thread(lambda: [*chat(client, stream=True)])
    until(lambda: len(server.service._jobs) == 2)
    server.let(2)  # after two steps, both are in the batch
    server.fail(RuntimeError("secret of the engine"))
    server.release()
    outcomes = [future.exception(PATIENCE) for future in (whole, stream)]
    assert any(outcomes), "no request was in the failed step"
    for error in filter(None, outcomes):
        assert isinstance(error, openai.APIError) and "a step of the engine failed" in str(error)
        assert "secret" not in str(error)
        assert isinstance(error, openai.InternalServerError) or error is outcomes[1]
    assert chat(client).choices


def test_after_a_bug_in_the_bookkeeping_the_engine_starts_over(start) -> None:
    server = start()
    client = client_of(server)
    server.hold()
    waiting = in_thread(lambda: chat(client, max_tokens=500))
    until(lambda: server.service._jobs)
    broken = server.engine

    def bug(*args: Any) -> Any:
        raise KeyError("an unknown block")

    broken.scheduler.commit = bug
    server.release()
    error = waiting.exception(PATIENCE)
    assert isinstance(error, openai.InternalServerError) and "started over" in str(error)
    assert server.engine is not broken
    assert chat(client).choices


def test_what_takes_too_long_is_ended(start) -> None:
    server = start(limits=Limits(timeout=0.2))
    server.hold()
    client = client_of(server)
    with pytest.raises(openai.InternalServerError) as whole:
        chat(client)
    assert whole.value.status_code == 504 and whole.value.code == "timeout"
    server.let()
    with pytest.raises(openai.APIError, match="more than 0.2 seconds"):
        [*chat(client, stream=True)]
    server.release()
    until(server.idle)
    assert not server.engine.block_tables()


# --- stopping ---------------------------------------------------------------------------------------------------


def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new(start) -> None:
    server = start()
    client = client_of(server)
    server.hold()
    stream = chat(client, stream=True, max_tokens=20, extra_body={"ignore_eos": True})
    whole = in_thread(lambda: chat(client, max_tokens=20, extra_body={"ignore_eos": True}))
    until(lambda: len(server.service._jobs) == 2)
    server.server.should_exit = True
    until(lambda: server.service.draining)
    with pytest.raises(openai.APIConnectionError):
        chat(client_of(server))
    server.release()
    assert [chunk for chunk in stream][-1].choices[0].finish_reason == "length"
    assert whole.result(PATIENCE).usage.completion_tokens == 20
    server.stop()


def test_what_does_not_finish_in_time_is_ended_with_an_error(start) -> None:
    server = start(limits=Limits(grace=0))
    client = client_of(server)
    server.hold()
    stream = in_thread(lambda: [*chat(client, stream=True)])
    whole = in_thread(lambda: chat(client))
    until(lambda: len(server.service._jobs) == 2)
    server.server.should_exit = True
    for future in (stream, whole):
        error = future.exception(PATIENCE)
        assert isinstance(error, openai.APIError) and "shutting down" in str(error)
    assert whole.exception().status_code == 503
    server.stop()


def test_metrics(start) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client IS NOT INSTALLED: pip install prometheus_client")
    server = start()
    client = client_of(server)
    usage = chat(client, n=2).usage
    with pytest.raises(openai.BadRequestError):
        chat(client, n=0)
    text = HTTP.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['minipaged_requests_total{endpoint="chat",status="200"}']) == 1
    assert float(values['minipaged_requests_total{endpoint="chat",status="400"}']) == 1
    assert float(values["minipaged_generation_tokens_total"]) == usage.completion_tokens
    assert float(values["minipaged_prompt_tokens_total"]) == usage.prompt_tokens
    assert float(values["minipaged_time_to_first_token_seconds_count"]) == 1
    assert float(values["minipaged_kv_blocks_free"]) == float(values["minipaged_kv_blocks"]) == 300
    assert not any(math.isnan(float(value)) for value in values.values())


def test_metrics_count_preemptions(start) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client IS NOT INSTALLED: pip install prometheus_client")
    server = start(num_blocks=8)
    client = client_of(server)
    server.hold()  # until both requests have arrived
    asked = [in_thread(lambda: complete(client, max_tokens=90, extra_body={"ignore_eos": True})) for _ in range(2)]
    until(lambda: len(server.service._jobs) == 2)
    server.release()
    assert [future.result(PATIENCE).usage.completion_tokens for future in asked] == [90, 90]
    values = dict(line.rsplit(" ", 1) for line in HTTP.get(f"{server.url}/metrics").text.splitlines())
    assert float(values["minipaged_preemptions"]) == server.engine.scheduler.num_preemptions > 0

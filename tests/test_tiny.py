"""The `LLM` class with the embedded model: text in, text out."""

from minipaged import LLM, SamplingParams


def test_text_held_back_for_a_stop_string_is_given_out_on_abort():
    llm = LLM("tiny", num_blocks=64)
    params = SamplingParams(temperature=0, max_tokens=100, stop="e@@@")
    llm.engine.add_request("a", llm.encode("Once upon a time"), params)
    while True:
        ((out,),) = [output.outputs for output in llm.engine.step()]
        whole = llm.tokenizer.decode(out.token_ids)
        if whole.endswith("e"):
            break
    assert out.text == whole[:-1]
    (out,) = llm.engine.abort("a").outputs
    assert out.text == whole


def test_a_second_turn_of_a_chat_finds_the_first_in_the_prefix_cache():
    llm = LLM("tiny", num_blocks=64)
    cached = []
    llm.engine.events.subscribe(lambda e: cached.append(e.num_cached) if e.type == "admitted" else None)
    messages = [{"role": "user", "content": "What is a block table?"}]
    params = SamplingParams(temperature=0, max_tokens=60)
    answer = llm.chat(messages, params).outputs[0]
    assert "physical block" in answer.text and answer.finish_reason == "stop"
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
    llm.chat(messages, params)
    assert cached[0] == 0 and cached[1] >= 16

"""Answers of the default engine on the micro model, against transformers' own generate."""

import threading

import pytest
import torch

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay, save_overlay
from nexus_ray.data.encoding import encode_messages
from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.generation.request import (
    BusyError,
    ClosedError,
    ContextLengthError,
    SamplingParams,
    UnknownModelError,
)
from nexus_ray.generation.serving import load_assistant

HELLO = [{"role": "user", "content": "Good morrow, who goes there?"}]
GREEDY = SamplingParams(max_tokens=24, temperature=0)


def answer(assistant, model, params=GREEDY, messages=HELLO):
    return "".join(piece.text for piece in assistant.generate(messages, model, params))


def reference(loaded, tokens=24):
    """Greedy continuation by transformers, base if there are no shared experts."""
    ids = torch.tensor([encode_messages(loaded.tokenizer, HELLO, prompt=True)])
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    generated = output[0, ids.shape[1] :].tolist()
    assert not set(generated) & set(loaded.tokenizer.get_added_vocab().values()), "choose another prompt"
    return loaded.tokenizer.decode(generated)


def test_greedy_answers_are_those_of_transformers(assistant, student, plain_base):
    assert answer(assistant, "student") == reference(student)
    assert answer(assistant, "base") == reference(plain_base)


def test_base_and_student_differ(assistant):
    assert answer(assistant, "base") != answer(assistant, "student")


def test_a_student_with_a_zero_overlay_answers_as_the_base(tmp_path, make_assistant, micro_model, micro_overlay):
    description, tensors = load_overlay(micro_overlay, fingerprint(micro_model))
    zero = {name: tensor * 0 if "down_proj" in name else tensor for name, tensor in tensors.items()}
    save_overlay(tmp_path / "zero", description, zero)
    both = make_assistant({"silent": tmp_path / "zero"})
    assert answer(both, "silent") == answer(both, "base")


def test_concurrent_callers_of_several_models_do_not_mix(assistant):
    expected = {model: answer(assistant, model) for model in ("base", "student")}
    found = []
    callers = [
        threading.Thread(target=lambda model=model: found.append((model, answer(assistant, model))))
        for model in ("base", "student") * 4
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 8
    assert all(text == expected[model] for model, text in found)


def test_pieces_come_one_by_one_with_counts_and_a_reason(assistant, student):
    generation = assistant.generate(HELLO, "base", GREEDY)
    pieces = list(generation)
    assert len(pieces) > 5
    assert generation.prompt_tokens == len(encode_messages(student.tokenizer, HELLO, prompt=True))
    assert generation.completion_tokens == 24
    assert generation.finish_reason == "length"


def test_the_tokens_of_the_pieces_are_those_generated(assistant):
    generation = assistant.generate(HELLO, "base", SamplingParams(24, 0, alternatives=2))
    tokens = [token for piece in generation for token in piece.tokens]
    assert len(tokens) == 24
    assert all(token.top[0] == (token.id, token.logprob) for token in tokens)  # greedy: the chosen one is the best
    assert all(token.top[0][1] >= token.top[1][1] for token in tokens)


def test_a_stop_string_ends_the_answer_before_it(assistant):
    full = answer(assistant, "base")
    stop = full[10:13]
    generation = assistant.generate(HELLO, "base", SamplingParams(24, 0, stop=(stop,)))
    assert "".join(piece.text for piece in generation) == full[: full.index(stop)]
    assert generation.finish_reason == "stop"
    assert generation.completion_tokens < 24


def test_a_seed_reproduces_a_sampled_answer(assistant):
    def sampled(seed):
        return answer(assistant, "student", SamplingParams(24, 1.0, seed=seed))

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    assert sampled(None) != sampled(None)


def test_sampling_leaves_the_process_random_state_alone(assistant):
    answer(assistant, "student", SamplingParams(1, 1.0))  # transformers sets a seed when its loop begins
    before = torch.random.get_rng_state()
    answer(assistant, "student", SamplingParams(4, 1.0, seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_p_of_almost_nothing_is_greedy(assistant):
    assert answer(assistant, "base", SamplingParams(24, 1.0, top_p=1e-6)) == answer(assistant, "base")


def test_what_does_not_fit_the_context_is_refused(assistant):
    prompt = assistant.chat_prompt(HELLO, "base", SamplingParams(max_tokens=1))
    context = assistant.engine.context_length
    left = context - len(prompt.request.ids)
    assert assistant.chat_prompt(HELLO, "base", SamplingParams(max_tokens=left)).request.max_tokens == left
    with pytest.raises(ContextLengthError, match=f"context is {context} tokens, but the prompt takes"):
        assistant.chat_prompt(HELLO, "base", SamplingParams(max_tokens=left + 1))
    with pytest.raises(ContextLengthError):
        assistant.chat_prompt([{"role": "user", "content": "word " * context}], "base", SamplingParams())


def test_megabytes_are_refused_without_tokenising_them(assistant, monkeypatch):
    monkeypatch.setattr("nexus_ray.generation.codec.encode_messages", None)
    with pytest.raises(ContextLengthError, match="10000000 characters"):
        assistant.chat_prompt([{"role": "user", "content": "x" * 10_000_000}], "base", SamplingParams())


def test_text_of_the_longest_tokens_is_not_refused_too_early(assistant, plain_base):
    tokenizer = plain_base.tokenizer
    longest = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.decode([tokenizer.convert_tokens_to_ids(longest)])
    context = assistant.engine.context_length
    prompt = assistant.chat_prompt([{"role": "user", "content": text * (context * 2 // 3)}], "base", SamplingParams())
    assert len(prompt.request.ids) < context


def test_the_default_length_bends_to_what_is_left(assistant, make_assistant):
    prompt = assistant.chat_prompt(HELLO, "base", SamplingParams())
    assert prompt.request.max_tokens == 256
    short = make_assistant({}, max_new_tokens=9)
    assert short.chat_prompt(HELLO, "base", SamplingParams()).request.max_tokens == 9
    context = assistant.engine.context_length
    filler = {"role": "user", "content": " a" * (context - len(prompt.request.ids) - 20)}
    nearly_full = assistant.chat_prompt([filler], "base", SamplingParams()).request
    assert nearly_full.max_tokens == context - len(nearly_full.ids) < 256


def test_a_full_queue_refuses_and_recovers(make_assistant):
    assistant = make_assistant(requests=1)
    long = assistant.generate(HELLO, "base", SamplingParams(400, 0))
    with pytest.raises(BusyError, match="all 1 places"):
        assistant.generate(HELLO, "base", GREEDY)
    long.cancel()
    list(long)
    assert answer(assistant, "base", SamplingParams(2, 0))


def test_cancelling_stops_running_and_waiting_answers(make_assistant):
    assistant = make_assistant(batch_requests=1)
    running = assistant.generate(HELLO, "base", SamplingParams(400, 0))
    waiting = assistant.generate(HELLO, "base", SamplingParams(400, 0))
    waiting.cancel()
    next(iter(running))
    running.cancel()
    assert list(waiting) == []
    list(running)
    assert 0 < running.completion_tokens < 400
    assert waiting.completion_tokens == 0
    assert assistant.engine.state().running == 0


def test_closing_ends_what_runs_and_refuses_what_comes(make_assistant):
    assistant = make_assistant()
    running = assistant.generate(HELLO, "base", SamplingParams(400, 0))
    next(iter(running))
    assistant.close()
    with pytest.raises(ClosedError):
        list(running)
    with pytest.raises(ClosedError):
        assistant.generate(HELLO, "base", GREEDY)


def test_a_text_is_continued_as_transformers_does(assistant, student):
    prompt = assistant.text_prompt("thou art the", "student", GREEDY)
    ids = torch.tensor([prompt.request.ids])
    output = student.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    continued = "".join(piece.text for piece in assistant.submit(prompt))
    assert continued == student.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_text_and_its_token_ids_are_the_same_prompt(assistant):
    prompt = assistant.text_prompt("thou art the", "base", GREEDY)
    assert assistant.text_prompt(list(prompt.request.ids), "base", GREEDY) == prompt


def test_token_ids_outside_the_vocabulary_are_refused(assistant):
    with pytest.raises(DataError, match="token id 999999"):
        assistant.text_prompt([1, 999_999], "base", GREEDY)


def test_an_unknown_model_is_refused_with_those_known(assistant):
    with pytest.raises(UnknownModelError, match="'gpt-5'; known: 'base', 'student'"):
        assistant.chat_prompt(HELLO, "gpt-5", GREEDY)


def test_a_missing_overlay_says_what_to_run(micro_config, tmp_path):
    with pytest.raises(ArtefactError, match="nexus-ray run CONFIG"):
        load_assistant(micro_config(tmp_path / "run"), {"bard": tmp_path / "run" / "overlay"})

"""The engine on the micro model, against transformers' own generate and a perplexity worked out by hand."""

import math
import threading

import pytest
import torch

from nexus_ray.checkpoints.overlay import load_overlay, save_overlay
from nexus_ray.config import ModelSection
from nexus_ray.data.encoding import encode_messages
from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.generation.engine import load_served_model
from nexus_ray.generation.request import BusyError, ClosedError, ContextLengthError, SamplingParams
from nexus_ray.modeling.loading import load_student

HELLO = [{"role": "user", "content": "Good morrow, who goes there?"}]
GREEDY = SamplingParams(max_tokens=24, temperature=0)
TEXT = "thou art the king and I thy servant; speak, good sir, or be silent. " * 4


def answer(engine, which, params=GREEDY, messages=HELLO):
    return "".join(piece.text for piece in engine.generate(messages, which, params))


def reference(loaded, tokens=24):
    """Greedy continuation by transformers, base if there are no shared experts."""
    ids = torch.tensor([encode_messages(loaded.tokenizer, HELLO, prompt=True)])
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    generated = output[0, ids.shape[1] :].tolist()
    assert not set(generated) & set(loaded.tokenizer.get_added_vocab().values()), "choose another prompt"
    return loaded.tokenizer.decode(generated)


def test_greedy_answers_are_those_of_transformers(engine, student, plain_base):
    assert answer(engine, "student") == reference(student)
    assert answer(engine, "base") == reference(plain_base)


def test_base_and_student_differ(engine):
    assert answer(engine, "base") != answer(engine, "student")


def test_a_plain_base_answers_as_the_student_does_switched_off(engine, make_engine, plain_base):
    assert answer(make_engine(plain_base), "base") == answer(engine, "base")


def test_a_student_with_a_zero_overlay_answers_as_the_base(tmp_path, engine, make_engine, micro_model, micro_overlay):
    description, tensors = load_overlay(micro_overlay, engine.loaded.fingerprint)
    zero = {name: tensor * 0 if "down_proj" in name else tensor for name, tensor in tensors.items()}
    save_overlay(tmp_path / "zero", description, zero)
    silent = make_engine(load_student(ModelSection(path=micro_model), tmp_path / "zero"))
    assert answer(silent, "student") == answer(engine, "base")


def test_concurrent_callers_do_not_mix(engine):
    expected = {which: answer(engine, which) for which in ("base", "student")}
    found = []
    callers = [
        threading.Thread(target=lambda which=which: found.append((which, answer(engine, which))))
        for which in ("base", "student") * 4
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 8
    assert all(text == expected[which] for which, text in found)


def test_pieces_come_one_by_one_with_counts_and_a_reason(engine, student):
    generation = engine.generate(HELLO, "base", GREEDY)
    pieces = list(generation)
    assert len(pieces) > 5
    assert generation.prompt_tokens == len(encode_messages(student.tokenizer, HELLO, prompt=True))
    assert generation.completion_tokens == 24
    assert generation.finish_reason == "length"


def test_a_stop_string_ends_the_answer_before_it(engine):
    full = answer(engine, "base")
    stop = full[10:13]
    generation = engine.generate(HELLO, "base", SamplingParams(24, 0, stop=(stop,)))
    assert "".join(piece.text for piece in generation) == full[: full.index(stop)]
    assert generation.finish_reason == "stop"
    assert generation.completion_tokens < 24


def test_a_seed_reproduces_a_sampled_answer(engine):
    def sampled(seed):
        return answer(engine, "student", SamplingParams(24, 1.0, seed=seed))

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    assert sampled(None) != sampled(None)


def test_sampling_leaves_the_process_random_state_alone(engine):
    before = torch.random.get_rng_state()
    answer(engine, "student", SamplingParams(4, 1.0, seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_p_of_almost_nothing_is_greedy(engine):
    assert answer(engine, "base", SamplingParams(24, 1.0, top_p=1e-6)) == answer(engine, "base")


def test_sampling_is_from_the_whole_vocabulary(engine, monkeypatch):
    """transformers keeps the 50 likeliest tokens unless told otherwise; OpenAI's interface has no such limit."""
    generate, outputs = engine.loaded.model.generate, []
    monkeypatch.setattr(engine.loaded.model, "generate", lambda *a, **k: outputs.append(generate(*a, **k)))
    for seed in range(8):
        answer(engine, "student", SamplingParams(1, 1e4, seed=seed))
    with torch.no_grad():
        logits = engine.loaded.model(outputs[0][:, :-1]).logits[0, -1]
    best = set(logits.topk(50).indices.tolist())
    assert not all(int(output[0, -1]) in best for output in outputs)


def test_what_does_not_fit_the_context_is_refused(engine):
    prompt = engine.prepare(HELLO, "base", SamplingParams(max_tokens=1))
    left = engine.context_length - len(prompt.ids)
    assert engine.prepare(HELLO, "base", SamplingParams(max_tokens=left)).max_tokens == left
    with pytest.raises(ContextLengthError, match=f"context is {engine.context_length} tokens"):
        engine.prepare(HELLO, "base", SamplingParams(max_tokens=left + 1))
    with pytest.raises(ContextLengthError):
        engine.prepare([{"role": "user", "content": "word " * engine.context_length}], "base", SamplingParams())


def test_megabytes_are_refused_without_tokenising_them(engine, monkeypatch):
    monkeypatch.setattr("nexus_ray.generation.engine.encode_messages", None)
    with pytest.raises(ContextLengthError, match="10000000 characters"):
        engine.prepare([{"role": "user", "content": "x" * 10_000_000}], "base", SamplingParams())


def test_text_of_the_longest_tokens_is_not_refused_too_early(engine):
    longest = max(engine.loaded.tokenizer.get_vocab(), key=len)
    text = engine.loaded.tokenizer.decode([engine.loaded.tokenizer.convert_tokens_to_ids(longest)])
    many = engine.context_length * 2 // 3
    messages = [{"role": "user", "content": text * many}]
    assert len(engine.prepare(messages, "base", SamplingParams()).ids) < engine.context_length


def test_the_default_length_bends_to_what_is_left(engine, make_engine, student):
    prompt = engine.prepare(HELLO, "base", SamplingParams())
    assert prompt.max_tokens == 256
    assert make_engine(student, max_new_tokens=9).prepare(HELLO, "base", SamplingParams()).max_tokens == 9
    filler = {"role": "user", "content": " a" * (engine.context_length - len(prompt.ids) - 20)}
    nearly_full = engine.prepare([filler], "base", SamplingParams())
    assert nearly_full.max_tokens == engine.context_length - len(nearly_full.ids) < 256


def test_a_full_queue_refuses_and_recovers(make_engine, student):
    engine = make_engine(student, max_requests=1, max_new_tokens=400)
    long = engine.generate(HELLO, "base", SamplingParams(400, 0))
    with pytest.raises(BusyError, match="all 1 places"):
        engine.generate(HELLO, "base", GREEDY)
    long.cancel()
    list(long)
    assert answer(engine, "base", SamplingParams(2, 0))


def test_cancelling_stops_a_running_answer_and_skips_a_waiting_one(engine):
    running = engine.generate(HELLO, "base", SamplingParams(400, 0))
    waiting = engine.generate(HELLO, "base", SamplingParams(400, 0))
    waiting.cancel()
    next(iter(running))
    running.cancel()
    assert list(waiting) == []
    list(running)
    assert 0 < running.completion_tokens < 400
    assert waiting.completion_tokens == 0


def test_a_failure_reaches_its_caller_and_the_engine_goes_on(engine, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.loaded.model, "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(engine.generate(HELLO, "base", GREEDY))
    assert answer(engine, "base")


def test_closing_ends_what_runs_and_refuses_what_waits_or_comes(make_engine, student):
    engine = make_engine(student)
    running = engine.generate(HELLO, "base", SamplingParams(400, 0))
    waiting = engine.generate(HELLO, "base", SamplingParams(400, 0))
    next(iter(running))
    engine.close()
    list(running)
    assert running.completion_tokens < 400
    with pytest.raises(ClosedError):
        list(waiting)
    with pytest.raises(ClosedError):
        engine.generate(HELLO, "base", GREEDY)


def nats_by_hand(loaded, text, length):
    """Sum over the windows of [separator, text, separator] with an overlap of one token."""
    tokenizer = loaded.tokenizer
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [separator, *tokenizer.encode(text, add_special_tokens=False), separator]
    total, start = 0.0, 0
    while start < len(ids) - 1:
        window = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            log_probs = loaded.model(window).logits[0, :-1].double().log_softmax(-1)
        total -= log_probs.gather(1, window[0, 1:, None]).sum().item()
        start += length - 1
    return total, len(ids) - 1


def test_perplexity_is_that_worked_out_by_hand(engine, student, plain_base):
    scores = engine.score([TEXT], ["base", "student"], threading.Event()).result()[0]
    for which, loaded in (("base", plain_base), ("student", student)):
        nats, tokens = nats_by_hand(loaded, TEXT, 32)
        score = scores[which]
        assert score.tokens == tokens > 64
        assert score.bytes == len(TEXT.encode())
        assert score.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
        assert score.token_perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert scores["base"] != scores["student"]


def test_special_tokens_in_a_scored_text_are_text(engine):
    text = "a<|return|>b"
    score = engine.score([text], ["base"], threading.Event()).result()[0]["base"]
    assert score.bytes == len(text)


def test_chats_and_texts_are_not_tokenised_at_the_same_time(engine, monkeypatch):
    """They set different options of one tokenizer: the second must wait for the first."""
    scored = threading.Event()

    def score():
        engine.score(["x"], [], threading.Event())
        scored.set()

    thread = threading.Thread(target=score)

    def encode(*_, **__):
        thread.start()
        assert not scored.wait(0.3)
        return [1]

    monkeypatch.setattr("nexus_ray.generation.engine.encode_messages", encode)
    engine.prepare(HELLO, "base", GREEDY)
    thread.join(5)
    assert scored.is_set()


def test_an_empty_text_is_refused(engine):
    with pytest.raises(DataError, match="empty"):
        engine.score([""], ["base"], threading.Event())


def test_abandoned_scoring_stops(engine):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(InterruptedError):
        engine.score([TEXT], ["base"], cancelled).result()


def test_a_missing_overlay_says_what_to_run(micro_config, tmp_path):
    with pytest.raises(ArtefactError, match="nexus-ray run CONFIG"):
        load_served_model(micro_config(tmp_path / "run"), tmp_path / "run" / "overlay")


def test_a_plain_base_does_not_pass_for_the_student(make_engine, plain_base):
    engine = make_engine(plain_base)
    with pytest.raises(ArtefactError, match="no student"):
        engine.prepare(HELLO, "student", GREEDY)
    with pytest.raises(ArtefactError, match="no student"):
        engine.score(["x"], ["base", "student"], threading.Event())

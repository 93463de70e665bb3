"""The batching engine itself: several overlays in one batch, long prompts, faults, exchange of overlays, scoring."""

import json
import math
import shutil
import threading
import time

import pytest
import torch

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay, save_overlay
from nexus_ray.config import ModelSection
from nexus_ray.errors import ArtefactError, ConfigError, NexusError
from nexus_ray.generation.batching.engine import BatchingEngine
from nexus_ray.generation.batching.paged import BatchLimits, requests_of
from nexus_ray.generation.batching.sampling import Draw
from nexus_ray.generation.request import ScoringRequest, TokenRequest, UnknownModelError
from nexus_ray.modeling.loading import load_base, load_student

PROMPT = tuple(range(300, 340))


def tokens(continuation):
    return [choice.id for choice in continuation]


def greedy(model, ids=PROMPT, count=16):
    return TokenRequest(tuple(ids), model, count, temperature=0)


def reference(loaded, ids=PROMPT, count=16):
    batch = torch.tensor([list(ids)])
    output = loaded.model.generate(
        batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=count, eos_token_id=-1
    )
    return output[0, len(ids) :].tolist()


@pytest.fixture
def other_overlay(tmp_path, micro_model, micro_overlay):
    """Another student: the same shared experts with the sign turned."""
    description, tensors = load_overlay(micro_overlay, fingerprint(micro_model))
    turned = {name: -tensor if "down_proj" in name else tensor for name, tensor in tensors.items()}
    save_overlay(tmp_path / "other", description, turned)
    return tmp_path / "other"


def test_base_and_two_overlays_share_batches_and_each_computes_its_own(
    make_assistant, plain_base, student, micro_model, micro_overlay, other_overlay
):
    engine = make_assistant({"one": micro_overlay, "two": other_overlay}).engine
    assert engine.models == ("base", "one", "two")
    references = {
        "base": plain_base,
        "one": student,
        "two": load_student(ModelSection(path=micro_model), other_overlay),
    }
    prompts = [PROMPT[: 8 + 5 * number] for number in range(6)]
    running = {(model, ids): engine.submit(greedy(model, ids)) for ids in prompts for model in references}
    found = {key: tokens(continuation) for key, continuation in running.items()}
    assert found == {(model, ids): reference(references[model], ids) for model, ids in found}
    assert len({tuple(found[model, prompts[0]]) for model in references}) == 3


def test_a_prompt_longer_than_a_batch_and_than_the_window_is_read_in_parts(make_assistant, student):
    ids = [300 + (7 * place) % 900 for place in range(300)]
    assert student.model.config.sliding_window < 300
    engine = make_assistant(batch_tokens=64).engine
    short = engine.submit(greedy("student", count=40))
    assert tokens(engine.submit(greedy("student", ids))) == reference(student, ids)
    assert tokens(short) == reference(student, count=40)


def test_more_requests_than_the_cache_holds_wait_their_turn(make_assistant, student):
    engine = make_assistant(cache_tokens=512, page_tokens=16, requests=12).engine
    running = [engine.submit(greedy("student", PROMPT, 60)) for _ in range(12)]
    expected = reference(student, PROMPT, 60)
    assert all(tokens(continuation) == expected for continuation in running)


def test_new_requests_are_let_in_when_all_that_filled_the_cache_are_cancelled(make_assistant, student):
    engine = make_assistant(cache_tokens=512, page_tokens=16, requests=30).engine
    tokens(engine.submit(greedy("student", count=1)))
    blocked = threading.Event()
    scheduler = engine._manager.batch_processor.scheduler
    engine.base.model.register_forward_hook(lambda *_: blocked.set() if scheduler.block_new_requests else None)
    running = [engine.submit(greedy("student", PROMPT, 200)) for _ in range(12)]
    assert blocked.wait(60), "the cache was never full"
    for continuation in running:
        continuation.cancel()
    assert tokens(engine.submit(greedy("student"))) == reference(student)


def test_scoring_works_after_a_failure(make_assistant, monkeypatch):
    engine = make_assistant().engine
    with monkeypatch.context() as patch:
        patch.setattr(engine.base.model.model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(RuntimeError, match="division"):
            tokens(engine.submit(greedy("base")))
    assert engine.state().step_seconds == 0
    [choices] = engine.score([ScoringRequest(PROMPT, PROMPT[1:], "base")], threading.Event()).result(30)
    assert len(choices) == len(PROMPT) - 1


def test_an_exchanged_overlay_answers_new_requests_and_old_ones_end_as_they_began(
    make_assistant, micro_overlay, other_overlay, student, micro_model
):
    engine = make_assistant({"bard": micro_overlay}).engine
    old = engine.submit(greedy("bard", count=60))
    first = next(iter(old))
    engine.serve({"bard": other_overlay, "new": micro_overlay})
    assert tokens(engine.submit(greedy("bard"))) == reference(
        load_student(ModelSection(path=micro_model), other_overlay)
    )
    assert tokens(engine.submit(greedy("new"))) == reference(student)
    assert [first.id, *tokens(old)] == reference(student, count=60)
    engine.serve({})
    with pytest.raises(UnknownModelError):
        engine.submit(greedy("bard"))


def test_a_damaged_overlay_changes_nothing(make_assistant, micro_overlay, tmp_path):
    engine = make_assistant({"bard": micro_overlay}).engine
    (tmp_path / "overlay_config.json").write_text("{")
    with pytest.raises(ArtefactError):
        engine.serve({"bard": micro_overlay, "broken": tmp_path})
    assert engine.models == ("base", "bard")


@pytest.fixture
def full_attention(tmp_path, micro_model, micro_overlay):
    """(model, overlay) of the micro model with full attention in every layer, and an overlay for it."""
    model = tmp_path / "full"
    shutil.copytree(micro_model, model)
    config = json.loads((model / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (model / "config.json").write_text(json.dumps(config))
    description, tensors = load_overlay(micro_overlay, fingerprint(micro_model))
    save_overlay(tmp_path / "overlay", description.model_copy(update={"base_fingerprint": fingerprint(model)}), tensors)
    return model, tmp_path / "overlay"


def test_prefixes_are_shared_where_all_attention_is_full_but_not_between_overlays(full_attention):
    """Keys and values of a prompt depend on the overlay that computed them."""
    model, overlay = full_attention
    section = ModelSection(path=model)
    references = {"base": load_base(section), "student": load_student(section, overlay)}
    engine = BatchingEngine(load_base(section), {"student": overlay}, BatchLimits(cache_tokens=2048, page_tokens=16))
    counted = []
    engine.base.model.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: counted.append(inputs[0].numel()))
    try:
        for _ in range(2):
            for name, loaded in references.items():
                assert tokens(engine.submit(greedy(name))) == reference(loaded)
    finally:
        engine.close()
    prefills = [count for count in counted if count > 1]
    assert prefills == [len(PROMPT)] * 2 + [len(PROMPT) - 32] * 2


def test_what_a_cancelled_request_leaves_in_the_cache_is_its_overlay_s(full_attention, monkeypatch):
    """A request that is cancelled just before its pass is computed all the same, and others share its prefix."""
    model, overlay = full_attention
    expected = reference(load_student(ModelSection(path=model), overlay))
    base = load_base(ModelSection(path=model))
    engine = BatchingEngine(base, {"student": overlay}, BatchLimits(cache_tokens=2048, page_tokens=16))

    def cancel_first(manager):
        for number in list(engine._running):
            engine._end(number, None)
        return requests_of(manager)

    try:
        with monkeypatch.context() as patch:
            patch.setattr("nexus_ray.generation.batching.engine.requests_of", cancel_first)
            assert tokens(engine.submit(greedy("student"))) == []
        assert tokens(engine.submit(greedy("student"))) == expected
    finally:
        engine.close()


@pytest.mark.parametrize("seconds", [0, 0.5], ids=["", "while it is still ending"])
def test_a_failure_reaches_its_callers_and_the_engine_goes_on(assistant, monkeypatch, seconds):
    engine = assistant.engine
    status = engine._manager.background_thread_status
    record = status.record_fatal_error

    def broken(*_, **__):
        raise RuntimeError("CUDA out of memory")

    def slowly(error):
        time.sleep(seconds)
        record(error)

    monkeypatch.setattr(status, "record_fatal_error", slowly)
    with monkeypatch.context() as patch:
        patch.setattr(engine.base.model.model, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            tokens(engine.submit(greedy("base")))
    assert tokens(engine.submit(greedy("base")))


def test_logits_that_are_no_numbers_end_their_own_request_only(assistant, monkeypatch):
    engine = assistant.engine
    healthy = tokens(engine.submit(greedy("base")))
    model = engine._models["student"]
    monkeypatch.setattr(model.overlay.experts[0].scale, "data", torch.tensor(float("nan")))
    broken, sound = engine.submit(greedy("student")), engine.submit(greedy("base"))
    with pytest.raises(ArtefactError, match="not finite"):
        tokens(broken)
    assert tokens(sound) == healthy


def test_an_engine_that_is_stuck_says_so(assistant, monkeypatch):
    engine = assistant.engine
    engine.check()
    entered, leave = threading.Event(), threading.Event()

    def stuck(*_):
        entered.set()
        leave.wait(30)

    hook = engine.base.model.model.register_forward_pre_hook(stuck)
    waiting = engine.submit(greedy("base", count=1))
    assert entered.wait(30)
    monkeypatch.setattr(engine, "limits", type(engine.limits)(stuck_seconds=0))
    with pytest.raises(NexusError, match="forward pass has been running"):
        engine.check()
    leave.set()
    hook.remove()
    tokens(waiting)
    engine.check()


def test_scores_are_those_of_a_forward_pass_of_each_model(assistant, student, plain_base):
    windows = [(300, 340, 7), (310, 320, 3), (400, 425, 24)]
    requests = [
        ScoringRequest(tuple(range(start, stop)), tuple(range(start + 1, stop + 1))[-targets:], model, alternatives=3)
        for start, stop, targets in windows
        for model in ("base", "student")
    ]
    results = assistant.engine.score(requests, threading.Event()).result()
    for request, choices in zip(requests, results, strict=True):
        loaded = student if request.model == "student" else plain_base
        with torch.no_grad():
            log_probs = loaded.model(torch.tensor([request.inputs])).logits[0].double().log_softmax(-1)
        expected = log_probs[-len(request.targets) :]
        assert [choice.id for choice in choices] == list(request.targets)
        for choice, row in zip(choices, expected, strict=True):
            assert choice.logprob == pytest.approx(row[choice.id].item(), abs=1e-4)
            assert [id_ for id_, _ in choice.top] == row.topk(3).indices.tolist()


def test_the_token_that_follows_is_the_greedy_one(assistant, plain_base):
    request = ScoringRequest(PROMPT, PROMPT[1:], "base", follow=True)
    [choices] = assistant.engine.score([request], threading.Event()).result()
    assert len(choices) == len(PROMPT)
    assert choices[-1].id == reference(plain_base, count=1)[0]


def test_scoring_and_generating_do_not_disturb_each_other(assistant, student):
    request = ScoringRequest(PROMPT, PROMPT[1:], "base")
    alone = assistant.engine.score([request], threading.Event()).result()
    running = [assistant.engine.submit(greedy("student", count=40)) for _ in range(4)]
    scored = [assistant.engine.score([request] * 5, threading.Event()) for _ in range(4)]
    expected = reference(student, count=40)
    assert all(tokens(continuation) == expected for continuation in running)
    for future in scored:
        for result in future.result():
            assert [choice.logprob for choice in result] == pytest.approx([c.logprob for c in alone[0]], abs=1e-4)


def test_scoring_that_is_abandoned_in_the_middle_of_a_pass_frees_its_place(assistant):
    engine, entered, leave = assistant.engine, threading.Event(), threading.Event()

    def wait(*_):
        entered.set()
        leave.wait(30)

    hook = engine.base.model.model.register_forward_pre_hook(wait)
    cancelled = threading.Event()
    future = engine.score([ScoringRequest(PROMPT, PROMPT[1:], "base")], cancelled)
    assert entered.wait(30)
    assert not future.cancel(), "nobody but the engine completes it"
    cancelled.set()
    leave.set()
    future.result(30)
    hook.remove()
    assert engine.state().scoring == 0
    engine.check()


def test_no_overlay_takes_the_place_of_the_base(assistant, micro_overlay):
    with pytest.raises(ConfigError, match="'base'"):
        assistant.engine.serve({"base": micro_overlay})
    assert assistant.engine.models == ("base", "student")


def test_requests_that_wait_while_no_pass_runs_are_noticed(assistant, monkeypatch):
    engine = assistant.engine
    monkeypatch.setattr(engine._manager, "add_request", lambda *_, **__: "taken")
    waiting = engine.submit(greedy("base"))
    engine.check()
    monkeypatch.setattr(engine, "_progress", 0.0)
    with pytest.raises(NexusError, match="without a pass"):
        engine.check()
    waiting.cancel()
    engine.check()


def test_a_queue_longer_than_the_scorer_looks_ahead_is_scored_whole(assistant):
    requests = [ScoringRequest(PROMPT[: 2 + index % 3], PROMPT[1 : 3 + index % 3], "base") for index in range(1500)]
    alone = [assistant.engine.score([request], threading.Event()).result()[0] for request in requests[:3]]
    results = assistant.engine.score(requests, threading.Event()).result(60)
    for index, found in enumerate(results):
        expected = [choice.logprob for choice in alone[index % 3]]
        assert [choice.logprob for choice in found] == pytest.approx(expected, abs=1e-4)


def test_abandoned_scoring_stops(assistant):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(InterruptedError):
        assistant.engine.score([ScoringRequest(PROMPT, PROMPT[1:], "base")], cancelled).result()
    assert assistant.engine.state().scoring == 0


def draws(count=4000, **params):
    """Relative frequencies of what a draw chooses from four tokens of probability 0.1, 0.2, 0.3 and 0.4."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draw = Draw(TokenRequest((1,), "base", 1, seed=0, **params))
    return torch.bincount(torch.tensor([draw.choose(logits) for _ in range(count)]), minlength=4) / count


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_p": 0.7}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"temperature": 0.5, "top_p": 0.5}, [0, 0, 0, 1]),
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"top_p": 0}, [0, 0, 0, 1]),
    ],
)
def test_draws_have_the_distribution_that_temperature_and_top_p_leave(params, expected):
    for found, wanted in zip(draws(**params).tolist(), expected, strict=True):
        assert abs(found - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / 4000)

"""The parts of benchmarks/comparison.py that its table rests on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from nexus_ray.errors import ArtefactError, ConfigError

EXPERTS, HIDDEN, INNER, TOKENS = 5, 16, 12, 24


@pytest.fixture(scope="module")
def part(script):
    script("comparison")
    return lambda name: script(f"_comparison.{name}")


@pytest.fixture
def experts() -> GptOssExperts:
    torch.manual_seed(0)
    config = GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INNER)
    module = GptOssExperts(config)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module.requires_grad_(False)


@pytest.fixture
def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, selected experts and their weights."""
    generator = torch.Generator().manual_seed(1)
    weights, indices = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(-1).topk(2)
    return torch.randn(TOKENS, HIDDEN, generator=generator), indices, weights


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module


def test_low_rank_additions_to_all_experts_are_pefts(part, experts, routed):
    peft = pytest.importorskip("peft")
    block = torch.nn.ModuleDict({"experts": experts})
    names = part("adapters").PROJECTIONS
    targets = {"target_modules": [], "target_parameters": [f"experts.{name}" for name in names]}
    randomised(peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, **targets), block))
    outer = block["experts"]
    wrappers = {wrapper.parameter_name: wrapper for wrapper in (outer, outer.base_layer)}

    ours = part("adapters").AdaptedExperts(
        experts, range(EXPERTS), lambda inputs, outputs: part("adapters").LowRank(inputs, outputs, 3, 6)
    )
    for name, expert in itertools.product(names, range(EXPERTS)):
        a, b = (getattr(wrappers[name], f"lora_{which}")["default"].weight.data for which in "AB")
        ours.additions[str(expert)][name].a.weight.data = a.view(EXPERTS, 3, -1)[expert]
        ours.additions[str(expert)][name].b.weight.data = b.view(len(b), 3, EXPERTS)[..., expert]
    with torch.no_grad():
        assert torch.allclose(outer(*routed), ours(*routed), atol=1e-5)


def test_whole_additions_are_experts_with_other_weights(part, experts, routed):
    ours = randomised(part("adapters").AdaptedExperts(experts, [1, 3], part("adapters").whole))
    with torch.no_grad():
        output = ours(*routed)
        for name, expert in itertools.product(part("adapters").PROJECTIONS, [1, 3]):
            added = ours.additions[str(expert)][name]
            getattr(experts, name)[expert] += added.weight.T
            getattr(experts, f"{name}_bias")[expert] += added.bias
        assert torch.allclose(output, experts(*routed), atol=1e-5)


@pytest.mark.parametrize("kind", ["low rank", "whole"])
def test_additions_start_at_the_function_of_the_experts(part, experts, routed, kind):
    adapters = part("adapters")
    addition = adapters.whole if kind == "whole" else lambda inputs, outputs: adapters.LowRank(inputs, outputs, 4, 8)
    with torch.no_grad():
        assert torch.allclose(adapters.AdaptedExperts(experts, [0, 2], addition)(*routed), experts(*routed), atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_heaviest_experts_are_as_few_as_can_be(part, seed):
    mass = np.random.default_rng(seed).dirichlet(np.full(6, 0.5), size=2) * 40
    for layer, chosen in zip(mass, part("methods").heaviest(mass, 0.6), strict=True):
        fewest = next(
            count
            for count in range(1, 7)
            if any(layer[list(some)].sum() >= 0.6 * layer.sum() for some in itertools.combinations(range(6), count))
        )
        assert len(chosen) == fewest
        assert layer[chosen].sum() >= 0.6 * layer.sum()


def test_a_quarter_of_the_experts_is_the_most_routed_one(part):
    selected = np.array([[3, 9, 1, 7, 5, 0, 2, 4], [1, 1, 8, 1, 1, 1, 9, 1]])
    assert part("methods").most_routed(selected, 0.25) == [[1, 3], [2, 6]]


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3e-3, 1e-2, 1e-1])
def test_the_search_ends_at_the_best_learning_rate_wherever_it_begins(part, best):
    tuning, found = part("tuning"), {}
    while rates := tuning.next_rates(1e-2, found):
        found |= {rate: abs(math.log(rate / best)) for rate in rates}
    assert tuning.best_rate(found) == best


def test_a_learning_rate_that_diverges_is_never_the_best(part):
    tuning = part("tuning")
    run = part("training").Run
    results = {run("m", 1e-2, 1000): None, run("m", 3e-3, 1000): 5.0, run("m", 3e-3, 0): 1.0, run("n", 1e-2, 1000): 0.0}
    tuned = tuning.tuned_of(results, "m")
    assert tuned == {1e-2: math.inf, 3e-3: 5.0}
    assert tuning.best_rate(tuned) == 3e-3


def test_finished_runs_are_not_done_again(script, part):
    run, method = part("training").Run, part("methods").METHODS["router"]
    tuned = {run("router", rate, 1000): loss for rate, loss in ((3e-3, 2.0), (1e-2, 1.0), (3e-2, 3.0))}
    remaining = script("comparison").outstanding([method], tuned | {run("router", 1e-2, 1): 4.0}, 3, search=True)
    assert remaining == [run("router", 1e-2, 0), run("router", 1e-2, 2)]


def test_one_run_has_the_interval_of_a_t_test(part):
    values = np.random.default_rng(0).normal(1.0, 2.0, size=(1, 12))
    found = part("statistics").crossed_mean(values)
    expected = stats.ttest_1samp(values[0], 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_intervals_cover_the_truth_for_other_runs_and_other_text(part):
    """At least as often as they say; runs that differ in their means are what an interval over sequences misses."""
    generator = np.random.default_rng(0)
    covered, of_sequences = 0, 0
    for _ in range(1000):
        runs, text = generator.normal(0, 0.5, (4, 1)), generator.normal(0, 1, (1, 32))
        values = 3.0 + runs + text + generator.normal(0, 0.5, (4, 32))
        found = part("statistics").crossed_mean(values)
        covered += found.low <= 3 <= found.high
        naive = stats.ttest_1samp(values.ravel(), 0.0).confidence_interval(0.95)
        of_sequences += naive.low <= 3 <= naive.high
    assert 930 <= covered <= 995
    assert of_sequences < 700


def test_the_verdict_says_where_the_shared_expert_loses(part):
    estimate = part("statistics").Estimate
    others = {"A": estimate(0.3, 0.1, 0.5), "B": estimate(-0.3, -0.5, -0.1), "C": estimate(0.3, -0.1, 0.7)}
    others |= {"D": estimate(0.2, 0.1, 0.3)}
    assert part("verdicts").verdict("The loss", others) == (
        "* **The loss** of the shared expert is lower than A and D; higher than B; not surely different from C."
    )


def test_a_directory_belongs_to_comparisons_of_one_size(part, tmp_path):
    settings = part("settings").Settings
    settings(tmp_path, steps=5).claim()
    settings(tmp_path, steps=5, seeds=9).claim()
    with pytest.raises(ConfigError, match="holds a comparison of"):
        settings(tmp_path, steps=6).claim()


def test_tables_go_between_the_marks_of_the_document(part, tmp_path):
    tables = part("tables")
    document = tmp_path / "comparison.md"
    document.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_docs(document, "| new |")
    assert document.read_text() == f"before\n{tables.BEGIN}\n\n| new |\n\n{tables.END}\nafter\n"
    document.write_text("no marks")
    with pytest.raises(ArtefactError, match="does not say where"):
        tables.write_docs(document, "| new |")


def hidden_states(student, ids: torch.Tensor) -> torch.Tensor:
    return student.loaded.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))[0]


@pytest.fixture(scope="module")
def student_and_text(part, tmp_path_factory):
    """The tiny base with trained routers that have moved, and a few sequences of every source."""
    settings = part("settings").Settings(tmp_path_factory.mktemp("comparison"), steps=2, train_sequences=20)
    student = part("methods").build(part("methods").METHODS["router"], settings, 0)
    generator = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(0, 4000, (2, 32), generator=generator) for name in settings.config.data.sources}
    with torch.no_grad():
        base = {
            name: student.loaded.hidden_states(part_, torch.ones_like(part_).bool())[0] for name, part_ in ids.items()
        }
    for parameter in student.parameters.values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return settings, student, ids, base


def test_the_objective_is_cross_entropy_of_the_domain_and_weighted_kl_of_the_rest(part, student_and_text):
    settings, student, ids, base = student_and_text
    batch = {name: (ids[name], base[name] if name != "shakespeare" else None) for name in ids}
    found = part("training").batch_loss(student, batch, settings)

    head = student.loaded.head
    logits = {
        name: student.loaded.hidden_states(each, torch.ones_like(each).bool())[0] @ head.T for name, each in ids.items()
    }
    expected = F.cross_entropy(logits["shakespeare"][:, :-1].flatten(0, 1), ids["shakespeare"][:, 1:].flatten())
    for name in ("speeches", "code"):
        log_q = logits[name][:, :-1].log_softmax(-1).flatten(0, 1)
        log_p = (base[name] @ head.T)[:, :-1].log_softmax(-1).flatten(0, 1)
        expected = expected + 4.0 / 2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_what_is_measured_afterwards_is_what_was_minimised(part, student_and_text):
    settings, student, ids, base = student_and_text
    training, text = part("training"), part("text")
    parts = {name: text.Part(ids[name].numpy().astype(np.int32), base[name].numpy()) for name in ids}
    losses = training.evaluate(student, parts)
    batch = {name: (ids[name], base[name]) for name in ids}
    with torch.no_grad():
        minimised = float(training.batch_loss(student, batch, settings))
    assert training.objective(losses, settings) == pytest.approx(minimised, rel=1e-6)
    assert np.mean(part("tables").objectives(losses, settings)) == pytest.approx(minimised, rel=1e-6)


def test_only_what_a_method_trains_gets_a_gradient(part, student_and_text):
    settings, student, ids, base = student_and_text
    batch = {name: (ids[name], base[name]) for name in ids}
    part("training").batch_loss(student, batch, settings).backward()
    moved = {name for name, parameter in student.loaded.model.named_parameters() if parameter.grad is not None}
    assert moved == set(student.parameters)
    assert all(".router." in name for name in moved)
    assert student.count == 18_528


def test_the_slow_parameters_learn_at_the_routers_share_of_the_learning_rate(part, student_and_text):
    """The first update of Adam is as large as its learning rate, whatever the gradient."""
    settings, student, _, _ = student_and_text
    slow = frozenset(name for name in student.parameters if ".0." in name)
    text = {
        name: part("text").Part(ids, np.zeros((*ids.shape, 192), np.float32))
        for name in settings.config.data.sources
        for ids in [np.random.default_rng(0).integers(0, 4000, (20, 16), dtype=np.int32)]
    }
    before = {name: parameter.detach().clone() for name, parameter in student.parameters.items()}
    half_slow = part("methods").Student(student.loaded, student.parameters, slow)
    next(part("training").steps_of(half_slow, text, part("training").Run("router", 1e-2, 0), settings))
    for name, parameter in student.parameters.items():
        step = float((parameter.detach() - before[name]).abs().max())
        assert step == pytest.approx(1e-3 if name in slow else 1e-2, rel=0.02), name

"""How small teacher targets are, and what is lost: bytes a token against KL(teacher || reconstruction).

Claims, on real outputs of two teachers, the embedded model and SmolLM2 upcycled to GPT-OSS (`smollm2-moe`), on
held-out speeches, Shakespeare and code:

1. At as many bytes as DistillKit's two published settings take, or fewer, `topk` targets lose less. Bytes are counted
   for the vocabulary of GPT-OSS (201,088); K and bits of a value are chosen here, by the loss on both models.
2. `sampled` targets are unbiased: the mean gradient over many repetitions converges to the dense one as fast as chance
   allows, and each repetition is nearer to it than as many independent draws.
3. `hidden` targets in bfloat16 and float8 against the dense distribution.

Every reconstruction is a full distribution; mass that a format does not place is spread over the other tokens in equal
parts. `events` is the KL of the kept tokens and the rest as one event, which is what the loss on `topk` targets sees.
Bytes are those of the encoding, before Parquet compresses them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from _common import command_line, print_result
from _distillkit import BUDGET, RECOMMENDED
from _target_forms import Form, Outputs, distillkit_form, float16_form, hidden_form, top_k_bytes, top_k_form
from _texts import heldout_texts
from torch import Tensor

from nexus_ray.config import ModelSection
from nexus_ray.console import progress
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.modeling.head import logits_of
from nexus_ray.modeling.loading import load_base
from nexus_ray.targets.encoding.encodings import SampledEncoding

_ROOT = Path(__file__).parents[1]
_SOURCES = ("speeches", "shakespeare", "code")
_LENGTH = 256
_O200K = 201_088
_GPT_OSS_HIDDEN = 2880
_BITS = (2, 3, 4, 5, 6)
_DEFAULT_K = 64
_RIVALS = {"budget": BUDGET, "recommended": RECOMMENDED}
_CHUNK = 32  # positions whose dense float64 distributions are held
_REPETITIONS = (16, 64, 256, 1024)
_SAMPLED_POSITIONS = 12
_STUDENT_TEMPERATURE = 1.5
_OFTEN = 20  # expected repetitions with either count, for a normal approximation


@dataclass(frozen=True)
class Teacher:
    """Final hidden states [positions, hidden] of a model on held-out text, and its LM head [V, hidden]."""

    hidden: Tensor
    head: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.head)

    def outputs(self) -> Iterator[Outputs]:
        """A few positions at a time."""
        for hidden in self.hidden.split(_CHUNK):
            logits = logits_of(hidden, self.head)
            log_probs = logits.double().log_softmax(-1)
            yield Outputs(hidden, logits, log_probs, log_probs.exp())


@torch.no_grad()
def ask(directory: Path, tokens: int) -> Teacher:
    """What the model in `directory` says about `tokens` tokens of held-out text, the same number of each source."""
    base = load_base(ModelSection(path=directory, dtype="float32", device="cpu"))
    found = []
    rows = tokens // _LENGTH // len(_SOURCES)
    for source in _SOURCES:
        text = "\n".join(heldout_texts(source))[: 16 * rows * _LENGTH]
        ids = torch.tensor(base.tokenizer(text, verbose=False)["input_ids"][: rows * _LENGTH]).view(rows, _LENGTH)
        found.append(base.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))[0].flatten(0, 1))
    return Teacher(torch.cat(found), base.head.detach())


def forms(head: Tensor) -> dict[str, Form]:
    """Everything that is measured, by name; `head` is the model's."""
    budgets = [rival.bytes_per_token(_O200K) for rival in _RIVALS.values()]
    kept = [(largest_k(bits, budget), bits) for budget in budgets for bits in _BITS]
    found = {_top_k_name(k, bits): top_k_form(k, bits) for k, bits in kept + [(_DEFAULT_K, bits) for bits in _BITS]}
    for name, rival in _RIVALS.items():
        for renormalised in (False, True):
            found[_rival_name(name, renormalised)] = distillkit_form(rival, renormalised=renormalised)
    found |= {f"hidden {dtype}": hidden_form(dtype, head) for dtype in ("bfloat16", "float8")}
    return found | {f"float16, top {_DEFAULT_K}, 4-byte ids": float16_form(_DEFAULT_K)}


def largest_k(bits: int, budget: int) -> int:
    """The most tokens that fit `budget` bytes with the vocabulary of GPT-OSS."""
    k = 1
    while top_k_bytes(k + 1, bits, _O200K) <= budget:
        k += 1
    return k


@torch.no_grad()
def losses(teacher: Teacher, measured: dict[str, Form]) -> dict[str, dict[str, float]]:
    """Mean nats lost a position, by form and kind."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    with progress("reconstruct", len(teacher.hidden)) as advance:
        for outputs in teacher.outputs():
            for name, form in measured.items():
                for kind, nats in form.losses(outputs).items():
                    sums[name][kind] += nats / len(teacher.hidden)
            advance(len(outputs.hidden))
    return sums


@dataclass(frozen=True)
class Estimate:
    """The mean of repeated estimates of distributions p.

    Attributes:
        errors: norm of (mean - p), by repetitions.
        squared: mean squared norm of one estimate's error.
        mean: of all repetitions [positions, V].
    """

    errors: dict[int, float]
    squared: float
    mean: Tensor


def repeated(p: Tensor, draw: Callable[[], Tensor], what: str) -> Estimate:
    """Estimate `p` [positions, V] again and again as the shares of drawn ids [positions, N]."""
    sums, squared, errors = torch.zeros_like(p), 0.0, {}
    with progress(what, _REPETITIONS[-1]) as advance:
        for repetition in range(1, _REPETITIONS[-1] + 1):
            ids = draw()
            sums.scatter_add_(-1, ids, torch.full(ids.shape, 1 / ids.shape[-1], dtype=p.dtype))
            squared += _squared_error(p, ids)
            if repetition in _REPETITIONS:
                errors[repetition] = float((sums / repetition - p).norm())
            advance(1)
    return Estimate(errors, squared / _REPETITIONS[-1], sums / _REPETITIONS[-1])


def _squared_error(p: Tensor, ids: Tensor) -> float:
    """Sum of (share of draws - p)^2, of which the square of a share is the part of pairs of draws that agree."""
    pairs = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).double().mean((-1, -2))
    return float((pairs - 2 * p.gather(-1, ids).mean(-1) + p.square().sum(-1)).sum())


@torch.no_grad()
def sampling(teacher: Teacher, draws: int, seed: int) -> dict[str, Any]:
    """How the gradient of forward KL with respect to a student's logits, q - p, comes out of draws.

    Returns:
        relative_error: norm of (mean over repetitions - dense) over the norm of the dense gradient, by repetitions.
        decay: exponent of the repetitions in it; chance alone gives -0.5.
        rms_z: root mean square of deviations of the mean, in units of their exact standard deviation, of the tokens
            that are drawn often enough for it; 1 without bias.
        squared_error_to_independent: of one repetition, over that of as many independent draws.
    """
    generator = torch.Generator().manual_seed(seed)
    encoding = SampledEncoding(draws=draws, vocabulary=teacher.vocabulary)
    places = torch.linspace(0, len(teacher.hidden) - 1, _SAMPLED_POSITIONS).long()
    logits = logits_of(teacher.hidden[places], teacher.head)
    p, q = logits.double().softmax(-1), (logits.double() / _STUDENT_TEMPERATURE).softmax(-1)

    def systematic() -> Tensor:
        offsets = torch.rand(len(p), generator=generator, dtype=torch.float64)
        return encoding.decode(encoding.encode(logits, offsets)).ids

    cumulative = p.cumsum(-1)

    def independent() -> Tensor:
        points = torch.rand(len(p), draws, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, points, right=True).clamp(max=p.shape[-1] - 1)

    found = repeated(p, systematic, "draw")
    chance = repeated(p, independent, "draw independently")
    dense, (first, *_, last) = float((q - p).norm()), _REPETITIONS
    return {
        "relative_error": {str(key): error / dense for key, error in found.errors.items()},
        "relative_error_of_independent": {str(key): error / dense for key, error in chance.errors.items()},
        "decay": log(found.errors[last] / found.errors[first]) / log(last / first),
        "rms_z": _rms_z(found.mean, p, draws, last),
        "squared_error_to_independent": found.squared / chance.squared,
    }


def _rms_z(mean: Tensor, p: Tensor, draws: int, repetitions: int) -> float:
    """Of tokens whose count, one of two neighbouring numbers, was expected to be each of them often."""
    upper = (draws * p).frac()
    often = (torch.minimum(upper, 1 - upper) * repetitions) > _OFTEN
    deviation = (upper * (1 - upper) / repetitions).sqrt() / draws
    return float(((mean - p) / deviation)[often].square().mean().sqrt())


def _top_k_name(k: int, bits: int) -> str:
    return f"topk {k} x {bits} bits"


def _rival_name(name: str, renormalised: bool) -> str:
    return f"DistillKit {name}" + (", renormalised" if renormalised else "")


def against_rivals(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """For each setting of DistillKit the form of `topk` that fits its bytes, and their losses.

    Args:
        found: losses by model and form.

    Returns:
        by setting: k, value_bits and bytes_per_token_o200k of the form with the smallest worst ratio; kl_vs_distillkit,
        that ratio; and by model the losses, DistillKit's being the better of its two readings.
    """
    result = {}
    for setting, rival in _RIVALS.items():
        budget = rival.bytes_per_token(_O200K)
        theirs = {
            model: min(losses[_rival_name(setting, renormalised)]["kl"] for renormalised in (False, True))
            for model, losses in found.items()
        }
        choices = {bits: largest_k(bits, budget) for bits in _BITS}
        ours = {
            bits: {model: losses[_top_k_name(k, bits)]["kl"] for model, losses in found.items()}
            for bits, k in choices.items()
        }
        ratios = {bits: max(kls[model] / theirs[model] for model in found) for bits, kls in ours.items()}
        best = min(ratios, key=lambda bits: ratios[bits])
        result[setting] = {
            "k": choices[best],
            "value_bits": best,
            "bytes_per_token_o200k": top_k_bytes(choices[best], best, _O200K),
            "distillkit_bytes_per_token_o200k": budget,
            "kl_vs_distillkit": ratios[best],
            "kl": {model: {"topk": ours[best][model], "distillkit": theirs[model]} for model in found},
        }
    return result


def table(model: str, teacher: Teacher, measured: dict[str, Form], found: dict[str, dict[str, float]]) -> str:
    """Markdown, sorted by bytes."""
    size = teacher.hidden.shape[-1]
    lines = [
        f"{model}: {len(teacher.hidden)} positions, vocabulary {teacher.vocabulary}",
        "",
        "| form | bytes/token | bytes/token, GPT-OSS 20B | KL, nats | events, nats |",
        "|---|---|---|---|---|",
    ]
    for name, form in sorted(measured.items(), key=lambda item: item[1].bytes(_O200K, _GPT_OSS_HIDDEN)):
        events = f"{found[name]['events']:.6f}" if "events" in found[name] else "-"
        sizes = (form.bytes(teacher.vocabulary, size), form.bytes(_O200K, _GPT_OSS_HIDDEN))
        lines.append(f"| {name} | {sizes[0]:,} | {sizes[1]:,} | {found[name]['kl']:.6f} | {events} |")
    return "\n".join(lines) + "\n"


def smollm2(directory: Path) -> Path:
    """The upcycled model, made when it is missing.

    Raises:
        NexusError: it cannot be made here.
    """
    if not directory.exists():
        from _smollm2 import make_smollm2_moe

        make_smollm2_moe(directory, swiglu_limit=7.0, gguf=None, seed=0)
    return directory


def models(tiny: Path, smollm2_directory: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Directories of the models that there are, and why others are missing, both by name."""
    try:
        return {"tiny": tiny, "smollm2-moe": smollm2(smollm2_directory)}, {}
    except NexusError as error:
        return {"tiny": tiny}, {"smollm2-moe": str(error)}


def measure(directories: dict[str, Path], tokens: int, draws: int, seed: int) -> dict[str, Any]:
    """Measure every form on every model, print a table of each, and return the result."""
    found, gradients, sizes = {}, {}, {}
    for model, directory in directories.items():
        teacher = ask(directory, tokens)
        measured = forms(teacher.head)
        found[model] = losses(teacher, measured)
        gradients[model] = sampling(teacher, draws, seed)
        sizes = {name: form.bytes(_O200K, _GPT_OSS_HIDDEN) for name, form in measured.items()}
        print(table(model, teacher, measured, found[model]), flush=True)
    rivals = against_rivals(found)
    sampled_bytes = sum(SampledEncoding(draws=draws, vocabulary=_O200K).widths().values())
    return {
        "topk": rivals["budget"] | {"recommended": rivals["recommended"]},
        "sampled": {"draws": draws, "bytes_per_token_o200k": sampled_bytes, "gradient": gradients},
        "bytes_per_token_o200k": sizes,
        "losses": found,
    }


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", type=Path, default=_ROOT / "assets" / "tiny-gpt-oss")
    parser.add_argument("--smollm2", type=Path, default=_ROOT / "build" / "smollm2-moe", help="made when missing")
    parser.add_argument("--tokens", type=int, default=1536, help="of each model")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with command_line():
        least = _LENGTH * len(_SOURCES)
        if arguments.tokens < least:
            raise ConfigError(f"--tokens {arguments.tokens}: a sequence of each source is {least}", f"--tokens {least}")
        directories, skipped = models(arguments.tiny, arguments.smollm2)
        result = measure(directories, arguments.tokens, arguments.draws, arguments.seed)
        print_result(result | {"skipped": skipped})


if __name__ == "__main__":
    main()

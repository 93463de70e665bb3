"""`selection.json`: the ranked experts of every layer, and beside each figure what chance would give.

The file is complete: reports and figures are made from it alone, and `convert` reads its rankings from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from nexus_ray.data.coverage import CalibrationSample
from nexus_ray.errors import ArtefactError
from nexus_ray.selection.distribution import Distribution
from nexus_ray.selection.scores import rank_experts
from nexus_ray.storage import Place, read_json, write_json

FORMAT_VERSION = 4
MethodName = Literal["pca", "pca_variance", "usage", "gate_mass", "reap"]
Verdict = Literal["stable", "partly stable", "not distinguishable from noise"]
VERDICTS: tuple[Verdict, ...] = ("stable", "partly stable", "not distinguishable from noise")
NOISE: Verdict = "not distinguishable from noise"
Cause = Literal[
    "agreement",
    "chance",
    "pooled",
    "constant",
    "identical",
    "everything_selected",
    "too_little_text",
    "too_few_experts",
]
_JUDGED: frozenset[Cause] = frozenset(("agreement", "chance", "pooled", "too_few_experts"))
_ROUNDING = 1e-9  # of a share: two experts that sum to one vary equally, in any text
EXCEEDED_BY_CHANCE = 0.05  # part of the structureless layers whose share is above `null_share_high`
_RESELECT = "run `nexus-ray select CONFIG` again"


@dataclass(frozen=True)
class ExpertRanking:
    """Experts of each layer, best first.

    Attributes:
        used: by how often the router selects them.
        important: by the method of `select`; experts passed over as redundant come last.
        used_overall: the expert index selected most often over all layers together.
        counts: how many experts `select` selected in each layer.
        reap: by REAP saliency; None when the statistics hold no expert output norms.
    """

    used: Sequence[Sequence[int]]
    important: Sequence[Sequence[int]]
    used_overall: int
    counts: Sequence[int]
    reap: Sequence[Sequence[int]] | None = None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def exceeds(share: float, null_share_high: float) -> bool:
    """Whether a share is above what chance would give by more than rounding."""
    return share > null_share_high + _ROUNDING


class SourceUse(_Record):
    """Which experts one source of text is sent to.

    Attributes:
        usage: each expert's share of the router's selections, in expert order.
        selected: the most used experts of this source alone, best first; as many as the layer selects.
        split_half_overlap: fraction of them common to the most used of either half of this source; None when a
            half holds fewer than two tokens.
    """

    usage: tuple[float, ...]
    selected: tuple[int, ...]
    split_half_overlap: float | None


class LayerSelection(_Record):
    """Ranked experts of one layer.

    A share is a fraction of the score of the experts to choose from, and chance and null model choose from the same
    ones: those that are not passed over and, with `reap`, got a token.

    Attributes:
        ranked: all experts, best first; those passed over come last.
        scores: their scores, in the same order.
        selected: the first of `ranked`: `top_k` of them, or as many as reach `coverage`.
        passed_over: experts moved to the end because they are correlated with a better one, in order of score.
        share: share of the selected experts.
        null_share: the mean share of the best as many experts under the null model of the method.
        null_share_high: the 95 % quantile of the same.
        held_out_share: share that one half of the text gives to the experts selected from the other half, mean of
            both ways; None when a half is too small to select from.
        null_curve: [experts] mean share of the best 1, 2, ... of all experts under the null model, with those passed
            over.
        split_half_overlap: fraction of the experts selected from one half of the text that are selected from the
            other; None as above.
        chance_overlap: what random selections have in common on average.
        overlap_p_value: probability that random selections have at least as many experts in common; None as above.
        verdict: what the figures allow to say.
        cause: what decided that. `agreement`: the layer passed its own test; `chance`: it did not. `pooled`: no
            agreement of this layer alone could pass, but it is high and all layers together pass;
            `too_few_experts`: none could pass, and that is not so. `constant`, `identical`, `everything_selected`
            and `too_little_text`: there is nothing to judge.
        reason: why, in plain language.
        explained_variance_ratio: of all principal components of the router probabilities.
        null_explained_variance_ratio: the same for experts of the same variances that are independent but for summing
            to one, mean of the draws.
        total_variance: sum of the variances of all experts' probabilities.
        usage: each expert's share of the router's selections over the chosen sources, in expert order.
        by_source: which experts each collected source is sent to.
        reap: each expert's REAP saliency over the chosen sources, in expert order; None when it was not recorded.
        distribution: how the score is spread over all experts, with those passed over.
    """

    ranked: tuple[int, ...]
    scores: tuple[float, ...]
    selected: tuple[int, ...]
    passed_over: tuple[int, ...]
    share: float
    null_share: float
    null_share_high: float
    held_out_share: float | None
    null_curve: tuple[float, ...]
    split_half_overlap: float | None
    chance_overlap: float
    overlap_p_value: float | None
    verdict: Verdict
    cause: Cause
    reason: str
    explained_variance_ratio: tuple[float, ...]
    null_explained_variance_ratio: tuple[float, ...]
    total_variance: float
    usage: tuple[float, ...]
    by_source: dict[str, SourceUse]
    reap: tuple[float, ...] | None
    distribution: Distribution

    @property
    def judged(self) -> bool:
        """Whether there is a choice to judge, and text to judge it by."""
        return self.cause in _JUDGED

    @property
    def concentrated(self) -> bool:
        """Whether this is judged and its experts have more of the score than 95 % of the null model's draws give."""
        return self.judged and exceeds(self.share, self.null_share_high)


class Selection(_Record):
    """The ranked experts of every layer.

    Attributes:
        format_version: of the file.
        base_fingerprint: identity of the base model.
        method: how experts were scored.
        top_k: experts selected in each layer, unless `coverage` decides.
        coverage: share of its score for which each layer selects as few experts as reach it; None: `top_k`.
        max_correlation: above which an expert is passed over for a better one; None: never.
        components: principal components in the scores of `pca` and `pca_variance`.
        sources: the sources whose statistics were used.
        tokens: tokens of each collected source.
        calibration: how the text of each source was chosen, as far as it is known.
        num_experts: routed experts of a layer.
        pooled_overlap_p_value: probability that random selections have at least as many experts in common in all
            judged layers together; None when no layer is judged.
        expected_above_null: judged layers whose share chance alone would put above `null_share_high`, on average.
        layers: one entry a layer.
    """

    format_version: int = FORMAT_VERSION
    base_fingerprint: str
    method: MethodName
    top_k: int
    coverage: float | None
    max_correlation: float | None
    components: int
    sources: tuple[str, ...]
    tokens: dict[str, int]
    calibration: dict[str, CalibrationSample]
    num_experts: int
    pooled_overlap_p_value: float | None
    expected_above_null: float
    layers: tuple[LayerSelection, ...]

    def experts(self, layer: int) -> list[int]:
        """All experts of a layer, best first."""
        return list(self.layers[layer].ranked)

    def ranking(self) -> ExpertRanking:
        """All experts of every layer by usage, by importance and by REAP saliency."""
        usage = np.asarray([layer.usage for layer in self.layers])
        important = [layer.ranked for layer in self.layers]
        return ExpertRanking(
            used=[rank_experts(layer) for layer in usage],
            important=important,
            used_overall=rank_experts(usage.sum(axis=0))[0],
            counts=[len(layer.selected) for layer in self.layers],
            reap=important if self.method == "reap" else self._by_saliency(),
        )

    def _by_saliency(self) -> list[list[int]] | None:
        saliency = [layer.reap for layer in self.layers if layer.reap is not None]
        if len(saliency) < len(self.layers):
            return None
        return [rank_experts(np.asarray(layer)) for layer in saliency]

    def verdicts(self) -> dict[Verdict, int]:
        """How many layers have each verdict, those that no layer has included."""
        counts = Counter(layer.verdict for layer in self.layers)
        return {verdict: counts[verdict] for verdict in VERDICTS}

    def summary(self) -> str:
        """What the whole selection allows to say, in one sentence."""
        counts = sorted({len(layer.selected) for layer in self.layers})
        number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        verdicts = ", ".join(f"{verdict} in {count}" for verdict, count in self.verdicts().items() if count)
        above = sum(layer.concentrated for layer in self.layers)
        return (
            f"The choice of {number} of {self.num_experts} experts by {self.method} on {' + '.join(self.sources)} is "
            f"{verdicts} of {len(self.layers)} layers; its share of the score is above the null model's in {above}, "
            f"where chance would give {self.expected_above_null:.1f}."
        )

    def save(self, path: Place) -> None:
        """Write the selection as JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Place) -> Selection:
        """Read what `save` wrote.

        Raises:
            ArtefactError: the file is missing, damaged or of another format version.
        """
        values = read_json(path, what="expert selection", hint=_RESELECT)
        version = values.get("format_version", FORMAT_VERSION) if isinstance(values, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise ArtefactError(f"{path} has format {version}, not {FORMAT_VERSION}", _RESELECT)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ArtefactError(f"{path} is not an expert selection: {error}", _RESELECT) from error

"""A pretraining run: pack the text, train, export with MXFP4 experts, measure. Finished parts are skipped."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoTokenizer, GptOssForCausalLM

from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.config import ModelSection, PretrainRun, flatten_values
from nexus_ray.data.packing import Batch, batches, pack_shard, token_byte_lengths
from nexus_ray.data.sources import describe_files, list_shards
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import ConfigError, ModelError
from nexus_ray.evaluation.perplexity import bits_per_byte, sequence_nats, target_bytes, token_perplexity
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base
from nexus_ray.pipeline import differing_settings
from nexus_ray.pretraining.model import build_config, new_model
from nexus_ray.pretraining.task import pretrain_worker
from nexus_ray.run_lock import locked
from nexus_ray.storage import read_json, write_json
from nexus_ray.targets.writing.job import job_of_text
from nexus_ray.targets.writing.precompute import precompute
from nexus_ray.training import trainer
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.local import local_only
from nexus_ray.training.optimiser import check_optimiser
from nexus_ray.training.recovery import steps_reached

logger = logging.getLogger(__name__)
_BATCH_SEQUENCES = 8
_REPORT = "pretraining.json"
_WITHOUT_EFFECT = {"steps", "output", "micro_batch_sequences", "checkpoint_every", "keep_checkpoints", "prompts"}


def pretrain(run: PretrainRun) -> Path:
    """Make the model of a pretraining run.

    Returns:
        The Hugging Face directory; `pretraining.json` in it holds held-out perplexities before and after MXFP4
        quantisation.

    Raises:
        ConfigError: a step has fewer sequences than there are workers, or the directory holds a training that began
            with other settings.
        ModelError: the tokenizer is missing.
        DataError: the text is missing or too short.
    """
    if not (run.pretrain.tokenizer / "tokenizer.json").exists():
        raise ModelError(
            f"pretrain.tokenizer: no tokenizer.json in {run.pretrain.tokenizer}",
            "see assets/README.md for how to make one",
        )
    if run.pretrain.sequences_per_step < run.resources.workers:
        raise ConfigError(
            f"pretrain.sequences_per_step is {run.pretrain.sequences_per_step}, fewer than "
            f"resources.workers={run.resources.workers}"
        )
    check_optimiser(run.pretrain.optimiser)
    layout = RunLayout(run.run.directory)
    with locked(layout):
        _refuse_other_settings(run, layout)
        precompute(job_of_text(run.data, run.pretrain.tokenizer), layout.targets, run.resources)
        trainer.run_distributed(
            pretrain_worker,
            {"run": run.model_dump(mode="json")},
            local_only(layout.training),
            run.resources,
            metrics=local_only(layout.metrics),
            steps=run.pretrain.steps,
        )
        return export(run, layout)


def _refuse_other_settings(run: PretrainRun, layout: RunLayout) -> None:
    """Keep a training from going on with other settings than it began with; more steps are fine.

    Raises:
        ConfigError: it names them.
    """
    marker = layout.stages / "pretrain.json"
    now = flatten_values(
        {
            "pretrain": run.pretrain.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
            "data": {"sequence_length": run.data.sequence_length, "text": describe_files(run.data, "train")},
            "run": {"seed": run.run.seed},
        }
    )
    reached = steps_reached(local_only(layout.checkpoints))
    if marker.exists() and reached:
        changed = differing_settings(read_json(marker, what="settings", hint=f"delete {marker}"), now)
        if changed:
            raise ConfigError(
                f"pretrain: {layout.directory} holds a training that has reached step {reached}, made with other "
                f"settings: {'; '.join(changed)}",
                "put them back to continue, or choose another run.directory",
            )
    write_json(marker, now)


def export(run: PretrainRun, layout: RunLayout) -> Path:
    """Write the best weights as a Hugging Face directory with MXFP4 experts, and what quantisation cost."""
    section = run.pretrain
    model = new_model(
        build_config(section.architecture, AutoTokenizer.from_pretrained(section.tokenizer)), run.run.seed
    )
    state = load_checkpoint(local_only(layout.best), dict(model.named_parameters()))
    model.to(torch.bfloat16)
    export_mxfp4(model, section.tokenizer, section.output)
    loaded = load_base(ModelSection(path=section.output, device="cpu"))
    quantised = loaded.model
    assert isinstance(quantised, GptOssForCausalLM)
    unreadable = UnreadableRows(run.data.strict)
    report = {
        "steps": state["step"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation_loss_nats": state["best"],
        "heldout_before_mxfp4": heldout_perplexity(run, model.float().eval(), unreadable),
        "heldout_after_mxfp4": heldout_perplexity(run, quantised, unreadable),
    }
    write_json(section.output / _REPORT, report)
    logger.info("exported %s: %s", section.output, report)
    return section.output


@torch.no_grad()
def heldout_perplexity(
    run: PretrainRun, model: GptOssForCausalLM, unreadable: UnreadableRows
) -> dict[str, dict[str, float]]:
    """Token perplexity and bits per byte of each source that has held-out text.

    Raises:
        DataError: no row of a source can be read, or not every one when the run is strict.
    """
    tokenizer = AutoTokenizer.from_pretrained(run.pretrain.tokenizer)
    lengths = token_byte_lengths(tokenizer)
    results = {}
    for name in (name for name, source in run.data.sources.items() if source.heldout):
        nats = targets = size = 0.0
        for shard in list_shards(run.data, "heldout", (name,)):
            found = UnreadableRows(run.data.strict)
            predict = run.data.sources[name].predict
            packed = pack_shard(shard, tokenizer, run.data.sequence_length, found.handler, predict)
            for batch in batches(packed, _BATCH_SEQUENCES):
                nats += float(sequence_nats(_logits(model, batch), batch).sum())
                targets += float(batch.is_target.sum())
                size += float(target_bytes(batch, lengths).sum())
            unreadable.add_row(name, {"shard": shard.index, **found.as_row()})
        unreadable.warn("heldout", without_text=() if targets else (name,))
        results[name] = {
            "token_perplexity": token_perplexity(nats, targets),
            "bits_per_byte": bits_per_byte(nats, size),
            "tokens": targets,
        }
    return results


def _logits(model: GptOssForCausalLM, batch: Batch) -> torch.Tensor:
    input_ids = torch.from_numpy(batch.input_ids).long()
    mask = torch.from_numpy(batch.valid).long()
    logits: torch.Tensor = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return logits

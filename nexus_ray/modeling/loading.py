"""Loading a base model, with or without an overlay, ready to run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.node_cache import local_description, local_model
from nexus_ray.checkpoints.overlay import ROUTERS, OverlayConfig, TrainedKind, load_overlay
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import Attention, ModelSection
from nexus_ray.data.packing import Batch, separator_id
from nexus_ray.errors import ModelError
from nexus_ray.families import MoeDimensions, MoeFamily, family_of
from nexus_ray.memory import bound_shape_caches
from nexus_ray.modeling.documents import document_positions, within_documents
from nexus_ray.modeling.packed_experts import ExpertNorms, PackedExperts
from nexus_ray.modeling.recomputation import checkpointed, recomputing, require_checkpointing
from nexus_ray.modeling.shared_expert import Activation, SharedExperts, SharedExpertShape
from nexus_ray.modeling.trained_routers import TrainedRouters, load_trained_routers
from nexus_ray.modeling.weights import build_model
from nexus_ray.storage import Place


@dataclass
class LoadedModel:
    """A stock transformers model in evaluation mode, and what nexus-ray knows about it.

    Attributes:
        model: the transformers model, on `device`.
        tokenizer: its tokenizer.
        family: its MoE family.
        config: its `config.json`.
        dimensions: sizes of its MoE layers.
        fingerprint: identity of the base.
        device: where it is.
        shared_experts: the attached shared experts, None on a plain base.
        routers: the attached differences of trained routers, None where the routers are the base's.
        overlay: their description, None on a plain base.
        attention: what a token of a packed sequence attends to, as `model.attention` says.
        checkpointing: whether passes with gradients keep only each layer's input, see `checkpoint_layers`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: MoeFamily
    config: dict[str, Any]
    dimensions: MoeDimensions
    fingerprint: str
    device: torch.device
    shared_experts: SharedExperts | None = None
    routers: TrainedRouters | None = None
    overlay: OverlayConfig | None = None
    attention: Attention = "sequence"
    checkpointing: bool = False

    def base(self) -> AbstractContextManager[None]:
        """Within the block the model computes what the base does."""
        return self.shared_experts.disabled() if self.shared_experts is not None else nullcontext()

    def train_routers(self, routers: TrainedKind) -> None:
        """Attach router differences of zero for those of `routers` that a student's overlay has none for.

        What the model computes stays the same, and `overlay` describes them too; `trained_parameters` hands them out.
        """
        assert self.overlay is not None
        self.overlay = self.overlay.with_routers(routers, self.dimensions.experts)
        if self.routers is not None:
            self.routers.widen(routers)
        elif self.overlay.routers != "none":
            self.routers = TrainedRouters(self.overlay, self.family)
            self.routers.attach(self.family.routers(self.model))

    def checkpoint_layers(self) -> None:
        """From now on passes with gradients keep only each layer's input, and backward computes the layer again.

        Outputs and gradients are what they are without it; the modules stay in evaluation mode.

        Raises:
            ModelError: this model's layers cannot do it.
        """
        require_checkpointing(self.family.layers(self.model))
        self.checkpointing = True

    def _checkpointed(self) -> AbstractContextManager[None]:
        on = self.checkpointing and torch.is_grad_enabled()
        return checkpointed(self.family.layers(self.model)) if on else nullcontext()

    @property
    def head(self) -> Tensor:
        """[vocabulary, hidden] weight of the LM head; logits are hidden states times its transpose."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        return head.weight

    def hidden_states(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Run the decoder layers and keep their router logits, with gradients where parameters have them.

        Args:
            input_ids: [sequences, length] token ids on `device`.
            valid: [sequences, length] false on padding, which must be at the end.

        Returns:
            final hidden states [sequences, length, hidden] after the last norm, which `head` makes logits from, and
            router logits [sequences, length, layers, experts].
        """
        with self._checkpointed(), self.recording_routers() as records:
            output = self.model.base_model(input_ids=input_ids, use_cache=False, **self._attended(input_ids, valid))
        layers = torch.stack(records, dim=1)
        return output.last_hidden_state, layers.view(*input_ids.shape, *layers.shape[1:])

    @functools.cached_property
    def _separator(self) -> int:
        return separator_id(self.tokenizer)

    def _attended(self, input_ids: Tensor, valid: Tensor) -> dict[str, Any]:
        """Arguments that say what each token attends to."""
        if self.attention == "sequence":
            return {"attention_mask": valid.long()}
        return within_documents(self.model, document_positions(input_ids, valid, self._separator))

    def forward(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden_states`, and the LM head on all of them: logits [sequences, length, vocabulary] in one tensor."""
        hidden, router_logits = self.hidden_states(input_ids, valid)
        return self.model.get_output_embeddings()(hidden), router_logits

    @torch.no_grad()
    def forward_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`forward` of a packed batch without gradients, in float32."""
        input_ids = torch.from_numpy(batch.input_ids).long().to(self.device)
        valid = torch.from_numpy(batch.valid).to(self.device)
        logits, router_logits = self.forward(input_ids, valid)
        return logits.float(), router_logits.float()

    @torch.no_grad()
    def route_batch(self, batch: Batch) -> Tensor:
        """Router logits [sequences, length, layers, experts] of a packed batch; the LM head is not computed."""
        input_ids = torch.from_numpy(batch.input_ids).long().to(self.device)
        valid = torch.from_numpy(batch.valid).to(self.device)
        return self.hidden_states(input_ids, valid)[1]

    @contextmanager
    def recording_routers(self) -> Iterator[list[Tensor]]:
        """Collect each layer's router logits [tokens, experts], in layer order, of one forward pass."""
        records: list[Tensor] = []

        def record(_router: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if not recomputing():
                records.append(self.family.router_logits(output).to(self.device))

        hooks = [router.register_forward_hook(record) for router in self.family.routers(self.model)]
        try:
            yield records
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def recording_expert_norms(self) -> Iterator[list[ExpertNorms]]:
        """Collect how much each routed expert adds, one entry a layer, in layer order, of one forward pass.

        Raises:
            ModelError: the experts are not packed ones, which alone can say it.
        """
        records: list[ExpertNorms] = []
        with ExitStack() as stack:
            for block in self.family.moe_blocks(self.model):
                experts = block.get_submodule("experts")
                if not isinstance(experts, PackedExperts):
                    raise ModelError("the norms of expert outputs need packed experts", "set model.experts=packed")
                stack.enter_context(experts.recording_norms(records))
            yield records


def load_base(section: ModelSection, devices: Sequence[torch.device] | None = None) -> LoadedModel:
    """Load the frozen base model, from this node's cache where `model.path` is a URI.

    Layers are spread over the devices when there are several. MXFP4 experts stay packed, unless `model.experts`
    names one of transformers' implementations.

    Args:
        section: which model, and how it computes.
        devices: where to put it; default: every GPU that this process sees, or the CPU.

    Raises:
        ModelError: the directory is missing, incomplete or of an unsupported family, or the tokenizer does not
            fit the model.
        StorageError: a remote model cannot be fetched: its store fails for minutes, or the disk is too small.
    """
    bound_shape_caches()
    family_of(read_model_config(section.path))  # before gigabytes are fetched
    directory = local_model(section.path)
    config = read_model_config(directory)
    family = family_of(config)
    identity = fingerprint(directory)
    places = _places(section, devices)
    model = build_model(
        directory, config, family, experts=section.experts, dtype=_dtype(section, places[0]), devices=places
    )
    tokenizer = load_tokenizer(directory, config)
    sizes = family.dimensions(config)
    return LoadedModel(model, tokenizer, family, config, sizes, identity, places[0], attention=section.attention)


def load_student(section: ModelSection, overlay: Place, devices: Sequence[torch.device] | None = None) -> LoadedModel:
    """Load the base and attach the overlay in directory `overlay`, each shared expert where its layer is.

    Raises:
        ModelError: as `load_base`.
        ArtefactError: the overlay is missing, damaged or belongs to another base.
    """
    loaded = load_base(section, devices)
    description, tensors = load_overlay(overlay, loaded.fingerprint)
    experts = load_shared_experts(description, tensors, activation(loaded.family, loaded.config))
    blocks = loaded.family.moe_blocks(loaded.model)
    for expert, block in zip(experts.layers, blocks, strict=True):
        expert.to(next(block.parameters()).device)
    experts.attach(blocks)
    loaded.shared_experts = experts
    loaded.overlay = description
    if description.routers != "none":
        loaded.routers = load_trained_routers(description, tensors, loaded.family)
        loaded.routers.attach(loaded.family.routers(loaded.model))
    return loaded


def build_shared_experts(description: OverlayConfig, function: Activation) -> SharedExperts:
    """Shared experts of the shape that an overlay describes, with undefined weights; frozen but for training."""
    shape = SharedExpertShape(description.hidden_size, description.width, description.token_gate)
    experts = SharedExperts(description.layers, shape, function, description.scale)
    return experts.requires_grad_(False)


def load_shared_experts(description: OverlayConfig, tensors: dict[str, Tensor], function: Activation) -> SharedExperts:
    """Shared experts with the tensors of an overlay as float32 masters; nothing is allocated but these.

    Args:
        description: the overlay's description.
        tensors: all of its tensors, which `load_overlay` has checked.
        function: the activation of the routed experts.
    """
    with torch.device("meta"):
        experts = build_shared_experts(description, function)
    shared = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith(ROUTERS)}
    experts.load_state_dict(shared, assign=True)
    return experts


def activation(family: MoeFamily, config: dict[str, Any]) -> Activation:
    """The expert activation of a model as a function of (gate, up)."""
    return functools.partial(family.expert_activation, config=config)


def load_tokenizer(path: Place, config: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model and check that every id has an embedding; of a remote one no weights are fetched.

    Raises:
        ModelError: there is none, or its vocabulary is larger than the model's.
    """
    directory = local_description(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many types
        raise ModelError(f"{path} has no usable tokenizer: {error}", "copy tokenizer.json into it") from error
    if len(tokenizer) > config["vocab_size"]:
        raise ModelError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model {config['vocab_size']}: "
            "it belongs to another model",
            "copy the model's own tokenizer.json and tokenizer_config.json into its directory",
        )
    return tokenizer


def _places(section: ModelSection, devices: Sequence[torch.device] | None) -> list[torch.device]:
    """The given devices, by default every GPU that this process sees, or the CPU, as `model.device` allows."""
    visible = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    gpus = [device for device in (visible if devices is None else devices) if device.type == "cuda"]
    if section.device == "cuda" and not gpus:
        raise ModelError("model.device is cuda, but this process has no GPU", "set resources.gpus_per_worker=1")
    return gpus if gpus and section.device != "cpu" else [torch.device("cpu")]


def _dtype(section: ModelSection, device: torch.device) -> torch.dtype:
    if section.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if section.dtype == "bfloat16" else torch.float32

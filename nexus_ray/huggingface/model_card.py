"""The README.md of an exported model: what it is, how to load it, what it was made from."""

from __future__ import annotations

from nexus_ray.checkpoints.overlay import OverlayConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nexus-ray, mixture-of-experts, shared-expert]
---

# {name}

`{base}` with one shared expert added to every MoE layer by nexus-ray. {tensors}
The licence is that of the base, and of the text it was trained on.

```python
import nexus_ray  # makes transformers know the architecture nexus_gpt_oss
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")                            # experts dequantised
model = AutoModelForCausalLM.from_pretrained("{name}", experts_memory="packed")   # experts as they are stored

with model.shared_experts_off():  # what the base would compute
    ...
```

| | |
|---|---|
| shared experts | {layers} layers, width {width}, {gate}, {parameters:,} parameters |
| routers | {routers} |
| initialised with | {initialisation} |
| training steps | {steps} |
| fingerprint of the base | `{fingerprint}` |

An engine that does not know `nexus_gpt_oss` refuses this directory. Do not rename the architecture to make it load: it
would compute the base and ignore the shared experts. `nexus-ray merge-check DIR` proves that they take part.

"""


_ADDED = "`model-shared-experts.safetensors`"
_TENSORS = {
    "none": f"The base's tensors are unchanged;\nthe added ones are in {_ADDED}.",
    "bias": f"The biases of its routers were trained\ntoo; they and the added tensors are in {_ADDED}.",
    "all": f"Its routers were trained too;\nthey and the added tensors are in {_ADDED}.",
}
_ROUTERS = {"none": "the base's", "bias": "trained biases", "all": "trained"}


def model_card(name: str, base: str, description: OverlayConfig) -> str:
    """Markdown of the model card.

    Args:
        name: of the export's directory.
        base: name of the base's directory.
        description: of the overlay.
    """
    return _CARD.format(
        name=name,
        base=base,
        tensors=_TENSORS[description.routers],
        routers=_ROUTERS[description.routers],
        layers=description.layers,
        width=description.width,
        gate="one sigmoid gate per token" if description.token_gate else "no gate",
        parameters=description.parameters,
        initialisation=description.initialisation,
        steps=description.trained_steps,
        fingerprint=description.base_fingerprint,
    )

"""nexus-ray: specialise a Mixture-of-Experts language model with trainable shared experts, on Ray.

After `import nexus_ray`, `AutoModelForCausalLM.from_pretrained` of transformers loads the directories that
`nexus-ray export` writes.
"""

from nexus_ray.huggingface.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()

"""A Hugging Face config.json, as a plain mapping, -> the arguments of `MoEConfig.create`. Needs no transformers."""

from moe.hf_config.families import FAMILIES, REFUSED
from moe.hf_config.fields import layer_fields

__all__ = ["FAMILIES", "REFUSED", "layer_fields"]

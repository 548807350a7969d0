"""The plug-in that vLLM loads at every start, asleep unless MOE_VLLM asks for it."""

import os

ASLEEP = ("", "0")


def plugin() -> None:
    """Let vLLM run its MoE layers on `moe` if MOE_VLLM says so; see `moe.integrations.vllm.register`."""
    if os.environ.get("MOE_VLLM", "").strip() in ASLEEP:
        return
    from moe.integrations.vllm import register

    register()

"""SGLang runs its unquantised MoE layers on this package, under --moe-runner-backend moe_stages. Importable without SGLang."""

from moe.integrations.plugins.sglang import KNOWN, NAME, expect_known, register

__all__ = ["KNOWN", "NAME", "expect_known", "register"]

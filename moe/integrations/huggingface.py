"""Runs the experts of Hugging Face models on our pipeline: `experts_implementation="moe"`. Forward only, bfloat16.

transformers calls an experts function with the experts module as its first argument, the tokens, and the chosen experts
(`transformers.integrations.moe.ExpertsInterface`); routing, shared experts and expert parallelism stay with the model.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from moe.integrations.hf_call import call_apart, call_experts, call_normed
from moe.integrations.hf_experts import biases_of, expect_weights, form_of, weights_of
from moe.integrations.hf_models import experts_of, gathered_dtype, hand_over, stood_for
from moe.integrations.hf_own_forward import OwnForward, stand_for
from moe.integrations.hf_training import is_trained, wants_gradients

OLDEST_TRANSFORMERS = (5, 7)  # the first that takes the name of an experts function that it did not bring itself
INSTALL = 'pip install "transformers>=5.7"'


def register(name: str = "moe", *, is_batch_invariant: bool = False) -> None:
    """Make `experts_implementation=name` known to transformers, for the whole process. May be called again.

    Args:
        is_batch_invariant: on a GPU, a token has the bits that it has in any batch, at a cost; see `moe.MoEConfig.create`. A name
            stands for layers of one kind.

    transformers cannot be told here to refuse a model whose experts it never hands over (Llama 4, DBRX, ...): with
    `from_pretrained(..., experts_implementation=name)` such a model runs on its own code without a word. Use `use_moe`,
    or `check_model` after loading.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: transformers has another implementation of that name, or it stands for layers of the other kind.
    """
    functions = _transformers_moe().ALL_EXPERTS_FUNCTIONS
    kinds = {False: run_hf_experts, True: run_hf_experts_batch_invariant}
    ours, other = kinds[is_batch_invariant], kinds[not is_batch_invariant]
    if name == "eager" or (name in functions and functions[name] not in (ours, other)):
        raise ValueError(
            f"name: expected one that transformers does not use, got {name!r}; pass another, such as 'moe'"
        )
    if name in functions and functions[name] is other:
        raise ValueError(
            f"name: expected one that does not stand for layers with is_batch_invariant={not is_batch_invariant}, got "
            f"{name!r}; pass another, such as 'moe_{'invariant' if is_batch_invariant else 'fast'}'"
        )
    _transformers_moe().ExpertsInterface.register(name, ours)


def use_moe(model: nn.Module, name: str = "moe", *, is_batch_invariant: bool = False) -> nn.Module:
    """Run all experts of a transformers model on our pipeline from now on; returns the model.

    Args:
        model: also one that is wrapped (DDP, a value head, torch.compile), sharded by fully_shard before or after, adapted,
            or a part of one: a decoder layer, an experts module. Other parts of that model are left as they are.
        name, is_batch_invariant: as in `register`.

    Raises:
        ImportError: transformers is missing or too old.
        TypeError: not a module.
        ValueError: an experts module that this package cannot run, with the reason; the model is then as before.
    """
    register(name, is_batch_invariant=is_batch_invariant)
    _expect_runnable(model)
    hand_over(model, name, is_batch_invariant=is_batch_invariant)
    check_model(model, name)
    return model


def check_model(model: nn.Module, name: str = "moe") -> None:
    """Raise unless every experts module of a transformers model runs on our pipeline.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: naming the module, and why it does not.
    """
    _expect_runnable(model)
    for path, experts in experts_of(model):
        chosen = getattr(experts.config, "_experts_implementation", None)
        ours = (run_hf_experts, run_hf_experts_batch_invariant)
        if chosen != name or _transformers_moe().ALL_EXPERTS_FUNCTIONS.get(name) not in ours:
            raise ValueError(
                f"{path}: expected experts_implementation {name!r}, got {chosen!r}; call use_moe(model) to set it"
            )
    for path, module in stood_for(model):
        forward = module.__dict__.get("forward")
        if not isinstance(forward, OwnForward) or forward.name != name:
            raise ValueError(f"{path}: expected a forward of {name!r}, got its class's; call use_moe(model) to set it")


def run_hf_experts(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    is_batch_invariant: bool = False,
) -> Tensor:
    """The experts function that `register` hands to transformers.

    Args:
        experts: the experts module. Its weights are read where they lie: gate_up_proj [E, 2I, H] and
            down_proj [E, H, I], the last two axes swapped where `experts.is_transposed`; up_proj [E, I, H] in place of
            gate_up_proj where the experts have no gate. Where `experts.has_bias`, [E, 2I] and [E, H] in bfloat16 or float32 are
            added to the float32 products. E counts the experts that lie here.
        hidden_states: [..., H] bfloat16, T tokens. Under torch.autocast to bfloat16 also float32, as the weights may be:
            they are converted in each call, as matrix products do it there.
        top_k_index: [T, K] of any integer dtype, ids of experts that lie here. Any other id is skipped: expert
            parallelism marks slots of other ranks by E.
        top_k_weights: [T, K] of any floating dtype.

    Returns:
        [..., H] in the dtype of hidden_states: sum over a token's experts of weight times expert(token).

    Raises:
        ValueError: a module or a tensor that this package does not take, and what to do instead.
    """
    path = type(experts).__name__
    form, inputs = form_of(experts, path), (hidden_states, top_k_index, top_k_weights)
    weights, biases = weights_of(experts), biases_of(experts, form)
    if form.activation is None or (
        not is_trained(form) and wants_gradients(hidden_states, top_k_weights, *weights, *biases)
    ):
        return call_apart(path, form, experts, *inputs, is_batch_invariant=is_batch_invariant)
    arguments = (path, form, weights, *inputs)
    if getattr(experts, "has_post_expert_norm", False):
        norm = cast(nn.Module, experts.post_expert_norm)
        return call_normed(*arguments, norm, is_batch_invariant=is_batch_invariant, biases=biases)
    return call_experts(*arguments, is_batch_invariant=is_batch_invariant, biases=biases)


def run_hf_experts_batch_invariant(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`run_hf_experts` with the bits, on a GPU, that a token has in any batch."""
    return run_hf_experts(experts, hidden_states, top_k_index, top_k_weights, is_batch_invariant=True)


def _expect_runnable(model: nn.Module) -> None:
    """Raise unless the layer computes what every experts module of the model computes, from its weights."""
    for path, experts in experts_of(model):
        form_of(experts, path)
        expect_weights(experts, path, gathered_dtype(model, experts, getattr(experts, "down_proj", None)))
    for path, module in stood_for(model):
        stand = stand_for(module)
        assert stand is not None
        stand.expect(module, path, gathered_dtype(model, module, stand.weights(module)[1]))


def _transformers_moe() -> Any:
    try:
        from transformers import __version__ as version
        from transformers.integrations import moe
    except ImportError as error:
        raise ImportError(f"moe.integrations.huggingface needs transformers; {INSTALL}") from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRANSFORMERS:
        raise ImportError(f"moe.integrations.huggingface: expected transformers 5.7 or newer, got {version}; {INSTALL}")
    return moe

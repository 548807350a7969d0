"""A failing call that was kept, run again: on this device, and by the references."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.call import LayerCall
from moe.cli.exact import ERROR_LIMIT
from moe.cli.machine import UnfitMachine
from moe.compose import build_pipeline, reference_pipeline
from moe.failing_calls import KeptCall, read_call, tensors_by_name
from moe.flow import Added, ExpertOutputs, TopK
from moe.pipeline import MoEPipeline

INDENT = len("versions  ")


def read_kept(path: str) -> KeptCall:
    """The call, on the CPU.

    Raises:
        UnfitMachine: no file of ours, or nothing to read it with.
    """
    try:
        return read_call(path)
    except (ValueError, ImportError) as error:
        raise UnfitMachine(f"replay: {error}") from error


def replay(kept: KeptCall, device: torch.device) -> tuple[list[str], bool]:
    """What happened then and what happens now, in lines; and whether it is right now."""
    lines = [
        f"kept      {kept.notes['date']} on {kept.notes['device']}",
        f"versions  {', '.join(f'{name} {version}' for name, version in kept.notes['versions'].items())}",
        f"failure   {kept.failure}",
        f"call      {_described(kept)}",
        *(f"          {line}" for line in _not_finite_inputs(kept.call)),
    ]
    expected, reference_says = _run(reference_pipeline(kept.config), kept)
    lines.append(f"now       references on cpu: {reference_says}")
    if device.type == "cpu":
        return lines, expected is not None and bool(torch.isfinite(expected).all())
    result, says = _run(build_pipeline(kept.config, device), kept, device)
    is_right = result is not None and bool(torch.isfinite(result).all())
    if result is not None and expected is not None:
        error = _relative_error(result, expected)
        says += f", relative error to the references {error:.1e}"
        is_right = is_right and error <= ERROR_LIMIT
    return [*lines, f"          kernels on {device}: {says}"], is_right


def _run(pipeline: MoEPipeline, kept: KeptCall, device: torch.device | None = None) -> tuple[Tensor | None, str]:
    """The result on the CPU, or None, and what came of the call."""
    try:
        call = kept.call if device is None else _moved(kept.call, device)
        result = pipeline.run(call) if kept.is_finalized else _summed(pipeline.run_unfinalized(call))
        result = result.cpu()
    except Exception as error:  # whatever the call raised, which is what it is run for
        return None, f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    rows = int((~torch.isfinite(result)).any(dim=1).sum())
    return result, f"{rows} of {len(result)} rows are not finite" if rows else "all finite"


def _summed(outputs: ExpertOutputs) -> Tensor:
    """[T, H] float32 of the rows before finalize, those that no slot names left out."""
    is_local = outputs.row_of_slot >= 0
    if not len(outputs.rows):
        return outputs.rows.new_zeros(len(is_local), outputs.rows.shape[1], dtype=torch.float32)
    rows = outputs.rows[outputs.row_of_slot.clamp(min=0).long()].float()
    return torch.where(is_local[..., None], outputs.weights[..., None].float() * rows, 0.0).sum(dim=1)


def _moved(call: LayerCall, device: torch.device) -> LayerCall:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    entry = TopK(*map(move, (call.entry.expert_ids, call.entry.weights))) if call.is_chosen else move(call.entry)  # type: ignore[arg-type]
    swiglu = call.swiglu
    if swiglu is not None:
        swiglu = type(swiglu)(*map(move, (swiglu.alpha, swiglu.beta, swiglu.clamp_limit)))
    tensors = (call.hidden_states.to(device), call.w1.to(device), call.w2.to(device))
    added = call.added
    if added is not None:
        added = Added(added.values.to(device), move(added.gate) if isinstance(added.gate, Tensor) else added.gate)
    moved = LayerCall(entry, *tensors, swiglu, move(call.bias), is_chosen=call.is_chosen, added=added)
    return moved._replace(w1_bias=move(call.w1_bias), w2_bias=move(call.w2_bias))


def _described(kept: KeptCall) -> str:
    config, call = kept.config, kept.call
    start = "chosen experts" if call.is_chosen else "logits"
    end = "" if kept.is_finalized else ", stopped before finalize"
    return (
        f"{call.num_tokens} tokens from {start}{end}: H={config.hidden_size} I={config.intermediate_size} "
        f"E={config.num_experts} K={config.top_k}, {config.routing.method.value}"
    )


def _not_finite_inputs(call: LayerCall) -> list[str]:
    tensors = {name: value for name, value in tensors_by_name(call).items() if isinstance(value, Tensor)}
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    return [f"{count} values of {name} are not finite" for name, count in counts.items() if count]


def _relative_error(result: Tensor, expected: Tensor) -> float:
    """Of the elements that both have finite."""
    is_finite = torch.isfinite(result) & torch.isfinite(expected)
    difference = torch.linalg.vector_norm((result.double() - expected.double())[is_finite]).item()
    return difference / torch.linalg.vector_norm(expected.double()[is_finite]).item() if difference else 0.0

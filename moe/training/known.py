"""Training pipelines by a string: what an operator of torch is told, which takes no Python objects."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import torch

from moe.config import MoEConfig

if TYPE_CHECKING:
    from moe.training.pipeline import TrainingPipeline

_SWAPPED = "swapped "
_pipelines: dict[tuple[str, torch.device | None], TrainingPipeline] = {}


def built_key(config: MoEConfig, *, recompute: bool, is_tuned: bool, uses_pdl: bool) -> str:
    """The same in each process, so that what torch keeps of compiled graphs holds there."""
    options: dict[str, Any] = {"recompute": recompute, "is_tuned": is_tuned, "uses_pdl": uses_pdl}
    return json.dumps(options | {"config": config.model_dump(mode="json")}, sort_keys=True)


def remember(pipeline: TrainingPipeline, key: str) -> None:
    """As what `build_training_pipeline` makes of `key` for the pipeline's device."""
    _pipelines[key, pipeline.device] = pipeline


def remember_swapped(pipeline: TrainingPipeline) -> str:
    """The key of a pipeline with stages of somebody else's: no other process knows it, and this one never forgets it."""
    key = _SWAPPED + uuid.uuid4().hex
    _pipelines[key, None] = pipeline
    return key


def is_swapped(key: str) -> bool:
    return key.startswith(_SWAPPED)


def known(key: str, device: torch.device) -> TrainingPipeline | None:
    return _pipelines.get((key, None if is_swapped(key) else device))


def pipeline_of(key: str, device: torch.device) -> TrainingPipeline:
    """The pipeline of a key, built where this process has not built it yet."""
    pipeline = known(key, device)
    if pipeline is None:
        from moe.training.compose import build_training_pipeline  # which makes pipelines that ask here

        options = json.loads(key)
        config = MoEConfig.model_validate(options.pop("config"))
        pipeline = build_training_pipeline(config, device, **options)
    return pipeline

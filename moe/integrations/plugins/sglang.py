"""The plug-in that SGLang loads at every start: it adds a name to --moe-runner-backend, and does nothing until that is given."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

NAME = "moe_stages"
KNOWN = ("0.5.21", "0.5.22", "0.5.23")
_ARGUMENTS = "sglang.srt.server_args"
_METHOD = "sglang.srt.layers.quantization.unquant"
_LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer"
_DONE: list[str] = []


def plugin() -> None:
    """Add the backend `moe_stages`: a look at the arguments of a server, and last its name on the command line.

    Only a server that was asked for it registers the rest, which takes the import of SGLang's layers. SGLang logs what a plug-in
    raises, and starts without it: then the name is no choice, and a server that was asked for it does not start. A second
    call does nothing.

    Raises:
        RuntimeError: an SGLang that this package was not tried with.
    """
    choices = import_module("sglang.srt.arg_groups.choices")
    if NAME in choices.MOE_RUNNER_BACKEND_CHOICES:
        return
    expect_known(_installed())
    if {_METHOD, _LAYER} <= sys.modules.keys():
        register()
    else:
        _found(_ARGUMENTS, "ServerArgs", "resolve_once")  # raises where there is none: a hook would only be logged
        hooks = import_module("sglang.srt.plugins.hook_registry")
        hooks.HookRegistry.register(f"{_ARGUMENTS}.ServerArgs.resolve_once", _look_at, hooks.HookType.BEFORE)
    choices.add_moe_runner_backend_choices([NAME])


def _look_at(arguments: Any, *args: Any, **more: Any) -> None:
    """Before SGLang resolves a server's arguments, in each of its processes."""
    if NAME in (arguments.moe_runner_backend, getattr(arguments, "speculative_moe_runner_backend", None)):
        register()


def register() -> None:
    """The runner of `moe_stages` and the hooks that choose it. A second call does nothing.

    Raises:
        RuntimeError: a hook that SGLang did not apply, which it would only log.
    """
    if _DONE:
        return
    hooks = import_module("sglang.srt.plugins.hook_registry")
    registry, around, after = hooks.HookRegistry, hooks.HookType.AROUND, hooks.HookType.AFTER
    targets = {
        f"{_METHOD}.UnquantizedFusedMoEMethod.create_moe_runner": (_create_moe_runner, around),
        f"{_LAYER}.FusedMoE.__init__": (_expect_ours, after),
    }
    import_module("sglang.srt.layers.moe.moe_runner").register_moe_runner_core(NAME, _runner_core)
    for target, (hook, kind) in targets.items():
        registry.register(target, hook, kind)
    registry.apply_hooks()
    for target in targets:
        found = _found(*target.rsplit(".", 2))
        if not hasattr(found, "__wrapped__"):
            raise RuntimeError(
                f"moe_stages: expected SGLang to hook {target}, and it did not; leave out --moe-runner-backend {NAME}"
            )
    _DONE.append(NAME)


def expect_known(release: str) -> None:
    """Raise RuntimeError for a release of SGLang that this package was not tried with."""
    if release.partition("+")[0] not in KNOWN:
        raise RuntimeError(
            f"moe_stages: expected sglang {', '.join(KNOWN)}, got {release}; install one of them, or leave out "
            f"--moe-runner-backend {NAME}"
        )


def _installed() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return str(import_module("sglang").__version__)


def _found(module: str, *names: str) -> Any:
    found: Any = import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


def _is_asked_for() -> bool:
    return import_module("sglang.srt.layers.moe.utils").get_moe_runner_backend().value == NAME


def _runner_core(config: Any) -> Any:
    return import_module("moe.integrations.sglang_runner").MoeStagesRunnerCore(config)


def _create_moe_runner(original: Any, method: Any, layer: Any, moe_runner_config: Any, *args: Any, **more: Any) -> Any:
    result = original(method, layer, moe_runner_config, *args, **more)  # it sets more than the runner
    if _is_asked_for():
        runner = import_module("sglang.srt.layers.moe.moe_runner")
        backend = import_module("sglang.srt.layers.moe.utils").resolve_moe_runner_backend(NAME)
        method.runner = runner.MoeRunner(backend, moe_runner_config)
        # With one token a compiled model would leave the runner for plain torch, where padding ids index an expert.
        method._torch_compile_forward = lambda num_tokens: None
    return result


def _expect_ours(result: None, layer: Any, *args: Any, **more: Any) -> None:
    """After a layer is built: raise where it was asked to run here and does not, which SGLang would not notice."""
    if not _is_asked_for():
        return
    runner = getattr(layer.quant_method, "runner", None)
    core = getattr(runner, "runner_core", None)
    # Some quantised layers take whatever runner the command line names.
    is_plain = isinstance(layer.quant_method, _found(_METHOD, "UnquantizedFusedMoEMethod"))
    if not is_plain or type(core).__name__ != "MoeStagesRunnerCore":
        number = getattr(layer, "layer_id", "?")
        raise NotImplementedError(
            f"MoE layer {number}: quant_method: expected an unquantised layer of experts for --moe-runner-backend {NAME}, got "
            f"{type(layer.quant_method).__name__}; leave out that backend for this checkpoint"
        )

"""Starting a runtime anew that can't go on otherwise: what it holds is drained first, so that no request is lost."""

from __future__ import annotations

from modelium.core.instructions import StopRuntime
from modelium.core.moves import begin_unload, drain
from modelium.core.runtimes import lose_models
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Runtime

WHY = "its runtime is to be started anew"


def go_on(turn: Turn) -> None:
    """Drain what runtimes that are to be started anew hold, and stop those that hold nothing any more."""
    for _, runtime in sorted(turn.runtimes.items()):
        if runtime.recycle and runtime.state is RuntimeState.UP:
            _empty(turn, runtime)


def _empty(turn: Turn, runtime: Runtime) -> None:
    """Nothing is drained while something loads or is replaced there, which may take long: all the others serve on."""
    held = [m for n in sorted(turn.live) if (m := turn.models[n]).home == runtime.name]
    if any(m.state is State.LOADING or (m.state is State.READY and m.op) for m in held):
        return
    for model in held:
        if model.state is State.READY and all(m.home == runtime.name for m in turn.live_dependents(model.name)):
            again = Want.RESTORE if turn.used_lately(model) else Want.NONE
            drain(turn, turn.models[model.name], f"{WHY}: {runtime.recycle}", again=again)
        elif model.state is State.STANDBY:
            begin_unload(turn, turn.models[model.name], f"{WHY}: {runtime.recycle}")
    if all(turn.models[m.name].state in (State.FAILED, State.RECOVERING) for m in held):
        lose_models(turn, runtime.name, Failure("runtime_unavailable", f"{WHY}: {runtime.recycle}"))
        turn.move_runtime(runtime, RuntimeState.STOPPING, f"started anew: {runtime.recycle}", recycle="")
        turn.out.append(StopRuntime(runtime.name, runtime.epoch))

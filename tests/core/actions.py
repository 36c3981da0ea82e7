"""Everything that can happen to a `Sim`, as plain functions of small numbers, for drivers that draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.states import RuntimeState, State
from modelium.core.ticking import GONE_AFTER
from modelium.core.world import Failure, Policy
from tests.core.sim import Sim

LEAVES = ("a", "b", "c", "d", "kept", "big")
WHOLES = {"ab": ("a", "b"), "bc": ("b", "c"), "deep": ("ab", "d"), "lost": ("a", "nothing")}
NAMES = (*LEAVES, *WHOLES)
SIZES = (0, 10, 30, 40, 60, 90, 120)
WAITS = (0.0, 0.01, 0.5, 1.0, 4.0, 11.0, 16.0, 31.0, 70.0, 301.0)
DEADLINES = (1.0, 10.0, 40.0, 300.0, 2000.0)

Pick = Callable[[int], int]
"""A number from 0 up to, not including, the given one."""


def policy(pick: Pick) -> Policy:
    return Policy(
        always_loaded=("kept",) if pick(2) else (),
        budgets={"cpu:0": 100, "cpu:1": 60},
        idle_s=(300.0, 20.0)[pick(2)],
        min_resident_s=(30.0, 0.0)[pick(2)],
        drain_timeout_s=30.0,
        load_timeout_s=(900.0, 40.0)[pick(2)],
        unload_timeout_s=60.0,
        max_concurrent_loads=1 + pick(2),
        max_queue_per_model=4,
        max_queue=12,
        crash_budget=4,
        standby_budget_bytes=(None, 0, 20, 100)[pick(4)],
    )


def a_sim(pick: Pick) -> Sim:
    two = pick(3) == 0
    sim = Sim(
        policy(pick), devices=1 + pick(2), runtimes=("r", "s") if two else ("r",), blind=pick(6) == 0,
        levels=((), (1,), (1, 2), (2,))[pick(4)], residue=(0, 2, 10)[pick(3)],
    )  # fmt: skip
    if pick(3) == 0:
        machine_comes(sim, pick)
    return sim


def a_sim_of_sleepers(pick: Pick) -> Sim:
    """One in which all can sleep, and most fits only on a device that only its runtime reaches."""
    budgets = {"cpu:0": (50, 100)[pick(2)], "cpu:1": 60}
    sim = Sim(
        replace(policy(pick), budgets=budgets, min_resident_s=0.0, standby_budget_bytes=90), devices=1 + pick(2),
        blind=pick(6) == 0, levels=((1,), (1, 2))[pick(2)], residue=(0, 2, 10)[pick(3)],
    )  # fmt: skip
    machine_comes(sim, pick)
    return sim


def _name(sim: Sim, pick: Pick) -> str:
    return NAMES[pick(len(NAMES))]


def _known(sim: Sim, pick: Pick) -> str | None:
    names = sorted(sim.files)
    return names[pick(len(names))] if names else None


def _model(sim: Sim, pick: Pick, *states: State) -> str | None:
    names = sorted(n for n, m in sim.world.models.items() if m.state in states)
    return names[pick(len(names))] if names else None


def _runtime(sim: Sim, pick: Pick) -> str:
    names = sorted(sim.real)
    return names[pick(len(names))]


def accept(sim: Sim, pick: Pick) -> None:
    name = _name(sim, pick)
    if name in sim.files:
        return
    memory = SIZES[pick(len(SIZES))]
    drift = (0, 0, 0, 5, -5, 20)[pick(6)]
    sim.accept(
        name,
        memory=memory,
        real=max(0, memory + drift),
        parts=WHOLES.get(name, ()),
        runtime=_runtime(sim, pick) if name in LEAVES else "r",
        devices=2 if name in LEAVES and pick(6) == 0 else 1,
        dropped=pick(2) == 0,
        pinned=pick(12) == 0,
        bad=pick(8) == 0,
    )


def accept_again_after_restart(sim: Sim, pick: Pick) -> None:
    """A model that a record says was loaded: as if the service had just begun with this one."""
    name = LEAVES[pick(len(LEAVES))]
    if name in sim.files or name in sim.world.models:
        return
    real = sim.real["r"]
    size = SIZES[pick(len(SIZES))]
    if pick(2) and real.alive:
        real.drop(name)
        real.models[name] = (("cpu:0", size),)
        if sim.levels and pick(2):
            real.sleep(name, sim.levels[0], (("host:0", 5),))
    sim.accept(name, memory=size, was_loaded=True, loaded_revision=("1", "0", None)[pick(3)])


def change(sim: Sim, pick: Pick) -> None:
    name = _known(sim, pick)
    if name is not None:
        sim.change(name, memory=SIZES[pick(len(SIZES))] if pick(2) else None, bad=pick(4) == 0)
        sim.files[name].real = max(0, sim.files[name].memory + (0, 0, 5)[pick(3)])


def change_plan(sim: Sim, pick: Pick) -> None:
    """Another runtime, or other parts."""
    name = _known(sim, pick)
    if name is None:
        return
    file = sim.files[name]
    parts = file.spec.depends_on
    if name in WHOLES:
        parts = WHOLES[name] if parts != WHOLES[name] else WHOLES[name][:1]
    sim.accept(
        name,
        memory=file.memory,
        real=file.real,
        parts=parts,
        runtime=_runtime(sim, pick),
        revision=str(int(file.spec.revision) + pick(2)),
    )


def rescan(sim: Sim, pick: Pick) -> None:
    name = _known(sim, pick)
    if name is not None:
        sim.rescan(name)


def redrop(sim: Sim, pick: Pick) -> None:
    name = _known(sim, pick)
    if name is not None:
        file = sim.files[name]
        sim.accept(
            name,
            memory=file.memory,
            real=file.real,
            parts=file.spec.depends_on,
            runtime=file.spec.runtime,
            revision=file.spec.revision,
            dropped=True,
        )


def invalid(sim: Sim, pick: Pick) -> None:
    name = _name(sim, pick)
    sim.files.pop(name, None)
    sim.happen(e.ModelInvalid(sim.now, name, Failure("model_invalid", "half of it is missing")))


def remove(sim: Sim, pick: Pick) -> None:
    sim.remove(_name(sim, pick))


def drop(sim: Sim, pick: Pick) -> None:
    place = f"incoming/{NAMES[pick(3)]}"
    kept_as = (place, place.replace("incoming", "quarantine"))[pick(2)]
    match pick(4):
        case 0 | 1:
            sim.happen(e.DropSeen(sim.now, place, ("seen", "half of it is here")[pick(2)]))
        case 2:
            sim.happen(e.DropRefused(sim.now, place, Failure("model_invalid", "no model"), kept_as))
        case _:
            sim.happen(e.DropGone(sim.now, kept_as))


def ask(sim: Sim, pick: Pick) -> None:
    sim.ask(_name(sim, pick), deadline_s=DEADLINES[pick(len(DEADLINES))], priority=(0, 0, 5, -5)[pick(4)])


def ask_known(sim: Sim, pick: Pick) -> None:
    name = _known(sim, pick)
    if name is not None:
        sim.ask(name, deadline_s=DEADLINES[pick(len(DEADLINES))], priority=(0, 0, 0, 10)[pick(4)])


def load(sim: Sim, pick: Pick) -> None:
    parameters = (None, {}, {"config": "x"}, {"config": "y"})[pick(4)]
    sim.ask(_name(sim, pick), deadline_s=DEADLINES[pick(len(DEADLINES))], person=True, parameters=parameters)


def unload(sim: Sim, pick: Pick) -> None:
    sim.unload(_name(sim, pick), deadline_s=DEADLINES[pick(len(DEADLINES))])


def pin(sim: Sim, pick: Pick) -> None:
    sim.pin(_name(sim, pick), pick(3) == 0)


def withdraw(sim: Sim, pick: Pick) -> None:
    tickets = sorted(sim.world.tickets)
    if tickets:
        sim.withdraw(tickets[pick(len(tickets))])


def use(sim: Sim, pick: Pick) -> None:
    names = sorted(sim.open)
    if names:
        name = names[pick(len(names))]
        for _ in range((1, 1, 40)[pick(3)]):
            sim.use(name)


def end_use(sim: Sim, pick: Pick) -> None:
    names = sorted(n for n, count in sim.in_flight.items() if count)
    if names:
        name = names[pick(len(names))]
        for _ in range((1, 1000)[pick(2)]):
            sim.end(name)


def complete(sim: Sim, pick: Pick) -> None:
    ready = sim.ready_to_end()
    if ready:
        sim.complete(ready[pick(len(ready))])


def fail(sim: Sim, pick: Pick) -> None:
    ready = sim.ready_to_end()
    if ready:
        lost = pick(2) == 0
        sim.fail(ready[pick(len(ready))], runtime_lost=lost, config=pick(8) == 0, recycle=lost and pick(3) == 0)


def lose(sim: Sim, pick: Pick) -> None:
    if sim.pending:
        sim.lose(sim.pending[pick(len(sim.pending))], done=pick(2) == 0)


def wait(sim: Sim, pick: Pick) -> None:
    sim.wait(WAITS[pick(len(WAITS))])


def jump(sim: Sim, pick: Pick) -> None:
    sim.jump((3600.0, 50.0, -20.0)[pick(3)])


def look(sim: Sim, pick: Pick) -> None:
    sim.look(_runtime(sim, pick))


def see(sim: Sim, pick: Pick) -> None:
    sim.see()


def see_now(sim: Sim, pick: Pick) -> None:
    sim.see_runtime(_runtime(sim, pick))


def see_devices(sim: Sim, pick: Pick) -> None:
    sim.see_devices()


def foreign_memory(sim: Sim, pick: Pick) -> None:
    sim.foreign[pick(len(sim.foreign))] = (0, 0, 20, 60, 100)[pick(5)]
    sim.see_devices()


def machine_comes(sim: Sim, pick: Pick) -> None:
    """One that only one runtime reaches."""
    runtime = _runtime(sim, pick)
    sim.apart[f"{runtime}/cpu:0"] = runtime
    sim.see_devices()


def machine_is_missed(sim: Sim, pick: Pick) -> None:
    if sim.apart:
        sim.see_devices(without=sorted(sim.apart)[pick(len(sim.apart))])


def machine_goes(sim: Sim, pick: Pick) -> None:
    if sim.apart:
        sim.lose_device(sorted(sim.apart)[pick(len(sim.apart))], sleepers=pick(2) == 0, looks=1 + pick(GONE_AFTER))


def machine_goes_on_the_way(sim: Sim, pick: Pick) -> None:
    """That of a model that sleeps, falls asleep, wakes or goes."""
    names = sorted(n for n, m in sim.world.models.items() if m.parked is not None or m.state is State.UNLOADING)
    if names:
        model = sim.world.models[names[pick(len(names))]]
        before = model.parked.before if model.parked is not None else ()
        there = [d for d, _ in (*before, *model.booking) if d in sim.apart]
        if there:
            sim.lose_device(there[0], sleepers=pick(2) == 0, looks=1 + pick(GONE_AFTER))


def budgets(sim: Sim, pick: Pick) -> None:
    """What models may occupy changes, perhaps to less than they hold or need."""
    device = ("cpu:0", "cpu:1", "r/cpu:0")[pick(3)]
    sim.policy = replace(sim.policy, budgets={**sim.policy.budgets, device: (100, 60, 50, 35)[pick(4)]})
    sim.see_devices()


def memory_grows(sim: Sim, pick: Pick) -> None:
    real = sim.real[_runtime(sim, pick)]
    names = sorted(real.models.keys() - real.broken)
    if names:
        name = names[pick(len(names))]
        real.models[name] = tuple((d, n + (1, 15)[pick(2)]) for d, n in real.models[name])


def crash(sim: Sim, pick: Pick) -> None:
    sim.crash(_runtime(sim, pick), told=pick(3) > 0)


def lose_contact(sim: Sim, pick: Pick) -> None:
    sim.tell_down(_runtime(sim, pick))


def restart_silently(sim: Sim, pick: Pick) -> None:
    sim.restart_silently(_runtime(sim, pick))


def load_behind_its_back(sim: Sim, pick: Pick) -> None:
    """Somebody loads a model in the runtime without asking: not while it is being worked on there."""
    name = _model(sim, pick, State.COLD, State.QUEUED, State.FAILED)
    if name is not None and name in LEAVES and name in sim.files and not _worked_on(sim, name):
        real = sim.real[sim.world.models[name].home]
        if real.alive:
            real.drop(name)
            real.broken.discard(name)
            real.models[name] = (("cpu:0", sim.files[name].real),)


def unload_behind_its_back(sim: Sim, pick: Pick) -> None:
    name = _model(sim, pick, State.READY, State.DRAINING)
    if name is not None and not _worked_on(sim, name):
        sim.real[sim.world.models[name].home].drop(name)


def disturb_sleep(sim: Sim, pick: Pick) -> None:
    """Somebody puts a model to sleep, wakes or ends one without asking."""
    real = sim.real[_runtime(sim, pick)]
    names = [n for n in sorted(real.models.keys() - real.broken) if not _worked_on(sim, n)]
    if not sim.levels or not names:
        return
    name = names[pick(len(names))]
    if name not in real.asleep:
        real.sleep(name, sim.levels[pick(len(sim.levels))], (("host:0", 5),))
    elif pick(2):
        real.wake(name)
    else:
        real.drop(name)


def fall_asleep(sim: Sim, pick: Pick) -> None:
    """Nobody uses a model for long, and it is drained; it is parked then, perhaps, or is on its way to be."""
    name = _model(sim, pick, State.READY)
    if name is None or not sim.levels:
        return
    while sim.in_flight.get(name):
        sim.end(name)
    sim.wait(2 * sim.policy.idle_s + sim.policy.sweep_s)
    for _ in range(1 + pick(2)):
        ready = [p for p in sim.ready_to_end() if not p.late and _is_of(p.order, name)]
        if ready:
            sim.complete(ready[0])


def host_memory(sim: Sim, pick: Pick) -> None:
    sim.taken = (0, 30, 60, 90)[pick(4)]
    sim.see_devices()


def breaks(sim: Sim, pick: Pick) -> None:
    """A process of a loaded model ends."""
    real = sim.real[_runtime(sim, pick)]
    names = [name for name in sorted(real.models) if not _worked_on(sim, name)]
    if names:
        name = names[pick(len(names))]
        real.broken.add(name)
        real.models[name] = tuple((device, 0) for device, _ in real.models[name])


def _worked_on(sim: Sim, name: str) -> bool:
    return any(_is_of(p.order, name) for p in sim.pending)


def _is_of(order: i.Instruction, name: str) -> bool:
    return isinstance(order, i.Load | i.Unload | i.Park | i.Wake | i.CloseRoute) and order.name == name


def load_foreign(sim: Sim, pick: Pick) -> None:
    real = sim.real[_runtime(sim, pick)]
    if real.alive:
        real.models["stranger"] = (("cpu:0", 10),)


def another_chance(sim: Sim, pick: Pick) -> None:
    """A person loads a model of a runtime that was given up."""
    for name in sorted(sim.files):
        runtime = sim.world.runtimes.get(sim.world.models[name].home) if name in sim.world.models else None
        if runtime is not None and runtime.state is RuntimeState.CRASHED:
            sim.ask(name, person=True)
            return


OFTEN = (accept, ask, ask_known, ask_known, complete, complete, complete, complete, wait, wait, use, end_use, end_use)
SELDOM = (
    accept_again_after_restart, change, change_plan, rescan, redrop, invalid, remove, drop, load, load, unload, pin,
    withdraw, fail, lose, jump, look, see, see_now, see_devices, foreign_memory, machine_comes,
    machine_is_missed, machine_goes, machine_goes_on_the_way, budgets, memory_grows, breaks, crash,
    lose_contact, restart_silently, load_behind_its_back, unload_behind_its_back, load_foreign, another_chance,
    disturb_sleep, host_memory, fall_asleep,
)  # fmt: skip
AMONG_SLEEPERS = (
    accept, accept, ask_known, ask_known, ask_known, complete, complete, complete, complete, wait, end_use,
    fall_asleep, fall_asleep, fall_asleep, machine_comes, machine_is_missed,
    machine_goes_on_the_way, budgets,
)  # fmt: skip

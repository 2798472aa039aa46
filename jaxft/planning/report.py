"""A plan as text: what a person wants to know before renting the machine."""

from collections.abc import Sequence

from jaxft.config import Config
from jaxft.models.decoder import Remat
from jaxft.planning.plan import GIB, Plan

MIB = 1 << 20


def describe(plan: Plan) -> str:
    """The plan in full."""
    c, machine, memory = plan.config, plan.topology.machine, plan.memory
    lines = [
        f"{c.model_name_or_path}: {_method(plan)}",
        f"{plan.devices} x {machine.name}, mesh {mesh_of(plan)}",
        f"{c.micro_batch_size} x {c.max_length} tokens in a micro-batch of each data-parallel group, "
        f"{plan.tokens:,} in an update",
        f"remat {remat_of(c.remat)}; attention {plan.attention}",
        "",
        "memory of a device        GiB",
    ]
    for part in ("base", "adapters", "optimizer", "gradients", "temporaries"):
        lines.append(f"  {part:<20}{getattr(memory, part) / GIB:>9.2f}")
    lines.append(f"  {'total':<20}{memory.total / GIB:>9.2f}  of {machine.capacity / GIB:.2f}")
    if asked := prompts_of(c):
        lines.append(
            f"  not in it: the cache of {asked} held-out prompts that are answered before and after; "
            "sample_prompts: 0 and exact_match_samples: 0 leave them out"
        )
    if plan.collectives:
        lines += ["", f"sent by a device in an update {'MiB':>20}{'times':>8}"]
        for each in plan.collectives:
            what = f"{each.kind} {each.dtype} over {' x '.join(each.axes) or 'itself'}"
            lines.append(f"  {what:<38}{each.bytes / MIB:>10,.1f}{each.count:>8,}")
    work, times = plan.work, plan.times
    lines += [
        "",
        f"an update: {work.model_flops / 1e12:,.1f} TFLOP of the model, {work.hardware_flops / 1e12:,.1f} with what is "
        f"recomputed; a device moves {work.memory_bytes / GIB:,.1f} GiB of memory",
        f"  {times.products:.3f} s bound by products, {times.memory:.3f} s by memory; the network takes "
        f"{times.hidden_collectives:.3f} s beside them and {times.exposed_collectives:.3f} s in their way",
        f"  estimate: {times.step:.3f} s, {plan.tokens_per_second_per_device:,.0f} tokens/s a device, "
        f"bound by {times.bound_by}",
    ]
    if plan.program is not None:
        lines += ["", "the largest buffers that it makes"]
        lines += [
            f"  {buffer.array.bytes / MIB:>9,.1f} MiB  {buffer.array!s:<28} {buffer.operation[-60:]}"
            for buffer in plan.program.largest_buffers()
        ]
    lines += ["", f"compiled in {plan.compile_seconds:.1f} s", verdict(plan)]
    return "\n".join(lines)


def prompts_of(config: Config) -> int:
    """The most held-out prompts that base and tuned model answer."""
    held_out = config.eval_datasets or config.val_set_size
    return max(config.sample_prompts, config.exact_match_samples) if held_out else 0


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    total, capacity = plan.memory.total / GIB, plan.topology.machine.capacity / GIB
    if plan.fits:
        return f"fits: {total:.2f} of {capacity:.2f} GiB"
    return f"does not fit, short by {total - capacity:.2f} GiB: {total:.2f} of {capacity:.2f}"


def row(plan: Plan) -> str:
    """A line of the table of a search."""
    return (
        f"{mesh_of(plan):<36}{plan.config.micro_batch_size:>6}  {_as_in_config(plan.config.remat):<44}"
        f"{plan.memory.total / GIB:>8.2f}  {'yes' if plan.fits else 'no':<5}"
        f"{plan.tokens_per_second_per_device:>10,.0f}  {plan.times.bound_by}"
    )


HEADING = f"{'mesh':<36}{'micro':>6}  {'remat':<44}{'GiB':>8}  {'fits':<5}{'tokens/s':>10}  bound by"


def config_lines(plan: Plan) -> str:
    """What to write into the config to get this plan."""
    sizes = ", ".join(f"{axis}: {size}" for axis, size in plan.mesh.items() if size > 1) or "data: 1"
    return (
        f"mesh: {{{sizes}}}\nmicro_batch_size: {plan.config.micro_batch_size}\n"
        f"gradient_accumulation_steps: {plan.config.gradient_accumulation_steps}\n"
        f"remat: {_as_in_config(plan.config.remat)}"
    )


def mesh_of(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def remat_of(remat: Remat | Sequence[str]) -> str:
    return remat if isinstance(remat, str) else f"all but {', '.join(remat)}"


def _as_in_config(remat: Remat | Sequence[str]) -> str:
    return remat if isinstance(remat, str) else f"[{', '.join(remat)}]"


def _method(plan: Plan) -> str:
    c = plan.config
    if c.adapter == "none":
        return f"every weight, computed in {c.dtype}"
    return f"{c.adapter} r={c.lora_r} on a base in {c.quant_type or c.dtype}"

"""Predicts seconds, MFU and hours from what a compiled program says about itself; nothing here is a measurement."""

from typing import Any

from cjepa_jax.tpu import chips, hlo, kernels

METHOD = """\
Predicted, not measured: the TPU compiler's cycle estimates for its own schedule, each as often as its loop runs, plus
the critical path of the attention kernels' own schedules (cjepa_jax/tpu/kernels.py), plus the time in which a chip
could send each collective over all its ICI links at full rate, nothing overlapping. It includes tiling, padding and
layout copies. It leaves out the operations listed as not costed, stalls, latency, the input pipeline, checkpoints and
probes. It can rank designs that differ by more than 5 %; it does not predict the real throughput."""


def describe(compiled: str, chip: chips.Chip, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns what one program, as compiled text, costs on one chip of a slice of this shape; seconds are predicted."""
    program = hlo.analyse(compiled)
    bandwidth = chips.ici_bandwidth(chip, shape)
    found = _kernels(program, chip)
    not_costed = {name: value._asdict() for name, value in program.uncosted.items()}
    for kernel in found:
        if kernel["seconds"] is None:
            name = f"kernel {kernel['name']} of {kernel['operands']}"
            not_costed[name] = {"times": kernel["times"], "result_bytes": kernel["result_bytes"]}
    collectives = [
        c._asdict() | {"sent_bytes": c.sent_bytes, "seconds": c.sent_bytes / bandwidth if bandwidth else 0.0}
        for c in sorted(program.collectives, key=lambda c: -c.sent_bytes)
    ]
    return {
        "matmul_flops": program.matmul_flops,
        "cycles": program.cycles,
        "costed_operations": len(program.costs),
        "compute_seconds": program.cycles / chip.clock,
        "update_seconds": sum(c.cycles for c in program.costs if "/update/" in c.source) / chip.clock,
        "kernel_seconds": sum(kernel["seconds"] or 0.0 for kernel in found),
        "kernels": found,
        "collective_seconds": sum(c["seconds"] for c in collectives),
        "exposed_collective_seconds": sum(c["seconds"] for c in collectives if not c["overlapped"]),
        "collectives": collectives,
        "not_costed": not_costed,
        "costliest": [c._asdict() for c in sorted(program.costs, key=lambda c: -c.cycles)[:20]],
    }


def _kernels(program: hlo.ProgramCost, chip: chips.Chip) -> list[dict[str, Any]]:
    """Returns each kernel with the seconds of all its calls, or None where they are not known; equal calls add up."""
    calls: dict[tuple[str, str], hlo.Kernel] = {}
    for kernel in program.kernels:
        key = kernel.name, kernel.operands
        if key in calls:
            before = calls[key]
            kernel = hlo.Kernel(
                *key,
                before.times + kernel.times,
                before.flops + kernel.flops,
                before.result_bytes + kernel.result_bytes,
            )
        calls[key] = kernel
    cycles = {key: kernels.cycles(kernel, chip.name) for key, kernel in calls.items()}
    return [
        kernel._asdict() | {"seconds": None if (known := cycles[key]) is None else known / chip.clock}
        for key, kernel in calls.items()
    ]


def add_step(report: dict[str, Any], *, useful: float, batch: int, chip: chips.Chip) -> None:
    """Adds to the report of a whole step what follows from its time.

    useful: FLOPs that the method needs per image. batch: images of the global batch.
    """
    seconds = report["compute_seconds"] + report["kernel_seconds"] + report["collective_seconds"]
    useful_per_chip = useful * batch / report["chips"]
    hours = seconds * report["steps"] / 3600
    report |= {
        "useful_flops_per_image": useful,
        "useful_of_compiled_flops": useful_per_chip / report["matmul_flops"],
        "predicted_step_seconds": seconds,
        "predicted_mfu": useful_per_chip / seconds / chip.flops,
        "predicted_images_per_second": batch / seconds,
        "predicted_hours": hours,
        "predicted_chip_hours": hours * report["chips"],
    }


def format_step(report: dict[str, Any], chip: chips.Chip) -> str:
    """Returns the report of a whole step as a table."""
    groups: dict[tuple[str, int], list[float]] = {}
    for c in report["collectives"]:
        total = groups.setdefault((c["opcode"], c["group"]), [0, 0.0, 0.0])
        for i, value in enumerate((c["times"], c["times"] * c["operand_bytes"], c["seconds"])):
            total[i] += value
    share = report["peak_hbm_bytes"] / chip.hbm
    rows = [
        ("chips", f"{report['chips']}", f"{report['images_per_chip']} images each"),
        ("peak HBM", f"{report['peak_hbm_bytes'] / chips.GIB:.2f} GiB", f"{share:.0%} of {chip.hbm / chips.GIB:.0f}"),
        (
            "useful FLOPs",
            f"{report['useful_flops_per_image'] / 1e9:.1f} G",
            f"per image; {report['useful_of_compiled_flops']:.0%} of the compiled products'",
        ),
        ("compute", _ms(report["compute_seconds"]), f"{report['costed_operations']} operations"),
        (
            "of it optimizer, EMA",
            _ms(report["update_seconds"]),
            f"{report['update_seconds'] / report['predicted_step_seconds']:.1%} of the step",
        ),
        (
            "kernels",
            _ms(report["kernel_seconds"]),
            f"{report['kernel_seconds'] / report['predicted_step_seconds']:.0%} of the step; "
            + (", ".join(f"{k['name']} x {k['times']}" for k in report["kernels"]) or "none"),
        ),
        *(
            (f"{opcode} x {times:.0f}", _ms(seconds), f"{size / 1e6:.1f} MB per chip, groups of {group}")
            for (opcode, group), (times, size, seconds) in groups.items()
        ),
        ("not overlapped", _ms(report["exposed_collective_seconds"]), "of the collectives, by the schedule"),
        ("predicted step", _ms(report["predicted_step_seconds"]), ""),
        ("predicted MFU", f"{report['predicted_mfu']:.1%}", f"of {chip.flops / 1e12:.0f} TFLOP/s bfloat16"),
        ("predicted images/s", f"{report['predicted_images_per_second']:.0f}", ""),
        (
            f"{report['epochs']:g} epochs",
            f"{report['predicted_hours']:.1f} h",
            f"predicted; {report['predicted_chip_hours']:.0f} chip-hours, {report['steps']} steps",
        ),
    ]
    return "\n".join(f"{name:22}{value:>12}  {note}".rstrip() for name, value, note in rows)


def format_layers(report: dict[str, Any], chip: chips.Chip) -> str:
    """Returns the report of `compile_layers` as a table."""
    lines = [
        f"{'predicted':10}{'tokens':>14}{'per layer':>12}{'in kernels':>12}{'layers':>8}{'together':>12}{'MFU':>6}"
        f"{'peak HBM':>12}"
    ]
    for name, layer in report.items():
        tokens, seconds = (
            f"{layer['sequences']} x {layer['tokens']}",
            layer["compute_seconds"] + layer["kernel_seconds"],
        )
        lines.append(
            f"{name:10}{tokens:>14}{_ms(seconds):>12}{_ms(layer['kernel_seconds']):>12}{layer['depth']:>8}"
            f"{_ms(seconds * layer['depth']):>12}"
            f"{layer['predicted_mfu']:>6.0%}{layer['peak_hbm_bytes'] / chips.GIB:>8.2f} GiB"
        )
    total = sum((layer["compute_seconds"] + layer["kernel_seconds"]) * layer["depth"] for layer in report.values())
    return "\n".join([*lines, f"{'all layers':56}{_ms(total):>12}"])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def not_costed(report: dict[str, Any]) -> str:
    """Returns the line that belongs beside every predicted time: which operations have no estimate."""
    found = report["not_costed"].items()
    return "not costed: " + ", ".join(f"{k} x {v['times']} ({v['result_bytes'] / 1e6:.1f} MB)" for k, v in found)

"""Pictures: the curves of a run, its masks over a few images, spectra, images side by side with maps of them."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from cjepa_jax.files import write_whole
from cjepa_jax.models.masking import Masks

matplotlib.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3})

_COMMON = {  # title of a panel -> metrics, after those of the method
    "Learning rate": ("lr",),
    "Norm of the gradient": ("grad_norm",),
    "EMA momentum": ("ema_momentum",),
    "Throughput": ("images_per_second",),
}


def curves(lines: list[dict[str, Any]], path: epath.Path, panels: Mapping[str, Sequence[str]]) -> None:
    """Draws metrics of `metrics.jsonl` against the step; `panels` are a method's, by their titles.

    A panel of which no line holds a metric is left out.
    """
    logged = {name for line in lines for name in line}
    shown = {title: [name for name in names if name in logged] for title, names in {**panels, **_COMMON}.items()}
    shown = {title: names for title, names in shown.items() if names}
    rows = max(1, math.ceil(len(shown) / 3))
    figure = Figure(figsize=(11, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, sharex=True).flat
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, names) in zip(grid, shown.items(), strict=False):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "", label=name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
        axes.set_ylabel(names[0] if len(names) == 1 else names[0].partition("/")[0])
        if len(names) > 1:
            axes.legend()
        if title == "Regulariser's terms":
            axes.set_yscale("log")
    _save(figure, path)


def masks(images: np.ndarray, sampled: Masks, path: epath.Path, *, grid: int) -> None:
    """Draws each image [n, H, W, C] uint8, what the context encoder sees of it, and each target block."""
    columns, side = 2 + sampled.target_idx.shape[1], images.shape[1]
    titles = ["image", "context", *(f"target {m + 1}" for m in range(columns - 2))]
    width, height = math.ceil(1.05 * side), math.ceil(1.2 * side)  # of a picture with its margin and its title
    drawn = np.ones((height * len(images), width * columns, 3))
    figure = Figure(figsize=(1.5 * columns, 1.7 * len(images)))
    axes = figure.add_axes((0, 0, 1, 1))  # a single one: each further one takes a twentieth of a second
    for i, image in enumerate(images):
        visible = [np.ones(grid * grid, bool), _members(sampled.context_idx[i], sampled.context_valid[i], grid)]
        visible += [
            _members(*block, grid) for block in zip(sampled.target_idx[i], sampled.target_valid[i], strict=True)
        ]
        for j, (members, title) in enumerate(zip(visible, titles, strict=True)):
            shown = np.kron(members.reshape(grid, grid), np.ones((side // grid, side // grid)))[..., None]
            picture = image / 255 * shown + 0.5 * (1 - shown) * np.array([0.35, 0.45, 0.65])
            top, left = (i + 1) * height - side, j * width
            drawn[top : top + side, left : left + side] = picture
            axes.text(left + side / 2, top - 0.03 * side, f"{title} ({members.sum()})", ha="center", va="bottom")
    axes.imshow(drawn)
    axes.set_axis_off()
    _save(figure, path)


def spectra(found: Mapping[str, np.ndarray], path: epath.Path) -> None:
    """Draws standard deviations along the principal axes, relative to the largest, by the encoder's name."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        axes.plot(np.arange(1, len(values) + 1), values / max(values[0], 1e-30), label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4)
    axes.set_xlabel("principal axis")
    axes.set_ylabel("std along it / largest")
    axes.legend()
    _save(figure, path)


def bands(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: epath.Path, *, label: str) -> None:
    """Draws a panel for each title, and in it means over runs as lines and standard deviations as bands.

    A panel has, by the name of a line, x [p] and values [runs, p]; `label` says what x is.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = Figure(figsize=(4.5 * len(panels), 3.6 + 0.06 * len(names)), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for name, (x, values) in lines.items():
            color = f"C{names.index(name) % 10}"
            style = ("-", "--", ":", "-.")[names.index(name) // 10 % 4]
            mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
            axes.plot(x, mean, style, color=color, marker="." if len(x) < 20 else "", label=name)
            axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel(label)
    handles = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    _save(figure, path)


def bars(panels: Mapping[str, Mapping[str, Sequence[float]]], path: epath.Path) -> None:
    """Draws a panel for each title: means as bars with their standard errors, and each value as a point."""
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    figure = Figure(figsize=(1 + 4.5 * len(panels), 1 + 0.28 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=True):
        for name, values in found.items():
            row = names.index(name)
            error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
            axes.barh(row, np.mean(values), xerr=error, color=f"C{row % 10}", alpha=0.6)
            axes.plot(values, [row] * len(values), "k.", markersize=4)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
    grid.flat[0].invert_yaxis()
    _save(figure, path)


def side_by_side(
    columns: Mapping[str, Sequence[np.ndarray] | np.ndarray],
    path: epath.Path,
    *,
    title: str,
    under: np.ndarray | None = None,
) -> None:
    """Draws a row for each image and a column for each name.

    A column has images [n, H, W, C], uint8 or in [0, 1], or maps [n, H, W]. Images `under`, [n, H, W, C] uint8, shine
    through the maps in grey.

    The maps of a row have one scale, which stands beside them; above each are its smallest and its largest value.
    """
    rows = list(zip(*columns.values(), strict=True))
    figure = Figure(figsize=(0.5 + 1.9 * len(columns), 0.7 + 2.0 * len(rows)), layout="constrained")
    figure.suptitle(title, wrap=True)
    for i, (panels, row) in enumerate(zip(figure.subplots(len(rows), len(columns), squeeze=False), rows, strict=True)):
        coloured, values = None, [picture for picture in row if picture.ndim == 2]
        scale: dict[str, Any] = {}
        if values:
            scale = {"vmin": min(map(np.min, values)), "vmax": max(map(np.max, values))}
            scale |= {} if under is None else {"alpha": 0.5, "cmap": "jet"}
        for axes, name, picture in zip(panels, columns, row, strict=True):
            is_map = picture.ndim == 2
            span = f"{picture.min():.2g} to {picture.max():.2g}" if is_map else ""
            if is_map and under is not None:
                axes.imshow(under[i].mean(axis=-1), cmap="gray", vmin=0, vmax=255)
            drawn = axes.imshow(picture, **(scale if is_map else {"cmap": "gray"} if picture.shape[-1] == 1 else {}))
            axes.set_axis_off()
            axes.set_title("\n".join(filter(None, (name if i == 0 else "", span))))
            coloured = drawn if is_map else coloured
        if coloured:
            figure.colorbar(coloured, ax=panels, fraction=0.05, pad=0.01)
    _save(figure, path)


def _members(idx: Any, valid: Any, grid: int) -> np.ndarray:
    members = np.zeros(grid * grid, bool)
    members[np.asarray(idx)[np.asarray(valid)]] = True
    return members


def _save(figure: Figure, path: epath.Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_whole(path, buffer.getvalue())

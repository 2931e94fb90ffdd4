"""Pictures: the curves of a run, its masks over a few images, spectra, images side by side with maps of them."""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from cjepa_jax.files import printable, write_whole
from cjepa_jax.models.masking import Masks

_styled = matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3})  # of each drawing function

_COMMON = {  # title of a panel -> metrics, after those of the method
    "Learning rate": ("lr",),
    "Norm of the gradient": ("grad_norm",),
    "EMA momentum": ("ema_momentum",),
    "Throughput": ("images_per_second",),
}


@_styled
def curves(lines: list[dict[str, Any]], path: epath.Path, panels: Mapping[str, Sequence[str]]) -> None:
    """Draws metrics of `metrics.jsonl` against the step; `panels` are a method's, by their titles.

    A panel of which no line holds a metric is left out.
    """
    logged = {name for line in lines for name in line}
    shown = {title: [name for name in names if name in logged] for title, names in {**panels, **_COMMON}.items()}
    shown = {title: names for title, names in shown.items() if names}
    rows = max(1, math.ceil(len(shown) / 3))
    figure = Figure(figsize=(11, 2.5 * rows))
    grid = figure.subplots(rows, 3, sharex=True).flat
    # Margins in inches. matplotlib's own layout would take half of the time, and a run waits for its curves.
    margins = {"bottom": 0.5 / 2.5 / rows, "top": 1 - 0.3 / 2.5 / rows, "hspace": 0.42}
    figure.subplots_adjust(left=0.06, right=0.99, wspace=0.25, **margins)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, names) in zip(grid, shown.items(), strict=False):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "", label=name)
        axes.set_title(title, y=1.0)  # where it would come anyway: matplotlib's search takes a tenth of the time
        axes.locator_params(nbins=5)  # ticks and their labels are most of the work
        axes.set_ylabel(names[0] if len(names) == 1 else names[0].partition("/")[0])
        if len(names) > 1:
            axes.legend()
        if title == "Regulariser's terms":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
    for axes in grid[max(0, len(shown) - 3) : len(shown)]:  # the lowest of each column
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    save_figure(figure, path)


@_styled
def masks(images: np.ndarray, sampled: Masks, path: epath.Path, *, grid: tuple[int, int]) -> None:
    """Draws each image [n, H, W, C] uint8, what the context encoder sees of it, and each target block."""
    columns, (high, wide) = 2 + sampled.target_idx.shape[1], images.shape[1:3]
    titles = ["image", "context", *(f"target {m + 1}" for m in range(columns - 2))]
    side = math.sqrt(high * wide)
    width, height = (
        math.ceil(wide + 0.05 * side),
        math.ceil(high + 0.2 * side),
    )  # with margin and title
    drawn = np.ones((height * len(images), width * columns, 3))
    inches = 1.43 / side  # a pixel
    figure = Figure(figsize=(inches * drawn.shape[1], inches * drawn.shape[0]))
    axes = figure.add_axes((0, 0, 1, 1))  # a single one: each further one takes a twentieth of a second
    for i, image in enumerate(images):
        visible = [np.ones(math.prod(grid), bool), _members(sampled.context_idx[i], sampled.context_valid[i], grid)]
        visible += [
            _members(*block, grid) for block in zip(sampled.target_idx[i], sampled.target_valid[i], strict=True)
        ]
        for j, (members, title) in enumerate(zip(visible, titles, strict=True)):
            patch = np.ones((high // grid[0], wide // grid[1]))
            shown = np.kron(members.reshape(grid), patch)[..., None]
            picture = image / 255 * shown + 0.5 * (1 - shown) * np.array([0.35, 0.45, 0.65])
            top, left = (i + 1) * height - high, j * width
            drawn[top : top + high, left : left + wide] = picture
            axes.text(left + wide / 2, top - 0.03 * side, f"{title} ({members.sum()})", ha="center", va="bottom")
    axes.imshow(drawn)
    axes.set_axis_off()
    save_figure(figure, path)


@_styled
def spectra(found: Mapping[str, np.ndarray], path: epath.Path) -> None:
    """Draws for each name standard deviations along principal axes, [k], largest first, as shares of the first."""
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
    save_figure(figure, path)


@_styled
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
    save_figure(figure, path)


@_styled
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
    save_figure(figure, path)


@_styled
def side_by_side(
    columns: Mapping[str, Sequence[np.ndarray] | np.ndarray],
    path: epath.Path,
    *,
    title: str,
    under: np.ndarray | None = None,
) -> None:
    """Draws a row for each image and a column for each name.

    A column has images [n, H, W, C], uint8 or in [0, 1], or maps [n, H, W]. The maps of a row have one scale, which
    stands beside them; above each are its smallest and its largest value.

    Images `under`, [n, H, W, C] uint8, shine through the maps in grey, and each map has a scale of its own.
    """
    rows = list(zip(*columns.values(), strict=True))
    figure = Figure(figsize=(0.5 + 1.9 * len(columns), 0.7 + 2.0 * len(rows)), layout="constrained")
    figure.suptitle(_text(title), wrap=True)
    for i, (panels, row) in enumerate(zip(figure.subplots(len(rows), len(columns), squeeze=False), rows, strict=True)):
        coloured, values = None, [picture for picture in row if picture.ndim == 2]
        scale: dict[str, Any] = {} if under is None else {"alpha": 0.5, "cmap": "jet"}
        if values and under is None:
            scale = {"vmin": min(map(np.min, values)), "vmax": max(map(np.max, values))}
        for axes, name, picture in zip(panels, columns, row, strict=True):
            is_map = picture.ndim == 2
            span = f"{picture.min():.2g} to {picture.max():.2g}" if is_map else ""
            if is_map and under is not None:
                axes.imshow(under[i].mean(axis=-1), cmap="gray", vmin=0, vmax=255)
            grey = {"cmap": "gray", "vmin": 0, "vmax": 255 if picture.dtype == np.uint8 else 1}
            drawn = axes.imshow(picture, **(scale if is_map else grey if picture.shape[-1] == 1 else {}))
            axes.set_axis_off()
            axes.set_title("\n".join(filter(None, (name if i == 0 else "", span))))
            coloured = drawn if is_map else coloured
        if coloured and under is None:
            figure.colorbar(coloured, ax=panels, fraction=0.05, pad=0.01)
    save_figure(figure, path)


class Panel(NamedTuple):
    """An image [H, W, C] uint8 with its caption; `agrees` gives it a green frame, or an orange one if False."""

    image: np.ndarray
    caption: str
    agrees: bool | None = None


@_styled
def panels(rows: Sequence[Sequence[Panel]], path: epath.Path, *, title: str) -> None:
    """Draws rows of panels, whose images have one shape, with a gap behind the first of each row."""
    tall = rows[0][0].image.shape[0] / rows[0][0].image.shape[1]
    columns, height, gap = max(map(len, rows)), 0.4 + tall, 0.2  # in widths of an image
    width = 1.1 * columns + gap
    figure = Figure(figsize=(1.1 * width, 1.1 * (height * len(rows) + 0.3)))
    axes = figure.add_axes((0, 0, 1, 1))  # a single one: each further one takes a twentieth of a second
    axes.set(xlim=(0, width), ylim=(height * len(rows) + 0.3, 0))
    axes.set_axis_off()
    axes.text(width / 2, 0.15, _text(title), ha="center", va="center", wrap=True)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            left, bottom = 0.05 + 1.1 * j + gap * (j > 0), height * (i + 1) + 0.25
            box = (left, left + 1, bottom, bottom - tall)
            picture = panel.image
            axes.imshow(picture, cmap="gray" if picture.shape[-1] == 1 else None, vmin=0, vmax=255, extent=box)
            lines = [_text(line, 20) for line in panel.caption.splitlines()]
            axes.text(left + 0.5, bottom - tall - 0.02, "\n".join(lines), ha="center", va="bottom", fontsize=7)
            if panel.agrees is not None:
                color = "tab:green" if panel.agrees else "tab:orange"
                axes.add_patch(Rectangle((left, bottom - tall), 1, tall, fill=False, edgecolor=color, linewidth=2))
    axes.set(xlim=(0, width), ylim=(height * len(rows) + 0.3, 0), aspect="auto")  # imshow has changed them
    save_figure(figure, path)


@_styled
def maps(rows: Mapping[str, Mapping[str, np.ndarray]], classes: np.ndarray, path: epath.Path, *, title: str) -> None:
    """Draws points [n, 2] in the plane: a row of panels for each name, and in it a panel for each title.

    `classes` [n] names the class of each point, "" for none. The 20 commonest ones have a colour and a marker.
    """
    found = Counter(name for name in classes.tolist() if name)
    named = sorted(name for name, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:20])
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(3.2 * columns + 1.8 * bool(named), 0.4 + 3.3 * len(rows)), layout="constrained")
    figure.suptitle(_text(title))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, panels) in zip(grid, rows.items(), strict=True):
        for axes, (of, points) in zip(row, panels.items(), strict=False):
            others = ~np.isin(classes, named)
            label = ("other classes" if len(found) > len(named) else "no label") if named else None
            if others.any():
                axes.scatter(*points[others].T, s=6, color="0.75" if named else "C0", linewidths=0, label=label)
            for k, one in enumerate(named):
                mine = points[classes == one]
                axes.scatter(*mine.T, s=9, color=f"C{k % 10}", marker="o^"[k // 10], linewidths=0, label=one)
            axes.set_title(f"{name}: {of}")
            axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
            axes.grid(False)
            axes.set_aspect("equal", "datalim")
    if named:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        short = [_text(label, 24) for label in labels]
        figure.legend(handles, short, loc="outside right center", markerscale=2)
    save_figure(figure, path)


def _text(text: str, longest: int | None = None) -> str:
    """Returns a name as matplotlib can write it, which takes what stands between two dollar signs for mathematics."""
    text = printable(text)
    text = text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."
    return text.replace("$", r"\$")


def _members(idx: Any, valid: Any, grid: tuple[int, int]) -> np.ndarray:
    members = np.zeros(math.prod(grid), bool)
    members[np.asarray(idx)[np.asarray(valid)]] = True
    return members


@_styled
def save_figure(figure: Figure, path: epath.Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, pil_kwargs={"compress_level": 1})  # a tenth larger, a fifth quicker
    write_whole(path, buffer.getvalue())

"""What the runs of a study have found: choices, tables and figures, all of it read from the files of the runs."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from cjepa_jax import plots
from cjepa_jax.evaluate import report
from cjepa_jax.evaluate.config import Evaluation
from cjepa_jax.evaluate.frozen import PIXELS, UNTRAINED
from cjepa_jax.files import read_json, write_whole
from cjepa_jax.studies.design import Arm, Run, Study
from cjepa_jax.train import writer

_FRACTIONS = ("knn", "logistic", "linear")  # measures that are shares of images, for people in %
HELD_OUT, TEST = "held_out", "test"
Values = dict[int, float]  # by seed


def diverged(run: Run) -> str:
    """Gives the error that has ended a run for good, "" where there is none."""
    path = run.folder / "diverged.txt"
    return path.read_text().strip() if path.exists() else ""


def finished(run: Run) -> bool:
    """Tells whether nothing is left to train of a run."""
    return report.is_of(run.folder, run.steps) or bool(diverged(run))


def measures(path: epath.Path, encoder: str | None = None) -> dict[str, float]:
    """Reads the metrics of an encoder from a file of results, by name; by default those of the judged encoder."""
    results, known = read_json(path)["results"], Evaluation().evaluators
    found: dict[str, float] = {}
    for name, rows in results.items():
        chosen = rows if encoder is None else {one: row for one, row in rows.items() if one == encoder}
        found |= known[name].metrics(chosen) if chosen else {}
    return found


def held_out(run: Run, encoder: str | None = None) -> dict[str, float]:
    """Reads what a run's own evaluation at its end says; {} where it has diverged or is not finished."""
    ended = report.is_of(run.folder, run.steps) and not diverged(run)
    return measures(run.folder / "evaluation.json", encoder) if ended else {}


def test_files(study: Study, run: Run) -> list[epath.Path]:
    """Lists the files that hold the results of a run on the test split."""
    return [run.folder / "evaluation" / f"{TEST}.{name}.json" for name in study.evaluators]


def tested(study: Study, run: Run, encoder: str | None = None) -> dict[str, float]:
    """Reads the results of a run on the test split; {} where it has not been judged."""
    files = test_files(study, run)
    found: dict[str, float] = {}
    if held_out(run) and all(path.exists() for path in files):
        for path in files:
            found |= measures(path, encoder)
    return found


def trial_values(study: Study, arm: Arm) -> list[float | None]:
    """Gives what each trial has reached on the held-out images; None where it has diverged or is not finished."""
    return [held_out(study.trial(arm, i)).get(study.choose_by) for i in range(len(arm.trials))]


def chosen(study: Study, arm: Arm) -> dict[str, Any] | None:
    """Gives the settings of an arm's best trial, the first of equals; None while trials are to come."""
    if not all(finished(study.trial(arm, i)) for i in range(len(arm.trials))):
        return None
    values = [-math.inf if value is None else value for value in trial_values(study, arm)]
    return arm.trials[values.index(max(values))] if arm.trials else {}


def finals(study: Study, arm: Arm) -> dict[int, Run]:
    """Lists the runs of an arm by their seeds, none while its settings have not been chosen."""
    best = chosen(study, arm)
    return {} if best is None else {seed: study.final(arm, best, seed) for seed in study.seeds}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Gives mean, standard deviation and standard error of the mean; the last two are None for less than two values."""
    several = len(values) > 1
    deviation = statistics.stdev(values) if several else None
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "standard_deviation": deviation,
        "standard_error": deviation / math.sqrt(len(values)) if deviation is not None else None,
    }


def paired(values: Values, baseline: Values) -> dict[str, Any]:
    """Summarises the difference from the baseline over the seeds that both have."""
    return summary([values[seed] - baseline[seed] for seed in values if seed in baseline])


def table(study: Study) -> dict[str, Any]:
    """Collects all that the tables say, as JSON."""
    runs = {name: finals(study, arm) for name, arm in study.arms.items()}
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {
        split: {
            name: {seed: held_out(run) if split == HELD_OUT else tested(study, run) for seed, run in of_arm.items()}
            for name, of_arm in runs.items()
        }
        for split in (HELD_OUT, TEST)
    }
    arms = {}
    for name, arm in study.arms.items():
        values = trial_values(study, arm)
        arms[name] = {
            "trials": [{"settings": s, study.choose_by: v} for s, v in zip(arm.trials, values, strict=True)],
            "chosen": chosen(study, arm),
            "steps": arm.steps,
            "images_seen": arm.images_seen,
            "diverged": {seed: diverged(run) for seed, run in runs[name].items() if diverged(run)},
        }
        for split, by_arm in found.items():
            others = _by_measure(by_arm[study.baseline])
            arms[name][split] = {
                measure: _row(of_seeds)
                | ({"difference": paired(of_seeds, others.get(measure, {}))} if name != study.baseline else {})
                for measure, of_seeds in _by_measure(by_arm[name]).items()
            }
    references: dict[str, dict[str, Any]] = {}
    for split in (HELD_OUT, TEST):
        for encoder in (UNTRAINED, PIXELS):
            read = {
                seed: held_out(run, encoder) if split == HELD_OUT else tested(study, run, encoder)
                for seed, run in runs[study.baseline].items()
            }
            rows = {measure: _row(of_seeds) for measure, of_seeds in _by_measure(read).items()}
            references.setdefault(encoder, {})[split] = rows
    return {"study": study.describe(), "arms": arms, "references": references}


def _row(of_seeds: Values) -> dict[str, Any]:
    return {"values": of_seeds, **summary(list(of_seeds.values()))}


def _by_measure(found: Mapping[int, Mapping[str, float]]) -> dict[str, Values]:
    names = dict.fromkeys(name for of_run in found.values() for name in of_run)
    return {name: {seed: of_run[name] for seed, of_run in found.items() if name in of_run} for name in names}


def as_csv(collected: Mapping[str, Any]) -> str:
    """Writes one line for each arm, split and measure."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    numbers = ("n", "mean", "standard_deviation", "standard_error")
    lines.writerow(["arm", "split", "measure", *numbers, *(f"difference_{name}" for name in numbers)])
    for name, arm in (collected["arms"] | collected["references"]).items():
        for split in (HELD_OUT, TEST):
            for measure, row in arm[split].items():
                difference = row.get("difference", {})
                cells = [*(row[one] for one in numbers), *(difference.get(one) for one in numbers)]
                lines.writerow([name, split, measure, *("" if cell is None else cell for cell in cells)])
    return text.getvalue()


def as_markdown(study: Study, collected: Mapping[str, Any]) -> str:
    """Writes the tables for people: accuracies in %, mean ± standard error, and differences from the baseline."""
    arms, seeds = collected["arms"], len(study.seeds)
    text = [
        f"Mean ± standard error over {seeds} seed{'s' if seeds > 1 else ''}; accuracies in %. In brackets: the mean "
        f"paired difference from {study.baseline}, seed by seed, ± its standard error.",
        "",
        f"Every arm had {study.trials} trials of one seed, chosen by {study.choose_by} on the images held out of the "
        f"training split ({study.splits['held_out']}); training saw {study.splits['train']}. No trial is among the "
        "runs of the tables."
        if study.trials
        else f"Nothing was tuned. Training saw {study.splits['train']}; {study.splits['held_out']} was held out.",
    ]
    if seeds < 3:
        text += ["", "Fewer than three seeds: nothing here is more than a hint."]
    for split, title in (
        (TEST, f"Test split ({study.splits['test']}), judged once, at the end"),
        (HELD_OUT, "Held-out images"),
    ):
        columns = list(dict.fromkeys(measure for arm in arms.values() for measure in arm[split]))
        if not columns:
            text += ["", f"## {title}", "", "Not yet judged." if split == TEST else "No run has finished."]
            continue
        of_training = any(measure.startswith("collapse/") for measure in columns)
        text += [
            "",
            f"## {title}",
            "",
            *(["The columns of collapse describe training images.", ""] if of_training else []),
            "| " + " | ".join(["arm", "n", *columns]) + " |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for name, arm in (arms | collected["references"]).items():
            count = max((row["n"] for row in arm[split].values()), default=0)
            cells = [_cell(arm[split].get(measure), percent=measure in _FRACTIONS) for measure in columns]
            text.append("| " + " | ".join([name, str(count), *cells]) + " |")
    text += [
        "",
        "## Budget",
        "",
        "| arm | trials | chosen | steps | images seen | diverged seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        values = [trial[study.choose_by] for trial in arm["trials"]]
        best = "open" if arm["chosen"] is None else _settings(arm["chosen"])
        tried = ", ".join(
            f"{_settings(trial['settings'])}: {'none' if value is None else f'{100 * value:.1f}'}"
            for trial, value in zip(arm["trials"], values, strict=True)
        )
        cells = [name, tried or "none", best or "nothing to choose", str(arm["steps"]), f"{arm['images_seen']:,}"]
        text.append("| " + " | ".join([*cells, ", ".join(map(str, arm["diverged"])) or "none"]) + " |")
    return "\n".join(text) + "\n"


def _settings(flat: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in flat.items())


def _cell(row: Mapping[str, Any] | None, *, percent: bool) -> str:
    if not row or not row["n"]:
        return ""
    cell, difference = _number(row, percent=percent), row.get("difference")
    return f"{cell} [{_number(difference, percent=percent, sign='+')}]" if difference and difference["n"] else cell


def _number(found: Mapping[str, Any], *, percent: bool, sign: str = "") -> str:
    def form(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.3g}"

    error = found["standard_error"]
    return form(found["mean"], sign) + ("" if error is None else f" ± {form(error)}")


def curves(study: Study, metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gives images seen [p] and values [seeds, p] of a metric, by arm, from the runs that have finished."""
    found = {}
    for name, arm in study.arms.items():
        series = [
            {line["step"]: line[metric] for line in writer.read(run.folder) if metric in line}
            for run in finals(study, arm).values()
            if held_out(run)
        ]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        if steps:
            values = np.array([[one[step] for step in steps] for one in series])
            found[name] = np.array(steps) * arm.batch_size, values
    return found


def write(study: Study) -> None:
    """Writes table.json, table.csv, table.md and the figures into the workdir, from what there is so far."""
    collected, workdir = table(study), study.workdir
    write_whole(workdir / "table.json", json.dumps(collected, indent=1) + "\n")
    write_whole(workdir / "table.csv", as_csv(collected))
    write_whole(workdir / "table.md", as_markdown(study, collected))
    probes = {"kNN on held-out images": "eval/knn", "Linear probe on held-out images": "eval/logistic"}
    signs = {"Std over images": "rep/std", "Effective rank": "rep/rank", "Cosine between images": "rep/cosine"}
    for name, metrics in (("convergence", probes), ("signs_of_collapse", signs)):
        panels = {title: curves(study, metric) for title, metric in metrics.items()}
        if any(panels.values()):
            plots.bands(panels, workdir / f"{name}.png", label="images seen")
    arms = collected["arms"]
    split = TEST if any(arm[TEST] for arm in arms.values()) else HELD_OUT
    bars = {
        f"{measure}, {split.replace('_', ' ')} images": {
            name: list(arm[split][measure]["values"].values()) for name, arm in arms.items() if measure in arm[split]
        }
        for measure in _FRACTIONS
    }
    bars = {title: by_arm for title, by_arm in bars.items() if by_arm}
    if bars:
        plots.bars(bars, workdir / "ablation.png")
    spectra = {}
    for name, arm in study.arms.items():
        paths = [run.folder / "evaluation" / f"{TEST}.collapse.json" for run in finals(study, arm).values()]
        read = [
            next(iter(read_json(path)["results"]["collapse"].values()))["spectrum"] for path in paths if path.exists()
        ]
        if read:
            spectra[name] = np.mean(read, axis=0)
    if spectra:
        plots.spectra(spectra, workdir / "spectrum.png")

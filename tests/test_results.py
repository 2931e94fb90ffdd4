"""What the docs say of studies and single runs is what their raw files in results/ say."""

import functools
import json
import pathlib
import re
import statistics
import tarfile

import pytest
import scipy.stats

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in ROOT.glob("results/*/table.json"))
MEASURES = {"knn": "weighted", "logistic": "all labels"}  # the measure of the table -> that of its evaluator's file


@functools.cache
def files(folder: pathlib.Path) -> dict[str, str]:
    """Reads the raw files of a folder's runs, by their paths."""
    with tarfile.open(folder / "runs.tar.xz") as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive if member.isfile()}


def metrics(folder: pathlib.Path, run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in files(folder)[f"{run}/metrics.jsonl"].splitlines()]


def series(lines: list[dict[str, float]], metric: str) -> list[float]:
    return [line[metric] for line in lines if metric in line]


def judged(folder: pathlib.Path, run: str, measure: str) -> dict[str, dict]:
    """Gives what the evaluator found on the test split, by encoder."""
    return json.loads(files(folder)[f"{run}/evaluation/test.{measure}.json"])["results"][measure]


def path_of(arm: str, seed: int | str) -> str:
    return f"runs/{arm.replace(' ', '_')}/seed{seed}"


def short(value: float, digits: int) -> str:
    """Writes a number below 1 without its 0."""
    return f"{value:.{digits}f}".removeprefix("0")


def lines_of(page: str) -> list[str]:
    return (ROOT / "docs" / f"{page}.md").read_text().splitlines()


def raw(folder: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
    """Reads the accuracies of each run: the last ones of metrics.jsonl, and those on the test split."""
    found = {}
    for name in files(folder):
        if not name.endswith("/metrics.jsonl") or "/seed" not in name:
            continue
        run = name.removesuffix("/metrics.jsonl")
        lines = metrics(folder, run)
        last = [line for line in lines if "eval/knn" in line][-1]
        assert last["step"] == lines[-1]["step"]
        found[run] = {
            "held_out": {measure: last[f"eval/{measure}"] for measure in MEASURES},
            "test": {measure: judged(folder, run, measure)["trained"][key] for measure, key in MEASURES.items()},
        }
    return found


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_a_studys_table_follows_from_its_runs(folder):
    table, runs = json.loads((folder / "table.json").read_text()), raw(folder)
    assert len(runs) == sum(arm["held_out"]["knn"]["n"] for arm in table["arms"].values()) > 0
    for name, arm in table["arms"].items():
        for split in ("held_out", "test"):
            for measure in MEASURES:
                row = arm[split][measure]
                values = {seed: runs[path_of(name, seed)][split][measure] for seed in row["values"]}
                assert row["values"] == pytest.approx(values)
                assert row["mean"] == pytest.approx(statistics.mean(values.values()))
                error = statistics.stdev(values.values()) / len(values) ** 0.5 if len(values) > 1 else None
                assert row["standard_error"] == pytest.approx(error)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_the_docs_show_the_table_as_it_is(folder):
    """They show the first columns of the table about the test split, and table.md is as table.json."""
    written = (folder / "table.md").read_text().split("## ")[1].splitlines()
    rows = [line for line in written if line.startswith("|")]
    docs = lines_of("study")
    assert len(rows) > 5 and not [row for row in rows if "|".join(row.split("|")[:7]) + "|" not in docs]
    for name, arm in json.loads((folder / "table.json").read_text())["arms"].items():
        row = arm["test"]["knn"]
        says = f"| {name} | {row['n']} | {100 * row['mean']:.1f}"
        says += f" ± {100 * row['standard_error']:.1f}" if row["n"] > 1 else ""
        assert any(line.startswith(says) for line in rows), says


def alarms(folder: pathlib.Path, arm: str, seeds: int) -> tuple[int, int]:
    """Counts the seeds of an arm that had an alarm of a collapse at any time, and at the end."""
    ever = last = 0
    for seed in range(seeds):
        found = series(metrics(folder, path_of(arm, seed)), "rep/collapsed")
        ever, last = ever + any(found), last + bool(found[-1])
    return ever, last


def test_the_docs_show_every_seed_of_the_study_of_collapse_on_cifar10():
    """kNN on the test split, seed by seed, and how many seeds had an alarm at any time, and at the end."""
    folder = ROOT / "results" / "collapse_cifar10"
    runs, docs = raw(folder), lines_of("study")
    arms = json.loads((folder / "study.json").read_text())["arms"]
    assert len(arms) == 12 and len(runs) == 60
    for arm in arms:
        knn = ", ".join(f"{100 * runs[path_of(arm, seed)]['test']['knn']:.1f}" for seed in range(5))
        ever, last = alarms(folder, arm, 5)
        assert f"| {arm} | {knn} | {ever} | {last} |" in docs


@pytest.mark.parametrize(
    "study, method, number",
    [
        ("rates_cifar10", "C-JEPA 0.01", 6),
        ("rates_terms_cifar10", "variance and covariance 0.01", 6),
        ("robustness_cifar10", "C-JEPA 0.01", 4),
    ],
)
def test_the_docs_compare_the_methods_with_each_change(study, method, number):
    """The paired differences on the test split, in points, and the alarms of both."""
    folder = ROOT / "results" / study
    table, docs = json.loads((folder / "table.json").read_text())["arms"], lines_of("study")
    plains = [arm for arm in table if arm.startswith("I-JEPA")]
    assert len(plains) == number
    for plain in plains:
        change = plain.removeprefix("I-JEPA")
        regularised = f"{method}{change}"
        cells = [re.sub("^(, )?(rate |momentum )?0?", "", change) or ".98"]
        for measure in MEASURES:
            one, other = (table[arm]["test"][measure]["values"] for arm in (regularised, plain))
            points = [100 * (one[seed] - other[seed]) for seed in other]
            cells.append(f"{statistics.mean(points):+.1f} ± {statistics.stdev(points) / len(points) ** 0.5:.1f}")
        counts = *alarms(folder, plain, 3), *alarms(folder, regularised, 3)
        assert f"| {' | '.join([*cells, *map(str, counts)])} |" in docs


def along_the_way(folder: pathlib.Path, arm: str, measure: str) -> list[list[float]]:
    """Gives what each seed has on held-out images after 20, 50 and 100 % of the images, in %."""
    curves = [series(metrics(folder, path_of(arm, seed)), f"eval/{measure}") for seed in range(3)]
    assert all(len(curve) == 10 for curve in curves)
    return [[100 * curve[at] for curve in curves] for at in (1, 4, 9)]


@pytest.mark.parametrize("study", ["convergence_cifar10", "convergence_tinyimagenet"])
def test_the_docs_compare_the_terms_along_the_way(study):
    """The paired differences from I-JEPA on held-out images, in points."""
    folder = ROOT / "results" / study
    docs = "\n".join(lines_of("study")).partition(f"[study_{study}.py](../configs/study_{study}.py): ")[2]
    docs = docs.partition("\n## ")[0].splitlines()
    for arm in ("variance and covariance", "invariance", "all"):
        cells = [arm]
        for measure in MEASURES:
            for mine, others in zip(*(along_the_way(folder, one, measure) for one in (arm, "I-JEPA")), strict=True):
                points = [value - other for value, other in zip(mine, others, strict=True)]
                cells.append(f"{statistics.mean(points):+.1f} ± {statistics.stdev(points) / len(points) ** 0.5:.1f}")
        assert f"| {' | '.join(cells)} |" in docs, cells


@pytest.mark.parametrize(
    "study, arm, measure, shares, says",
    [
        ("cifar10", "variance and covariance", "knn", [60, 80], "reach I-JEPA's last kNN accuracy after 60 and 80 %"),
        ("tinyimagenet", "all", "knn", [80, 80], "reach I-JEPA's last kNN accuracy after 80 % of the images"),
        ("tinyimagenet", "all", "logistic", [60, 80], "and its last linear probe after 60 and 80 %"),
    ],
)
def test_the_docs_say_when_the_last_accuracy_of_ijepa_is_reached(study, arm, measure, shares, says):
    """After which share of the images, in %, by those seeds that reach it on held-out images."""
    folder, reached = ROOT / "results" / f"convergence_{study}", []
    for seed in range(3):
        mine, others = (series(metrics(folder, path_of(one, seed)), f"eval/{measure}") for one in (arm, "I-JEPA"))
        reached += [10 * at for at, value in enumerate(mine, 1) if value >= others[-1]][:1]
    assert reached == shares
    assert says in " ".join((ROOT / "docs" / "study.md").read_text().split())


def test_the_docs_show_other_methods_along_the_way():
    """Means over seeds on held-out images."""
    folder = ROOT / "results" / "neighbours_cifar10"
    docs = lines_of("study")
    for arm in json.loads((folder / "study.json").read_text())["arms"]:
        cells = [arm]
        for measure in MEASURES:
            cells += [f"{statistics.mean(values):.1f}" for values in along_the_way(folder, arm, measure)]
        assert f"| {' | '.join(cells)} |" in docs, cells


def test_the_docs_compare_the_coefficients_at_each_size():
    """Means over seeds of the points that each coefficient gains over I-JEPA, and of what it leaves between blocks."""
    folder = ROOT / "results" / "coefficient_cifar10"
    table, docs = json.loads((folder / "table.json").read_text())["arms"], lines_of("study")
    seeds = range(len(table["base, I-JEPA"]["test"]["knn"]["values"]))
    assert len(seeds) > 1 and len(raw(folder)) == 22 * len(seeds)

    def invariance(arm: str, seed: int) -> float:
        return series(metrics(folder, path_of(arm, seed)), "loss/invariance")[-1]

    for size in ("base", "width 48", "width 192", "batch 32", "batch 256"):
        plain, gained, left = f"{size}, I-JEPA", [], []
        for weight in (0.01, 0.03, 0.1):
            arm = f"{size}, C-JEPA {weight}"
            means = [[table[one]["test"][measure]["mean"] for one in (arm, plain)] for measure in MEASURES]
            gained.append(" / ".join(f"{100 * (mine - others):+.1f}" for mine, others in means))
            shares = [(invariance(arm, seed) / invariance(plain, seed)) ** 0.5 for seed in seeds]
            left.append(short(statistics.mean(shares), 2))
        assert f"| {size} | {' | '.join(gained + left)} |" in docs, gained + left


def test_the_readmes_sentences_quote_the_studies():
    """Points of kNN on the test split, mean and standard error over seeds."""
    prose = " ".join((ROOT / "README.md").read_text().partition("## Results in short")[2].split())

    def knn(study: str, arm: str) -> dict[str, float]:
        table = json.loads((ROOT / "results" / study / "table.json").read_text())["arms"]
        return {seed: 100 * value for seed, value in table[arm]["test"]["knn"]["values"].items()}

    def said(values) -> str:
        values = list(values)
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"

    def gain(study: str, arm: str, other: str) -> str:
        return said(value - knn(study, other)[seed] for seed, value in knn(study, arm).items())

    def points(study: str, arm: str) -> str:
        return said(knn(study, arm).values())

    low = "robustness_cifar10", "C-JEPA 0.01, momentum 0.9"
    wide = "coefficient_cifar10", "width 192, C-JEPA 0.01", "width 192, I-JEPA"
    plain, regularised = (
        [points("collapse_cifar10", f"{arm}{ema}") for ema in ("", ", no EMA")] for arm in ("I-JEPA", "C-JEPA 0.03")
    )
    digits = [list(knn("collapse_digits", arm).values()) for arm in ("C-JEPA 0.01", "I-JEPA")]
    p = short(scipy.stats.ttest_rel(*digits).pvalue, 2)
    for words in (
        f"I-JEPA reaches {plain[0]} with EMA and {plain[1]} without.",
        f"(`vicreg.weight`) .03 reaches {regularised[0]} with EMA and {regularised[1]} without.",
        f"gains {gain('collapse_digits', 'C-JEPA 0.01', 'I-JEPA')} points (p = {p})",
        f"leads by {gain(*low, 'I-JEPA, momentum 0.9')} points if the [EMA's momentum starts at .9]",
        f"by {gain(*low, 'I-JEPA')} if each method has its better momentum, and by {gain(*wide)} at [twice the width]",
        f"covariance alone reach {points('terms_cifar10', 'variance and covariance 0.03')}, and all three terms "
        f"together reach {points('terms_cifar10', 'C-JEPA 0.03')}.",
        f"reach {points('neighbours_cifar10', 'LeJEPA')} and {points('neighbours_cifar10', 'VICReg')}.",
    ):
        assert words in prose, words


def test_the_page_on_evaluation_shows_a_seed_of_the_study_on_cifar10():
    folder = ROOT / "results" / "convergence_cifar10"
    docs = lines_of("evaluation")
    encoders = {"raw pixels": ("I-JEPA", "raw pixels"), "untrained": ("I-JEPA", "untrained")}
    for title, (arm, encoder) in (encoders | {"I-JEPA": ("I-JEPA", "trained"), "C-JEPA": ("all", "trained")}).items():
        knn, logistic = (judged(folder, path_of(arm, 0), measure)[encoder] for measure in MEASURES)
        cells = [f"{100 * share:.1f}" for share in (knn["weighted"], knn["plain"], logistic["all labels"])]
        few = (logistic["0.01 of labels"], logistic["10 a class"])
        cells += [f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}" for share in few]
        assert f"| {title} | {' | '.join(cells)} |" in docs


# Single runs, of which the pages on results, methods, reliability, fine-tuning and differences have tables


@functools.cache
def single() -> dict[str, tuple[list[dict[str, float]], dict[str, dict]]]:
    """Reads the lines of metrics.jsonl and the evaluation at the end of each single run, by the name of the run."""
    folder, found = ROOT / "results" / "single_runs", {}
    for name in files(folder):
        if name.endswith("/metrics.jsonl"):
            run = name.removesuffix("/metrics.jsonl")
            ended = json.loads(files(folder)[f"{run}/evaluation.json"])["results"]
            found[run.rpartition("/")[2]] = metrics(folder, run), ended
    return found


def accuracies(run: str, encoder: str = "trained") -> list[float]:
    """Gives kNN and linear probe with all labels, and both with ten labels of a class, in %."""
    knn, logistic = (single()[run][1][name][encoder] for name in ("knn", "logistic"))
    found = knn["weighted"], logistic["all labels"], knn["weighted, 10 a class"]["mean"], logistic["10 a class"]["mean"]
    return [100 * value for value in found]


def spread(values) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def last(run: str, metric: str) -> float:
    return series(single()[run][0], metric)[-1]


def over_seeds(title: str, runs: str, encoder: str = "trained") -> str:
    columns = zip(*(accuracies(f"{runs}_{seed}", encoder) for seed in range(3)), strict=True)
    return f"| {title} | {' | '.join(map(spread, columns))} |"


def row_of_results(title: str, runs: str) -> str:
    """Gives the row of four accuracies over the seeds, and what each seed says of collapse."""
    signs = [
        ", ".join(short(last(f"{runs}_{seed}", f"rep/{metric}"), digits) for seed in range(3))
        for metric, digits in (("std", 2), ("rank", 1), ("cosine", 3))
    ]
    return f"{over_seeds(title, runs)} {' | '.join(signs)} |"


def row_of_signs(title: str, run: str) -> str:
    """Gives the lowest and the last value of the signs of collapse, as shares of the first, and when they alarm."""
    lines = [line for line in single()[run][0] if "rep/std" in line]
    signs = [(line["rep/std"], line["rep/rank"], 1 - line["rep/cosine"]) for line in lines]
    shares = [[now / first for now, first in zip(sign, signs[0], strict=True)] for sign in signs]
    cells = [f"{short(min(column), 2)}, {short(column[-1], 2)}" for column in zip(*shares, strict=True)]
    low = [line["step"] for line in lines if line["rep/collapsed"]]
    ends = "from step {} to the end" if low and low[-1] == lines[-1]["step"] else "steps {} to {}"
    return f"| {title} | {' | '.join(cells)} | {ends.format(low[0], low[-1]) if low else 'none'} |"


ARMS = {"C-JEPA": "cjepa", "I-JEPA": "ijepa", "C-JEPA, no EMA": "cjepa_noema", "I-JEPA, no EMA": "ijepa_noema"}
COMMANDS = {
    "vicreg": "vicreg_digits.py",
    "simsiam": "simsiam_digits.py",
    "simsiam_nostop": "simsiam_digits.py --config.simsiam.stop_gradient=False",
    "lejepa": "lejepa_digits.py",
    "sigreg": "sigreg_digits.py",
}


def expected_rows() -> dict[str, list[str]]:
    """Gives the rows of the tables, by the page that has them."""
    baselines = [over_seeds(title, "cjepa", title) for title in ("raw pixels", "untrained")]
    pixels = "| raw pixels | " + " | ".join(f"{value:.1f}" for value in accuracies("cjepa_0", "raw pixels")[:2])
    return {
        "results": [row_of_results(*arm) for arm in ARMS.items()] + [row + " " for row in baselines[1:]],
        "differences": [over_seeds("offset 0", "cjepa_offset0"), over_seeds("offset 1", "cjepa")],
        "reliability": [row_of_signs(title, f"{run}_0") for title, run in ARMS.items()],
        "methods": [
            f"| `python -m cjepa_jax.main --config=configs/{command}` | "
            + " | ".join(f"{value:.1f}" for value in accuracies(run)[:2])
            + f" | {short(last(run, 'rep/std'), 2)} | {last(run, 'rep/rank'):.1f} |"
            for run, command in COMMANDS.items()
        ]
        + [pixels],
        "finetuning": [
            f"| {title} | {100 * last(run, 'eval/top1'):.1f} | {100 * last(run, 'eval/top5'):.1f} | "
            f"{single()[run][1]['accuracy']['parameters']['loss']:.2f} |"
            for title, run in (("from C-JEPA's target encoder", "finetune"), ("from scratch", "scratch"))
        ],
    }


@pytest.mark.parametrize("page", ["results", "differences", "reliability", "methods", "finetuning"])
def test_tables_of_single_runs_say_what_the_runs_say(page):
    docs = lines_of(page)
    assert not [row for row in expected_rows()[page] if not any(line.startswith(row) for line in docs)]

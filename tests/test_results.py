"""What the docs say of a study is what its raw files in results/ say."""

import itertools
import json
import pathlib
import statistics
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in ROOT.glob("results/*/table.json"))
MEASURES = {"knn": "weighted", "logistic": "all labels"}  # the measure of the table -> that of its evaluator's file


def raw(folder: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
    """Reads the accuracies of each run: the last ones of metrics.jsonl, and those on the test split."""
    found = {}
    with tarfile.open(folder / "runs.tar.xz") as archive:
        files = {member.name: member for member in archive if member.isfile()}

        def read(name: str) -> str:
            return archive.extractfile(files[name]).read().decode()

        for name in files:
            if not name.endswith("/metrics.jsonl") or "/seed" not in name:
                continue
            run = name.removesuffix("/metrics.jsonl")
            lines = [json.loads(line) for line in read(name).splitlines()]
            last = [line for line in lines if "eval/knn" in line][-1]
            assert last["step"] == lines[-1]["step"]
            found[run] = {"held_out": {measure: last[f"eval/{measure}"] for measure in MEASURES}, "test": {}}
            for measure, key in MEASURES.items():
                judged = json.loads(read(f"{run}/evaluation/test.{measure}.json"))["results"][measure]
                found[run]["test"][measure] = judged["trained"][key]
    return found


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_a_studys_table_follows_from_its_runs(folder):
    table, runs = json.loads((folder / "table.json").read_text()), raw(folder)
    assert len(runs) == sum(arm["held_out"]["knn"]["n"] for arm in table["arms"].values()) > 0
    for name, arm in table["arms"].items():
        for split in ("held_out", "test"):
            for measure in MEASURES:
                row = arm[split][measure]
                values = {
                    seed: runs[f"runs/{name.replace(' ', '_')}/seed{seed}"][split][measure] for seed in row["values"]
                }
                assert row["values"] == pytest.approx(values)
                assert row["mean"] == pytest.approx(statistics.mean(values.values()))
                error = statistics.stdev(values.values()) / len(values) ** 0.5
                assert row["standard_error"] == pytest.approx(error)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_the_docs_show_the_table_as_it_is(folder):
    """They show the first columns of the table about the test split, and table.md is as table.json."""
    written = (folder / "table.md").read_text().split("## ")[1].splitlines()
    rows = [line for line in written if line.startswith("|")]
    docs = (ROOT / "docs" / "study.md").read_text().splitlines()
    assert len(rows) > 5 and not [row for row in rows if "|".join(row.split("|")[:7]) + "|" not in docs]
    for name, arm in json.loads((folder / "table.json").read_text())["arms"].items():
        row = arm["test"]["knn"]
        says = f"| {name} | {row['n']} | {100 * row['mean']:.1f} ± {100 * row['standard_error']:.1f}"
        assert any(line.startswith(says) for line in rows), says


def test_the_readme_quotes_the_study():
    table = (ROOT / "results" / "collapse_digits" / "table.md").read_text().split("## ")[1].splitlines()
    cells = {row.split("|")[1].strip(): row.split("|")[3:7] for row in table if row.startswith("|")}
    short = (ROOT / "README.md").read_text().partition("## Results in short")[2].splitlines()
    rows = [row.split("|")[1:-1] for row in short if row.startswith("| ") and "±" in row]
    assert len(rows) == 5
    for name, *quoted in rows:
        knn, logistic, _, rank = cells[name.strip().replace(", coefficient .", " 0.")]
        for said, whole in zip(quoted, (knn, logistic, rank), strict=True):
            assert (
                whole.strip().startswith(said.strip()[:3]) and said.strip() in f"{whole} {float(whole.split()[0]):.1f}"
            )


def test_the_page_on_evaluation_shows_a_seed_of_the_study_on_cifar10():
    found = {}
    with tarfile.open(ROOT / "results" / "convergence_cifar10" / "runs.tar.xz") as archive:
        for arm, measure in itertools.product(("I-JEPA", "all"), MEASURES):
            text = archive.extractfile(f"runs/{arm}/seed0/evaluation/test.{measure}.json").read()
            found[arm, measure] = json.loads(text)["results"][measure]
    page = (ROOT / "docs" / "evaluation.md").read_text().splitlines()
    encoders = {"raw pixels": ("I-JEPA", "raw pixels"), "untrained": ("I-JEPA", "untrained")}
    for title, (arm, encoder) in (encoders | {"I-JEPA": ("I-JEPA", "trained"), "C-JEPA": ("all", "trained")}).items():
        knn, logistic = (found[arm, measure][encoder] for measure in MEASURES)
        cells = [f"{100 * share:.1f}" for share in (knn["weighted"], knn["plain"], logistic["all labels"])]
        few = (logistic["0.01 of labels"], logistic["10 a class"])
        cells += [f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}" for share in few]
        assert f"| {title} | {' | '.join(cells)} |" in page

"""README.md and docs/: links resolve, and every command is executed, or parsed by the program that it names.

What stands behind the language of a code block says how its commands are checked; docs/development.md explains it.
"""

import ast
import os
import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest

from cjepa_jax.evaluate.config import Evaluation
from cjepa_jax.methods import METHODS
from cjepa_jax.settings import keys
from tests import commands

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
BLOCK = re.compile(r"^```(\w*) ?(.*)\n((?s:.*?))^```$", re.MULTILINE)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NEEDS = {"checkpoint", "cloud", "data", "gpu", "libtpu", "network", "time", "tpu"}
STAND_INS = {"CONFIG": "configs/vitb16.py", "SLICE": "v5e:8x8", "FORMAT": "timm", "N": "0"}
OF_OTHERS = {"pip", "gcloud", "git", "export"}  # programs whose arguments are not ours to check
TAKE_CONFIG = {
    "cjepa_jax.main",
    "cjepa_jax.finetune",
    "cjepa_jax.compile",
    "cjepa_jax.evaluate",
    "cjepa_jax.bench.step",
}


def blocks() -> list[tuple[str, str, str, str]]:
    """The page, language, mark and text of each code block."""
    return [(page, *match) for page, text in PAGES.items() for match in BLOCK.findall(text)]


def command_lines(text: str) -> list[list[str]]:
    """The words of each command line of a block, with values in place of placeholders."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    placeholder = re.compile(r"(?<==)[A-Z]+$")
    return [
        [placeholder.sub(lambda match: STAND_INS.get(match[0], match[0]), word) for word in words]
        for words in found
        if words
    ]


def prose_of(text: str) -> str:
    """The page without its code blocks."""
    return BLOCK.sub("", text)


def all_commands() -> list:
    """The mark and words of every command line of the pages, in blocks and, without a mark, in the prose."""
    found = [
        (page, mark, words)
        for page, language, mark, text in blocks()
        if language == "bash"
        for words in command_lines(text)
    ]
    for page, text in PAGES.items():
        inline = re.findall(r"`(python -m cjepa_jax[^`]*)`", prose_of(text))
        found += [(page, "", words) for code in inline for words in command_lines(code)]
    return [pytest.param(mark, words, id=f"{page}: {' '.join(words)}") for page, mark, words in found]


def test_every_block_says_how_it_is_checked():
    for page, language, mark, text in blocks():
        if language == "text":
            continue
        assert language in ("bash", "python"), f"{page}: a block without a language: {text}"
        name, _, value = mark.partition("=")
        if name == "tested":
            file, _, test = value.partition("::")
            functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
            assert test in functions, f"{page}: {value} does not exist"
        elif name == "needs":
            assert set(value.split(",")) <= NEEDS, f"{page}: {mark}"
        else:
            assert mark == "run", f"{page}: a block does not say how it is checked: {text}"


@pytest.mark.parametrize("mark, words", all_commands())
def test_command(mark, words):
    if words[0] in OF_OTHERS:
        assert mark.startswith("needs=")
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0].startswith("cjepa-"):
        module, _, _ = SCRIPTS[words[0]].partition(":")
        check_own(module.removesuffix(".__main__"), words[1:], mark)
    elif words[0] == "launch/tpu_vm.sh":
        variables = {"PROJECT": "p", "ZONE": "z", "WORKDIR": "gs://bucket/run"}
        subprocess.run(["bash", *words, "--dry-run"], cwd=ROOT, env=os.environ | variables, check=True, timeout=20)
    elif words[2] == "pytest":
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    else:
        assert words[1] == "-m" and words[0].endswith("python")
        check_own(words[2], words[3:], mark)


def check_own(module: str, arguments: list[str], mark: str) -> None:
    """Checks flags and settings of a command of this package: after them, --help only prints."""
    given = [] if mark == "run" else ["--help"]
    if module == "cjepa_jax.evaluate" and given:
        given.append("--config=configs/evaluate.py")
        methods = [word.partition("=")[2] for word in arguments if word.startswith("--method=")]
        assert set(",".join(methods).split(",")) <= Evaluation().evaluators.keys() | {""}
    done = commands.run(module, *arguments, *given)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert len(said) > 100
    if module not in TAKE_CONFIG:  # these print their help before they look at other flags
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert all(re.search(rf"{flag}\b", said) for flag in flags), said


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_the_prose_exist(page):
    known = {
        name
        for cls in (*(method.settings for method in METHODS.values()), Evaluation)
        for key in keys(cls)
        for name in (key.name, key.formerly)
        if name
    }
    groups = {name.partition(".")[0] for name in known}
    for code in re.findall(r"`([^`]*)`", prose_of(PAGES[page])):
        for group, key in re.findall(r"(?:^|--config\.)([a-z]+)\.([a-z_0-9]+)(?==|$| )", code):
            assert group not in groups or key == "py" or f"{group}.{key}" in known, f"{page}: {group}.{key}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)]*)\)", prose_of(PAGES[page])):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < 200


def test_every_page_is_in_the_readme_and_every_config_on_a_page():
    assert all(f"({page})" in PAGES["README.md"] for page in PAGES if page != "README.md")
    text = "".join(PAGES.values())
    assert [path.name for path in ROOT.glob("configs/*.py") if f"configs/{path.name}" not in text] == []

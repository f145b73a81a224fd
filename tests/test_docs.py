"""The pages: what they name exists, their worked examples run, the site builds strictly and needs no network."""

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import doc_blocks
from doc_blocks import PAGES, ROOT
from espalier import conf
from espalier.cli import app
from espalier.workflow.sweep import Composer, points

BLOCKS = [block for page in PAGES for block in doc_blocks.blocks(page)]
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
COMMANDS = typer.main.get_command(app).commands
PLACEHOLDER = re.compile(r"[A-Z]{2,}|\.\.\.|\*")  # NAME, ORG/NAME@COMMIT, conf/paper/*.csv
CREATED = {word for block in BLOCKS for word in re.findall(r"conf/[\w/]+\.\w+", block.text) if block.language == "sh"}
CREATED |= {block.path for block in BLOCKS if block.path}


def prose(page):
    """The page without its fenced blocks."""
    return doc_blocks.FENCE.sub("", (ROOT / page).read_text())


def command_lines():
    """(where, words) of every espalier command of the pages: in blocks, shown ones apart, and between backticks."""
    lines = [(b.where, line) for b in BLOCKS if b.language == "sh" for line in b.text.splitlines()]
    lines += [(page, code) for page in PAGES for code in re.findall(r"`(espalier [^`]+)`", prose(page))]
    for where, line in lines:
        found = re.match(r"(?:\.venv/bin/)?espalier (.*)", line)
        if found:
            yield where, shlex.split(re.sub(r"\$\([^)]*\)*", "ID", found[1]), comments=True)


def exists(group, name):
    made = f"conf/{group}/{name}.yaml" in CREATED
    return name in conf.names(group) or made or PLACEHOLDER.search(name)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    for block in doc_blocks.blocks(page):
        known = f"write one of {doc_blocks.LANGUAGES} behind the backticks; tests/doc_blocks.py says what each is for"
        assert block.language in doc_blocks.LANGUAGES, f"{block.where}: {block.language!r}: {known}"
        assert not block.mark or doc_blocks.MARK.fullmatch(block.mark), f"{block.where}: <!-- {block.mark} -->"


def test_every_command_and_option_exists():
    checked = 0
    for where, words in command_lines():
        if words[0].startswith("-"):
            words = ["run", *words]  # of the program itself; --help and --version stand in every command's list below
        name = words[0]
        if PLACEHOLDER.search(name):
            continue
        assert name in COMMANDS, f"{where}: no command `espalier {name}`"
        options = {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)}
        for word in words[1:]:
            option = word.partition("=")[0]
            if option.startswith("-") and not option[1:2].isdigit():
                assert option in {*options, "--help", "-h", "--debug", "--version"}, f"{where}: {name} has no {option}"
        checked += 1
    assert checked > 30


def test_names_of_configurations_exist():
    for where, words in command_lines():
        if words[0] == "run" and not words[1].startswith("-"):
            assert exists("experiment", words[1]), f"{where}: no experiment {words[1]}"
        named = dict(itertools.pairwise(words))
        for option, group in (("--method", "method"), ("--then", "method"), ("--hardware", "hardware")):
            assert exists(group, named.get(option, "NONE")), f"{where}: no {group} {named[option]}"
        for profile in [named["--profile"]] if "--profile" in named else []:
            assert (ROOT / "workflow/profiles" / profile).is_dir(), f"{where}: no profile {profile}"
    for page in PAGES:
        text = (ROOT / page).read_text()
        for group, name in re.findall(r"\bconf/(\w+)/(\w+)\.yaml", text):
            assert exists(group, name), f"{page}: no conf/{group}/{name}.yaml"
        for group, name in re.findall(r"`(tuning|speed|kernel|evaluation)[:=] ?(\w+)`", prose(page)):
            assert exists(group, name), f"{page}: no {group} {name}"


def test_keys_and_files_exist():
    keys = {group: set() for group in GROUPS}
    for group in GROUPS:
        for name in conf.names(group):
            loaded = conf.load(group, name)
            keys[group] |= set(loaded) | {str(d).split("@")[-1].split("'")[0] for d in loaded.get("defaults", ())}
    for page in PAGES:
        text = prose(page)
        for group, key in re.findall(r"`(runtime|evaluation|calibration|tuning|speed|tracking)\.(\w+)[=`]", text):
            assert key in keys[group] | {"json"}, f"{page}: conf/{group} has no key {key}"
        for path in re.findall(r"`((?:src|conf|tests|docs|benchmarks|workflow)/[\w./-]+\w)`", text):
            made = any(f"{other}/".startswith(f"{path}/") for other in CREATED)
            assert made or (ROOT / path).exists() or PLACEHOLDER.search(path), f"{page}: no {path}"
        for name in re.findall(r"`(\w+\.py)`", text):
            assert [*(ROOT / "src").rglob(name), *(ROOT / "tests").glob(name)], f"{page}: no {name}"
        for path in re.findall(r"`python3? ([\w/]+\.py)", text):
            assert (ROOT / path).exists(), f"{page}: no {path}"
        targets = (ROOT / "Makefile").read_text()
        for target in re.findall(r"`make (\w+)`", text):
            assert re.search(rf"^{target}:", targets, re.M), f"{page}: no target {target}"


def test_experiments_that_pages_run_compose():
    asked = {
        tuple(words[1:]) for _, words in command_lines() if words[0] == "run" and words[1] in conf.names("experiment")
    }
    composed = {(words[0], *(w for w in words[1:] if re.match(r"[\w.@+]+=", w))) for words in asked}
    composed = {words for words in composed if "gate_sum" not in str(words)}  # which a page adds
    assert len(composed) >= 5
    for name, *overrides in sorted(composed):
        composer = Composer(name, overrides)
        assert composer.compose({})
        assert len(list(points(composer.sweep()))) > 1


def test_a_failing_command_of_a_page_fails_the_walk(tmp_path):
    page = "```sh\necho one\n```\n\n```python\nprint('two')\n```\n\n<!-- not run: never -->\n```sh\nexit 3\n```\n"

    def walk(text):
        script = doc_blocks.script(doc_blocks.blocks("docs/page.md", text))
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout.split("\n")

    assert walk(page) == (0, ["== docs/page.md:2", "one", "== docs/page.md:6", "two", ""])
    for block in ("```sh\nfalse | cat\necho three\n```\n", "```python\nraise SystemExit(1)\n```\n"):
        code, lines = walk(page + "\n" + block + "\n```sh\necho four\n```\n")
        assert code == 1
        assert lines[-2] == "== docs/page.md:15"
    dry = doc_blocks.blocks("p", "<!-- dry: an hour -->\n```sh\nespalier run x seeds=[0]   # long\n```\n")[0]
    assert dry.script() == "espalier run x seeds=[0] -n\n"
    dry = doc_blocks.blocks("p", "<!-- dry: a cluster -->\n```sh\n.venv/bin/espalier run x 'a=$B'\n```\n")[0]
    assert dry.script() == ".venv/bin/espalier run x 'a=$B' -n\n"
    assert doc_blocks.blocks("p", "```yaml\n# conf/a/b.yaml\nx: 1\n```\n")[0].path == "conf/a/b.yaml"


@pytest.fixture
def copy(tmp_path):
    """A copy of the project."""
    for name in ("src", "conf", "workflow", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "environment.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def read(copy, *pages):
    """Run the pages' blocks in the copy, but slow ones, as its reader would, and return what they print."""
    chosen = [block for page in pages for block in doc_blocks.blocks(page) if block.mark != "slow"]
    paths = {"PYTHONPATH": str(copy / "src"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # The command line of the environment that runs the tests, on the copy's code.
    script = 'espalier() { python -m espalier "$@"; }\n' + doc_blocks.script(chosen)
    done = subprocess.run(["bash", "-c", script], cwd=copy, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_add_a_method(copy):
    said = read(copy, "docs/add_a_method.md")
    assert re.search(r"^Job \d+: plan [0-9a-f]{12}: gate_sum 25 %", said, re.M)
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", "gate_sum"]
    tests = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert tests.returncode == 0, tests.stdout
    assert int(re.search(r"(\d+) passed", tests.stdout).group(1)) > 5


def test_add_a_family(copy):
    assert "flex_olmo" not in {path.stem for path in (ROOT / "src/espalier/families").glob("*.py")}
    said = read(copy, "docs/add_a_family.md")
    assert "stock transformers" in said
    assert yaml.safe_load((copy / "smaller-flex-olmo/config.json").read_text())["num_experts"] == 6


@pytest.mark.slow
def test_add_a_task_and_a_table(copy):
    read(copy, "docs/add_a_task.md", "docs/add_a_table.md")
    table = (copy / "results/refs/brackets/table.md").read_text()
    assert re.search(r"^\| full +\| +100\.0 \| +40\.0 \|$", table, re.M), table  # as the page says
    table = (copy / "results/refs/first_table/table.md").read_text()
    for whose, value in (("ours .*", r"40\.0 .*"), ("paper", r"44\.7"), ("ours - paper", r"-4\.7")):
        assert re.search(rf"^\| full +\| +{whose} \| +{value} \|$", table, re.M), table  # as the page says


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, built as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_needs_no_network(site):
    pages = sorted(site.glob("*.html"))
    assert {page.stem for page in pages} >= {Path(page).stem for page in PAGES} - {"README"}
    for page in pages:
        loaded = re.findall(
            r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)", page.read_text()
        )
        assert loaded
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet
    assert not list(site.rglob("*.py"))


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = re.findall(r"[\w-]+\.md", str(config["nav"]))
    assert sorted(named) == sorted(Path(page).name for page in PAGES if page != "README.md")


def module(name):
    """A script of docs/, loaded."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_diagrams_are_what_their_script_draws():
    diagrams = module("diagrams")
    for name in ("pipeline", "block"):
        assert (ROOT / f"docs/{name}.svg").read_text() == getattr(diagrams, name)(), "run `python docs/diagrams.py`"


def test_readme_shows_the_chosen_rows_of_the_results():
    publish = module("publish")
    results = (ROOT / "docs/results.md").read_text()
    head = publish.head(re.search(r"<!-- results:begin -->\n(.*?)\n### ", results, re.S)[1])
    assert [line.split("|")[1].strip() for line in head.splitlines()[2:]] == list(publish.ROWS)
    readme = (ROOT / "README.md").read_text()
    assert readme.index(head) < 6000, "README.md's first screen: the table comes early"


def test_citation_names_every_paper_of_a_method():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license", "type"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= set(reference), reference
        for author in reference["authors"]:
            assert set(author) <= {"family-names", "given-names", "name", "name-particle"}, author
            assert author.get("family-names") or author.get("name"), author
    cited = set(re.findall(r"\d{4}\.\d{5}", (ROOT / "CITATION.cff").read_text()))
    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", text))
    docstrings = {
        paper
        for name in conf.names("method")
        if name != "none"
        for paper in re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / f"src/espalier/methods/{name}.py").read_text()[:400])
    }
    assert shown | docstrings <= cited, (shown | docstrings) - cited


def test_every_file_format_is_described():
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    written = set(re.findall(r"espalier\.[a-z_]+/\d", sources))
    described = set(re.findall(r"espalier\.[a-z_]+/\d", (ROOT / "docs/file_formats.md").read_text()))
    assert written == described

"""Every command of README.md and CONTRIBUTING.md works, or is named here with what else runs it."""

import re
import shlex
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]

# Commands that some other check runs: a text in a file that must be there.
ELSEWHERE = {
    "python -m pip install -e . && python -m lenet_sweep lr=0.1,0.5,0.9 -m": (".ci/run", None),
    "python -m pip install -e '.[test]' && python -m pytest": (".ci/run", None),
    "python -m pip install -e '.[dev]'": (".ci/run", "pip install -e '.[dev]'"),
    "python -m venv .venv && source .venv/bin/activate": (".ci/run", "-m venv"),
    "pre-commit install": (".ci/run", "pre-commit validate-config"),
    "python -m lenet_sweep +debug=fast": ("tests/test_sweep.py", "test_debug_preset_does_what_it_says"),
    "python -m lenet_sweep +debug=overfit": ("tests/test_sweep.py", "test_debug_preset_does_what_it_says"),
    "python -m lenet_sweep +debug=profile": ("tests/test_sweep.py", "test_debug_preset_does_what_it_says"),
    "python -m lenet_sweep data": ("tests/test_sources.py", "test_torchvision_reads_what_was_fetched"),
    "python -m lenet_sweep reproduce RUN": ("tests/test_reproduce.py", "test_finished_run_is_reproduced"),
    "python -m lenet_sweep reproduce RUN lr=0.3": (
        "tests/test_reproduce.py",
        "test_override_makes_a_variant",
    ),
    "python -m lenet_sweep compare": ("tests/test_compare.py", "test_no_name_is_the_latest_sweep"),
    "python -m lenet_sweep compare SWEEP OTHER --by model lr --metric val/acc": (
        "tests/test_compare.py",
        "test_commands_of_the_readme_work",
    ),
    """python -m lenet_sweep compare --filter "params.lr = '0.1'" --csv table.csv --json table.json""": (
        "tests/test_compare.py",
        "test_filter_is_mlflows",
    ),
    "python -m lenet_sweep compare SWEEP --html report.html --figures figures": (
        "tests/test_compare.py",
        "test_commands_of_the_readme_work",
    ),
    "python -m lenet_sweep predict RUN shoe.jpg shirt.png --activations activations.png": (
        "tests/test_predict.py",
        "test_predict_tells_the_networks_probabilities",
    ),
    "python -m lenet_sweep predict RUN --ood ood.png": (
        "tests/test_predict.py",
        "test_out_of_distribution_images_are_compared",
    ),
    "python -m lenet_sweep ui": ("tests/test_ui.py", "test_saved_view_shows_the_sweeps_runs_and_curves"),
    "python -m lenet_sweep sync": ("tests/test_faults.py", "test_server_that_dies_in_the_middle"),
    "python -m lenet_sweep tracking=server tracking.uri=http://127.0.0.1:5000": (
        "tests/test_run.py",
        "test_training_goes_on_when_the_server_dies",
    ),
}

SMALL = ("data=fashion_mnist_mini", "epochs=1", "data.train_size=300", "threads=1")


def commands(document):
    text = (CHECKOUT / document).read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (line.partition("  #")[0].rstrip() for line in block.splitlines())


COMMANDS = [*commands("README.md"), *commands("CONTRIBUTING.md")]
HERE = [command for command in COMMANDS if command not in ELSEWHERE]


def test_readme_opens_with_the_two_commands_of_a_newcomer():
    assert COMMANDS[:2] == list(ELSEWHERE)[:2]
    before = (CHECKOUT / "README.md").read_text().partition("```")[0]
    assert len(before.splitlines()) <= 2  # its title


@pytest.mark.parametrize("command", ELSEWHERE)
def test_command_that_is_run_elsewhere_is_run_there(command):
    assert command in COMMANDS
    file, text = ELSEWHERE[command]
    assert (text or command) in (CHECKOUT / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_other_command_works_on_a_few_pictures(command_in, tmp_path):
    """On few pictures, for one epoch, untracked; a sweep of many runs is planned and not trained."""

    def run(number, command):
        program, arguments = shlex.split(command)[:3], shlex.split(command)[3:]
        assert program == ["python", "-m", "lenet_sweep"], command
        small = (*SMALL, "tracking=none", *(["sweep.dry_run=true"] if "-m" in arguments else []))
        first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        folder = tmp_path / str(number)
        folder.mkdir()
        return command_in(folder, *arguments[:first_flag], *small, *arguments[first_flag:])

    done = {command: run(number, command) for number, command in enumerate(HERE)}
    assert {command: it.stderr for command, it in done.items() if it.returncode} == {}
    assert len(done) > 8


def test_documents_name_only_files_that_exist():
    for document in (CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *(CHECKOUT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), f"{document}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in [title.lower().replace(" ", "-") for title in titles], target

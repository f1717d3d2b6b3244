"""What the program tells users to type can be pasted into a shell."""

import shlex
from pathlib import Path

from evaluators.runtimes.remote.connection import Address
from search.cli import run
from search.config.command_lines import command_line
from search.tracking.model_registry import Registered
from search.tracking.store import VARIABLE, Tracking


def test_a_command_keeps_its_words_and_names_its_search() -> None:
    words = ("pick", "--budget", "latency<5ms", "--out", "my deploy/")
    there = Path("my runs") / "one's"
    assert shlex.split(command_line(*words)) == ["python", "-m", "search", *words]
    search = ["--search", "one's", "--runs", "my runs"]
    assert shlex.split(command_line(*words, search=there)) == ["python", "-m", "search", *words, *search]
    assert command_line("ui", search=Path("runs/one")) == "python -m search ui --search one"


def test_a_store_in_a_folder_with_a_space_is_served() -> None:
    store = Tracking("sqlite:////home/me/my runs/mlflow.db", None)
    first, *words = shlex.split(Registered("net", "1", store).serve)
    assert first == f"{VARIABLE}={store.uri}"
    assert words[:4] == ["mlflow", "models", "serve", "-m"]


def test_a_board_is_reached_by_hand_on_its_port_and_with_its_python() -> None:
    address = Address.parse("ssh://me@board:2222?python=/opt/my env/bin/python")
    *ssh, python, option = shlex.split(address.by_hand(address.python, "--version"))
    assert ssh == ["ssh", "-p", "2222", "me@board"]
    assert shlex.split(f"{python} {option}") == ["/opt/my env/bin/python", "--version"], (
        "the board's shell splits again"
    )
    assert Address.parse("ssh://board").by_hand() == "ssh board"


def test_a_new_study_in_a_folder_with_a_space_is_searched(tmp_path, capsys) -> None:
    assert run(["init", str(tmp_path / "my study")]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command)[3:] == ["--study", str(tmp_path / "my study" / "study.toml")]

"""A fixed number of command lines of tests/fuzz_commands.py, and that it sees what is wrong. Run:
python -m pytest tests/test_fuzz_commands.py"""

import sys

import pytest

from tests.fuzz_commands import LAST_FILES, fuzz, make_ground, problem_of


@pytest.mark.parametrize("seed", [0, 1])
def test_command_lines_without_sense_end_in_one_line(seed):
    found, number = fuzz(seed, list(LAST_FILES), count=75)
    assert number == 75 and not found, "\n".join(map("\n".join, found))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("raise ValueError('what?')", "ValueError: what?"),
        ("raise UserError('no remedy')", "not one line with a remedy"),
        ("raise UserError('one — give\\nanother')", "not one line with a remedy"),
        ("pass", "status 0 without its last file"),
        ("open('metrics.json', 'w'); raise UserError('late — give it up')", "a last file"),
        ("open('x', 'w'); raise UserError('--depth 0 — give more')", "files after an error"),
        ("open(sys.argv[2], 'w'); raise UserError('x — y')", "it changed what it was given"),
        ("raise SystemExit(3)", "status 3"),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch, broken, said):
    import evaluate
    from lib.files import UserError

    (tmp_path / "ground").mkdir()
    (tmp_path / "ground" / "run").write_text("q1 7 1\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(
        evaluate, "main", lambda: exec(broken, {"UserError": UserError, "sys": sys})
    )
    words = ["--run", str(tmp_path / "ground" / "run")]
    assert said in problem_of("evaluate", words, tmp_path / "ground", 20)


def test_the_commands_that_are_spoilt_work_before(tmp_path, monkeypatch):
    """Else every command would fail at once, and the fuzzer would try nothing."""
    from tests.fuzz_commands import COMMANDS

    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [])
    make_ground(tmp_path / "ground")
    for name in ("evaluate", "mine_negatives", "encode"):
        for number, command in enumerate(COMMANDS[name]):
            words = [
                str(tmp_path / "ground" / w) if (tmp_path / "ground" / w).exists() else w
                for w in command.split()
            ]
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            monkeypatch.chdir(folder)
            words += ["--output_dir", "out"]
            assert problem_of(name, words, tmp_path / "ground", 20) is None
            assert (folder / "out" / "args.json").is_file()

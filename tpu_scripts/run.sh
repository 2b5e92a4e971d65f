#!/usr/bin/env bash
# Starts `raft-jax run` on every worker of a slice, detached from the connection, or stops it.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: run.sh --name NAME --zone ZONE --project PROJECT CONFIG run_dir=/PATH [OVERRIDE...]
       run.sh --name NAME --zone ZONE --project PROJECT --stop

Starts raft-jax run CONFIG OVERRIDES on every worker and returns; the run goes on when the connection or this
machine goes away. CONFIG is a path inside the copied source. run_dir must be an absolute path, and on a slice
of several workers one that they share: $mount_point/ANYTHING after setup.sh --storage. Costs nothing beyond
the slice.

Each worker's output is in its ~/raft_jax/run.log, and after at most a minute also in
run_dir/logs/worker-N.log, which outlives the slice.

  --log-seconds N      (LOG_SECONDS)   how often the log is copied there; 60 where not given
  --stop               end the run on every worker: SIGTERM, on which it saves; waits until it has ended
                       everywhere and says how. Exit code 1 where a worker had to be killed
  --stop-seconds N     (STOP_SECONDS)  how long saving may take, and then SIGKILL; 300 where not given
$common_help
END
}

stop=0
STOP_SECONDS=${STOP_SECONDS:-300}
LOG_SECONDS=${LOG_SECONDS:-}
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --stop) stop=1; taken=1 ;;
    --stop-seconds) taken=2; need_value "$@"; STOP_SECONDS=$2 ;;
    --log-seconds) taken=2; need_value "$@"; LOG_SECONDS=$2 ;;
    *) take_setting "$@" ;;
  esac
  ((taken)) || break
  shift "$taken"
done
require NAME ZONE PROJECT
[[ $STOP_SECONDS =~ ^[1-9][0-9]*$ ]] || fail "--stop-seconds $STOP_SECONDS is not a number of seconds"
[[ $LOG_SECONDS =~ ^([0-9]+\.?[0-9]*)?$ ]] || fail "--log-seconds $LOG_SECONDS is not a number of seconds"
if ((stop)); then
  (($# == 0)) || fail "--stop takes no config"
  say "Waits for at most $STOP_SECONDS seconds."
  on_workers all "bash $worker_script stop $STOP_SECONDS asked"
  say "Ended on every worker. The slice is billed until delete.sh."
  exit
fi

check_run "$@"
if ((dry_run)); then
  say "are all workers set up and idle, and do they share the disk of run_dir?"
  on_workers all "$(status_command "$run_dir")"
else
  read_report "$run_dir"
  if grep -q ' not-set-up ' <<<"$report"; then
    fail "not every worker is set up; run setup.sh"
  elif grep -q ' running ' <<<"$report"; then
    fail "a run is going on; follow it with logs.sh, end it with run.sh --stop"
  elif (($(wc -l <<<"$report") > 1)) && grep -q ' local$' <<<"$report"; then
    fail "run_dir=$run_dir is on a disk that the workers do not share; mount one with setup.sh --storage"
  fi
fi

start="${LOG_SECONDS:+LOG_SECONDS=$LOG_SECONDS }bash $worker_script start $(quote_all "$@")"
if on_workers all "$start"; then
  say "Started. Follow it with logs.sh; the slice is billed until delete.sh."
else
  code=$?
  printf '%s: a worker did not start; stopping the others\n' "$program" >&2
  on_workers all "bash $worker_script stop $STOP_SECONDS" || true
  exit "$code"
fi

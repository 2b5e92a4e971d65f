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

  --stop               end the run on every worker: SIGTERM, and SIGKILL after two minutes
$common_help
END
}

stop=0
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --stop) stop=1; taken=1 ;;
    *) take_setting "$@" ;;
  esac
  ((taken)) || break
  shift "$taken"
done
require NAME ZONE PROJECT
if ((stop)); then
  (($# == 0)) || fail "--stop takes no config"
  on_workers all "bash $worker_script stop"
  exit
fi

(($#)) || fail "missing: CONFIG, such as configs/llama-3.2-3b.yaml; see $program --help"
config=$1
shift
run_dir=''
for override in "$@"; do
  case $override in
    run_dir=*) run_dir=${override#run_dir=} ;;
    *=*) ;;
    *) fail "$override is not an override; expected KEY=VALUE" ;;
  esac
done
case $run_dir in
  '') fail "missing: run_dir=/PATH; a run folder on the workers' own disks is lost with the slice" ;;
  gs://*)
    fail "run_dir=$run_dir: the run folder is a path; mount the bucket with setup.sh --storage gs://BUCKET" \
      "and give run_dir=$mount_point/NAME"
    ;;
  /*) ;;
  *) fail "run_dir=$run_dir is not an absolute path; expected something like $mount_point/NAME" ;;
esac

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

start="bash $worker_script start $(quote_all "$config" "$@")"
if on_workers all "$start"; then
  say "Started. Follow it with logs.sh; the slice is billed until delete.sh."
else
  code=$?
  printf '%s: a worker did not start; stopping the others\n' "$program" >&2
  on_workers all "bash $worker_script stop"
  exit "$code"
fi

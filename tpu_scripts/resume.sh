#!/usr/bin/env bash
# Makes a run go on: after a crash on the same slice, after a pre-emption on a new one.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: resume.sh (the settings of create.sh and setup.sh) CONFIG run_dir=/PATH [OVERRIDE...]

Gives raft-jax the same command again; it goes on where it stopped. Where the slice is gone (pre-empted,
failed, deleted) it is requested anew, after asking, and set up; where it is still in the queue, it is waited
for. Where the run is going on, or has ended with exit code 0, on every worker nothing happens; where it is
left on some only, it is stopped there first. A slice that has to be requested costs what create.sh costs.

  --accelerator TYPE   (ACCELERATOR)      as in create.sh, and so are
  --runtime-version V  (RUNTIME_VERSION)
  --spot               (SPOT=1)
  --valid-until TIME   (VALID_UNTIL)
  --ref REF            (REF)              as in setup.sh, and so are
  --git URL            (GIT)
  --storage WHERE      (STORAGE)
$common_help
END
}

while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --git | --ref | --storage) take_source_setting "$@" ;;
    *) take_slice_setting "$@" ;;
  esac
  ((taken)) || break
  shift "$taken"
done
require NAME ZONE PROJECT ACCELERATOR
(($#)) || fail "missing: CONFIG, such as configs/llama-3.2-3b.yaml; see $program --help"
resolve_accelerator
export NAME ZONE PROJECT ACCELERATOR RUNTIME_VERSION SPOT VALID_UNTIL STORAGE GIT REF

# The other scripts read the exported settings; the question has been asked here.
script() {
  local name=$1
  shift
  if ((dry_run)); then "$scripts/$name" --dry-run --yes "$@"; else "$scripts/$name" --yes "$@"; fi
}

question="$NAME is gone. Delete what is left of it and request $(describe_slice), in $ZONE? $billing"

if ((dry_run)); then
  check_source
  starting=$(script run.sh "$@")
  say "what is there?"
  tpu queued-resources list --format='value(name.basename(),state.state)'
  tpu tpu-vm list --format='value(name.basename(),state)'
  say "where the slice is there: is the run?"
  on_workers all "$(status_command /)"
  say "where it is left on some workers only:"
  on_workers all "bash $worker_script stop"
  say "where the slice is gone:"
  ask "$question"
  tpu queued-resources delete "$NAME" --force --quiet
  script create.sh
  script setup.sh
  say "in every case but a run that is going on:"
  printf '%s\n' "$starting"
  exit
fi
# Mistakes show before anything is asked or paid.
"$scripts/run.sh" --dry-run "$@" >/dev/null
check_source

read_states
say "$NAME: queued resource ${queued:-none}, VM ${vm:-none}"
case ${queued:-none}/${vm:-none} in
  ACTIVE/READY | none/READY)
    read_report /
    if grep -q ' not-set-up ' <<<"$report"; then
      script setup.sh
    elif ! grep -qv ' running ' <<<"$report"; then
      say "The run is going on on every worker; follow it with logs.sh."
      exit
    elif ! grep -qv ' exit-0 ' <<<"$report"; then
      say "The run has ended well on every worker. Another: run.sh. The end of the billing: delete.sh."
      exit
    elif grep -q ' running ' <<<"$report"; then
      on_workers all "bash $worker_script stop"
    fi
    ;;
  ACCEPTED/* | CREATING/* | WAITING_FOR_RESOURCES/* | PROVISIONING/*)
    wait_until_active
    script setup.sh
    ;;
  SUSPENDED/* | FAILED/* | none/none | */PREEMPTED | */TERMINATED)
    ask "$question"
    if [[ -n $queued ]]; then
      tpu queued-resources delete "$NAME" --force --quiet
    elif [[ -n $vm ]]; then
      tpu tpu-vm delete "$NAME" --quiet
    fi
    script create.sh
    script setup.sh
    ;;
  *)
    printf '%s: not a state to resume from; try again when it has changed, or delete.sh\n' "$program" >&2
    exit 1
    ;;
esac
script run.sh "$@"

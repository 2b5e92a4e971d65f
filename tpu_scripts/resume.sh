#!/usr/bin/env bash
# Makes a run go on: after a crash on the same slice, after a pre-emption on a new one.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tpu_scripts/slice.sh
source "$scripts/slice.sh"

usage() {
  cat <<END
Usage: resume.sh (the settings of create.sh and setup.sh) CONFIG run_dir=/PATH [OVERRIDE...]

Gives raft-jax the same command again; it goes on where it stopped. Where the slice is gone (pre-empted,
failed, deleted) it is requested anew, after asking, and set up; where it is still in the queue, it is waited
for. Where the run is going on, or has ended with exit code 0, on every worker nothing happens; where it is
left on some only, it is stopped there first. A slice that has to be requested costs what create.sh costs.

$slice_help
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
check_run "$@"
resolve_slice
one_slice
export_slice_settings

question="$NAME is gone. Delete what is left of it and request $(describe_slice), in $ZONE? $billing"

# Mistakes show before anything is asked or paid.
check_source
if ((dry_run)); then
  print_branches -- "$@"
  exit
fi

look
case $situation in
  running)
    say "The run is going on on every worker; follow it with logs.sh."
    exit
    ;;
  finished)
    say "The run has ended well on every worker. Another: run.sh. The end of the billing: delete.sh."
    exit
    ;;
  bare) script setup.sh ;;
  down) clear_run ;;
  queued)
    wait_until_active
    script setup.sh
    ;;
  gone)
    ask "$question"
    # shellcheck disable=SC2119 # create.sh is to wait, which it does without arguments
    renew_slice
    script setup.sh
    ;;
  changing)
    printf '%s: not a state to resume from; try again when it has changed, or delete.sh\n' "$program" >&2
    exit 1
    ;;
esac
script run.sh "$@"

#!/usr/bin/env bash
# Asks for a TPU slice through a queued resource and waits until it is there.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tpu_scripts/slice.sh
source "$scripts/slice.sh"

usage() {
  cat <<END
Usage: create.sh --name NAME --zone ZONE --project PROJECT --accelerator v5e-16 [--spot] [-- GCLOUD_FLAG...]

Asks Cloud TPU for a slice and waits until it is ACTIVE. Billing starts when the slice is granted, which may
be hours later, and goes on, idle or not, until delete.sh. Interrupting this script does not take the request
back. What follows -- is given to gcloud compute tpus queued-resources create as it is.

$slice_help
  --no-wait                               return once the request is in the queue; otherwise it looks every
                       (POLL_SECONDS)     30 seconds
$common_help
END
}

wait=1
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --) shift; break ;;
    --no-wait) wait=0; taken=1 ;;
    *) take_slice_setting "$@" ;;
  esac
  ((taken)) || fail "unexpected argument $1; see $program --help"
  shift "$taken"
done
require NAME ZONE PROJECT ACCELERATOR
resolve_slice

ask "Request $(describe_slice), as $NAME in $ZONE of $PROJECT? $billing"
request_slice "$@"
say "In the queue. To take the request back: delete.sh"
if ((wait)); then
  wait_until_active
  say "Next: setup.sh"
fi

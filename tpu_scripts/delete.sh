#!/usr/bin/env bash
# Deletes a slice and its queued resource, and looks whether they are gone.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: delete.sh --name NAME --zone ZONE --project PROJECT

Deletes the slice NAME, with the disks of its workers, and its queued resource, and checks that neither is
left; this ends the billing of the slice. Buckets and file servers are left alone, and go on being billed.

$common_help
END
}

while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  take_setting "$@"
  ((taken)) || fail "unexpected argument $1; see $program --help"
  shift "$taken"
done
require NAME ZONE PROJECT

ask "Delete the slice $NAME in $ZONE of $PROJECT, its queued resource and its disks? A run on it ends."
if ((dry_run)); then
  say "what is there?"
  tpu queued-resources list --format='value(name.basename(),state.state)'
  tpu tpu-vm list --format='value(name.basename(),state)'
  say "where there is a queued resource (its VM goes with it):"
  tpu queued-resources delete "$NAME" --force --quiet
  say "where there is only a VM:"
  tpu tpu-vm delete "$NAME" --quiet
  say "then the two lists again: $NAME must be in neither"
  exit
fi

read_states
say "$NAME: queued resource ${queued:-none}, VM ${vm:-none}"
if [[ -z $queued && -z $vm ]]; then
  say "There is no $NAME in $ZONE of $PROJECT; nothing to delete."
  exit
fi
if [[ -n $queued ]]; then
  tpu queued-resources delete "$NAME" --force --quiet
else
  tpu tpu-vm delete "$NAME" --quiet
fi

read_states
if [[ -n $queued || -n $vm ]]; then
  printf '%s: still there: queued resource %s, VM %s. It may still be billed; run this again.\n' "$program" \
    "${queued:-none}" "${vm:-none}" >&2
  exit 1
fi
say "Deleted: neither the queued resource nor the VM is left."

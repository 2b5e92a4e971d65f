#!/usr/bin/env bash
# Follows the log of a run on worker 0, another one, or all.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: logs.sh --name NAME --zone ZONE --project PROJECT [--worker N|all] [--lines N] [--no-follow]

Shows the last lines of ~/raft_jax/run.log, each behind the worker's host name, and follows it until the run
ends. Interrupting it leaves the run alone. Costs nothing beyond the slice.

  --worker N           a worker's number, or all; 0 where not given
  --lines N            how many old lines to show first; 50 where not given
  --no-follow          show these lines and return
$common_help
END
}

worker=0
lines=50
verb=follow
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  taken=2
  case $1 in
    --worker) need_value "$@"; worker=$2 ;;
    --lines) need_value "$@"; lines=$2 ;;
    --no-follow) verb=show; taken=1 ;;
    *) take_setting "$@" ;;
  esac
  ((taken)) || fail "unexpected argument $1; see $program --help"
  shift "$taken"
done
require NAME ZONE PROJECT
[[ $worker = all || $worker =~ ^[0-9]+$ ]] || fail "--worker $worker is neither a number nor all"
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines $lines is not a number"

on_workers "$worker" "bash $worker_script $verb $lines"

#!/usr/bin/env bash
# Follows the log of a run on worker 0, another one, or all; or shows what is left of it in the run folder.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: logs.sh --name NAME --zone ZONE --project PROJECT [--worker N|all] [--lines N] [--no-follow]
       logs.sh --name NAME --zone ZONE --project PROJECT --run-dir /PATH [--storage gs://BUCKET] [--worker N|all]

Shows the last lines of ~/raft_jax/run.log, each behind the worker's host name, and follows it until the run
ends. Interrupting it leaves the run alone. Costs nothing beyond the slice.
With --run-dir it asks no worker, and shows the last lines of the logs that lie in the run folder: they are
there when the slice is gone. It reads the folder itself where this machine has it mounted, or a bucket, and
otherwise says where the logs are.

  --worker N           a worker's number, or all; 0 where not given
  --lines N            how many old lines to show first; 50 where not given
  --no-follow          show these lines and return
  --run-dir PATH       (RUN_DIR)   the run_dir that run.sh was given
  --storage WHERE      (STORAGE)   as in setup.sh
$common_help
END
}

worker=0
lines=50
verb=follow
RUN_DIR=${RUN_DIR:-}
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  taken=2
  case $1 in
    --worker) need_value "$@"; worker=$2 ;;
    --lines) need_value "$@"; lines=$2 ;;
    --run-dir) need_value "$@"; RUN_DIR=$2 ;;
    --no-follow) verb=show; taken=1 ;;
    *) take_source_setting "$@" ;;
  esac
  ((taken)) || fail "unexpected argument $1; see $program --help"
  shift "$taken"
done
require NAME ZONE PROJECT
check_storage
[[ $worker = all || $worker =~ ^[0-9]+$ ]] || fail "--worker $worker is neither a number nor all"
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines $lines is not a number"
[[ -z $RUN_DIR || $RUN_DIR = /* ]] || fail "--run-dir $RUN_DIR is not an absolute path"

if [[ -z $RUN_DIR ]]; then
  on_workers "$worker" "bash $worker_script $verb $lines" && exit
  code=$?
  printf '%s: worker %s of %s did not answer; if the slice is gone, logs.sh --run-dir /PATH shows the logs in %s\n' \
    "$program" "$worker" "$NAME" "the run folder" >&2
  exit "$code"
fi

pattern=worker-$worker.log
[[ $worker != all ]] || pattern='worker-*.log'

show() {
  tail -n "$lines" | sed "s/^/[$1] /"
}

if [[ $STORAGE = gs://* && $RUN_DIR = "$mount_point"/* ]]; then
  folder=${STORAGE%/}/${RUN_DIR#"$mount_point"/}/logs
  if ((dry_run)); then
    run gcloud storage ls "$folder/$pattern" --project="$PROJECT"
    say "for each of them:"
    run gcloud storage cat "$folder/worker-0.log" --project="$PROJECT"
    exit
  fi
  files=$(run gcloud storage ls "$folder/$pattern" --project="$PROJECT")
  while read -r file; do
    run gcloud storage cat "$file" --project="$PROJECT" </dev/null | show "$(basename "$file" .log)"
  done <<<"$files"
elif ((dry_run)); then
  say "shows the last $lines lines of $RUN_DIR/logs/$pattern where this machine has that folder"
elif [[ -d $RUN_DIR/logs ]]; then
  for file in "$RUN_DIR/logs/"$pattern; do
    [[ -e $file ]] || fail "there is no $file"
    name=$(basename "$file" .log)
    show "$name" <"$file"
  done
else
  printf '%s: %s is not on this machine; the logs are %s/%s on the storage%s; mount it, or read them from a slice\n' \
    "$program" "$RUN_DIR" "$RUN_DIR/logs" "$pattern" "${STORAGE:+ $STORAGE}" >&2
  exit 1
fi

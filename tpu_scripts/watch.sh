#!/usr/bin/env bash
# Watches a run, and makes it go on by itself after a crash or a pre-emption, within a budget.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tpu_scripts/slice.sh
source "$scripts/slice.sh"

usage() {
  cat <<END
Usage: watch.sh (a budget, and the settings of create.sh and setup.sh) CONFIG run_dir=/PATH [OVERRIDE...]

Looks every minute at the slice and the run, and does what resume.sh does where the run is dead or the slice
is gone, without asking again; a new slice costs what create.sh costs. It ends when the run has ended well,
when it has failed with an error that resuming does not mend, when run.sh --stop has ended it, or when the
budget is used up. Interrupting it ends the watching only: the run and the slice go on.

  --max-resumes N      (MAX_RESUMES)      resume at most N times; 10 where only another budget is given
  --budget-hours H     (BUDGET_HOURS)     while this watches, a slice may be there for H hours, such as 48 or 1.5
  --deadline TIME      (DEADLINE)         until this time, in UTC, such as 2027-01-31T08:00Z
  --delete             (DELETE=1)         at the end, but not after run.sh --stop or an interruption, stop the run
                                          where it still goes on, which saves it, and delete the slice
                       (POLL_SECONDS)     how often it looks; 60 where not given
$slice_help
  --ref REF            (REF)              as in setup.sh, and so are
  --git URL            (GIT)
  --storage WHERE      (STORAGE)
$common_help
Further: 4 the budget is used up, 5 ended by run.sh --stop, 130 interrupted; 2 also where the run has failed for good.
END
}

MAX_RESUMES=${MAX_RESUMES:-}
BUDGET_HOURS=${BUDGET_HOURS:-}
DEADLINE=${DEADLINE:-}
DELETE=${DELETE:-}
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  taken=2
  case $1 in
    --max-resumes) need_value "$@"; MAX_RESUMES=$2 ;;
    --budget-hours) need_value "$@"; BUDGET_HOURS=$2 ;;
    --deadline) need_value "$@"; DEADLINE=$2 ;;
    --delete) DELETE=1; taken=1 ;;
    --git | --ref | --storage) take_source_setting "$@" ;;
    *) take_slice_setting "$@" ;;
  esac
  ((taken)) || break
  shift "$taken"
done
require NAME ZONE PROJECT ACCELERATOR
check_run "$@"
[[ -n $MAX_RESUMES$BUDGET_HOURS$DEADLINE ]] ||
  fail "missing: a budget, --max-resumes, --budget-hours or --deadline; see $program --help"
MAX_RESUMES=${MAX_RESUMES:-10}
DEADLINE=${DEADLINE%Z}
[[ $MAX_RESUMES =~ ^[0-9]+$ ]] || fail "--max-resumes $MAX_RESUMES is not a number"
[[ -z $BUDGET_HOURS || ($BUDGET_HOURS =~ ^[0-9]+(\.[0-9]+)?$ && $BUDGET_HOURS =~ [1-9]) ]] ||
  fail "--budget-hours $BUDGET_HOURS is not a number of hours"
[[ -z $DEADLINE || $DEADLINE =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}$ ]] ||
  fail "--deadline $DEADLINE: expected a time in UTC such as 2027-01-31T08:00Z"
resolve_slice
one_slice
if is_on DELETE; then delete=1; else delete=0; fi
export_slice_settings

budget="$MAX_RESUMES resumptions${BUDGET_HOURS:+, $BUDGET_HOURS hours of a slice}${DEADLINE:+, until $DEADLINE UTC}"
question="Watch $NAME and, where it is gone, request $(describe_slice), in $ZONE, without asking again, up to $budget? $billing"

check_source
if ((dry_run)); then
  print_branches --no-wait -- "$@"
  if ((delete)); then
    say "at the end, where the run still goes on:"
    script run.sh --stop
    say "and then:"
    script delete.sh
  fi
  exit
fi
ask "$question"
# Every slice gets the same source, whatever happens to this checkout.
[[ -n $GIT ]] || REF=$(git -C "$checkout" rev-parse "${REF:-HEAD}^{commit}")

resumes=0         # how often it has been resumed
pending=0         # 1 from a resumption until the run is seen running: that is one resumption
misses=0          # looks that failed in a row
failures=0        # steps that failed in a row
most=10           # of either, and then it gives up
half=0            # how often in a row the run was seen on some workers only
patience=3        # the workers of a run that ends do not end at the same moment
spent=0           # seconds for which a slice was there
there=0           # 1 where one was there at the last look
last=$(date +%s)
sleeper=''

log() {
  printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"
}

interrupted() {
  [[ -z $sleeper ]] || kill "$sleeper" 2>/dev/null || true
  log "interrupted: only the watching has ended. The run goes on, and the slice is billed until delete.sh."
  exit 130
}
trap interrupted INT TERM

nap() {
  sleep "${POLL_SECONDS:-60}" &
  sleeper=$!
  wait "$sleeper" || true
  sleeper=''
}

# end CODE WORDS: the last line, and with --delete the end of the slice.
end() {
  local code=$1 try
  shift
  log "$*"
  if ((!delete || code == 5)); then
    [[ $situation = gone ]] || log "The slice or its request is left as it is, and billed until delete.sh."
    exit "$code"
  fi
  case $situation in
    finished | bare | queued | gone) ;;
    *) script run.sh --stop || true ;;
  esac
  for ((try = 0; try < 3; try++)); do
    if script delete.sh; then exit "$code"; fi
    nap
  done
  log "NOT DELETED: $NAME may still be billed. Run delete.sh."
  exit 1
}

count_time() {
  local now
  now=$(date +%s)
  ((!there)) || spent=$((spent + now - last))
  last=$now
}

within_time() {
  if [[ -n $DEADLINE && ! $(date -u +%Y-%m-%dT%H:%M) < $DEADLINE ]]; then
    end 4 "the budget is used up: it is $DEADLINE UTC"
  elif [[ -n $BUDGET_HOURS ]] && awk "BEGIN {exit !($spent >= 3600 * $BUDGET_HOURS)}"; then
    end 4 "the budget is used up: a slice was there for $BUDGET_HOURS hours"
  fi
}

# Counts a resumption, for the reason given; one that is under way is not counted again.
resumption() {
  ((!pending)) || return 0
  ((resumes < MAX_RESUMES)) || end 4 "the budget is used up: $1, after $MAX_RESUMES resumptions"
  resumes=$((resumes + 1))
  pending=1
  log "resumption $resumes of at most $MAX_RESUMES: $1"
}

# failed CODE WHAT TIMES
failed() {
  log "$2 failed with exit code $1, $3 times in a row"
  (($3 < most)) || end "$1" "given up"
}

# The run is dead on some workers or all: is there sense in starting it again?
check_outcome() {
  if grep -q ' stopped ' <<<"$report"; then
    end 5 "run.sh --stop has ended the run; it is not resumed. To go on: resume.sh"
  elif grep -Eq ' exit-(2|126|127) ' <<<"$report"; then
    end 2 "the run has failed with an error that resuming does not mend; logs.sh shows it. Once it is mended: resume.sh, then watch.sh"
  fi
}

step() {
  case $situation in
    gone)
      resumption "the slice is gone"
      renew_slice --no-wait
      ;;
    bare)
      resumption "the slice is not set up"
      script setup.sh && script run.sh "${command[@]}"
      ;;
    down)
      resumption "the run is dead"
      clear_run && script run.sh "${command[@]}"
      ;;
  esac
}

command=("$@")
while true; do
  code=0
  look || code=$?
  count_time
  if ((code)); then
    misses=$((misses + 1))
    failed "$code" "looking" "$misses"
    nap
    continue
  fi
  misses=0
  case $situation in queued | gone) there=0 ;; *) there=1 ;; esac
  [[ $situation != finished ]] || end 0 "the run has ended well on every worker, after $resumes resumptions"
  [[ $situation != down ]] || check_outcome
  within_time
  if ((partly)); then half=$((half + 1)); else half=0; fi
  case $situation in
    running) pending=0 failures=0 ;;
    queued | changing) ;;
    *)
      if ((!partly || half >= patience)); then
        half=0
        if step; then
          failures=0
        else
          code=$?
          failures=$((failures + 1))
          failed "$code" "resuming" "$failures"
        fi
      fi
      ;;
  esac
  nap
done

# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # set here for the scripts that source it, or set by common.sh
# Sourced after common.sh by the scripts that request slices (create.sh, resume.sh, watch.sh): the settings of a
# slice, what is there now, and how a run is made to go on.

ACCELERATOR=${ACCELERATOR:-}
RUNTIME_VERSION=${RUNTIME_VERSION:-}
SPOT=${SPOT:-}
VALID_UNTIL=${VALID_UNTIL:-}
AUTOCHECKPOINT_ENABLED=${AUTOCHECKPOINT_ENABLED:-}
PROVISIONING_MODEL=${PROVISIONING_MODEL:-}
MAX_RUN_DURATION=${MAX_RUN_DURATION:-}
RESERVED=${RESERVED:-}
RESERVATION=${RESERVATION:-}
NETWORK=${NETWORK:-}
SUBNETWORK=${SUBNETWORK:-}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
BOOT_DISK=${BOOT_DISK:-}
DATA_DISK=${DATA_DISK:-}
NODE_COUNT=${NODE_COUNT:-}
ALPHA=${ALPHA:-}
CREATE_FLAGS=${CREATE_FLAGS:-}

billing='It is billed from the moment it is granted until it is deleted.'

# What stopping takes when the rest of a run waits for a worker that is gone, and does not answer SIGTERM.
rest_seconds=120

slice_help='  --accelerator TYPE   (ACCELERATOR)      v4-N, v5p-N (N TensorCores), v5e-N, v6e-N (N chips)
  --runtime-version V  (RUNTIME_VERSION)  the image of the workers; the usual one of the type where not given
  --spot               (SPOT=1)           cheaper, and may be taken away at any time
  --valid-until TIME   (VALID_UNTIL)      give up after this time in the queue, such as 6h
  --autocheckpoint-enabled                before maintenance a run gets SIGTERM and up to 5 minutes to save
                       (AUTOCHECKPOINT_ENABLED=1)
  --provisioning-model MODEL              standard, spot, reservation-bound, or flex-start, which needs
                       (PROVISIONING_MODEL)
  --max-run-duration D (MAX_RUN_DURATION) such as 8h: the slice is deleted after this time
  --reserved           (RESERVED=1)       capacity that is reserved for the project
  --reservation NAME   (RESERVATION)      capacity of this reservation
  --network NETWORK    (NETWORK)
  --subnetwork SUBNET  (SUBNETWORK)
  --service-account A  (SERVICE_ACCOUNT)  the e-mail address of the account that the workers act as
  --boot-disk K=V,...  (BOOT_DISK)        encryption: confidential-compute=True,kms-key=KEY
  --data-disk K=V,...  (DATA_DISK)        a disk to attach: source=DISK,mode=read-only
  --node-count N       (NODE_COUNT)       N slices (multislice), which the other scripts do not serve
  --alpha              (ALPHA=1)          gcloud alpha, for flags in CREATE_FLAGS that need it; settings above that
                                          need it choose it themselves
                       (CREATE_FLAGS)     more flags of gcloud, separated by blanks'

# Reads a setting that describes a slice from the front of the arguments, as take_setting does.
take_slice_setting() {
  taken=2
  case $1 in
    --accelerator) need_value "$@"; ACCELERATOR=$2 ;;
    --runtime-version) need_value "$@"; RUNTIME_VERSION=$2 ;;
    --valid-until) need_value "$@"; VALID_UNTIL=$2 ;;
    --provisioning-model) need_value "$@"; PROVISIONING_MODEL=$2 ;;
    --max-run-duration) need_value "$@"; MAX_RUN_DURATION=$2 ;;
    --reservation) need_value "$@"; RESERVATION=$2 ;;
    --network) need_value "$@"; NETWORK=$2 ;;
    --subnetwork) need_value "$@"; SUBNETWORK=$2 ;;
    --service-account) need_value "$@"; SERVICE_ACCOUNT=$2 ;;
    --boot-disk) need_value "$@"; BOOT_DISK=$2 ;;
    --data-disk) need_value "$@"; DATA_DISK=$2 ;;
    --node-count) need_value "$@"; NODE_COUNT=$2 ;;
    --spot) SPOT=1; taken=1 ;;
    --autocheckpoint-enabled) AUTOCHECKPOINT_ENABLED=1; taken=1 ;;
    --reserved) RESERVED=1; taken=1 ;;
    --alpha) ALPHA=1; taken=1 ;;
    *) take_setting "$@" ;;
  esac
}

export_slice_settings() {
  export NAME ZONE PROJECT ACCELERATOR RUNTIME_VERSION SPOT VALID_UNTIL AUTOCHECKPOINT_ENABLED \
    PROVISIONING_MODEL MAX_RUN_DURATION RESERVED RESERVATION NETWORK SUBNETWORK SERVICE_ACCOUNT BOOT_DISK \
    DATA_DISK NODE_COUNT ALPHA CREATE_FLAGS STORAGE GIT REF
}

# Checks the settings of a slice. Sets accelerator (gcloud's name), chips and workers of one slice, tier, track
# (alpha where a setting needs it) and, where it is empty, RUNTIME_VERSION.
resolve_slice() {
  resolve_accelerator
  resolve_tier
  [[ -z $NODE_COUNT || $NODE_COUNT =~ ^([2-9]|[1-9][0-9]+)$ ]] ||
    fail "--node-count $NODE_COUNT: expected 2 or more; one slice needs no --node-count"
  track=''
  if is_on ALPHA || is_on AUTOCHECKPOINT_ENABLED || [[ -n $BOOT_DISK$RESERVATION$PROVISIONING_MODEL ]]; then
    track=alpha
  fi
}

one_slice() {
  [[ -z $NODE_COUNT ]] || fail "--node-count $NODE_COUNT: $program works on a single slice; leave it out"
}

resolve_tier() {
  tier=on-demand
  PROVISIONING_MODEL=$(printf %s "$PROVISIONING_MODEL" | tr 'A-Z_' 'a-z-')
  case $PROVISIONING_MODEL in
    '' | standard) ;;
    spot) SPOT=1 ;;
    reservation-bound)
      [[ -n $RESERVATION ]] || fail "--provisioning-model reservation-bound needs --reservation NAME"
      ;;
    flex-start)
      [[ -n $MAX_RUN_DURATION ]] || fail "--provisioning-model flex-start needs --max-run-duration, such as 8h"
      tier="flex-start for $MAX_RUN_DURATION"
      ;;
    *)
      fail "--provisioning-model $PROVISIONING_MODEL: expected standard, spot, reservation-bound or flex-start"
      ;;
  esac
  [[ -z $MAX_RUN_DURATION || $PROVISIONING_MODEL = flex-start ]] ||
    fail "--max-run-duration $MAX_RUN_DURATION: only with --provisioning-model flex-start"
  if is_on RESERVED || [[ -n $RESERVATION ]]; then
    [[ $tier = on-demand ]] || fail "--provisioning-model $PROVISIONING_MODEL and a reservation exclude each other"
    tier=reserved
  fi
  if is_on SPOT; then
    [[ $tier = on-demand ]] || fail "--spot excludes --reserved, --reservation and --provisioning-model flex-start"
    [[ $PROVISIONING_MODEL != standard ]] || fail "--spot and --provisioning-model standard exclude each other"
    tier=spot
  fi
}

resolve_accelerator() {
  local kind size runtime
  case $(printf %s "$ACCELERATOR" | tr '[:upper:]' '[:lower:]') in
    tpu7* | v7* | ironwood*)
      fail "ACCELERATOR $ACCELERATOR: TPU7x is not served by the Cloud TPU API that these scripts use;" \
        "it needs GKE (gke.sh) or Compute Engine (docs/tpu.md)"
      ;;
    v5litepod-*) kind=v5e ;;
    v4-* | v5e-* | v5p-* | v6e-*) kind=${ACCELERATOR%%-*} ;;
    *) fail "ACCELERATOR $ACCELERATOR: expected v4-N, v5e-N, v5p-N or v6e-N, such as v5e-16" ;;
  esac
  size=${ACCELERATOR#*-}
  [[ $size =~ ^[1-9][0-9]{0,4}$ ]] || fail "ACCELERATOR $ACCELERATOR: $size is not a size"
  accelerator=$kind-$size
  case $kind in
    v4 | v5p) # counted in TensorCores: two a chip, four chips a worker
      ((size % 8 == 0)) ||
        fail "ACCELERATOR $ACCELERATOR: $kind counts TensorCores, eight a worker; use a multiple of 8"
      chips=$((size / 2))
      workers=$((size / 8))
      ;;
    v5e | v6e) # counted in chips: up to eight on one worker, beyond that four a worker
      case $size in
        1 | 4 | 8) workers=1 ;;
        16 | 32 | 64 | 128 | 256) workers=$((size / 4)) ;;
        *) fail "ACCELERATOR $ACCELERATOR: $kind comes with 1, 4, 8, 16, 32, 64, 128 or 256 chips" ;;
      esac
      chips=$size
      ;;
  esac
  case $kind in
    v4) runtime=tpu-ubuntu2204-base ;;
    v5e) runtime=v2-alpha-tpuv5-lite accelerator=v5litepod-$size ;;
    v5p) runtime=v2-alpha-tpuv5 ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
  esac
  RUNTIME_VERSION=${RUNTIME_VERSION:-$runtime}
}

describe_slice() {
  printf '%s%s: %d chip%s on %d worker%s%s, %s' "${NODE_COUNT:+$NODE_COUNT slices }" "$accelerator" \
    "$chips" "$([[ $chips = 1 ]] || echo s)" "$workers" "$([[ $workers = 1 ]] || echo s)" \
    "${NODE_COUNT:+ each}" "$tier"
}

# Requests the slice; the arguments are further flags of gcloud.
request_slice() {
  local flags words
  if [[ -n $NODE_COUNT ]]; then
    flags=(--node-count="$NODE_COUNT" --node-prefix="$NAME")
  else
    flags=(--node-id="$NAME")
  fi
  flags+=(--accelerator-type="$accelerator" --runtime-version="$RUNTIME_VERSION")
  # gcloud alpha would call the model standard beside --spot.
  if [[ $tier = spot && -n $track ]]; then
    flags+=(--spot --provisioning-model=spot)
  elif [[ $tier = spot ]]; then
    flags+=(--spot)
  elif [[ -n $PROVISIONING_MODEL ]]; then
    flags+=(--provisioning-model="$PROVISIONING_MODEL")
  fi
  [[ -z $MAX_RUN_DURATION ]] || flags+=(--max-run-duration="$MAX_RUN_DURATION")
  [[ -z $VALID_UNTIL ]] || flags+=(--valid-until-duration="$VALID_UNTIL")
  if is_on RESERVED; then flags+=(--reserved); fi
  [[ -z $RESERVATION ]] || flags+=(--reservation="$RESERVATION")
  if is_on AUTOCHECKPOINT_ENABLED; then flags+=(--autocheckpoint-enabled); fi
  [[ -z $NETWORK ]] || flags+=(--network="$NETWORK")
  [[ -z $SUBNETWORK ]] || flags+=(--subnetwork="$SUBNETWORK")
  [[ -z $SERVICE_ACCOUNT ]] || flags+=(--service-account="$SERVICE_ACCOUNT")
  [[ -z $BOOT_DISK ]] || flags+=(--boot-disk="$BOOT_DISK")
  [[ -z $DATA_DISK ]] || flags+=(--data-disk="$DATA_DISK")
  if [[ -n $CREATE_FLAGS ]]; then
    read -ra words <<<"$CREATE_FLAGS"
    flags+=("${words[@]}")
  fi
  run gcloud ${track:+"$track"} compute tpus queued-resources create "$NAME" "${flags[@]}" "$@" \
    --zone="$ZONE" --project="$PROJECT"
}

wait_until_active() {
  local state before='' misses=0
  if ((dry_run)); then
    say "repeated until it says ACTIVE:"
    tpu queued-resources describe "$NAME" --format='value(state.state)'
    return
  fi
  while true; do
    if state=$(gcloud compute tpus queued-resources describe "$NAME" --format='value(state.state)' \
      --zone="$ZONE" --project="$PROJECT") && [[ -n $state ]]; then
      misses=0
    else
      misses=$((misses + 1))
      ((misses < 5)) || return 1
    fi
    [[ $state = "$before" ]] || printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$NAME" "$state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        printf '%s: the request ended as %s; delete it with delete.sh and ask again\n' "$program" "$state" >&2
        return 1
        ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

# What resume.sh and watch.sh have in common

# Another script, with the exported settings; the question has been asked already.
script() {
  local name=$1
  shift
  if ((dry_run)); then "$scripts/$name" --dry-run --yes "$@"; else "$scripts/$name" --yes "$@"; fi
}

# Looks what is there. Sets queued, vm, report, and situation:
#   running   on every worker           finished  with exit code 0 on every worker
#   bare      a slice that is not set up           down      the run is dead on some workers or all
#   queued    waiting for a slice       gone      no slice, or only what is left of one
#   changing  anything else
# and, for down, partly (1 where some workers still run) and unmounted (1 where the storage is not there, as after
# a restart of the machine).
look() {
  situation='' partly=0 unmounted=0
  read_states || return
  say "$NAME: queued resource ${queued:-none}, VM ${vm:-none}"
  case ${queued:-none}/${vm:-none} in
    ACTIVE/READY | none/READY)
      read_report "$(looked_at)" || return
      if grep -q ' not-set-up ' <<<"$report"; then
        situation=bare
      elif ! grep -qv ' running ' <<<"$report"; then
        situation=running
      elif ! grep -qv ' exit-0 ' <<<"$report"; then
        situation=finished
      else
        situation=down
        ! grep -q ' running ' <<<"$report" || partly=1
        if [[ -n $STORAGE ]] && grep -q ' local$' <<<"$report"; then unmounted=1; fi
      fi
      ;;
    ACCEPTED/* | CREATING/* | WAITING_FOR_RESOURCES/* | PROVISIONING/*) situation=queued ;;
    SUSPENDED/* | FAILED/* | none/none | */PREEMPTED | */TERMINATED) situation=gone ;;
    *) situation=changing ;;
  esac
}

looked_at() {
  if [[ -n $STORAGE ]]; then printf %s "$mount_point"; else printf /; fi
}

# After look said gone: deletes what is left, makes sure that nothing is, and requests the slice again. The
# arguments are those of create.sh.
renew_slice() {
  if [[ -n $queued ]]; then
    tpu queued-resources delete "$NAME" --force --quiet || return
  elif [[ -n $vm ]]; then
    tpu tpu-vm delete "$NAME" --quiet || return
  fi
  if [[ -n $queued$vm ]]; then
    read_states || return
    if [[ -n $queued$vm ]]; then
      printf '%s: still there: queued resource %s, VM %s; no second slice is requested\n' "$program" \
        "${queued:-none}" "${vm:-none}" >&2
      return 1
    fi
  fi
  script create.sh "$@"
}

# After look said down: ends what is left of the run and mounts the storage again; run.sh can start then.
clear_run() {
  # Where a worker had to be killed this fails, and run.sh looks again.
  if ((partly)); then on_workers all "bash $worker_script stop $rest_seconds" || true; fi
  if ((unmounted)); then script setup.sh || return; fi
}

# The branches of resume.sh and watch.sh, for --dry-run; the arguments before -- are those of create.sh.
print_branches() {
  local starting create=()
  while [[ $1 != -- ]]; do
    create+=("$1")
    shift
  done
  shift
  starting=$(script run.sh "$@")
  say "what is there?"
  tpu queued-resources list --format='value(name.basename(),state.state)'
  tpu tpu-vm list --format='value(name.basename(),state)'
  say "where the slice is there: is the run?"
  on_workers all "$(status_command "$(looked_at)")"
  say "where it is left on some workers only:"
  on_workers all "bash $worker_script stop $rest_seconds"
  say "where the slice is gone:"
  ask "$question"
  tpu queued-resources delete "$NAME" --force --quiet
  script create.sh ${create[@]+"${create[@]}"}
  say "on a slice that is not set up, or has lost its storage:"
  script setup.sh
  say "in every case but a run that is going on:"
  printf '%s\n' "$starting"
}

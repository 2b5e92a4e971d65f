#!/usr/bin/env bash
# Runs raft-jax on a TPU7x (Ironwood) slice in GKE: fills gke/jobset.yaml and gives it to kubectl.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
Usage: gke.sh --name NAME --topology 2x2x2 --storage WHERE (--git URL | --image IMAGE) CONFIG run_dir=$mount_point/ANYTHING
              [OVERRIDE...]
       gke.sh --name NAME --delete

Creates a JobSet in the cluster that kubectl uses: one pod on every machine of the slice, and the storage on
$mount_point of each. JobSet starts all of them again when one fails, up to --max-restarts times, but not after
an error in the config. With --dry-run prints the manifest, which kubectl apply -f - takes. Costs nothing
itself; the machines of the node pool are billed while they are there, and a node pool that scales by itself
adds them for the JobSet.

  --name NAME          (NAME)             the JobSet
  --namespace N        (NAMESPACE)        default where not given
  --topology AxBxC     (TOPOLOGY)         that of the node pool, such as 2x2x1 (one machine), 2x2x2, 4x4x4
  --storage WHERE      (STORAGE)          gs://BUCKET[/FOLDER], or the name of a claim of a volume that many
                                          machines can write to, such as one of Filestore
  --git URL            (GIT)              each pod installs this repository, in its tested versions
  --ref REF            (REF)              the commit or branch; the default branch where not given
  --image IMAGE        (IMAGE)            python:3.12 where not given; where it has raft-jax, nothing is installed
  --service-account A  (SERVICE_ACCOUNT)  of Kubernetes, which may write to the bucket; default where not given
  --spot               (SPOT=1)           on a node pool of spot machines
  --max-restarts N     (MAX_RESTARTS)     10 where not given
  --stop-seconds N     (STOP_SECONDS)     how long saving may take after SIGTERM; 300 where not given
  --delete                                end the run, which saves it, and delete the JobSet; the node pool stays
  --dry-run                               print the manifest or command, run nothing
  --yes                                   do not ask
  --help
Each setting may come from the variable in brackets instead; a flag wins over it.
Exit codes: 0 done, 2 bad or missing settings, 3 not confirmed, otherwise what kubectl returned.
END
}

NAMESPACE=${NAMESPACE:-default}
TOPOLOGY=${TOPOLOGY:-}
IMAGE=${IMAGE:-}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
SPOT=${SPOT:-}
MAX_RESTARTS=${MAX_RESTARTS:-10}
STOP_SECONDS=${STOP_SECONDS:-300}
delete=0
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  taken=2
  case $1 in
    --namespace) need_value "$@"; NAMESPACE=$2 ;;
    --topology) need_value "$@"; TOPOLOGY=$2 ;;
    --image) need_value "$@"; IMAGE=$2 ;;
    --service-account) need_value "$@"; SERVICE_ACCOUNT=$2 ;;
    --max-restarts) need_value "$@"; MAX_RESTARTS=$2 ;;
    --stop-seconds) need_value "$@"; STOP_SECONDS=$2 ;;
    --spot) SPOT=1; taken=1 ;;
    --delete) delete=1; taken=1 ;;
    --zone | --project) fail "unknown option $1; kubectl knows the cluster" ;;
    *) take_source_setting "$@" ;;
  esac
  ((taken)) || break
  shift "$taken"
done

# One flag's value against the pattern of what Kubernetes or Google allow, which also keeps YAML out of it.
check() {
  [[ $2 =~ ^($3)$ ]] || fail "$1 $2: expected $4"
}

label='[a-z]([-a-z0-9]*[a-z0-9])?'
need NAME
check --name "$NAME" "$label" 'small letters, digits and dashes'
((${#NAME} <= 40)) || fail "--name $NAME is longer than 40 characters, and names of pods begin with it"
check --namespace "$NAMESPACE" "$label" 'small letters, digits and dashes'
((dry_run)) || command -v kubectl >/dev/null || fail "kubectl is not on the PATH; install it"

if ((delete)); then
  (($# == 0)) || fail "--delete takes no config"
  ask "End the run $NAME and delete the JobSet?"
  run kubectl delete jobset "$NAME" --namespace="$NAMESPACE"
  exit
fi

need TOPOLOGY STORAGE
[[ -n $GIT$IMAGE ]] || fail "missing: --git URL, or --image with raft-jax in it; see $program --help"
check_run "$@"
check --topology "$TOPOLOGY" '[1-9][0-9]{0,2}x[1-9][0-9]{0,2}x[1-9][0-9]{0,2}' 'three numbers, such as 2x2x2'
IFS=x read -r a b c <<<"$TOPOLOGY"
chips=$((a * b * c))
((chips % 4 == 0)) || fail "--topology $TOPOLOGY: $chips chips, but every machine has 4"
workers=$((chips / 4))
IMAGE=${IMAGE:-python:3.12}
check --image "$IMAGE" '[a-zA-Z0-9][-a-zA-Z0-9._/:@]*' 'the name of an image'
check --service-account "$SERVICE_ACCOUNT" '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' 'a service account of Kubernetes'
check --max-restarts "$MAX_RESTARTS" '[0-9]+' 'a number'
check --stop-seconds "$STOP_SECONDS" '[1-9][0-9]*' 'a number of seconds'
[[ $GIT != -* && $REF != -* ]] || fail "GIT and REF must not begin with a dash"
bucket='' folder='' claim=''
case $STORAGE in
  gs://*)
    bucket=${STORAGE#gs://}
    bucket=${bucket%/}
    [[ $bucket != */* ]] || folder=${bucket#*/}
    bucket=${bucket%%/*}
    check --storage "$bucket" '[a-z0-9][-a-z0-9_.]*' 'gs://BUCKET[/FOLDER]'
    [[ $folder != *[,:=]* ]] || fail "--storage $STORAGE: expected a folder without , : and ="
    storage=bucket
    ;;
  *)
    claim=$STORAGE
    check --storage "$claim" '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' 'gs://BUCKET[/FOLDER] or the name of a claim'
    storage=claim
    ;;
esac

[[ $run_dir = "$mount_point"/* ]] || fail "run_dir=$run_dir: the storage is on $mount_point; give run_dir=$mount_point/NAME"

# A text in double quotes, as in JSON. $ is doubled, because Kubernetes replaces $(NAME) in arguments.
quoted() {
  case $1 in
    *[[:cntrl:]]*) fail "a setting with a line break or another control character" ;;
  esac
  printf '"%s"' "$(printf %s "$1" | sed 's/[\\"]/\\&/g; s/\$/$$/g')"
}

arguments=''
for word in "$@"; do
  arguments="$arguments${arguments:+, }$(quoted "$word")"
done
# A worker must see at once what another has written.
options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0${folder:+,only-dir=$folder}
options=$(quoted "$options")
git=$(quoted "$GIT")
ref=$(quoted "$REF")
other=bucket
[[ $storage = claim ]] || other=claim
spot='/# only spot$/d'
if is_on SPOT; then spot=''; fi

# for_sed TEXT: as the replacement of a command s that is delimited by |.
for_sed() {
  printf %s "$1" | sed 's/[\\&|]/\\&/g'
}

manifest() {
  sed -e "/# only $other\$/d" -e "$spot" -e 's/ *# only [a-z]*$//' \
    -e "s|@NAME@|$NAME|; s|@NAMESPACE@|$NAMESPACE|; s|@TOPOLOGY@|$TOPOLOGY|; s|@WORKERS@|$workers|" \
    -e "s|@IMAGE@|$IMAGE|; s|@SERVICE_ACCOUNT@|$SERVICE_ACCOUNT|; s|@MAX_RESTARTS@|$MAX_RESTARTS|" \
    -e "s|@STOP_SECONDS@|$STOP_SECONDS|; s|@BUCKET@|$bucket|; s|@CLAIM@|$claim|" \
    -e "s|@MOUNT_OPTIONS@|$(for_sed "$options")|" \
    -e "s|@GIT@|$(for_sed "$git")|; s|@REF@|$(for_sed "$ref")|" \
    -e "s|@ARGUMENTS@|[$(for_sed "$arguments")]|" "$scripts/gke/jobset.yaml"
}

if ((dry_run)); then
  manifest
  exit
fi
ask "Create the JobSet $NAME, $workers pods on a TPU7x slice of $TOPOLOGY? Its machines are billed while they are there."
manifest | run kubectl apply -f -
say "Follow it with: kubectl logs --follow --namespace=$NAMESPACE -l jobset.sigs.k8s.io/jobset-name=$NAME --prefix"

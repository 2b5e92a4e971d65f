#!/usr/bin/env bash
# A run on a Slurm cluster's GPUs, one process for each GPU. Killed, or at the end of its time, it is queued again and
# goes on where it was:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=8:00:00 examples/slurm.sh CONFIG [KEY=VALUE ...]
#
# run_dir has to be on a file system that all nodes share. Each process takes the GPU of its own number, so all of a
# node's processes have to see all of its GPUs: no --gpus-per-task, no --gpu-bind. PYTHON is the Python that has
# raft_jax, by default that of .venv.
#SBATCH --job-name=raft
#SBATCH --output=raft-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM to the processes five minutes before the time is over: they save and end with 130.
#SBATCH --signal=TERM@300
set -uo pipefail
if (($# == 0)); then
  echo "usage: sbatch [sbatch's options] $0 CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "$0: no Slurm job here; start it by sbatch" >&2
  exit 2
fi
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m raft_jax run "$@"
code=$?
# 2 is bad input, which would be bad the next time, too.
case $code in
  0 | 2 | 126 | 127) exit $code ;;
esac
restarts=${SLURM_RESTART_COUNT:-0}
if ((code != 130 && restarts >= 3)); then
  echo "ended with $code after $restarts restarts; not queued again" >&2
  exit $code
fi
echo "ended with $code; queued again"
scontrol requeue "$SLURM_JOB_ID"

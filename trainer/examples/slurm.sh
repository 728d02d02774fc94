#!/usr/bin/env bash
# Train a script on several nodes of a Slurm cluster:
#
#   sbatch --nodes=4 slurm.sh train.py [ARGUMENT...]
#
# train.py gives the Trainer a run_dir that all nodes share, and resume="auto". Before the job's time is over, all ranks
# stop with a checkpoint, and the job is queued again; so it is after a preemption and after the failure of a node.
# scancel stops the run with a checkpoint, too, within KillWait of slurm.conf (30 s by default).
#
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail

# Rank 0 of each restart has a store of its own; the launchers count restarts differently on each node.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that torchrun leaves the ranks after a SIGTERM, below the 180 above. Releases of torch that lack this setting
# leave them 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
# srun does not take this over from the job.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
time_is_over=
trap 'time_is_over=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # to the processes that srun has started

# One torchrun per node, which starts a rank per GPU. The first that ends must not end the others, which may be writing.
srun --kill-on-bad-exit=0 --wait=0 torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --max-restarts=3 \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$first_node:$((20000 + SLURM_JOB_ID % 10000))" \
  --rdzv-id="$SLURM_JOB_ID" \
  "$@" &
step=$!
until wait "$step"; code=$?; ! kill -0 "$step" 2>/dev/null; do :; done  # a signal ends `wait`, and not the step

if [ -n "$time_is_over" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

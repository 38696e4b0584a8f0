#!/usr/bin/env bash
#SBATCH --job-name=decovae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=120G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
#
# Two nodes of four GPUs; the job goes back to the queue when it is preempted or its time is over, and goes on from its
# last checkpoint when it starts again (README.md beside this file):
#
#   sbatch train/cluster/slurm.sh train/vae.py paper --data.root /data/t1 --out /shared/runs/paper-vad
#
# Options before the script's name change the above, for example sbatch --nodes=4 --partition=gpu train/cluster/slurm.sh …
set -euo pipefail

if (( $# == 0 )); then
    echo "give what to train: sbatch train/cluster/slurm.sh train/vae.py paper …" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
head_name="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
HEAD="${HEAD:-$(getent ahostsv4 "$head_name" | awk '{ print $1; exit }')}"
export HEAD NODES="$SLURM_NNODES" RUN="decovae-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
threads=$((SLURM_CPUS_PER_TASK / ${SLURM_GPUS_ON_NODE:-4} / 2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# In the background, so that the shell takes its signal at once. NODE is the task's number: one a node. Some srun (22.05)
# do not know how many CPUs sbatch was asked for, and give one.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
    bash -c 'NODE="$SLURM_NODEID" exec train/cluster/host.sh "$@"' host "$@" &
step=$!

over=""
# shellcheck disable=SC2317  # called by trap
stop() {
    over=1
    echo "$(date -Is) the time is nearly over: asking the run to write a checkpoint and stop" >&2
    # srun passes it to torchrun on every node, and torchrun to its processes, which have 150 of the 180 seconds
    # (host.sh). On SIGTERM srun would kill them all.
    kill -USR1 "$step" || true
}
trap stop USR1
# A job that is cancelled or preempted: SLURM tells torchrun itself, and this must only outlive it. Who preempts the job
# also puts it back into the queue, and who cancels it does not want it there.
trap 'echo "$(date -Is) the job is being ended" >&2' TERM

while kill -0 "$step" 2> /dev/null; do
    wait "$step" || true # which a signal ends too
done
code=0
wait "$step" || code=$?

if [[ -n "$over" ]] && (( code != 0 )); then
    echo "$(date -Is) stopped; back to the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

#!/bin/bash
# Predict on eight devices of one node, and go on after preemption, a time limit or a failed node:
#
#     sbatch examples/slurm.sh python my_predict.py
#
# The script's Trainer has `devices=8` and a `PredictionWriter` on a file system that all nodes share.
#
#SBATCH --job-name=predict
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM comes a minute before the time is up, so that what was launched is committed.
#SBATCH --signal=TERM@60

set -u

# Each rank is a task of `srun`, whose exit code is the highest of theirs.
srun "$@"
code=$?

# 143 is 128 + SIGTERM: the run was ended between two batches. SLURM requeues after preemption and node failures by
# itself, and not when the time is up.
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

#!/usr/bin/env bash
# Trains on GPU nodes under Slurm, one process a GPU. The processes find each other through Slurm's environment.
#
#   launch/slurm_gpu.sh --nodes=4 --gpus=8 --config=configs/final.py --workdir=/shared/run1 [--name=unifusion] \
#       [--partition=gpu] [--account=a] [--time=24:00:00] [--venv=/shared/venv | --image=/shared/unifusion.sqsh] [--dry-run] \
#       [-- --config.total_steps=1000]
#
#   --gpus      GPUs of a node
#   --workdir   folder that every node sees
#   --venv      virtual environment that every node sees, or
#   --image     container (Pyxis/Enroot) made from launch/Dockerfile.cuda
#   --dry-run   print the job script instead of submitting it
#
# Two minutes before its time is up all processes get SIGTERM, save and end with status 75, and the job is queued again; so it
# is, up to 20 times, when a process is lost. Other failures end it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"

options=(name nodes gpus partition account time config workdir venv image)
name=unifusion nodes='' gpus='' partition='' account='' time=24:00:00 config='' workdir='' venv='' image=''
parse_options "$@"
require nodes gpus config workdir
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes is a number from 1, got '$nodes'"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus is a number from 1, got '$gpus'"
[[ -z $venv || -z $image ]] || fail "give --venv or --image, not both"

job_script() {
  echo '#!/usr/bin/env bash'
  echo "#SBATCH --job-name=$name --nodes=$nodes --ntasks-per-node=$gpus --gpus-per-node=$gpus --time=$time"
  echo '#SBATCH --signal=TERM@120 --requeue --open-mode=append --output=%x-%j.txt --exclusive'
  [[ -z $partition ]] || echo "#SBATCH --partition=$partition"
  [[ -z $account ]] || echo "#SBATCH --account=$account"
  [[ -z $venv ]] || echo ". $(printf '%q' "$venv")/bin/activate"
  echo "cd $(printf '%q' "$(dirname "$here")")"
  # One task a GPU: JAX takes the one with the task's number in its node. A task that fails does not end the others: they do
  # so themselves, and say which one it was.
  local srun="srun --kill-on-bad-exit=0"
  [[ -z $image ]] || srun+=" --container-image=$(printf '%q' "$image") --container-mounts=$(printf '%q' "$workdir")"
  echo "$srun $(train_command)"
  cat <<'END'
status=$?
# 75: told to end, saved. 76 and 134: another process was lost. 137: one was killed. srun returns the highest of all.
case $status in
  75 | 76 | 134 | 137) ((${SLURM_RESTART_COUNT:-0} < 20)) && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $status
END
}

if "$dry_run"; then
  job_script
else
  job_script | sbatch
fi

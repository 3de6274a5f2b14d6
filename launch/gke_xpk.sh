#!/usr/bin/env bash
# Trains on a GKE cluster of TPU slices with xpk: builds the image, pushes it and submits a workload. Pods find each other
# through GKE's environment.
#
#   launch/gke_xpk.sh --name=run1 --cluster=my-cluster --zone=us-east5-a --project=my-project --type=v5p-256 \
#       --image=us-docker.pkg.dev/my-project/train/unifusion_jax:1 --config=configs/final.py --workdir=/gcs/run1 \
#       [--slices=1] [--restarts=20] [--build=true] [--dry-run] [-- --config.total_steps=1000]
#
#   --image     where the image is pushed to and pulled from
#   --build     false: take the image as it is
#   --slices    slices of --type, joined over the data centre network
#   --workdir   folder that every pod sees, below a bucket attached to the cluster by `xpk storage attach`
#   --restarts  how often GKE starts the workload again after a preemption (status 75), a lost host (76) or a kill: every
#               start goes on from the newest checkpoint
#   --dry-run   print the commands
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"

options=(name cluster zone project type image config workdir slices restarts build)
name='' cluster='' zone='' project='' type='' image='' config='' workdir='' slices=1 restarts=20 build=true
parse_options "$@"
require name cluster zone project type image config workdir
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is a number from 1, got '$slices'"
[[ $build == true || $build == false ]] || fail "--build is true or false, got '$build'"

if "$build"; then
  run docker build --tag "$image" --file "$here/Dockerfile.tpu" "$(dirname "$here")"
  run docker push "$image"
fi
command=(xpk workload create --workload "$name" --cluster "$cluster" --zone "$zone" --project "$project")
command+=(--tpu-type "$type" --num-slices "$slices" --docker-image "$image" --max-restarts "$restarts")
# Kubernetes announces the end of a pod by SIGTERM; this long is left to save.
command+=(--termination-grace-period-seconds 600 --restart-on-exit-codes "75,76")
run "${command[@]}" --command "$(train_command)"

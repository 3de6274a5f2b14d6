#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: asks for it as a queued resource, installs the package on every host and starts the same
# command on all of them. The hosts find each other through the TPU's metadata.
#
#   launch/tpu_pod_slice.sh --name=run1 --zone=us-east5-a --type=v5p-256 --project=my-project \
#       --config=configs/final.py --workdir=/gcs/my-bucket/run1 [--bucket=my-bucket] [--spot=true] [--dry-run] \
#       [-- --config.total_steps=1000]
#
#   --name      name of the TPU and of its queued resource
#   --type      accelerator type, e.g. v5p-256, v6e-256
#   --version   runtime image (default: by type)
#   --package   what pip installs (default: this repository, copied to the hosts)
#   --workdir   folder that every host sees; with --bucket=NAME that bucket is mounted at /gcs/NAME
#   --spot      true: may be preempted, costs less. The training saves and ends with status 75, is started again when the
#               TPU is back, and goes on
#   --retries   how often the training is started again after a preemption or a lost host (default 20)
#   --dry-run   print the commands
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"

options=(name zone project type version config workdir bucket package spot retries)
name='' zone='' project='' type='' version='' config='' workdir='' bucket='' package='' spot=false retries=20
parse_options "$@"
require name zone project type config workdir
[[ $spot == true || $spot == false ]] || fail "--spot is true or false, got '$spot'"
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries is a number, got '$retries'"

if [[ -z $version ]]; then
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) fail "no runtime image is known for --type=$type; give --version" ;;
  esac
fi

where=(--zone="$zone" --project="$project")
create=(gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}")
create+=(--accelerator-type="$type" --runtime-version="$version")
"$spot" && create+=(--spot)

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

wait_until_active() {
  if "$dry_run"; then
    echo "# wait until the queued resource is ACTIVE"
    return
  fi
  local state
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) return 1 ;;
    esac
    echo "$(date +%T) $name is $state"
    sleep 30
  done
}

# Copies the repository, without what was trained and installed in it, and sets every host up.
prepare_hosts() {
  local root archive
  root=$(dirname "$here")
  if [[ -z $package ]]; then
    archive=$(mktemp -d)/unifusion_jax.tgz
    run tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./runs -czf "$archive" .
    run gcloud compute tpus tpu-vm scp "$archive" "$name:unifusion_jax.tgz" "${where[@]}" --worker=all
    rm -rf "${archive%/*}"
    on_all_hosts 'rm -rf unifusion_jax && mkdir unifusion_jax && tar -C unifusion_jax -xzf unifusion_jax.tgz'
  fi
  on_all_hosts "bash -c $(printf '%q ' "$(<"$here/tpu_host.sh")" tpu_host.sh "${package:-./unifusion_jax[tpu]}" "$bucket")"
}

# Trains on all hosts; succeeds with the status of the training on the first host, printed. Nothing is printed where that host
# is gone.
train() {
  on_all_hosts "cd ~/unifusion_jax 2>/dev/null; . ~/venv/bin/activate; $(train_command); echo \$? > ~/train_status" >&2 || true
  if "$dry_run"; then
    echo 0
  else
    gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command='cat ~/train_status' || true
  fi
}

for ((start = 0; start <= retries; start++)); do
  if "$dry_run" || ! gcloud compute tpus queued-resources describe "$name" "${where[@]}" >/dev/null 2>&1; then
    run "${create[@]}"
  fi
  if wait_until_active; then
    prepare_hosts
    status=$(train)
    # 75: told to end, saved. 76 and 134: another host was lost. Nothing: this one was.
    case ${status:-lost} in
      75 | 76 | 134 | lost) ;;
      *) exit "$status" ;;
    esac
    echo "the training ended with status ${status:-unknown}: starting again"
  else
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
  sleep 60
done
fail "gave up after $retries restarts"

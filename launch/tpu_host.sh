#!/usr/bin/env bash
# Prepares one TPU host for launch/tpu_pod_slice.sh, which runs it on all of them at every start: after a preemption the hosts
# are new and empty, otherwise everything is there already.
#
#   launch/tpu_host.sh PACKAGE [BUCKET]
#
#   PACKAGE   what pip installs, into ~/venv
#   BUCKET    is mounted at /gcs/BUCKET
set -euo pipefail
[[ $# -ge 1 && $1 != -* ]] || { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
package=$1 bucket=${2:-}
export PATH=$HOME/.local/bin:$PATH

# The Python of the TPU images (3.10) is older than what JAX asks for; uv brings its own.
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -x ~/venv/bin/python ]] || uv venv --quiet --clear --python 3.12 ~/venv
uv pip install --quiet --python ~/venv/bin/python "$package"

if [[ -n $bucket ]] && ! mountpoint -q "/gcs/$bucket"; then
  if ! command -v gcsfuse >/dev/null; then
    # As https://cloud.google.com/storage/docs/cloud-storage-fuse/install says. A new host may still be updating itself.
    apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsS "$apt/doc/apt-key.gpg" | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq -o DPkg::Lock::Timeout=600
    sudo apt-get install -y -qq -o DPkg::Lock::Timeout=600 gcsfuse
  fi
  # Mounted by the user who trains: what root mounts, others may not write to.
  sudo mkdir -p "/gcs/$bucket"
  sudo chown "$(id -un)" "/gcs/$bucket"
  gcsfuse --implicit-dirs "$bucket" "/gcs/$bucket"
fi

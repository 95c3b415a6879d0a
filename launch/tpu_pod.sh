#!/usr/bin/env bash
# Trains on a TPU pod slice of TPU VMs: runs a command on every host, and again after preemption.
#
#   launch/tpu_pod.sh NAME ZONE setup                      copies the checkout, installs it
#   launch/tpu_pod.sh NAME ZONE train --config=... --workdir=gs-mounted/folder/runs/full
#
# Hosts find each other by the TPU's metadata. All of them need access to WORKDIR and the export.
set -euo pipefail

if (($# < 3)) || [[ $3 != setup && $3 != train ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
NAME=$1 ZONE=$2 WHAT=$3
shift 3

everywhere() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

if [[ $WHAT == setup ]]; then
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:geode_jax.tar.gz" --zone="$ZONE" --worker=all
    everywhere 'mkdir -p geode_jax && tar -xzf geode_jax.tar.gz -C geode_jax && cd geode_jax &&
        python3 -m venv .venv && .venv/bin/pip install --quiet --editable . "jax[tpu]"'
    exit
fi

# Every host prints its exit code, since gcloud's own code does not distinguish hosts. 0 = done; 2 = an
# error that would repeat. The command starts again after any other code (143: stopped and saved;
# 1: another host was lost) and if a host printed none (it was lost).
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for ((attempt = 1; attempt <= 100; attempt++)); do
    everywhere "cd geode_jax && .venv/bin/python -m geode_jax.main ${*@Q}; echo geode ended: \$?" |
        tee "$log" || true
    codes=$(sed -n 's/^.*geode ended: //p' "$log" | sort -nu | tr '\n' ' ')
    if [[ $codes == "0 " ]]; then
        exit 0
    elif [[ " $codes" == *" 2 "* ]]; then
        exit 2
    fi
    echo "hosts ended with: ${codes:-no exit code}; again in ${RETRY_SECONDS:=60} seconds" >&2
    sleep "$RETRY_SECONDS"
done
exit 1

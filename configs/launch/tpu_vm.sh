#!/usr/bin/env bash
# One Cloud TPU slice of several hosts, driven from your computer by gcloud. Steps, in order:
#
#     export NFS=10.0.0.2:/shared                # the file system that all hosts mount (docs/launching.md)
#     configs/launch/tpu_vm.sh create            # or: queue, which waits for capacity; SPOT=1 for spot
#     configs/launch/tpu_vm.sh setup             # mounts it on every host, installs jaxft there, once
#     configs/launch/tpu_vm.sh run               # starts, and goes on after any end
#     configs/launch/tpu_vm.sh logs              # also: stop, delete
#
# Machines  v6e-16: 16 chips on 4 hosts, billed from create to delete, and a Filestore share
# Output    Running as unit: jaxft.service            (run, once per host)
#           quickstart/train.jsonl: messages (detected by messages) -> chat template     (logs)
#             1500 examples read, 1500 kept; dropped: 0 too long, 0 with nothing to learn; cut: 0
set -euo pipefail

CONFIG=${CONFIG:-configs/quickstart.yaml}
NAME=${NAME:-jaxft}
ZONE=${ZONE:-us-east5-b}
TYPE=${TYPE:-v6e-16}
IMAGE=${IMAGE:-v2-alpha-tpuv6e} # v5litepod-*: v2-alpha-tpuv5-lite, v5p-*: v2-alpha-tpuv5
SHARED=/mnt/shared

spot=()
[ -z "${SPOT:-}" ] || spot=(--spot)

on() { # worker, command
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

case "${1:-}" in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$IMAGE" \
        ${spot[@]+"${spot[@]}"}
    ;;
queue)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$IMAGE" ${spot[@]+"${spot[@]}"}
    gcloud compute tpus queued-resources list --zone="$ZONE" # go on with setup when it says ACTIVE
    ;;
setup)
    on all "
        set -e
        while sudo fuser /var/lib/dpkg/lock-frontend >/dev/null 2>&1; do sleep 5; done
        sudo apt-get update -q && sudo apt-get install -yq nfs-common
        sudo mkdir -p $SHARED
        mountpoint -q $SHARED || sudo mount -t nfs -o vers=4.1 ${NFS:?set NFS=SERVER:/PATH} $SHARED
        echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    on 0 "sudo mkdir -p $SHARED/jaxft && sudo chown \$(id -u) $SHARED $SHARED/jaxft"
    archive=$(mktemp -d)/jaxft.tar
    git archive -o "$archive" HEAD # what is committed
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:/tmp/jaxft.tar" --zone="$ZONE" --worker=0
    on 0 "tar -x -C $SHARED/jaxft -f /tmp/jaxft.tar"
    # the images come with Python 3.10; what uv installs lies on the share, too, so that every host finds it
    on 0 "
        set -e
        cd $SHARED/jaxft
        curl -LsSf https://astral.sh/uv/install.sh | sh
        export UV_PYTHON_INSTALL_DIR=$SHARED/python
        [ -d .venv ] || ~/.local/bin/uv venv --python 3.12
        ~/.local/bin/uv pip install -e '.[tpu]'"
    ;;
run)
    # a service: it outlives this terminal, and a host that shuts down sends it SIGTERM
    on all "
        sudo systemd-run --unit=jaxft --collect --uid=\$(id -u) \
            --working-directory=$SHARED/jaxft --property=KillMode=mixed --property=TimeoutStopSec=600 \
            --setenv=PYTHONUNBUFFERED=1 --setenv=HF_HOME=$SHARED/huggingface \
            --setenv=JAX_COMPILATION_CACHE_DIR=$SHARED/jax_cache \
            $SHARED/jaxft/.venv/bin/python scripts/train.py --config $CONFIG resume_from_checkpoint=true \
            output_dir=$SHARED/runs/$NAME mesh.data=1 mesh.fsdp=-1"
    ;;
logs) on 0 "sudo journalctl -u jaxft -o cat -n 100 -f" ;; # ends with the exit code: status=75 was stopped and saved
stop) on all "sudo systemctl stop jaxft" ;;               # SIGTERM: saves, then ends with 75
delete)
    if gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
        gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force # with its machines
    else
        gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
    fi
    ;;
*)
    sed -n '2,/^set /{/^#/p;}' "$0"
    exit 2
    ;;
esac

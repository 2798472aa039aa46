#!/usr/bin/env bash
# A TPU slice on GKE through xpk (pip install xpk), which writes the JobSet. Steps, in order:
#
#     export PROJECT=my-project IMAGE=us-docker.pkg.dev/my-project/jaxft/jaxft:tpu   # from configs/launch/Dockerfile
#     configs/launch/gke_xpk.sh create           # a cluster with one slice, a share at /shared; SPOT=1 for spot
#     configs/launch/gke_xpk.sh run              # starts; after a stop or an end it goes on
#     configs/launch/gke_xpk.sh stop             # takes the job away, pods get SIGTERM; also: delete, of the cluster
#
# Machines  v6e-16: 16 chips on 4 nodes, a few CPU nodes of the cluster, and 1 TB of Filestore
# Output    [XPK] Follow your workload here: https://console.cloud.google.com/...      (run)
#           quickstart/train.jsonl: messages (detected by messages) -> chat template   (the log of pod 0)
set -euo pipefail

CONFIG=${CONFIG:-configs/quickstart.yaml}
NAME=${NAME:-jaxft}
CLUSTER=${CLUSTER:-jaxft}
ZONE=${ZONE:-us-east5-b}
TYPE=${TYPE:-v6e-16}
capacity=--on-demand
[ -z "${SPOT:-}" ] || capacity=--spot
where=(--cluster="$CLUSTER" --project="${PROJECT:?set PROJECT}" --zone="$ZONE")

case "${1:-}" in
create)
    xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices=1 "$capacity" \
        --enable-gcpfilestore-csi-driver
    xpk storage create shared "${where[@]}" --type=gcpfilestore --tier=ZONAL --size=1024 \
        --access-mode=ReadWriteMany --vol=shared --mount-point=/shared --readonly=false --auto-mount=true
    ;;
run)
    # xpk restarts exit codes 42 and 127-255 (a killed process) by itself; 75 is jaxft's own: stopped and saved
    xpk workload create "${where[@]}" --workload="$NAME" --tpu-type="$TYPE" --docker-image="${IMAGE:?set IMAGE}" \
        --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=600 \
        --env=HF_HOME=/shared/huggingface --env=JAX_COMPILATION_CACHE_DIR=/shared/jax_cache \
        --command="cd /app && exec python scripts/train.py --config $CONFIG resume_from_checkpoint=true \
            output_dir=/shared/runs/$NAME mesh.data=1 mesh.fsdp=-1"
    ;;
stop) xpk workload delete "${where[@]}" --workload="$NAME" --force ;;
delete) xpk cluster delete "${where[@]}" ;;
*)
    sed -n '2,/^set /{/^#/p;}' "$0"
    exit 2
    ;;
esac

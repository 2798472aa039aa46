#!/usr/bin/env bash
# Machines that you reach by ssh, without a scheduler. The checkout, with its .venv, lies at the same path on storage
# that all of them share; start this in it:
#
#     HOSTS="node0 node1" configs/launch/hosts.sh        # starts, and goes on after any end
#     kill -TERM PID, or Ctrl-C                          # saves, ends with 75
#
# Machines  those of HOSTS, with all their devices; the first is the coordinator, and the others reach its PORT
# Output    quickstart/train.jsonl: messages (detected by messages) -> chat template
#             1500 examples read, 1500 kept; dropped: 0 too long, 0 with nothing to learn; cut: 0
set -euo pipefail

CONFIG=${CONFIG:-configs/quickstart.yaml}
NAME=${NAME:-jaxft}
PORT=${PORT:-8476}
read -ra hosts <<<"${HOSTS:?set HOSTS to the names of the machines}"

pids=()
for i in "${!hosts[@]}"; do
    ssh -n "${hosts[i]}" "
        cd '$PWD' && echo \$\$ >/tmp/jaxft-$NAME-$i.pid
        export PYTHONUNBUFFERED=1 HF_HOME='$PWD/.cache/huggingface' JAX_COMPILATION_CACHE_DIR='$PWD/.cache/jax'
        export JAX_COORDINATOR_ADDRESS=${hosts[0]}:$PORT JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$i
        exec .venv/bin/python scripts/train.py --config '$CONFIG' resume_from_checkpoint=true \
            output_dir='runs/$NAME' mesh.data=-1 mesh.fsdp=1" &
    pids+=($!)
done

# one process that is told to stop tells the others
told=
trap 'told=1; ssh -n "${hosts[0]}" "kill -TERM \$(cat /tmp/jaxft-$NAME-0.pid)"' INT TERM

status=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    if [ -n "$told" ] && [ "$code" -gt 128 ]; then # the signal ended the waiting, not the process
        told=
        code=0
        wait "$pid" || code=$?
    fi
    [ "$code" -eq 0 ] || status=$code
done
exit "$status"

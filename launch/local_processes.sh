#!/usr/bin/env bash
# Runs several processes on this machine's CPU, as the hosts of a pod do: to try and debug multi-process runs.
#
#     launch/local_processes.sh PROCESSES DEVICES [arguments of zslflax.main …]
#     launch/local_processes.sh 2 2 --config=configs/demo.py --workdir=runs/two --config.steps=20 \
#         --config.optimizer.warmup_steps=5
#
# DEVICES is the number of virtual devices of each process. With DRY_RUN=1 the commands are printed and not run.
set -euo pipefail

if (($# < 3)); then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
processes=$1 devices=$2
shift 2
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# Without this flag, a device may start two collectives in another order than the others, and the run hangs (jaxlib 0.10).
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_enable_concurrency_optimized_scheduler=false"

pids=()
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT # jax handles SIGTERM in multi-process runs
for ((i = 0; i < processes; i++)); do
    command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
        "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i" python -m zslflax.main "$@")
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        printf '\n'
    elif ((i == 0)); then
        "${command[@]}" &
        pids+=($!)
    else
        "${command[@]}" > >(sed "s/^/[$i] /" >&2) 2>&1 &
        pids+=($!)
    fi
done

# The first process that fails ends all of them. The others would wait for it until the heartbeat times out.
for _ in "${pids[@]}"; do
    wait -n
done

# Expect the output of process 0 unchanged, and that of process i on standard error after "[i] ". The exit status is
# that of the first process that failed, or 0. The run equals that of one process with all the devices, up to rounding.

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

# The first signal is passed on as SIGTERM: the run saves and stops, and is waited for. The second one ends it at once.
signals=0 pids=()
# shellcheck disable=SC2329  # the traps below call it
stop() {
    signals=$((signals + 1))
    if ((signals == 1)); then
        echo "${0##*/}: the processes save and stop; once more ends them at once" >&2 || true
        kill -TERM "${pids[@]}" 2>/dev/null || true
    else
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
}
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT # jax handles SIGTERM in multi-process runs
trap stop INT TERM HUP
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
        "${command[@]}" > >(trap '' INT TERM HUP && exec sed -u "s/^/[$i] /" >&2) 2>&1 &
        pids+=($!)
    fi
done

# The first process that fails ends all of them. The others would wait for it until they notice. A run that was asked to
# stop is waited for to its end.
running=${#pids[@]} failed=0
while ((running > 0)); do
    before=$signals status=0
    wait -n || status=$?
    if ((signals > before)); then
        continue # the wait was interrupted
    elif ((status == 127)); then
        break # all have ended
    fi
    running=$((running - 1))
    if ((status != 0)); then
        failed=$((failed ? failed : status))
        if ((signals == 0)); then
            gone=""
            for ((i = 0; i < processes; i++)); do
                kill -0 "${pids[i]}" 2>/dev/null || gone+=" $i"
            done
            reason="has failed with status $status"
            if ((status > 128)); then
                reason="was killed by signal $((status - 128))"
            fi
            echo "${0##*/}: process$gone $reason; the same command goes on from the newest checkpoint" >&2
            break # the others are ended
        fi
    fi
done
exit "$failed"

# Expect the output of process 0 unchanged, and that of process i on standard error after "[i] ". The exit status is
# that of the first process that failed, or 0. The run equals that of one process with all the devices, up to rounding.

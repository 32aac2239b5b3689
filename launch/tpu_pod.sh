#!/usr/bin/env bash
# Trains on a Cloud TPU slice: requests the slice, sets up all its hosts, runs, and resumes after every preemption.
#
#     NAME=r50 ZONE=us-west4-a ACCELERATOR=v5litepod-256 SHARE=10.0.0.2:/share launch/tpu_pod.sh \
#         --config=configs/r50_declutr.py --config.batch_size=16384 --config.eval.batch_size=1024 \
#         --config.data.train='/share/cc3m/{00000..00331}.tar'
#
# NAME         name of the queued resource, of the slice and of the run
# SHARE        NFS export, such as Filestore's, which every host mounts at /share; the workdir is /share/runs/NAME
# ACCELERATOR  type of the slice, v5litepod-256 by default
# RUNTIME      image of the hosts, v2-alpha-tpuv5-lite by default
# PROVISION    --spot by default; --reserved; or empty for on demand
# PROJECT      gcloud's project by default
# POLL         seconds between two requests for the slice's state, 60 by default
#
# The script runs until the training ends: start it in tmux on a small VM. With DRY_RUN=1 the commands are printed and
# not run.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${SHARE:?}"
project=${PROJECT:-$(gcloud config get-value project)}
where=(--project="$project" --zone="$ZONE" --quiet)

run() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

state() { # WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, …; empty if there is no request
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' \
        2>/dev/null || true
}

create() {
    # shellcheck disable=SC2086 # PROVISION may hold several flags, or none
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
        --accelerator-type="${ACCELERATOR:-v5litepod-256}" \
        --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${PROVISION---spot}
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force; }

set_up() {
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:zslflax.tar.gz" "${where[@]}" --worker=all ||
        return 1
    # The images have a Python that is too old for this project; uv installs a newer one.
    on_all_hosts "set -e
mkdir -p zslflax && tar -C zslflax -xzf zslflax.tar.gz && cd zslflax
command -v mount.nfs >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qqy nfs-common; }
sudo mkdir -p /share && { mountpoint -q /share || sudo mount -t nfs $(printf %q "$SHARE") /share; }
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --allow-existing --python 3.12 && ~/.local/bin/uv pip install -e '.[tpu]'"
}

train() { # a process of an earlier start would still hold the chips
    on_all_hosts "pkill -KILL -f '^.venv/bin/python'
cd zslflax && ZSLFLAX_DISTRIBUTED=1 .venv/bin/python -m zslflax.main\
$(printf ' %q' --stopped_status=143 "--workdir=/share/runs/$NAME" "$@")"
}

# The files that git tracks, with local changes, so that the same code runs after every preemption.
repository=$(dirname "$0")/..
archive=$(mktemp --suffix=.tar.gz)
trap 'rm "$archive"' EXIT
git -C "$repository" ls-files -z | tar -C "$repository" --null -T - -czf "$archive"

if [[ -n ${DRY_RUN:-} ]]; then
    create && set_up && train "$@" && delete
    exit
fi

failures=0
while true; do
    now=$(state)
    echo "$(date +%T) $NAME: ${now:-not requested}" >&2
    case $now in
        "") create || sleep "${POLL:-60}" ;;
        ACTIVE)
            if set_up && train "$@"; then
                break
            fi
            sleep "${POLL:-60}" # a preemption shows after a while
            if [[ $(state) == ACTIVE ]] && ((++failures == 3)); then
                echo "the run failed three times on an active slice, which costs money until you run:" >&2
                DRY_RUN=1 delete >&2
                exit 1
            fi
            ;;
        FAILED | SUSPENDED) delete || sleep "${POLL:-60}" ;; # preempted: request it again
        *) sleep "${POLL:-60}" ;;
    esac
done
delete

# Expect the state of the request every minute, some minutes of set-up, then the run's log. A preempted slice is deleted
# and requested again, and the run resumes from its newest checkpoint. At the end the slice is deleted. The run's files
# are in /share/runs/NAME.

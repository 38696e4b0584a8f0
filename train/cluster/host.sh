#!/usr/bin/env bash
# One host of a run of several, with the same command on each, NODE counting from 0 (README.md beside this file):
#
#   HEAD=10.0.0.1 NODE=0 train/cluster/host.sh train/vae.py paper --data.root /data/t1 --out /shared/runs/paper-vad
#
# HEAD       IPv4 address of host 0, as all hosts reach it
# NODE       0 on that host, then 1, 2, …
# NODES      hosts of the run (2)
# PROCESSES  processes a host (one a GPU)
# PORT       a free port of host 0 (29500)
# RUN        name of the run, the same on all hosts (decovae)
# RESTARTS   times that a failed run is started again (3)
# INTERFACE  network interface to the other hosts (the one that leads to HEAD)
# ADDRESS    this host's address on it
# PYTHON     interpreter (python)
#
# SIGUSR1, SIGTERM and Ctrl-C stop the run with a checkpoint, which has TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (150).
set -euo pipefail

: "${HEAD:?give the address of the first host}" "${NODE:?give 0 on the first host, 1 on the second}"
NODES="${NODES:-2}" PORT="${PORT:-29500}" RUN="${RUN:-decovae}" RESTARTS="${RESTARTS:-3}"

# A host name often leads to 127.0.1.1 or to a slow interface, so both are told: gloo and NCCL, and torchrun.
if [[ -z "${INTERFACE:-}" ]]; then
    if (( NODE == 0 )); then
        INTERFACE="$(ip -4 -o addr show to "$HEAD" | awk '{ print $2; exit }')"
    else
        INTERFACE="$(ip -4 -o route get "$HEAD" | sed -n 's/.* dev \([^ ]*\).*/\1/p')"
    fi
    : "${INTERFACE:?no interface leads to HEAD; give INTERFACE}"
fi
ADDRESS="${ADDRESS:-$(ip -4 -o addr show dev "$INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$INTERFACE}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$INTERFACE}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# A store for each start: the one that torchrun would keep fails when hosts change places at a restart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# From the signal to SIGKILL. torch 2.10 knows no such setting, and waits 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"

# torchrun would die of SIGUSR1 and leave its processes behind. TORCHELASTIC_SIGNALS_TO_HANDLE is no way to tell it: it
# writes that variable itself, from this option.
(( NODE == 0 )) && is_host=true || is_host=false
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN" --rdzv-conf "is_host=$is_host" \
    --local-addr "$ADDRESS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"

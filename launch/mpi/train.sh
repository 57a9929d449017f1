#!/usr/bin/env bash
# mpirun with Open MPI or MPICH: one process a rank.
#
#   RANKS=16 HOSTFILE=hosts.txt launch/mpi/train.sh CONFIG [key.sub=value ...]
#
# MASTER_ADDR need not be exported: with mpi4py installed the ranks find the host of rank 0 through
# MPI. Without mpi4py export MASTER_ADDR and MASTER_PORT (exported variables are passed on below).
#
#   RANKS           processes, all hosts together (default: 1)
#   HOSTFILE        hosts; Open MPI: "node1 slots=8" a line, MPICH: "node1:8" (default: this host)
#   MPIRUN          which mpirun (default: the first of PATH)
#   MPIRUN_OPTIONS  more options, such as Open MPI's choice of interface:
#                   --mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0
set -euo pipefail
CONFIG=${1:?usage: launch/mpi/train.sh CONFIG [key.sub=value ...]}
shift
MPIRUN=${MPIRUN:-mpirun}
options=(-n "${RANKS:-1}")
pass=(OMP_NUM_THREADS MASTER_ADDR MASTER_PORT NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG)
# flight recorder of collectives: see "When a run hangs" in docs/launchers.md
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
pass+=(TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_DUMP_TEMP_FILE)
if "$MPIRUN" --version | grep -Eq "Open ?(MPI|RTE)"; then
    # ranks are threads of a training program: no binding to one core each
    options+=(--bind-to none --oversubscribe ${HOSTFILE:+--hostfile "$HOSTFILE"})
    for name in "${pass[@]}"; do [ -z "${!name:-}" ] || options+=(-x "$name"); done
else
    options+=(${HOSTFILE:+-f "$HOSTFILE"}) # passes the whole environment on by itself
fi
cd "$(dirname "$0")/../.."
# shellcheck disable=SC2086
exec "$MPIRUN" "${options[@]}" ${MPIRUN_OPTIONS:-} "${PYTHON:-python}" launch/train.py --config "$CONFIG" "$@"

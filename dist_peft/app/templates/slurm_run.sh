# Body of the job scripts, after their #SBATCH lines: launch/slurm/*.sbatch of the repository source
# it, those that dist-peft init writes contain it.
#
#   sbatch launch/slurm/fsdp2_nodes.sbatch CONFIG [key.sub=value ...]
#
# Submit from the root of the repository (or set DIST_PEFT_ROOT). PYTHON names the interpreter
# (default: python of the submitting shell's PATH), PROGRAM what it runs (launch/train.py; without the
# repository "-m dist_peft train"). Options added by a script are in ENGINE.

# -- signals --------------------------------------------------------------------------------------
# SLURM signals this shell before the time limit (--signal=B:USR1@SECONDS), at once where --time is
# shorter than SECONDS, and sends TERM to a job that is preempted or cancelled. Both are passed on to
# srun and so to the ranks, which finish their step or their piece of the start-up, write a checkpoint
# where there is progress, and exit with 75. --signal=USR1@SECONDS, without B:, goes to the ranks
# directly. The traps come first: without them a signal would end the job for good.
step= early=
pass_on() { if [ -n "$step" ]; then kill -"$1" "$step" 2>/dev/null; else early=$1; fi; }
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

CONFIG=${1:?usage: sbatch SCRIPT CONFIG [key.sub=value ...]}
shift
cd "${DIST_PEFT_ROOT:-$SLURM_SUBMIT_DIR}" || exit 1

# -- rendezvous address ------------------------------------------------------------------------
# Rank 0 runs on the first host of the allocation. dist_peft finds both values by itself; they are
# set here to be seen, and to be changed where a node's name is not the address of its fast network.
: "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# -- network ------------------------------------------------------------------------------------
# The defaults are right on most clusters. Uncomment the lines that yours needs:
# export NCCL_SOCKET_IFNAME=ib0       # interface of NCCL's bootstrap; =eth0 exact, ^docker,lo not these
# export GLOO_SOCKET_IFNAME=ib0       # the same for CPU tensors; dist_peft sets it from the route
# export NCCL_IB_HCA=mlx5_0,mlx5_1    # InfiniBand adapters to use; default: all that are up
# export NCCL_IB_GID_INDEX=3          # RoCE v2 often needs it (show_gids)
# export NCCL_IB_TIMEOUT=22           # 4.096 us * 2^22 = 17 s before a lost packet is an error
# export NCCL_IB_DISABLE=1            # no InfiniBand: plain sockets, to find out whether it is to blame
# export NCCL_DEBUG=INFO              # which interface and adapter NCCL took; WARN in daily use

# -- hangs --------------------------------------------------------------------------------------
# A run without progress for engine.stall_seconds (300) ends by itself, writing stacks and torch's
# flight recorder to the run directory (docs/launchers.md). torch writes the recorder itself when a
# collective passes engine.timeout_minutes: to /tmp on each node, or where the last line says.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} # collectives kept, a few hundred bytes each
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# export TORCH_FR_DUMP_TEMP_FILE=runs/NAME/nccl_trace_ # the rank is appended

# -- run ----------------------------------------------------------------------------------------
# srun starts the workers on each node, one task a rank. If one dies, all end (--kill-on-bad-exit);
# a container goes into this line (uncomment one):
#   pyxis:     srun --container-image=IMAGE.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD" ...
#   apptainer: srun ... apptainer exec --nv --bind "$PWD" IMAGE.sif python launch/train.py ...
# A rank that stops on a signal creates this file: the others are killed with its exit, and srun reports
# their 137 (128 + KILL), the largest of all exit codes.
export DIST_PEFT_STOP_FILE=${DIST_PEFT_STOP_FILE:-$PWD/.dist_peft-stopped.$SLURM_JOB_ID}
rm -f "$DIST_PEFT_STOP_FILE"
code=75
if [ -z "$early" ]; then
    srun --kill-on-bad-exit=1 \
        "${PYTHON:-python}" ${PROGRAM:-launch/train.py} --config "$CONFIG" ${ENGINE:-} "$@" &
    step=$!
    [ -z "$early" ] || kill -"$early" $step
    wait $step
    code=$?
    while kill -0 $step 2>/dev/null; do # a trapped signal ends "wait" early
        wait $step
        code=$?
    done
fi

if [ "$code" = 137 ] && [ -e "$DIST_PEFT_STOP_FILE" ]; then code=75; fi
rm -f "$DIST_PEFT_STOP_FILE"

# 75: stopped on the signal. The same job goes back to the queue, and the same command resumes from
# save.dir (resume: auto): no job array and no chain of dependent jobs. 138 and 143 (128 + USR1, TERM)
# mean the same: the signal came before srun or Python could note it. A job that was cancelled ends in
# the same way, but is no longer RUNNING and stays cancelled. Where --time is too short for the start,
# no restart would get further: there is a limit.
case $code in 75 | 138 | 143) ;; *) exit "$code" ;; esac
[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$code"
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${DIST_PEFT_MAX_RESTARTS:-100}" ]; then
    echo "stopped on a signal after $SLURM_RESTART_COUNT restarts (DIST_PEFT_MAX_RESTARTS): not requeued"
    exit "$code"
fi
echo "stopped on a signal (exit code $code); requeueing job $SLURM_JOB_ID"
scontrol requeue "$SLURM_JOB_ID"
exit "$code"

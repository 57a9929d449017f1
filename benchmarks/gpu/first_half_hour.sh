#!/usr/bin/env bash
# The first half hour on a machine with a GPU: does it compute the same, how fast, in how much memory?
#
#   benchmarks/gpu/first_half_hour.sh [--dry-run] [--out DIR] [--only STEP ...]
#
# Steps: environment collectives decode roofline tests kill-rank shape-8b shape-70b shape-65b shape-14b shape-32b. Each
# has a time limit, writes OUT/STEP.json (but for tests) and OUT/STEP.log, and does not stop the others. OUT is
# benchmarks/results/gpu unless --out says otherwise. No network is needed. --dry-run runs all of it at tiny sizes
# on the CPU, in 6 minutes of one core; of the tests for a GPU it only makes sure that they are found.
# Exit code: the number of steps that failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

dry=() out="" only=()
while (($#)); do
  case $1 in
    --dry-run) dry=(--dry-run) ;;
    --out) out=$2; shift ;;
    --only) shift; only=("$@"); break ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift
done
if ((${#dry[@]})); then
  out=${out:-$(mktemp -d)}
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
out=${out:-benchmarks/results/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD/benchmarks/gpu:$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}" \
  TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=${PYTHON:-python}
failed=0

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  if ((${#only[@]})) && [[ ! " ${only[*]} " == *" $name "* ]]; then return; fi
  if ((${#dry[@]})); then limit=$((limit * 5)); fi # imports alone take minutes on a busy CPU
  local start=$SECONDS
  rm -f "$out/$name.json" # an earlier run's
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  if ((code == 0)) && [[ $name != tests && ! -s $out/$name.json ]]; then code="no result"; fi
  printf '%-12s %s  %4d s\n' "$name" "$([[ $code == 0 ]] && echo ok || echo "FAILED ($code), see $out/$name.log")" \
    $((SECONDS - start))
  [[ $code == 0 ]] || failed=$((failed + 1))
}

step environment 60 "$python" benchmarks/gpu/environment.py --out "$out" "${dry[@]}"
step collectives 180 "$python" benchmarks/gpu/collectives.py --out "$out" "${dry[@]}"
step decode 180 "$python" benchmarks/gpu/decode_bits.py --out "$out" "${dry[@]}"
step roofline 180 "$python" benchmarks/gpu/decode_roofline.py --out "$out" "${dry[@]}"
collect=()
if ((${#dry[@]})); then collect=(--collect-only); fi # fails if there is none
step tests 420 "$python" -m pytest tests -m gpu -q -p no:cacheprovider "${collect[@]}"
step kill-rank 240 "$python" benchmarks/gpu/kill_rank.py --out "$out" "${dry[@]}"
shape() { # NAME BASE SECONDS SIDE...
  local name=$1 base=$2 limit=$3; shift 3
  step "$name" "$limit" "$python" benchmarks/gpu/shape_step.py --base "$base" --out "$out" "${dry[@]}" --sides "$@"
}
shape shape-8b llama-3.1-8b 420 nf4 bf16 peft
shape shape-70b llama-3.1-70b 420 nf4
shape shape-65b llama-65b 420 nf4
shape shape-14b sizes-14b 240 nf4
shape shape-32b sizes-32b 300 nf4
"$python" benchmarks/gpu/summary.py --out "$out" "${dry[@]}" || failed=$((failed + 1))
exit "$failed"

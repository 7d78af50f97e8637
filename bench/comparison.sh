#!/usr/bin/env bash
# The full comparison behind docs/benchmarks.md, resumable cell by cell:
#
#     bench/comparison.sh main demo runs/mini                      # five seeds: some three hours on two cores
#     bench/comparison.sh orderings demo runs/mini-orderings       # the paper's, three seeds
#     bench/comparison.sh rest demo runs/mini                      # every other method, three seeds
#     bench/comparison.sh main bench/mini-b.yaml runs/mini-b       # the second world: main and rest
#
# All that is there so far: marble compare --out runs/mini
set -euo pipefail
what=$1 config=$2 out=$3
marble=${MARBLE:-.venv/bin/marble}
exact=balance.refresh=1,balance.smooth=gram,balance.decay=0.9 # solvers that are not the paper's, in every update

main=(marble published weighted-sum standardised-sum ppo uniform)
orderings=(
  published unnormalised published-uniform published-every published-first:optimizer.micro_batch=9
  published:balance.decay=0.1 published:balance.decay=0.3 published:balance.decay=0.5 published:balance.decay=0.9
  published:balance.refresh=5 published:balance.refresh=20
)
rest=(
  even=marble:balance.visits=even sum-visits=standardised-sum:balance.visits=importance
  every=marble:balance.refresh=1,balance.decay=0.9
  gdpo reward-dropout sequential awm specialists
  hand=weighted-sum:rewards.3.weight=2,rewards.4.weight=2
  hand-scaled=weighted-sum:rewards.0.weight=20,rewards.1.weight=20,rewards.2.weight=20
  tuned-ppo=ppo:objective.clip=6e-4,objective.kl=0.0,optimizer.lr=2e-3
)
for solver in closed-loop mgda upgrad dualproj cagrad nash-mtl pcgrad imtl-g aligned-mtl; do
  rest+=("$solver=$solver:$exact")
done

case $what in
  main) arms=("${main[@]}") seeds=(0 1 2 3 4) ;;
  orderings) arms=("${orderings[@]}") seeds=(0 1 2) ;;
  rest) arms=("${rest[@]}") seeds=(0 1 2) ;;
  *) echo "usage: $0 main|orderings|rest CONFIG OUT" >&2 && exit 2 ;;
esac
[ "$config" != demo ] || set -- # the demo's is what compare takes by itself
exec "$marble" compare "${@:2:1}" --methods "${arms[@]}" --seeds "${seeds[@]}" --jobs 2 --out "$out"

#!/usr/bin/env bash
# The table of strategies: every variant below over two orders of the five tasks and three seeds, compared pair by pair
# with the naive sequence. Prepare the ground first (prepare.py). Runs that are there already are not repeated.
#   bench/continual/table.sh ESPALIER [CACHE] [JOBS]      -> CACHE/table/sweep.md, sweep.json
set -euo pipefail
espalier=$(realpath "${1:?the program}") cache=${2:-${ESP_BENCH_CACHE:-$HOME/.cache/espalier}/continual} jobs=${3:-2}
cd "$cache"
variants=(
  'naive:'
  'joint: continual.policy=joint'
  'oracle: continual.policy=new_per_task; continual.strategy=bank; continual.bank.selector=oracle'
  'bank-nearest: continual.policy=new_per_task; continual.strategy=bank; continual.bank.selector=nearest'
  'ncm: adapter.type=none; continual.strategy=ncm'
  'replay-1: continual.strategy=replay; continual.replay.buffer=1%'
  'replay-5: continual.strategy=replay; continual.replay.buffer=5%'
  'o-lora: adapter.type=o-lora; adapter.orthogonal_lambda=0.05'
  'ewc: continual.strategy=ewc; continual.ewc.weight=30; continual.ewc.samples=128'
  'l2: continual.strategy=l2; continual.l2.weight=0.03'
  'lwf: continual.strategy=lwf; continual.lwf.kl=1; continual.lwf.temperature=2'
  'gere: continual.strategy=gere; continual.gere.data.path=general.jsonl; continual.gere.loss=margin; continual.gere.weight=1; continual.gere.batch=4'
  'full: adapter.type=full; optim.lr=5e-4'
  'osf: adapter.type=full; optim.lr=5e-4; continual.strategy=osf; continual.osf.retain=0.5'
  'i-lora: continual.strategy=ilora; continual.ilora.buffer=5%; continual.ilora.batch=4'
  'migu: continual.strategy=migu; continual.migu.threshold=0.7'
)
# The general samples of gere: the first texts of what the base was trained on.
head -n 200 corpus.jsonl >general.jsonl
list=$(printf '%s | ' "${variants[@]}")
exec "$espalier" sweep sequence.yaml --out table --jobs "$jobs" --seeds 1,2,3 \
  --order agnews,dbpedia,trec6,clinc_domains,yelp --order yelp,clinc_domains,trec6,dbpedia,agnews \
  --set "${list% | }"

#!/usr/bin/env bash
# Makes the example plans again: plans/examples.sh CONFIGS ROUTING
#   CONFIGS   a folder with NAME/config.json of each model (hf download ORG/NAME config.json --local-dir CONFIGS/NAME)
#   ROUTING   a folder with deepseek_v2_lite.npz (per-token experts from the logs of github.com/deepseek-ai/ESFT) and gpt_oss_20b.npz
#             (counts per prompt from github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting)
# Profiles and configurations go to /tmp/remoe-profiles, so that the paths in the plans do not depend on who makes them.
set -euo pipefail
cd "$(dirname "$0")/.."
routing=$2 bin=.venv/bin profiles=/tmp/remoe-profiles
configs=$profiles/configs
for config in "$1"/*/config.json; do
  folder=$configs/$(basename "$(dirname "$config")")
  mkdir -p "$folder"
  cp "$config" "$folder/"
done

profile() { # NAME, routing file, hardware description
  $bin/remoe profile import "$configs/$1" "$2" --latency-from "$3" --yes -o "$profiles/$1-$3"
}
synthetic() { # NAME: nobody published routing of this model, so it is drawn (Zipf, exponent 1)
  $bin/python docs/measure/synthetic_routing.py "$configs/$1/config.json" -o "$profiles/$1.npz" --zipf 1 --tokens 8000 --seed 0
}
plan() { # profile, plan, further options
  local made=$1 name=$2
  shift 2
  $bin/remoe plan "$profiles/$made" --yes -o "plans/$name.json" "$@"
}

# The demo model on this machine: really profiled, so the figures are this machine's.
$bin/remoe profile "$($bin/python -c 'from remoe_cli.model.demo import demo_model; print(demo_model("float32"))')" \
  --data remoe_cli/demo_data/prompts.jsonl --limit 64 --max-new-tokens 16 --yes -o $profiles/demo
plan demo demo-local

profile DeepSeek-V2-Lite "$routing/deepseek_v2_lite.npz" paper
plan DeepSeek-V2-Lite-paper deepseek-v2-lite-paper --catalog paper --n-in 125 --n-out 200
profile DeepSeek-V2-Lite "$routing/deepseek_v2_lite.npz" g5.xlarge
plan DeepSeek-V2-Lite-g5.xlarge deepseek-v2-lite-aws --catalog aws-us-east-1 --n-in 125 --n-out 200 --requests-per-hour 20

profile gpt-oss-20b "$routing/gpt_oss_20b.npz" g6e.xlarge
plan gpt-oss-20b-g6e.xlarge gpt-oss-20b-aws --catalog aws-us-east-1 --n-in 125 --n-out 200 --requests-per-hour 20

for name in Mixtral-8x7B-v0.1 Qwen3-30B-A3B DeepSeek-V3; do
  synthetic $name
  profile $name $profiles/$name.npz g6e.xlarge
done
aws() { # name, further options
  local name=$1
  shift
  plan $name-g6e.xlarge "$(echo $name | tr '[:upper:]' '[:lower:]')-aws-synthetic" --catalog aws-us-east-1 --n-in 125 --n-out 200 \
    --requests-per-hour 20 --time-limit 180 "$@"
}
aws Mixtral-8x7B-v0.1
aws Qwen3-30B-A3B
aws DeepSeek-V3 --cold-share 0 # its functions are kept warm: a cold request would take longer than the 8 minutes that an endpoint has

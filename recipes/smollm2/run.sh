#!/bin/sh
# The drafter of SmolLM2-135M-Instruct, by the commands that anyone would use; then its figures.  One GPU.
#
#     recipes/smollm2/run.sh MODEL DATA FOLDER [MINUTES [SHARE]]
#
# MODEL: a folder or Hub id; DATA: the files that README.md names; FOLDER: where everything is written; MINUTES: of
# training; SHARE: of the prompts.  A second run continues the first.
set -eu
model=$1 data=$2 folder=$3 minutes=${4:-4.2} share=${5:-1}
[ -e "$folder/prompts.jsonl" ] || python -m recipes.smollm2.prompts --data "$data" --output "$folder" --share "$share"
redrafter distill --model "$model" --prompts "$folder/prompts.jsonl" --output "$folder/answers.jsonl" \
    --temperature 0 --temperature 1 --max-new-tokens 256 --max-length 1536 --batch-size 256
redrafter train --model "$model" --data "$folder/answers.jsonl" --output "$folder/drafter" \
    --minutes "$minutes" --packing --batch-size 16 --learning-rate 1e-3 --overwrite --license apache-2.0 \
    --cross-entropy 0 --kl 0.5 --coupled 1 --decay 0.8 \
    --draft-vocabulary 10240 --blocks 3 --context-positions 2 --beam-length 5 --beam-width 10 --node-budget 32
redrafter eval --model "$model" --drafter "$folder/drafter" --prompts "$folder/held_out.jsonl" --by category

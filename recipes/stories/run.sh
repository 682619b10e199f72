#!/bin/sh
# A drafter for a small story model, on a CPU, by the commands that anyone would use; then the figures.
#
#     recipes/stories/run.sh MODEL FOLDER TOKENS
#
# MODEL: a folder or hub id; FOLDER: where everything is written; TOKENS: new tokens of each story it learns from.
set -eu
model=$1 folder=$2 tokens=$3
python "$(dirname "$0")/prompts.py" "$folder"
redrafter distill --model "$model" --prompts "$folder/prompts.jsonl" --output "$folder/own.jsonl" \
    --max-new-tokens "$tokens" --batch-size 64
redrafter train --model "$model" --data "$folder/own.jsonl" --output "$folder/drafter" \
    --epochs 6 --batch-size 16 --learning-rate 2e-3
redrafter info "$folder/drafter"
redrafter check --model "$model" --drafter "$folder/drafter" --prompts "$folder/held_out.jsonl" --max-new-tokens 128

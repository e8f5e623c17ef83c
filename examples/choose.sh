#!/usr/bin/env bash
# Multiple choice: which answer the model finds likeliest, and how often it is the right one.
# usage: examples/choose.sh model.gguf [questions.jsonl]
# Each line of the input has "prompt", "choices" and, handed on, "id" and "answer". The choices of a prompt share its computation.
set -euo pipefail  # a failure anywhere in the pipe is the script's
[ $# -ge 1 ] || { echo "usage: $0 model.gguf [questions.jsonl]" >&2; exit 2; }
kqprefill score -q "$1" "${2:-examples/questions.jsonl}" |
    jq -c '{id, best: .best_per_token, right: (.best_per_token == .answer)}' |
    jq -cs 'if length == 0 then empty else .[], {questions: length, accuracy: ((map(select(.right)) | length) / length)} end'

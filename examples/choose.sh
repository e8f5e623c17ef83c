#!/bin/sh
# Multiple choice: which answer the model finds likeliest, and how often it is the right one.
# usage: examples/choose.sh model.gguf [questions.jsonl]
# Each line of the input has "prompt", "choices" and, handed on, "id" and "answer". The choices of a prompt share its computation.
set -e
kqprefill score -q "$1" "${2:-examples/questions.jsonl}" |
    jq -c '{id, best: .best_per_token, right: (.best_per_token == .answer)}' |
    jq -cs '.[], {questions: length, accuracy: ((map(select(.right)) | length) / ([length, 1] | max))}'

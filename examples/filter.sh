#!/usr/bin/env bash
# Keep the texts whose perplexity is below a bound: a corpus filter that streams, for corpora of any length.
# usage: examples/filter.sh model.gguf bound <texts.jsonl >kept.jsonl
# `score` hands keys that it does not know on, so the text goes along under a name of its own. Bad lines are left out: status 3
# says that there were some, as it does of `score`.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 model.gguf bound <texts.jsonl >kept.jsonl" >&2; exit 2; }
jq -c '. + {text: .prompt}' |
    kqprefill score -q "$1" --on-error skip |
    jq -c --argjson bound "$2" 'select(.error == null and .perplexity != null and .perplexity < $bound) | {id, text, perplexity}'

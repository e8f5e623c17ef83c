"""A teacher's log-probabilities for distillation: of each place of each text the K likeliest tokens, as one .npz.

usage: python examples/distil.py model.gguf texts.jsonl teacher.npz [K]

Arrays: tokens [N] of all texts one after another, starts [texts], and for each scored place (all tokens but each text's
first) top_tokens and top_logprobs [N - texts, K]. Full logits of one text: kqprefill run … --logits all.safetensors
--all-positions.
"""

import json
import sys

import numpy as np

import kqprefill

model_path, texts_path, out_path, *rest = sys.argv[1:]
top = int(rest[0]) if rest else 32

with open(texts_path, encoding="utf-8") as lines:
    texts = [json.loads(line)["prompt"] for line in lines if line.strip()]

with kqprefill.load(model_path) as model:
    ids = [model.tokenize(text) for text in texts]
    scored = list(model.score(ids, top=top))  # packed into batches; the [T, V] logits stay on the GPU

np.savez(
    out_path,
    tokens=np.concatenate(ids).astype(np.int32),
    starts=np.cumsum([0, *map(len, ids)][:-1]),
    top_tokens=np.concatenate([s.top_tokens for s in scored]),
    top_logprobs=np.concatenate([s.top_logprobs for s in scored]).astype(np.float16),
)
print(f"{len(texts)} texts, {sum(map(len, ids))} tokens, {top} likeliest each: {out_path}")

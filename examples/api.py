"""The Python API in a page. usage: python examples/api.py [model.gguf]"""

import sys

import kqprefill

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-qwen3.gguf"

with kqprefill.load(path) as model:  # backend="auto", device=0, vram=None ("8G", "75%"), max_tokens=None
    prompt = model.tokenize("The capital of Italy is")

    result = model.prefill(prompt, logits="last")  # "all": every position's, float32 [T, V]
    print("next token:", result.token, repr(model.token_text(result.token)), f"log-probability {result.logprob:.4f}")
    for token, logprob in result.likeliest(3):
        print(f"  {token} {model.token_text(token)!r} {logprob:.4f}")

    # Log-probabilities of many prompts, packed into batches: records as in `kqprefill score`'s lines, or token ids.
    records = [prompt, {"prompt": "The capital of Italy is", "choices": [" Rome.", " Paris."]}]
    whole, choices = model.score(records)
    print(
        f"the prompt: {whole.n_tokens} tokens, log-probability {whole.logprob:.4f}, perplexity {whole.perplexity:.2f}"
    )
    print("the likelier choice:", max(range(len(choices)), key=lambda i: choices[i].logprob))

    # One long prompt in pieces, over a key/value cache: the same bits on a GPU.
    cache = model.new_cache(max_tokens=len(prompt))
    for piece in (prompt[:5], prompt[5:]):
        last = model.prefill(piece, cache=cache)
    print("in pieces:", last.token, "after", cache.length, "tokens")

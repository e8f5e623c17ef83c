"""Files in which llama.cpp keeps the layers' states of a sequence: bytes only, whatever computes or decodes.

Read in llama.cpp's src/llama-context.cpp, llama-kv-cache.cpp and llama-memory-recurrent.cpp, and tried against its
files (tests/test_handover.py). docs/handover.md says what they are for.
"""

"""Files in which llama.cpp keeps the layers' states of a sequence: bytes only, whatever computes or decodes.

Read in llama.cpp's src/llama-context.cpp, llama-kv-cache.cpp and llama-memory-recurrent.cpp, and tried against its
files (tests/test_handover.py). docs/handover.md says what they are for.
"""

FORMATS = "ggsq-4", "ggsq-3", "ggsq-2", "ggsn-11", "ggsn-10"  # kinds of files with their versions, the newest first
TYPES = "f16", "f32", "q8_0"  # of the numbers in them

"""SentencePiece's BPE as Llama, Mistral, Gemma and Phi 3 use it: neighbours are joined to the piece of the highest score until none is left.

Our own, since no library breaks ties as ggml does (llm_tokenizer_spm): the leftmost of equals.
"""

from heapq import heappop, heappush

_SPACE = "\u2581"


class SentencePieces:
    """pieces: the vocabulary; scores: of each piece."""

    def __init__(self, pieces, scores):
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._scores = scores
        self._bytes = [self._ids.get(f"<0x{byte:02X}>", self._ids.get(chr(byte))) for byte in range(256)]
        self._unknown = self._ids.get("<unk>")

    def encode(self, text):
        """Token ids; characters without a piece become their UTF-8 bytes' tokens."""
        symbols = list(text.replace(" ", _SPACE))  # "" once it has been joined to the one before
        before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
        heap, ids, scores = [], self._ids, self._scores

        def consider(left, right):
            if left >= 0 and right >= 0:
                joined = symbols[left] + symbols[right]
                token = ids.get(joined)
                if token is not None:
                    heappush(heap, (-scores[token], left, right, len(joined)))

        for right in range(1, len(symbols)):
            consider(right - 1, right)
        while heap:
            _, left, right, length = heappop(heap)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of them has been joined to another since
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = following = after[right]
            if following >= 0:
                before[following] = left
            consider(before[left], left)
            consider(left, following)
        found = []
        for symbol in symbols:
            if symbol:
                token = ids.get(symbol)
                found += [token] if token is not None else self._of_bytes(symbol)
        return found

    def _of_bytes(self, symbol):
        tokens = (self._bytes[byte] for byte in symbol.encode())
        return [token for token in (self._unknown if t is None else t for t in tokens) if token is not None]

"""One self-contained page of scored texts: tokens shaded by how surprising they were, the likeliest ones on hover."""

from __future__ import annotations

from bisect import bisect
from html import escape
import json
from typing import TYPE_CHECKING, BinaryIO

from ..terminal import shown, shown_json
from .common import how_it_ran

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.scoring import Item, Scored

# Nats of surprisal (-log-probability) at which the next shade begins.
_SHADES = 0.1, 0.5, 1, 2, 3, 4.5, 6, 8, 11
_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #767676; --line: #ddd; --hue: 24; \
--from: 97%; --step: -4.6%; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #16181b; --ink: #e8e8e8; --faint: #9a9a9a; --line: #333; \
--from: 12%; --step: 3.6%; }} }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink); font: \
16px/1.7 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: .85rem; font-weight: 600; margin: 1.6rem 0 .3rem; }}
small, .p {{ color: var(--faint); font-weight: 400; }}
.x {{ border-top: 1px solid var(--line); padding-top: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; font: \
15px/1.9 ui-monospace, monospace; }}
.t {{ border-radius: 3px; color: var(--ink); background: hsl(var(--hue) 90% calc(var(--from) + var(--n) * \
var(--step))); }}
.t:hover {{ outline: 2px solid var(--ink); }}
{shades}
#tip {{ position: absolute; display: none; z-index: 1; padding: .5rem .7rem; border-radius: 6px; background: \
var(--ink); color: var(--paper); font: 13px/1.5 ui-monospace, monospace; white-space: pre; pointer-events: none; }}
</style>
<h1>{title}</h1>
<p><small>Shaded by surprisal in nats (minus the natural logarithm of the probability): {legend}. Hover for the \
likeliest tokens; grey text was given, not scored.</small></p>
"""
_TAIL = """<div id="tip"></div>
<script>
const tip = document.getElementById("tip");
document.addEventListener("mouseover", event => {{
  const token = event.target.closest(".t[data-p]");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  const percent = p => (100 * Math.exp(p)).toPrecision(3).padStart(9) + " %";
  const rows = JSON.parse(token.dataset.a).map(([text, p]) => percent(p) + "  " + text);
  const text = JSON.stringify(token.textContent).replace(/\\p{{Cf}}/gu, c => "\\\\u" + c.charCodeAt().toString(16));
  tip.textContent = text + "\\nlog-probability " + token.dataset.p + "\\n" + \
rows.join("\\n");
  const box = token.getBoundingClientRect(), left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  tip.style.left = scrollX + Math.max(8, left) + "px";
  tip.style.top = scrollY + box.bottom + 4 + "px";
}});
</script>
<p><small>{summary}</small></p>
</html>
"""


class Page:
    """Written to a binary file as results come. model: an open Model, for its vocabulary; top: alternatives shown."""

    def __init__(self, file: BinaryIO, model: Model, name: str, top: int) -> None:
        self._file, self._text, self._top = file, model.token_text, top
        self._ran = how_it_ran(model)
        self._records = self._tokens = 0
        edges = [0, *_SHADES]
        legend = " ".join(f'<span class="t s{i}">&nbsp;≥&nbsp;{edge:g}&nbsp;</span>' for i, edge in enumerate(edges))
        shades = " ".join(f".s{i} {{ --n: {i}; }}" for i in range(len(edges)))
        self._write(_HEAD.format(title=escape(f"kqprefill score: {shown(name)}"), shades=shades, legend=legend))

    def add(self, index: int, item: Item, several: list[Scored]) -> None:
        """One record: its Item, and a Scored for each of its sequences."""
        for number, (ids, scored) in enumerate(zip(item.sequences, several)):
            given = ids[: len(ids) - scored.n_tokens]
            figures = "nothing to score"
            if scored.n_tokens:
                mean, perplexity = scored.mean_logprob, scored.perplexity
                figures = f"{scored.n_tokens} tokens, mean log-probability {mean:.4f}, perplexity {perplexity:.4g}"
            which = f"record {index}" + (f", choice {number}" if item.choices else "")
            # Each token is isolated (<bdi>): none can turn the order of what stands beside it round.
            before = "".join(f"<bdi>{escape(self._name(token))}</bdi>" for token in given)
            self._write(f'<h2>{which} <small>{figures}</small></h2>\n<div class="x"><span class="p">{before}</span>')
            for place, token in enumerate(scored.tokens.tolist()):
                self._write(self._token(scored, place, token))
            self._write("</div>\n")
            self._tokens += scored.n_tokens
        self._records += 1

    def _token(self, scored: Scored, place: int, token: int) -> str:
        logprob = float(scored.logprobs[place])
        top = zip(scored.top_tokens[place, : self._top].tolist(), scored.top_logprobs[place, : self._top].tolist())
        others = json.dumps(
            [[shown_json(json.dumps(self._name(t), ensure_ascii=False)), round(p, 4)] for t, p in top],
            ensure_ascii=False,
        )
        text = self._name(token)
        visible = "↵\n" if text == "\n" else text
        shade, alternatives = bisect(_SHADES, -logprob), escape(others)
        return f'<bdi class="t s{shade}" data-p="{logprob:.4f}" data-a="{alternatives}">{escape(visible)}</bdi>'

    def _name(self, token: int) -> str:
        text = self._text(token)
        return f" {token}" if text is None else text

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "replace"))

    def end(self) -> None:
        self._write(_TAIL.format(summary=f"{self._records} records, {self._tokens} scored tokens; {escape(self._ran)}"))

// A text that comes in pieces with its tokens: the text is shown as it is, and coloured as far as tokens spell it.

import { h } from "./dom.js";
import { inspectable } from "./inspect.js";
import { nats, percent, spoken, surpriseBin, visible } from "./scale.js";

/**
 * Text in an element. Tokens are OpenAI's `{token, logprob, bytes, top_logprobs}`. Several tokens may share one
 * character; they become one piece, whose surprise is their sum. Where tokens do not spell the text, for example
 * behind a stop string, the rest stays without colour.
 */
export class TokenText {
  text = "";
  surprise = { nats: 0, tokens: 0 };
  #element;
  #tail = document.createTextNode("");
  #coloured = 0; // characters of the text that have their colour
  #pieces = []; // decoded tokens whose text has not come yet
  #open = []; // tokens in the middle of a character
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #tokens = new WeakMap(); // tokens of each element
  #lost = false;

  constructor(element) {
    this.#element = element;
    element.append(this.#tail);
  }

  /** Add text and the tokens that came with it. */
  append(text, tokens) {
    this.text += text;
    for (const token of tokens ?? []) this.#decode(token);
    if (this.#place()) this.#tail.data = this.text.slice(this.#coloured);
    else this.#tail.appendData(text);
  }

  /** No more will come: half a character is one that cannot be shown. */
  finish() {
    const rest = this.#decoder.decode();
    if (rest) this.#piece(rest);
    if (this.#place()) this.#tail.data = this.text.slice(this.#coloured);
  }

  #decode(token) {
    this.surprise.nats -= token.logprob;
    this.surprise.tokens += 1;
    const text = token.bytes ? this.#decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.token;
    if (token.bytes?.length === 0) return; // marks that have no text
    this.#open.push(token);
    if (text) this.#piece(text);
  }

  #piece(text) {
    this.#pieces.push({ text, tokens: this.#open });
    this.#open = [];
  }

  /** Give colour to the pieces whose text is here; whether there were any. */
  #place() {
    const before = this.#coloured;
    while (this.#pieces.length && !this.#lost) {
      const { text, tokens } = this.#pieces[0];
      if (this.text.length < this.#coloured + text.length) break;
      this.#lost = !this.text.startsWith(text, this.#coloured);
      if (this.#lost) break;
      this.#pieces.shift();
      this.#tail.before(this.#span(text, tokens));
      this.#coloured += text.length;
    }
    return this.#coloured > before;
  }

  #span(text, tokens) {
    if (!this.#coloured) this.#makeInspectable();
    const surprise = -tokens.reduce((sum, token) => sum + token.logprob, 0);
    const span = h("span", { class: "token", "data-surprise": surpriseBin(surprise) }, text);
    this.#tokens.set(span, { text, tokens });
    return span;
  }

  #makeInspectable() {
    const label = "Tokens of the answer; the arrow keys go through them";
    Object.assign(this.#element, { tabIndex: 0, role: "group", ariaLabel: label });
    const enabled = () => document.body.dataset.surprise === "on";
    inspectable(this.#element, (span) => tokenDetails(this.#tokens.get(span)), enabled);
  }
}

/** What there is to know about a piece: its probability and what else could have come. */
function tokenDetails({ text, tokens }) {
  const total = tokens.reduce((sum, token) => sum + token.logprob, 0);
  const view = h("div", {}, headline(text, total));
  if (tokens.length > 1) view.append(h("p", { class: "details-note" }, `${tokens.length} tokens make this character`));
  if (tokens.length === 1 && tokens[0].top_logprobs?.length) view.append(alternatives(tokens[0]));
  return { view, text: `${spoken(text)}: probability ${percent(total)}, ${nats(-total)} nats` };
}

function headline(text, logprob) {
  return h(
    "p",
    { class: "details-head" },
    h("code", {}, visible(text)),
    h("span", {}, percent(logprob)),
    h("span", { class: "faint" }, `${nats(-logprob)} nats`),
  );
}

function alternatives(token) {
  const likely = token.top_logprobs.toSorted((a, b) => b.logprob - a.logprob);
  const rows = likely.map((other) => {
    const chosen = other.token === token.token && other.logprob === token.logprob;
    return h(
      "tr",
      { class: chosen ? "chosen" : null },
      h("td", {}, h("code", {}, visible(other.token))),
      h("td", {}, bar(Math.exp(other.logprob))),
      h("td", {}, percent(other.logprob)),
    );
  });
  return h("table", { class: "alternatives" }, h("caption", {}, "Most likely here"), h("tbody", {}, ...rows));
}

function bar(share) {
  const filled = h("span", {});
  filled.style.width = `${(100 * share).toFixed(1)}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, filled);
}

// A scored text: its tokens at their places, coloured by surprise or by which of two models expected them more.

import { h } from "./dom.js";
import { inspectable } from "./inspect.js";
import {
  differenceBin,
  differenceLegend,
  nats,
  percent,
  spoken,
  surpriseBin,
  surpriseLegend,
  visible,
} from "./scale.js";

const MOST_PIECES = 50_000; // a browser stays quick with that many

export class ScoredText {
  #pieces = new Map(); // what each element shows
  #elements = []; // element of each token

  /**
   * @param {string} text what was scored.
   * @param {string[]} models the base first.
   * @param {object} result `tokens`, `offsets` and `scores` of POST /v1/perplexity.
   */
  constructor(text, models, result) {
    Object.assign(this, { models, result });
    this.body = h("div", { class: "text scored", tabindex: 0, role: "group" });
    this.body.ariaLabel = "Tokens of the text; the arrow keys go through them";
    this.legend = h("div", { class: "scored-legend" });
    this.note = h("p", { class: "note" });
    this.choice = h("select", { onchange: () => this.#colour() }, ...this.#modes());
    const label = h("label", { class: "inline" }, "Colour by", this.choice);
    this.view = h(
      "section",
      { class: "card" },
      h("div", { class: "card-head" }, h("h3", {}, "Token by token"), label),
      this.legend,
      this.body,
      this.note,
    );
    this.#fill(text);
    inspectable(this.body, (element) => this.#details(this.#pieces.get(element)));
    this.#colour();
  }

  /** Point at a token, or at none. */
  mark(index) {
    this.body.querySelector(".marked")?.classList.remove("marked");
    if (index !== null) this.#elements[index]?.classList.add("marked");
  }

  #modes() {
    const [base, ...students] = this.models;
    const better = students.map((student) => ({ label: `better model: ${base} or ${student}`, of: [base, student] }));
    const surprise = this.models.map((model) => ({ label: `surprise of ${model}`, of: [model] }));
    this.modes = [...better, ...surprise];
    return this.modes.map(({ label }, index) => h("option", { value: index }, label));
  }

  #fill(text) {
    const pieces = cut(text, this.result.offsets);
    for (const piece of pieces.slice(0, MOST_PIECES)) {
      const element = h("span", { class: "token" }, piece.text);
      this.#pieces.set(element, piece);
      for (const index of piece.indices) this.#elements[index] = element;
      this.body.append(element);
    }
    const hidden = pieces.length - MOST_PIECES;
    if (hidden > 0) this.body.append(h("p", { class: "note" }, `${hidden.toLocaleString("en")} more are not shown.`));
  }

  #colour() {
    const { of } = this.modes[Number(this.choice.value)];
    for (const [element, { indices }] of this.#pieces) {
      const surprises = of.map((model) => this.#surprise(model, indices));
      delete element.dataset.surprise;
      delete element.dataset.difference;
      if (of.length === 1) element.dataset.surprise = surpriseBin(surprises[0]);
      else element.dataset.difference = differenceBin(surprises[0] - surprises[1]);
    }
    this.legend.replaceChildren(of.length === 1 ? surpriseLegend() : differenceLegend(...of));
    this.note.textContent = of.length === 1 ? "" : this.#wins(of);
  }

  #wins([base, student]) {
    const [first, second] = [base, student].map((model) => this.result.scores[model].token_logprobs);
    const share = (100 * second.filter((logprob, i) => logprob > first[i]).length) / second.length;
    return `${student} expected ${share.toFixed(0)}% of the tokens more than ${base} did.`;
  }

  /** Nats of the tokens that make up a piece. */
  #surprise(model, indices) {
    const { token_logprobs: logprobs } = this.result.scores[model];
    return -indices.reduce((sum, index) => sum + logprobs[index], 0);
  }

  #details({ text, indices }) {
    const rows = this.models.map((model) => {
      const surprise = this.#surprise(model, indices);
      return { model, chance: percent(-surprise), nats: `${nats(surprise)} nats` };
    });
    const cells = (row) => h("tr", {}, ...Object.values(row).map((value) => h("td", {}, value)));
    const position = `token ${(indices[0] + 1).toLocaleString("en")}`;
    const head = h(
      "p",
      { class: "details-head" },
      h("code", {}, visible(text)),
      h("span", { class: "faint" }, position),
    );
    const heard = rows.map((row) => `${row.model} ${row.chance}, ${row.nats}`).join("; ");
    const table = h("table", { class: "alternatives" }, h("tbody", {}, ...rows.map(cells)));
    return { view: h("div", {}, head, table), text: `${spoken(text)}: ${heard}` };
  }
}

/**
 * The text in pieces at the tokens' offsets, which count characters (code points, not the browser's UTF-16 units).
 * Tokens that share one character make one piece.
 */
export function cut(text, offsets) {
  const characters = Array.from(text);
  const pieces = [];
  let shared = [];
  offsets.forEach((offset, index) => {
    const part = characters.slice(offset, offsets[index + 1]).join("");
    shared.push(index);
    if (part === "") return;
    pieces.push({ text: part, indices: shared });
    shared = [];
  });
  return pieces;
}

// The figures of a text under each model, and how each student compares with the base.

import { h } from "./dom.js";
import { figure } from "./scale.js";

const ROWS = [
  ["token_perplexity", "Perplexity per token"],
  ["word_perplexity", "Perplexity per word"],
  ["byte_perplexity", "Perplexity per byte"],
  ["bits_per_byte", "Bits per byte"],
  ["nats_per_token", "Nats per token"],
  ["tokens", "Tokens"],
  ["words", "Words"],
  ["bytes", "Bytes"],
];
const COUNTS = new Set(["tokens", "words", "bytes"]);

/** A table of all figures; the least of each is the best. With more than one model, ratios to the first. */
export function figuresTable(models, scores) {
  const [base, ...others] = models;
  const heads = [...models, ...others.map((model) => `${model} ÷ ${base}`)];
  const head = h("tr", {}, h("td", {}), ...heads.map((name) => h("th", { scope: "col" }, name)));
  const rows = ROWS.map(([key, label]) => row(key, label, models, scores));
  const caption = h("caption", {}, "Lower is better.");
  return h(
    "div",
    { class: "table-frame", tabindex: 0, role: "region", "aria-label": "Figures" },
    h("table", { class: "figures" }, caption, h("thead", {}, head), h("tbody", {}, ...rows)),
  );
}

function row(key, label, models, scores) {
  // The service says null where a perplexity is no finite number, as of a text that is one long word.
  const values = models.map((model) => scores[model][key] ?? Infinity);
  const best = COUNTS.has(key) || models.length < 2 ? NaN : Math.min(...values);
  const cells = values.map((value) => h("td", { class: value === best ? "best" : null }, figure(value)));
  const ratios = values.slice(1).map((value) => h("td", { class: "ratio" }, ratio(key, value, values[0])));
  return h("tr", {}, h("th", { scope: "row" }, label), ...cells, ...ratios);
}

function ratio(key, value, base) {
  if (COUNTS.has(key)) return "";
  return Number.isFinite(value / base) ? (value / base).toFixed(3) : "–";
}

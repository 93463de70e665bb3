// Figures and colour scales: bins of surprise and of its difference (in nats), their legends, and how numbers read.

import { h } from "./dom.js";

const SURPRISE_EDGES = [0.1, 0.5, 1, 2, 4, 8];
const DIFFERENCE_EDGES = [0.1, 0.5, 1, 2];

/** The colour of a surprise of that many nats: 0 (expected) to 6. */
export function surpriseBin(nats) {
  return SURPRISE_EDGES.filter((edge) => nats >= edge).length;
}

/** The colour of a difference in nats: -4 (the first model is better) to 4 (the second is). */
export function differenceBin(nats) {
  return Math.sign(nats) * DIFFERENCE_EDGES.filter((edge) => Math.abs(nats) >= edge).length;
}

/** What the surprise colours mean. */
export function surpriseLegend() {
  const edges = [0, ...SURPRISE_EDGES];
  const swatches = edges.map((edge, bin) => swatch("data-surprise", bin, bin ? `${edge}` : "0"));
  return legend("Surprise: the negative log-probability of a token", "nats", swatches);
}

/** What the difference colours mean. */
export function differenceLegend(first, second) {
  const levels = [-4, -3, -2, -1, 0, 1, 2, 3, 4];
  const label = (level) => (level === 0 ? "0" : `${DIFFERENCE_EDGES[Math.abs(level) - 1]}`);
  const swatches = levels.map((level) => swatch("data-difference", level, label(level)));
  return h(
    "div",
    { class: "legend-pair" },
    h("span", { class: "legend-end first" }, `${first} is better`),
    legend("Difference in nats for each token", "nats", swatches),
    h("span", { class: "legend-end second" }, `${second} is better`),
  );
}

function legend(label, unit, swatches) {
  return h(
    "div",
    { class: "legend", role: "img", "aria-label": `${label}, in ${unit}` },
    h("span", { class: "legend-unit" }, unit),
    ...swatches,
  );
}

function swatch(attribute, bin, label) {
  return h("span", { class: "swatch", [attribute]: bin }, label);
}

/** A probability in per cent, with as many digits as it is worth. */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share >= 99.95) return share >= 100 ? "100%" : "99.9+%";
  if (share >= 0.01) return `${share >= 10 ? share.toFixed(1) : share.toFixed(2)}%`;
  return share > 0 ? `${share.toExponential(1)}%` : "0%";
}

/** Nats with two digits; surer ones with the sign of a minus. */
export function nats(value) {
  return value.toFixed(2).replace("-", "−");
}

/** A figure with four significant digits, whole numbers whole. */
export function figure(value) {
  if (!Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−");
}

/** A token so that its spaces and line ends can be seen. */
export function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\r", "␍").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** The name of a token for people who listen. */
export function spoken(token) {
  return token.replaceAll("\n", " line end ").trim() || "space";
}

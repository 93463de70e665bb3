// The perplexity tab: a text, the models to read it, and what each of them makes of it.

import { ApiError, perplexity } from "./api.js";
import { LineChart } from "./chart.js";
import { announce, byId, h } from "./dom.js";
import { figuresTable } from "./figures.js";
import { problemView } from "./problem.js";
import { nats, visible } from "./scale.js";
import { ScoredText } from "./scored.js";

const LARGEST_FILE = 1_000_000; // bytes
const EXAMPLE = `To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them.`;

export class Perplexity {
  /**
   * @param {HTMLElement} panel where the tab is.
   * @param {string[]} choices model ids, the base first.
   * @param {function()} moved called when other models are chosen.
   */
  constructor(panel, choices, moved) {
    Object.assign(this, { panel, choices, moved });
    this.text = byId("perplexity-text");
    this.results = byId("results");
    this.button = byId("score");
    this.boxes = choices.map((model) => {
      const box = h("input", { type: "checkbox", value: model, checked: true, onchange: () => this.#chosen() });
      byId("perplexity-models").append(h("label", { title: model }, box, h("span", {}, model)));
      return box;
    });
    this.#listen();
    this.#refresh();
  }

  /** The chosen models; none stands for all of them in the address. */
  get models() {
    const chosen = this.#chosenModels();
    return chosen.length === this.choices.length ? [] : chosen;
  }

  /** Choose what the address names; returns the ids that there are not. */
  open(models) {
    const known = models.filter((model) => this.choices.includes(model));
    for (const box of this.boxes) box.checked = !known.length || known.includes(box.value);
    this.#refresh();
    return models.filter((model) => !known.includes(model));
  }

  chooseNext() {}

  focus() {
    this.text.focus();
  }

  /** Break off; whether there was something to. */
  stop() {
    const busy = Boolean(this.running);
    this.running?.abort();
    return busy;
  }

  #listen() {
    byId("perplexity-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.stop()) this.#score();
    });
    this.text.addEventListener("input", () => this.#refresh());
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.button.disabled) this.#score();
    });
    byId("example").addEventListener("click", () => this.#fill(EXAMPLE));
    byId("perplexity-file").addEventListener("change", (event) => {
      this.#read(event.target.files[0]);
      event.target.value = "";
    });
    this.#takeDrops(byId("drop"));
  }

  #takeDrops(zone) {
    const over = (event, on) => {
      event.preventDefault();
      zone.classList.toggle("over", on);
    };
    zone.addEventListener("dragover", (event) => over(event, true));
    zone.addEventListener("dragleave", (event) => over(event, false));
    zone.addEventListener("drop", (event) => {
      over(event, false);
      const { files } = event.dataTransfer;
      if (files.length) this.#read(files[0]);
      else this.#fill(event.dataTransfer.getData("text/plain"));
    });
  }

  async #read(file) {
    if (!file) return;
    try {
      if (file.size > LARGEST_FILE) throw new Error(`${file.name} is larger than ${LARGEST_FILE / 1e6} MB.`);
      const bytes = await file.arrayBuffer();
      this.#fill(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    } catch (error) {
      const message = error instanceof TypeError ? `${file.name} is not text in UTF-8.` : error.message;
      this.results.replaceChildren(problemView(new ApiError(message)));
    }
  }

  #fill(text) {
    this.text.value = text;
    this.#refresh();
    this.focus();
  }

  #chosenModels() {
    return this.boxes.filter((box) => box.checked).map((box) => box.value);
  }

  #chosen() {
    this.#refresh();
    this.moved();
  }

  #refresh() {
    const ready = this.text.value !== "" && this.#chosenModels().length > 0;
    this.button.disabled = !this.running && !ready;
    this.button.textContent = this.running ? "Stop" : "Score";
    byId("perplexity-count").textContent = `${Array.from(this.text.value).length.toLocaleString("en")} characters`;
  }

  async #score() {
    if (this.running) return;
    const [text, models] = [this.text.value, this.#chosenModels()];
    const running = (this.running = new AbortController());
    this.#refresh();
    this.results.replaceChildren(h("p", { class: "working" }, "Reading the text"));
    this.results.setAttribute("aria-busy", "true");
    try {
      this.results.replaceChildren(...resultViews(text, models, await perplexity(text, models, running.signal)));
      announce("The text is scored");
    } catch (error) {
      if (running.signal.aborted) this.results.replaceChildren(h("p", { class: "note" }, "Stopped."));
      else this.results.replaceChildren(problemView(error, () => this.#score()));
    } finally {
      this.running = null;
      this.results.setAttribute("aria-busy", "false");
      this.#refresh();
    }
  }
}

function resultViews(text, models, result) {
  const scored = new ScoredText(text, models, result);
  const figures = h("section", { class: "card" }, h("h3", {}, "Figures"), figuresTable(models, result.scores));
  const charts = h("section", { class: "card charts" }, ...chartsOf(models, result, (at) => scored.mark(at)));
  return [figures, charts, scored.view];
}

function chartsOf(models, { tokens, scores }, moved) {
  const means = models.map((model) => runningMean(scores[model].token_logprobs));
  const named = (i) => `${visible(tokens[i])} (token ${(i + 1).toLocaleString("en")})`;
  const axis = { xLabel: "tokens read", moved };
  const both = new LineChart({
    ...axis,
    title: "Running mean of the surprise",
    yLabel: "nats per token",
    series: models.map((name, style) => ({ name, style, values: means[style] })),
    read: (i) =>
      `${named(i)}: ${models.map((name, m) => `${name} ${nats(means[m][i])}`).join(", ")} nats per token so far`,
  });
  if (models.length < 2) return [both.view];
  const apart = means.slice(1).map((mean) => mean.map((value, i) => value - means[0][i]));
  const names = models.slice(1).map((model) => `${model} − ${models[0]}`);
  const difference = new LineChart({
    ...axis,
    title: `Difference: ${names.join(", ")} (below zero, the student is better)`,
    yLabel: "nats per token",
    zero: true,
    series: names.map((name, m) => ({ name, style: m + 1, values: apart[m] })),
    read: (i) =>
      `${named(i)}: ${names.map((name, m) => `${name} ${nats(apart[m][i])}`).join(", ")} nats per token so far`,
  });
  return [both.view, difference.view];
}

/** Mean of the negative log-probabilities up to each token. */
export function runningMean(logprobs) {
  let sum = 0;
  return Float64Array.from(logprobs, (logprob, i) => (sum -= logprob) / (i + 1));
}

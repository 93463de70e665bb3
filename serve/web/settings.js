// How to ask: temperature, length, system message, and whether tokens come with their probabilities.

import { byId } from "./dom.js";
import { surpriseLegend } from "./scale.js";

const ALTERNATIVES = 5; // tokens shown beside each one

export class Settings {
  constructor() {
    this.view = byId("settings");
    this.temperature = byId("temperature");
    this.length = byId("max-tokens");
    this.system = byId("system");
    this.surprise = byId("surprise");
    byId("surprise-legend").append(surpriseLegend());
    this.temperature.addEventListener("input", () => this.#refresh());
    this.surprise.addEventListener("change", () => this.#refresh());
    this.#refresh();
  }

  /** The fields of a request; `system` is the system message or "". */
  values() {
    const values = { temperature: Number(this.temperature.value), stream_options: { include_usage: true } };
    if (this.length.value !== "") values.max_tokens = this.length.valueAsNumber;
    if (this.surprise.checked) Object.assign(values, { logprobs: true, top_logprobs: ALTERNATIVES });
    return { ...values, system: this.system.value.trim() };
  }

  /** Show or hide the panel where there is no room for it beside the conversation. */
  toggle() {
    const open = this.view.classList.toggle("open");
    for (const button of document.querySelectorAll(".settings-toggle")) button.setAttribute("aria-expanded", `${open}`);
  }

  #refresh() {
    byId("temperature-value").textContent = Number(this.temperature.value).toFixed(1);
    document.body.dataset.surprise = this.surprise.checked ? "on" : "off";
    byId("surprise-legend").hidden = !this.surprise.checked;
  }
}

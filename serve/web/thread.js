// A conversation: prompts, and beside each the answer of every model that takes part, each with its own history.

import { Answer } from "./answer.js";
import { h } from "./dom.js";

export class Thread {
  #turns = []; // {prompt, view, row, answers: model -> Answer}

  /**
   * @param {string[]} models who answers, in the order of the columns.
   * @param {function(): object} settings how to ask (see Settings.values).
   * @param {function()} changed called when answers begin or end.
   */
  constructor(models, settings, changed) {
    this.models = models;
    this.view = h("div", { class: "thread", "data-columns": models.length });
    this.settings = settings;
    this.changed = changed;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  get busy() {
    return this.#answers().some((answer) => answer.busy);
  }

  /** Put a question to every model. */
  ask(prompt) {
    const row = h("div", { class: "answers" });
    const view = h("section", { class: "turn" }, h("div", { class: "prompt", "aria-label": "You" }, prompt), row);
    const turn = { prompt, view, row, answers: new Map() };
    this.#turns.push(turn);
    this.view.append(view);
    for (const model of this.models) this.#answer(turn, model);
  }

  /** Break off whatever is being answered. */
  stop() {
    for (const answer of this.#answers()) if (answer.busy) answer.stop();
  }

  /** Forget everything. */
  clear() {
    this.stop();
    this.#turns = [];
    this.view.replaceChildren();
    this.changed();
  }

  /** The conversation to read and to paste. */
  asText() {
    const said = ({ prompt, answers }) => [
      `You:\n${prompt}`,
      ...[...answers.values()].map((answer) => `${answer.model}:\n${answer.text}`),
    ];
    return this.#turns.flatMap(said).join("\n\n");
  }

  #answers() {
    return this.#turns.flatMap(({ answers }) => [...answers.values()]);
  }

  /** Ask one model, in place of what it answered to this prompt before. */
  async #answer(turn, model) {
    const previous = turn.answers.get(model);
    const answer = new Answer(model, () => this.#again(turn, model));
    if (previous) previous.view.replaceWith(answer.view);
    else turn.row.append(answer.view);
    turn.answers.set(model, answer);
    const { system, ...options } = this.settings();
    const running = answer.run({ model, messages: this.#messages(turn, model, system), ...options });
    this.changed();
    await running;
    this.changed();
  }

  /** Only the last prompt can be answered again: later ones rest on the answers before them. */
  #again(turn, model) {
    if (turn === this.#turns.at(-1) && !turn.answers.get(model).busy) this.#answer(turn, model);
  }

  /** What this model has seen: prompts that it answered, and the one to answer. */
  #messages(turn, model, system) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { prompt, answers } of this.#turns.slice(0, this.#turns.indexOf(turn))) {
      const answer = answers.get(model);
      if (!answer.counts) continue;
      messages.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
    }
    return [...messages, { role: "user", content: turn.prompt }];
  }
}

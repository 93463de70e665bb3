// The tabs that talk: a choice of model, the conversation with it, and the box to write in.

import { copyText, h } from "./dom.js";
import { Thread } from "./thread.js";

const NEAR_END = 8; // pixels from the end within which the view follows what streams in

export class Talk {
  #threads = new Map(); // one for each choice

  /**
   * @param {HTMLElement} panel where the tab is.
   * @param {object} kind `choices`: model ids to choose from; `models(choice)`: who answers; `legend`, `before` (text
   *   before the choices), `title` and `greeting`.
   * @param {Settings} settings how to ask.
   * @param {function()} moved called when another model is chosen.
   */
  constructor(panel, kind, settings, moved) {
    Object.assign(this, { panel, kind, settings, moved });
    this.choice = kind.choices[0];
    this.#build();
    this.choose(this.choice);
  }

  /** Model ids for the address. */
  get models() {
    return [this.choice];
  }

  /** Show what the address names; returns the ids that this tab does not have. */
  open([choice]) {
    if (choice === undefined) return [];
    if (!this.kind.choices.includes(choice)) return [choice];
    this.choose(choice);
    return [];
  }

  /** Talk to another model; each has its own conversation. */
  choose(choice) {
    this.choice = choice;
    for (const radio of this.choices.querySelectorAll("input")) radio.checked = radio.value === choice;
    this.log.replaceChildren(this.#thread.view);
    this.#refresh();
    this.panel.scrollTop = this.panel.scrollHeight;
  }

  /** The model after this one, for the keyboard. */
  chooseNext() {
    const { choices } = this.kind;
    this.choose(choices[(choices.indexOf(this.choice) + 1) % choices.length]);
    this.moved();
  }

  /** Write here. */
  focus() {
    this.input.focus();
  }

  /** Break off; whether there was something to. */
  stop() {
    const { busy } = this.#thread;
    this.#thread.stop();
    return busy;
  }

  get #thread() {
    if (!this.#threads.has(this.choice)) {
      const models = this.kind.models(this.choice);
      const thread = new Thread(
        models,
        () => this.settings.values(),
        () => this.#refresh(),
      );
      this.#threads.set(this.choice, thread);
    }
    return this.#threads.get(this.choice);
  }

  #build() {
    this.choices = modelChoice(this.panel.id, this.kind, (choice) => {
      this.choose(choice);
      this.moved();
    });
    this.copy = h("button", { type: "button", class: "quiet", onclick: () => copyText(this.#thread.asText()) }, "Copy");
    this.clear = h("button", { type: "button", class: "quiet", onclick: () => this.#clear() }, "Clear");
    const toggle = h(
      "button",
      { type: "button", class: "quiet settings-toggle", "aria-controls": "settings" },
      "Settings",
    );
    toggle.addEventListener("click", () => this.settings.toggle());
    const actions = h("div", { class: "actions" }, this.copy, this.clear, toggle);
    this.log = h("div", { class: "log", role: "log", "aria-live": "polite", "aria-label": "Conversation" });
    this.greeting = h("div", { class: "greeting" }, h("h2", {}, this.kind.title), h("p", {}, this.kind.greeting));
    const before = this.kind.before && h("span", { class: "faint" }, this.kind.before);
    const choice = h("div", { class: "choice" }, before, this.choices);
    const composer = h("div", { class: "composer-place" }, this.#composer());
    this.panel.append(h("div", { class: "toolbar" }, choice, actions), this.log, composer);
    new MutationObserver(() => this.#follow()).observe(this.log, {
      childList: true,
      characterData: true,
      subtree: true,
    });
    this.panel.addEventListener("scroll", () => (this.following = atEnd(this.panel)), { passive: true });
  }

  #composer() {
    const id = `${this.panel.id}-input`;
    this.input = h("textarea", { id, rows: 1, placeholder: "Write a message", enterkeyhint: "send" });
    this.input.addEventListener("input", () => this.#grow());
    this.input.addEventListener("keydown", (event) => this.#key(event));
    this.send = h("button", { class: "primary send" }, "Send");
    this.halt = h("button", { type: "button", class: "stop", onclick: () => this.stop() }, "Stop");
    const submit = (event) => {
      event.preventDefault();
      this.#submit();
    };
    const label = h("label", { for: id, class: "visually-hidden" }, "Message");
    return h("form", { class: "composer", onsubmit: submit }, label, this.input, this.send, this.halt);
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.#submit();
  }

  #submit() {
    const prompt = this.input.value.trim();
    if (!prompt || this.#thread.busy) return;
    this.input.value = "";
    this.#grow();
    Object.assign(this, { following: true, top: 0 });
    this.#thread.ask(prompt);
  }

  #clear() {
    this.#thread.clear();
    this.focus();
  }

  #grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight + 2}px`;
  }

  /** Keep the end in view, unless somebody went up to read, which the scroll event may not have told yet. */
  #follow() {
    const { scrollTop, scrollHeight } = this.panel;
    if (scrollTop < this.top - 1 && scrollHeight >= this.height) this.following = false;
    if (this.following) this.panel.scrollTop = scrollHeight;
    Object.assign(this, { top: this.panel.scrollTop, height: scrollHeight });
  }

  #refresh() {
    const { busy, empty } = this.#thread;
    const focused = document.activeElement === this.send || document.activeElement === this.halt;
    Object.assign(this.send, { hidden: busy });
    Object.assign(this.halt, { hidden: !busy });
    Object.assign(this.copy, { disabled: empty });
    Object.assign(this.clear, { disabled: empty });
    if (focused) (busy ? this.halt : this.input).focus(); // the button that had the focus is gone
    if (empty && this.log.firstChild !== this.greeting) this.log.prepend(this.greeting);
    if (!empty) this.greeting.remove();
  }
}

function atEnd(panel) {
  return panel.scrollHeight - panel.scrollTop - panel.clientHeight < NEAR_END;
}

/** One button for each model, of which one is chosen. */
function modelChoice(name, { legend, choices }, chosen) {
  const option = (model) => {
    const radio = h("input", { type: "radio", name: `${name}-model`, value: model, onchange: () => chosen(model) });
    return h("label", { title: model }, radio, h("span", {}, model));
  };
  const heard = h("legend", { class: "visually-hidden" }, legend);
  return h("fieldset", { class: "segmented" }, heard, ...choices.map(option));
}

// The page: asks the service for its models, then keeps tabs, address and keyboard together.

import { listModels } from "./api.js";
import { readAddress, writeAddress } from "./address.js";
import { byId, h } from "./dom.js";
import { installDialogs, installKeys } from "./keys.js";
import { Perplexity } from "./perplexity.js";
import { problemView } from "./problem.js";
import { Settings } from "./settings.js";
import { Talk } from "./talk.js";

const TABS = ["chat", "compare", "perplexity"];

class Page {
  constructor([base, ...students], settings) {
    const models = [base, ...students];
    const moved = () => this.#write();
    this.tabs = {
      chat: new Talk(byId("panel-chat"), chatOf(models), settings, moved),
      perplexity: new Perplexity(byId("panel-perplexity"), models, moved),
    };
    if (students.length)
      this.tabs.compare = new Talk(byId("panel-compare"), compareOf(base, students), settings, moved);
    else byId("tab-compare").disabled = true;
    for (const name of TABS) this.#listen(byId(`tab-${name}`), name);
    addEventListener("popstate", () => this.read());
    installKeys({
      stop: () => this.tab.stop(),
      nextModel: () => this.tab.chooseNext(),
      nextTab: () => this.#step(1),
      focus: () => this.tab.focus(),
    });
    this.read();
  }

  /** Show what the address names, and say what of it there is not. */
  read() {
    const { tab, models } = readAddress();
    this.#show(Object.hasOwn(this.tabs, tab) ? tab : "chat");
    const unknown = this.tab.open(models);
    const named = unknown.map((model) => `“${model}”`).join(", ");
    byId("notice").replaceChildren(
      ...(named ? [h("p", { class: "note" }, `This service has no model ${named}.`)] : []),
    );
    this.#write();
  }

  #show(name) {
    this.name = name;
    this.tab = this.tabs[name];
    for (const each of TABS) {
      const selected = each === name;
      byId(`panel-${each}`).hidden = !selected;
      const button = byId(`tab-${each}`);
      button.setAttribute("aria-selected", `${selected}`);
      button.tabIndex = selected ? 0 : -1;
    }
    document.body.dataset.tab = name;
  }

  #write() {
    writeAddress(this.name, this.tab.models);
  }

  #listen(button, name) {
    button.addEventListener("click", () => this.#go(name));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      this.#step(step);
      byId(`tab-${this.name}`).focus();
    });
  }

  #go(name) {
    this.#show(name);
    this.#write();
  }

  #step(by) {
    const names = TABS.filter((name) => Object.hasOwn(this.tabs, name));
    this.#go(names[(names.indexOf(this.name) + by + names.length) % names.length]);
  }
}

function chatOf(models) {
  return {
    legend: "Model",
    choices: models,
    models: (model) => [model],
    title: "Chat",
    greeting: "Ask the model something. Each model keeps its own conversation.",
  };
}

function compareOf(base, students) {
  return {
    legend: "Student beside the base",
    before: `${base} and`,
    choices: students,
    models: (student) => [base, student],
    title: "Side by side",
    greeting: "One question, two answers: the base's and the student's. Each goes on from what it said itself.",
  };
}

async function start() {
  const notice = byId("notice");
  notice.replaceChildren(h("p", { class: "working" }, "Asking the service for its models"));
  try {
    const models = await listModels();
    notice.replaceChildren();
    byId("workspace").hidden = false;
    new Page(models, new Settings());
  } catch (error) {
    notice.replaceChildren(problemView(error, start));
  }
}

installDialogs();
start();
